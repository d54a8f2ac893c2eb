//! What the router knows of the caches: the engines' events, applied in order when they arrive.
//!
//! A trace's ids are dense and name whole prefixes, so holders of a block are one row of bits and an overlap is a run of ANDs. The
//! production index answers the same question for hashes that it has never seen; this one only has to be exact and fast, since a run asks it for
//! every worker at every request. Nothing compares the two yet.

use kvlane_index::{EngineHash, KvEvent};
use std::collections::{HashMap, VecDeque};

/// Copies of a block at a worker are counted up to here, as the production index does.
const MAX_COPIES: u8 = 3;

/// Leading blocks of a prompt at one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Held {
    /// Confirmed by events.
    pub device: u32,
    /// Confirmed or predicted; at least `device`.
    pub predicted: u32,
}

/// One bit for each worker.
type Word = u64;

/// Holders of every block, confirmed and predicted.
#[derive(Debug)]
pub struct Knowledge {
    workers: usize,
    words: usize,
    blocks: usize,
    device: Vec<Word>,
    /// Copies beyond the first, by (block, worker).
    more_copies: HashMap<(u32, u32), u8>,
    predicted: Vec<Word>,
    /// Predictions in order of their end; the latest one for a block counts.
    expiry: VecDeque<(u64, u32, Box<[u32]>)>,
    until_us: HashMap<(u32, u32), u64>,
    names: HashMap<EngineHash, u32>,
}

impl Knowledge {
    /// Nothing is known of `workers` caches for block ids below `blocks`.
    pub fn new(workers: usize, blocks: u32) -> Self {
        let words = workers.div_ceil(Word::BITS as usize);
        let size = words * blocks as usize;
        Self {
            workers,
            words,
            blocks: blocks as usize,
            device: vec![0; size],
            more_copies: HashMap::new(),
            predicted: vec![0; size],
            expiry: VecDeque::new(),
            until_us: HashMap::new(),
            names: HashMap::new(),
        }
    }

    fn place(&self, block: u32, worker: usize) -> (usize, Word) {
        (block as usize * self.words + worker / Word::BITS as usize, 1 << (worker % Word::BITS as usize))
    }

    /// Applies what an engine said. Blocks are known by their trace id; others (answers) are left out.
    pub fn apply(&mut self, worker: usize, event: &KvEvent) {
        match event {
            KvEvent::Stored { blocks, .. } => {
                for stored in blocks {
                    let Ok(id) = u32::try_from(stored.block.0) else { continue };
                    if id as usize >= self.blocks {
                        continue;
                    }
                    self.names.insert(stored.engine, id);
                    let (word, bit) = self.place(id, worker);
                    if self.device[word] & bit == 0 {
                        self.device[word] |= bit;
                    } else {
                        let more = self.more_copies.entry((id, worker as u32)).or_insert(0);
                        *more = (*more + 1).min(MAX_COPIES - 1);
                    }
                    if self.predicted[word] & bit != 0 {
                        self.predicted[word] &= !bit;
                        self.until_us.remove(&(id, worker as u32));
                    }
                }
            }
            KvEvent::Removed { hashes, .. } => {
                for hash in hashes {
                    let Some(id) = self.names.get(hash).copied() else { continue };
                    let key = (id, worker as u32);
                    match self.more_copies.get_mut(&key) {
                        Some(more) if *more > 1 => *more -= 1,
                        Some(_) => {
                            self.more_copies.remove(&key);
                        }
                        None => {
                            let (word, bit) = self.place(id, worker);
                            self.device[word] &= !bit;
                        }
                    }
                }
            }
            KvEvent::Cleared { .. } => self.clear(worker),
            KvEvent::StoredByHash { .. } => {}
        }
    }

    /// The worker holds nothing any more.
    pub fn clear(&mut self, worker: usize) {
        let (first, bit) = self.place(0, worker);
        for word in (first..self.device.len()).step_by(self.words) {
            self.device[word] &= !bit;
            self.predicted[word] &= !bit;
        }
        self.more_copies.retain(|key, _| key.1 != worker as u32);
        self.until_us.retain(|key, _| key.1 != worker as u32);
    }

