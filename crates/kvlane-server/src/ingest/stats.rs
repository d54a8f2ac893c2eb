//! What ingest has counted for one rank.

use kvlane_events::rebuild::Regained;
use kvlane_events::wire::DropReason;
use kvlane_index::Applied;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Figures of one rank since this process began; they survive the engine's death and return.
#[derive(Clone, Debug, Default)]
pub struct RankStats {
    /// Whether the subscription is connected.
    pub connected: bool,
    /// Why it is not, after a failed try.
    pub connect_error: Option<String>,
    /// Times that the subscription was connected.
    pub connects: u64,
    /// How many times everything known was voided.
    pub epoch: u64,
    /// Live messages received.
    pub messages: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Messages of replays received.
    pub replay_messages: u64,
    /// Batches applied.
    pub batches: u64,
    /// Holes seen in the sequence.
    pub gaps: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Restarts of the engine noticed.
    pub restarts: u64,
    /// Events whose medium is unknown (kept as external).
    pub unknown_media: u64,
    /// Drops by reason, in the order of [`DropReason::ALL`].
    pub drops: [u64; DropReason::ALL.len()],
    /// Stored events applied.
    pub stored_events: u64,
    /// Removed events applied.
    pub removed_events: u64,
    /// Clears applied, those of fences (see `epoch`) not included.
    pub cleared_events: u64,
    /// What they did to the index, in blocks.
    pub applied: AppliedTotals,
    /// Blocks that a fence had made unknown and whose place was learnt otherwise.
    pub regained: Regained,
    /// Images that the stream went on from: this process's of an earlier life, or another's.
    pub images_adopted: u64,
    /// Images that were found and not of this life of the engine, or older than what it still has.
    pub images_dropped: u64,
    /// From the engine's publishing of the last applied batch to its being in the index, by both machines' clocks: seconds.
    pub lag_s: Option<f64>,
    /// Time that the last applied batch waited for the writer.
    pub queue_wait: Duration,
    /// When the last message was received.
    pub heard: Option<Instant>,
}

impl RankStats {
    /// Drops by reason, those that happened.
    pub fn drops(&self) -> impl Iterator<Item = (DropReason, u64)> {
        DropReason::ALL.into_iter().zip(self.drops).filter(|(_, n)| *n > 0)
    }
}

/// Sums of [`Applied`], which counts one event; each figure as there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct AppliedTotals {
    /// Newly held blocks.
    pub stored: u64,
    /// One more copy of a held block.
    pub copies: u64,
    /// Held with all countable copies already.
    pub duplicates: u64,
    /// Stored without a known place in a prompt.
    pub orphaned: u64,
    /// Orphans that found their place.
    pub linked: u64,
    /// Engine hashes that moved to another place.
    pub rebound: u64,
    /// Copies taken.
    pub removed: u64,
    /// Removals of what was not held.
    pub unknown: u64,
    /// Dropped by a clear or a removal of the worker.
    pub cleared: u64,
    /// Not taken in because of a bound.
    pub refused: u64,
    /// Shed to stay inside the memory budget.
    pub shed: u64,
}

impl AppliedTotals {
    pub(super) fn add(&mut self, applied: &Applied) {
        let Applied {
            stored,
            copies,
            duplicates,
            orphaned,
            linked,
            rebound,
            removed,
            unknown,
            cleared,
            refused,
            shed,
        } = *applied;
        self.stored += u64::from(stored);
        self.copies += u64::from(copies);
        self.duplicates += u64::from(duplicates);
        self.orphaned += u64::from(orphaned);
        self.linked += u64::from(linked);
        self.rebound += u64::from(rebound);
        self.removed += u64::from(removed);
        self.unknown += u64::from(unknown);
        self.cleared += u64::from(cleared);
        self.refused += u64::from(refused);
        self.shed += u64::from(shed);
    }

    /// Each figure with the label used in metrics.
    pub fn by_status(&self) -> [(&'static str, u64); 11] {
        let Self {
            stored,
            copies,
            duplicates,
            orphaned,
            linked,
            rebound,
            removed,
            unknown,
            cleared,
            refused,
            shed,
        } = *self;
        [
            ("stored", stored),
            ("copy", copies),
            ("duplicate", duplicates),
            ("orphaned", orphaned),
            ("linked", linked),
            ("rebound", rebound),
            ("removed", removed),
            ("unknown", unknown),
            ("cleared", cleared),
            ("refused", refused),
            ("shed", shed),
        ]
    }
}

/// The shared cell that the rank's tasks write and `/metrics` reads; locked once for each batch.
#[derive(Debug, Default)]
pub(crate) struct RankCounters(Mutex<RankStats>);

impl RankCounters {
    pub(crate) fn update(&self, change: impl FnOnce(&mut RankStats)) {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner));
    }

    pub(crate) fn look<R>(&self, at: impl FnOnce(&RankStats) -> R) -> R {
        at(&self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn read(&self) -> RankStats {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
