//! Ours: `kvlane-index` of this checkout, `Index::overlap` from block hashes.

use std::cell::RefCell;

use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_index::{BlockHash, BlockSize, Index, IndexConfig, IndexWriter, Overlaps, Worker};
use parking_lot::Mutex;

use crate::contender::{Answer, Contender, Event, Setup, Tally};

thread_local! {
    static OVERLAPS: RefCell<Overlaps> = RefCell::default();
}

/// One partition. Its writer is unique: several publishers share it under a lock, taken once a batch.
pub struct Kvlane {
    writer: Mutex<IndexWriter>,
    index: Index,
}

impl Kvlane {
    /// From token ids to the answer, as the gateway goes.
    pub fn ask_tokens(&self, tokens: &[u32], block_size: BlockSize) -> Tally {
        thread_local! {
            static HASHES: RefCell<Vec<BlockHash>> = const { RefCell::new(Vec::new()) };
        }
        HASHES.with_borrow_mut(|hashes| {
            hashes.clear();
            prompt_hashes(tokens, block_size, &Namespace::default(), hashes);
            self.ask(0, hashes)
        })
    }
}

impl Contender for Kvlane {
    const WAYS: &'static [&'static str] = &["kvlane"];
    type Batch = Vec<Event>;
    type Prompt = Vec<BlockHash>;

    fn new(_: Setup) -> Self {
        let size = BlockSize::new(16).expect("not 0");
        let (writer, index) = kvlane_index::partition(IndexConfig::new(size));
        Self { writer: Mutex::new(writer), index }
    }
    fn batch(&self, events: &[Event]) -> Self::Batch {
        events.to_vec()
    }
    fn prompt(&self, blocks: &[BlockHash]) -> Self::Prompt {
        blocks.to_vec()
    }
    fn apply(&self, batch: Self::Batch) {
        let mut writer = self.writer.lock();
        for (worker, event) in &batch {
            let _ = writer.apply(*worker, event);
        }
    }
    fn settle(&self) {}
    fn ask(&self, _: usize, prompt: &Self::Prompt) -> Tally {
        OVERLAPS.with_borrow_mut(|overlaps| {
            self.index.overlap(prompt, overlaps);
            let blocks = overlaps.ranks.iter().map(|o| u64::from(o.device)).sum();
            Tally { workers: overlaps.ranks.len(), blocks }
        })
    }
    fn answer(&self, prompt: &Self::Prompt) -> Answer {
        let mut overlaps = Overlaps::default();
        self.index.overlap(prompt, &mut overlaps);
        overlaps.ranks.iter().filter(|o| o.device > 0).map(|o| (o.worker, o.device)).collect()
    }
    fn remove(&self, worker: Worker) {
        let _ = self.writer.lock().remove_worker(worker);
    }
}