    /// A request with these blocks was sent to `worker`: they will be there soon. Calls come in the order of `until_us`.
    pub fn predict(&mut self, worker: usize, blocks: &[u32], until_us: u64) {
        let mut new = Vec::new();
        for id in blocks {
            let (word, bit) = self.place(*id, worker);
            if self.device[word] & bit == 0 {
                self.predicted[word] |= bit;
                self.until_us.insert((*id, worker as u32), until_us);
                new.push(*id);
            }
        }
        if !new.is_empty() {
            self.expiry.push_back((until_us, worker as u32, new.into()));
        }
    }

    /// Drops predictions that nobody confirmed.
    pub fn expire(&mut self, now_us: u64) {
        while self.expiry.front().is_some_and(|e| e.0 <= now_us) {
            let Some((until, worker, blocks)) = self.expiry.pop_front() else { break };
            for id in &blocks {
                if self.until_us.get(&(*id, worker)) == Some(&until) {
                    self.until_us.remove(&(*id, worker));
                    let (word, bit) = self.place(*id, worker as usize);
                    self.predicted[word] &= !bit;
                }
            }
        }
    }

    /// What each worker holds of a prompt; `held` is overwritten.
    pub fn overlap(&self, blocks: &[u32], held: &mut Vec<Held>) {
        held.clear();
        held.resize(self.workers, Held::default());
        for word in 0..self.words {
            let (mut device, mut either) = (Word::MAX, Word::MAX);
            let first = word * Word::BITS as usize;
            let last = (first + Word::BITS as usize).min(self.workers);
            if last - first < Word::BITS as usize {
                either = (1 << (last - first)) - 1;
                device = either;
            }
            let mut depth = 0;
            for id in blocks {
                let at = *id as usize * self.words + word;
                let next_device = device & self.device[at];
                let next_either = either & (self.device[at] | self.predicted[at]);
                leave(device & !next_device, first, held, |h| h.device = depth);
                leave(either & !next_either, first, held, |h| h.predicted = depth);
                (device, either) = (next_device, next_either);
                if either == 0 {
                    break;
                }
                depth += 1;
            }
            leave(device, first, held, |h| h.device = depth);
            leave(either, first, held, |h| h.predicted = depth);
        }
    }
}

fn leave(mut bits: Word, first: usize, held: &mut [Held], mut set: impl FnMut(&mut Held)) {
    while bits != 0 {
        set(&mut held[first + bits.trailing_zeros() as usize]);
        bits &= bits - 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvlane_index::{BlockHash, Group, GroupId, StoredBlock, Tier};

    fn stored(ids: &[u64]) -> KvEvent {
        let blocks =
            ids.iter().map(|i| StoredBlock { engine: EngineHash(i + 100), block: BlockHash(*i) }).collect();
        KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent: None, blocks }
    }

    fn removed(id: u64) -> KvEvent {
        KvEvent::Removed { tier: Tier::Device, group: GroupId::default(), hashes: vec![EngineHash(id + 100)] }
    }

    #[test]
    fn runs_end_at_the_first_hole_and_copies_are_counted() {
        let mut k = Knowledge::new(70, 10);
        k.apply(3, &stored(&[0, 1, 2]));
        k.apply(69, &stored(&[0, 1]));
        k.apply(69, &stored(&[1]));
        k.apply(3, &removed(1));
        k.apply(69, &removed(1));
        let mut held = Vec::new();
        k.overlap(&[0, 1, 2], &mut held);
        assert_eq!((held[3].device, held[69].device, held[4].device), (1, 2, 0));
        k.apply(69, &removed(1));
        k.clear(3);
        k.overlap(&[0, 1, 2], &mut held);
        assert_eq!((held[3].device, held[69].device), (0, 1));
    }

    #[test]
    fn predictions_end_by_time_or_by_confirmation() {
        let mut k = Knowledge::new(2, 10);
        let mut held = Vec::new();
        k.apply(0, &stored(&[0]));
        k.predict(0, &[0, 1, 2], 50);
        k.predict(0, &[0, 1], 90);
        k.overlap(&[0, 1, 2, 3], &mut held);
        assert_eq!(held[0], Held { device: 1, predicted: 3 });
        k.expire(50);
        k.overlap(&[0, 1, 2, 3], &mut held);
        assert_eq!(held[0], Held { device: 1, predicted: 2 });
        k.apply(0, &stored(&[1]));
        k.expire(90);
        k.overlap(&[0, 1, 2, 3], &mut held);
        assert_eq!(held[0], Held { device: 2, predicted: 2 });
    }
}
