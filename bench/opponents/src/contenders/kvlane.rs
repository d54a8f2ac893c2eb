//! Ours: `kvlane-index` of this checkout.
//!
//! * `kvlane`: `Index::overlap` from block hashes.
//! * `kvlane-hashed`: `Index::overlap_hashed` of a prompt whose prefix hashes were made with its block hashes, as the gateway goes. What
//!   making them costs is in `hashing`.
//! * `kvlane-groups`, `kvlane-groups-hashed`: the same prompts, answered as sets of workers by depth (`Index::depth_groups`).

use std::cell::RefCell;
use std::hint::black_box;

use kvlane_index::hash::Namespace;
use kvlane_index::{
    BlockHash, BlockSize, DepthGroup, DepthGroups, HashedPrompt, Index, IndexConfig, IndexWriter, Overlaps,
    Worker,
};
use parking_lot::Mutex;

use crate::contender::{Answer, Contender, Event, Setup, Tally};

thread_local! {
    static OVERLAPS: RefCell<Overlaps> = RefCell::default();
    static GROUPS: RefCell<DepthGroups> = RefCell::default();
}

/// One partition. Its writer is unique: several publishers share it under a lock, taken once a batch.
pub struct Kvlane {
    writer: Mutex<IndexWriter>,
    index: Index,
}

impl Kvlane {
    /// From token ids to the answer, as the gateway goes.
    pub fn ask_tokens(&self, tokens: &[u32]) -> Tally {
        thread_local! {
            static HASHED: RefCell<HashedPrompt> = RefCell::default();
        }
        HASHED.with_borrow_mut(|hashed| {
            self.index.hash(tokens, &Namespace::default(), hashed);
            OVERLAPS.with_borrow_mut(|overlaps| {
                self.index.overlap_hashed(hashed, overlaps);
                tally(overlaps)
            })
        })
    }

    /// Block and prefix hashes of a prompt.
    pub fn hash(&self, tokens: &[u32]) -> usize {
        thread_local! {
            static HASHED: RefCell<HashedPrompt> = RefCell::default();
        }
        HASHED.with_borrow_mut(|hashed| {
            self.index.hash(tokens, &Namespace::default(), hashed);
            black_box(&*hashed).blocks().len()
        })
    }
}

fn tally(overlaps: &Overlaps) -> Tally {
    let blocks = overlaps.ranks.iter().map(|o| u64::from(o.device)).sum();
    Tally { workers: overlaps.ranks.len(), blocks }
}

impl Contender for Kvlane {
    const WAYS: &'static [&'static str] =
        &["kvlane", "kvlane-hashed", "kvlane-groups", "kvlane-groups-hashed"];
    type Batch = Vec<Event>;
    type Prompt = (Vec<BlockHash>, HashedPrompt);

    fn new(_: Setup) -> Self {
        let size = BlockSize::new(16).expect("not 0");
        let (writer, index) = kvlane_index::partition(IndexConfig::new(size));
        Self { writer: Mutex::new(writer), index }
    }
    fn batch(&self, events: &[Event]) -> Self::Batch {
        events.to_vec()
    }
    fn prompt(&self, blocks: &[BlockHash]) -> Self::Prompt {
        let mut hashed = HashedPrompt::default();
        self.index.hash_prompt(blocks, &mut hashed);
        (blocks.to_vec(), hashed)
    }
    fn apply(&self, batch: Self::Batch) {
        let mut writer = self.writer.lock();
        for (worker, event) in &batch {
            let _ = writer.apply(*worker, event);
        }
    }
    fn settle(&self) {}
    fn ask(&self, way: usize, (blocks, hashed): &Self::Prompt) -> Tally {
        if way > 1 {
            return GROUPS.with_borrow_mut(|groups| {
                match way {
                    2 => self.index.depth_groups(blocks, groups),
                    _ => self.index.depth_groups_hashed(hashed, groups),
                }
                let add = |sum: Tally, group: DepthGroup<'_>| Tally {
                    workers: sum.workers + group.len(),
                    blocks: sum.blocks + u64::from(group.depth) * group.len() as u64,
                };
                groups.iter().fold(Tally::default(), add)
            });
        }
        OVERLAPS.with_borrow_mut(|overlaps| {
            match way {
                0 => self.index.overlap(blocks, overlaps),
                _ => self.index.overlap_hashed(hashed, overlaps),
            }
            tally(overlaps)
        })
    }
    fn answer(&self, prompt: &Self::Prompt) -> Answer {
        let mut overlaps = Overlaps::default();
        self.index.overlap(&prompt.0, &mut overlaps);
        overlaps.ranks.iter().filter(|o| o.device > 0).map(|o| (o.worker, o.device)).collect()
    }
    fn remove(&self, worker: Worker) {
        let _ = self.writer.lock().remove_worker(worker);
    }
}
