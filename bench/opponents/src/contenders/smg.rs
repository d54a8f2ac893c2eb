//! SMG: `kv-index` 2.0.0, `ShardedChainIndex`.
//!
//! * `chain`: `find_matches`, as SMG's gateway calls it.
//! * `chain-into`: the same index, asked through `score_into` into a reused vector: its fastest way to answer. The gateway does
//!   not call it.
//!
//! Events are applied on the publisher's thread with the worker's own `ChainBlockMap`, as in the gateway. A shard has 1,024 worker
//! slots at most; beyond that the crate's own way is a second shard.

use std::cell::RefCell;
use std::sync::atomic::{AtomicU64, Ordering};

use kv_index::{ChainBlockMap, ContentHash, SequenceHash, ShardedChainIndex, StoredBlock};
use kvlane_index::{BlockHash, KvEvent, Worker};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use crate::contender::{Answer, Contender, Event, Setup, Tally};

const SLOTS_PER_SHARD: usize = 1024;

thread_local! {
    static SCORES: RefCell<Vec<(u32, u32)>> = const { RefCell::new(Vec::new()) };
}

/// What one event asks of a stream.
pub enum Op {
    /// A chain and its parent.
    Store(Option<SequenceHash>, Vec<StoredBlock>),
    /// Blocks that left.
    Remove(Vec<SequenceHash>),
    /// Everything left.
    Clear,
}

/// One worker's publisher: its id in the index and the map that only it touches.
struct Stream {
    id: u32,
    map: Mutex<ChainBlockMap>,
}

/// The chain index.
pub struct Chain {
    index: ShardedChainIndex,
    /// Slots are given while events are converted, outside of what is timed.
    slots: RwLock<FxHashMap<Worker, usize>>,
    streams: RwLock<Vec<Option<Stream>>>,
    workers: RwLock<FxHashMap<u32, Worker>>,
    refused: AtomicU64,
}

impl Chain {
    fn slot(&self, worker: Worker) -> usize {
        if let Some(slot) = self.slots.read().get(&worker) {
            return *slot;
        }
        let id = self.index.intern_worker(&worker.to_string()).expect("slots for every worker");
        let mut streams = self.streams.write();
        streams.push(Some(Stream { id, map: Mutex::default() }));
        self.workers.write().insert(id, worker);
        self.slots.write().insert(worker, streams.len() - 1);
        streams.len() - 1
    }

    fn op(&self, (worker, event): &Event) -> (usize, Op) {
        let op = match event {
            KvEvent::Stored { parent, blocks, .. } => Op::Store(
                parent.map(|p| SequenceHash(p.0)),
                blocks
                    .iter()
                    .map(|b| StoredBlock {
                        seq_hash: SequenceHash(b.engine.0),
                        content_hash: ContentHash(b.block.0),
                    })
                    .collect(),
            ),
            KvEvent::Removed { hashes, .. } => Op::Remove(hashes.iter().map(|h| SequenceHash(h.0)).collect()),
            KvEvent::Cleared { .. } => Op::Clear,
            KvEvent::StoredByHash { .. } => unreachable!("no workload stores by name alone"),
        };
        (self.slot(*worker), op)
    }
}

impl Contender for Chain {
    const WAYS: &'static [&'static str] = &["chain", "chain-into"];
    type Batch = Vec<(usize, Op)>;
    type Prompt = Vec<ContentHash>;

    fn new(setup: Setup) -> Self {
        Self {
            index: ShardedChainIndex::new(setup.workers.div_ceil(SLOTS_PER_SHARD), SLOTS_PER_SHARD),
            slots: RwLock::default(),
            streams: RwLock::default(),
            workers: RwLock::default(),
            refused: AtomicU64::new(0),
        }
    }
    fn batch(&self, events: &[Event]) -> Self::Batch {
        events.iter().map(|event| self.op(event)).collect()
    }
    fn prompt(&self, blocks: &[BlockHash]) -> Self::Prompt {
        blocks.iter().map(|b| ContentHash(b.0)).collect()
    }
    fn apply(&self, batch: Self::Batch) {
        let streams = self.streams.read();
        for group in batch.chunk_by(|a, b| a.0 == b.0) {
            let Some(stream) = &streams[group[0].0] else { continue };
            let map = &mut *stream.map.lock();
            for (_, op) in group {
                match op {
                    Op::Store(parent, blocks) => {
                        if self.index.apply_stored(stream.id, blocks, *parent, map).is_err() {
                            self.refused.fetch_add(1, Ordering::Relaxed);
                        }
                    }
                    Op::Remove(hashes) => self.index.apply_removed(stream.id, hashes, map),
                    Op::Clear => self.index.apply_cleared(stream.id, map),
                }
            }
        }
    }
    fn settle(&self) {}
    fn ask(&self, way: usize, prompt: &Self::Prompt) -> Tally {
        if way == 0 {
            let found = self.index.find_matches(prompt, false);
            let blocks = found.scores.values().map(|&d| u64::from(d)).sum();
            return Tally { workers: found.scores.len(), blocks };
        }
        SCORES.with_borrow_mut(|scores| {
            scores.clear();
            self.index.score_into(prompt, |c| c.0, false, |worker, depth| scores.push((worker, depth)));
            Tally { workers: scores.len(), blocks: scores.iter().map(|s| u64::from(s.1)).sum() }
        })
    }
    fn answer(&self, prompt: &Self::Prompt) -> Answer {
        let workers = self.workers.read();
        let found = self.index.find_matches(prompt, false).scores.into_iter();
        found.filter(|(_, depth)| *depth > 0).map(|(id, depth)| (workers[&id], depth)).collect()
    }
    fn remove(&self, worker: Worker) {
        let slot = self.slots.read()[&worker];
        if let Some(stream) = self.streams.write()[slot].take() {
            self.index.remove_worker(stream.id, stream.map.into_inner());
        }
    }
}
