//! Fingerprints of the batches that were applied last.
//!
//! Two lives of an engine use the same sequence numbers, so a number alone cannot tell an old batch seen twice from a
//! new one of a restarted engine. The payload can: it carries the time of publishing.

use std::collections::VecDeque;
use xxhash_rust::xxh3::xxh3_64;

/// How many fingerprints are kept: 32 KiB for each stream.
const KEPT: usize = 4096;

/// What two lives of an engine cannot have in common.
pub(super) fn fingerprint(payload: &[u8]) -> u64 {
    xxh3_64(payload)
}

/// What is known about a batch that is not the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Seen {
    /// Applied before, the same bytes.
    Same,
    /// Another batch was applied under this number.
    Other,
    /// Too old to say.
    Forgotten,
}

/// Fingerprints of contiguous batches, the oldest first.
#[derive(Clone, Debug, Default)]
pub(super) struct Recent {
    /// The number after the newest.
    next: u64,
    prints: VecDeque<u64>,
}

impl Recent {
    /// Notes an applied batch; a number that does not follow the newest starts afresh.
    pub(super) fn push(&mut self, seq: u64, payload: &[u8]) {
        if seq != self.next {
            self.prints.clear();
        }
        if self.prints.len() == KEPT {
            self.prints.pop_front();
        }
        self.prints.push_back(fingerprint(payload));
        self.next = seq.wrapping_add(1);
    }

    /// How many fingerprints there are.
    pub(super) fn len(&self) -> usize {
        self.prints.len()
    }

    /// The newest fingerprints, at most `count`, the newest last.
    pub(super) fn newest(&self, count: usize) -> Vec<u64> {
        self.prints.range(self.prints.len().saturating_sub(count)..).copied().collect()
    }

    /// Starts afresh with the fingerprints of the batches before `next`.
    pub(super) fn restart(&mut self, next: u64, prints: &[u64]) {
        self.prints.clear();
        self.prints.extend(&prints[prints.len().saturating_sub(KEPT)..]);
        self.next = next;
    }

    pub(super) fn clear(&mut self) {
        self.prints.clear();
    }

    pub(super) fn look(&self, seq: u64, payload: &[u8]) -> Seen {
        self.look_print(seq, fingerprint(payload))
    }

    /// The same by the fingerprint.
    pub(super) fn look_print(&self, seq: u64, print: u64) -> Seen {
        // How far before `next`: 1 = the newest.
        let back = self.next.wrapping_sub(seq);
        match usize::try_from(back).ok().filter(|back| (1..=self.prints.len()).contains(back)) {
            Some(back) if self.prints[self.prints.len() - back] == print => Seen::Same,
            Some(_) => Seen::Other,
            None => Seen::Forgotten,
        }
    }
}
