//! NVIDIA Dynamo: `dynamo-kv-router` 1.6.1.
//!
//! * `dynamo`: the default, `ThreadPoolIndexer` over `ConcurrentRadixTreeCompressed`, asked through `find_matches` as
//!   Dynamo's router does. This is the *reference*.
//! * `dynamo-inner`: the same index, asked by slice behind the public call: its fastest way to answer.
//! * `dynamo-radix`: the single-threaded `RadixTree`, called directly: its fastest way to take events. Its users reach
//!   it only through an actor's channels.

use std::future::Future;
use std::task::{Context, Poll, Waker};

use dynamo_kv_router::indexer::{KvIndexerInterface, SyncIndexer};
use dynamo_kv_router::protocols::{
    ExternalSequenceBlockHash, KvCacheEvent, KvCacheEventData, KvCacheRemoveData, KvCacheStoreData,
    KvCacheStoredBlockData, LocalBlockHash, OverlapScores, RouterEvent,
};
use dynamo_kv_router::{ConcurrentRadixTreeCompressed, RadixTree, ThreadPoolIndexer};
use kvlane_index::{BlockHash, KvEvent, Worker};
use parking_lot::Mutex;

use crate::contender::{Answer, Contender, Event, Setup, Tally};

thread_local! {
    static RUNTIME: tokio::runtime::Runtime =
        tokio::runtime::Builder::new_current_thread().build().expect("a runtime without drivers");
}

/// Polls once (the in-process lookups never suspend), else waits on a runtime.
fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = std::pin::pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(output) => output,
        Poll::Pending => RUNTIME.with(|runtime| runtime.block_on(future)),
    }
}

fn convert(id: usize, (worker, event): &Event) -> RouterEvent {
    let data = match event {
        KvEvent::Stored { parent, blocks, .. } => KvCacheEventData::Stored(KvCacheStoreData {
            parent_hash: parent.map(|p| ExternalSequenceBlockHash(p.0)),
            start_position: None,
            blocks: blocks
                .iter()
                .map(|b| KvCacheStoredBlockData {
                    block_hash: ExternalSequenceBlockHash(b.engine.0),
                    tokens_hash: LocalBlockHash(b.block.0),
                    mm_extra_info: None,
                })
                .collect(),
        }),
        KvEvent::Removed { hashes, .. } => KvCacheEventData::Removed(KvCacheRemoveData {
            block_hashes: hashes.iter().map(|h| ExternalSequenceBlockHash(h.0)).collect(),
        }),
        KvEvent::Cleared { .. } => KvCacheEventData::Cleared,
        KvEvent::StoredByHash { .. } => unreachable!("no workload stores by name alone"),
    };
    RouterEvent::new(worker.instance.0, KvCacheEvent { event_id: id as u64, dp_rank: worker.rank, data })
}

fn batch(events: &[Event]) -> Vec<RouterEvent> {
    events.iter().enumerate().map(|(id, event)| convert(id, event)).collect()
}

fn prompt(blocks: &[BlockHash]) -> Vec<LocalBlockHash> {
    blocks.iter().map(|b| LocalBlockHash(b.0)).collect()
}

fn tally(scores: &OverlapScores) -> Tally {
    Tally { workers: scores.scores.len(), blocks: scores.scores.values().map(|&d| u64::from(d)).sum() }
}

fn answer(scores: OverlapScores) -> Answer {
    let listed = scores.scores.into_iter().filter(|(_, depth)| *depth > 0);
    listed.map(|(w, depth)| (Worker::new(w.worker_id, w.dp_rank), depth)).collect()
}

/// The concurrent compressed tree behind its thread pool.
pub struct Pooled(ThreadPoolIndexer<ConcurrentRadixTreeCompressed>);

impl Pooled {
    /// What its router does with hashes that it made for one request: it gives them away.
    pub fn ask_owned(&self, hashes: Vec<LocalBlockHash>) -> Tally {
        tally(&block_on(self.0.find_matches(hashes)).expect("the pool is alive"))
    }
}

impl Contender for Pooled {
    const WAYS: &'static [&'static str] = &["dynamo", "dynamo-inner"];
    type Batch = Vec<RouterEvent>;
    type Prompt = Vec<LocalBlockHash>;

    fn new(setup: Setup) -> Self {
        Self(ThreadPoolIndexer::new(ConcurrentRadixTreeCompressed::new(), setup.event_threads, 16))
    }
    fn batch(&self, events: &[Event]) -> Self::Batch {
        batch(events)
    }
    fn prompt(&self, blocks: &[BlockHash]) -> Self::Prompt {
        prompt(blocks)
    }
    fn apply(&self, batch: Self::Batch) {
        for event in batch {
            let _ = self.0.enqueue_event(event);
        }
    }
    fn settle(&self) {
        RUNTIME.with(|runtime| runtime.block_on(self.0.flush_and_wait())).expect("the pool is alive");
    }
    fn ask(&self, way: usize, prompt: &Self::Prompt) -> Tally {
        if way == 1 {
            tally(&self.0.backend().find_matches(prompt, false))
        } else {
            // The public call takes the prompt by value; its router builds one for each request, too.
            self.ask_owned(prompt.clone())
        }
    }
    fn answer(&self, prompt: &Self::Prompt) -> Answer {
        answer(self.0.backend().find_matches(prompt, false))
    }
    fn remove(&self, worker: Worker) {
        RUNTIME.with(|runtime| {
            runtime.block_on(async {
                KvIndexerInterface::remove_worker(&self.0, worker.instance.0).await;
                self.0.flush_and_wait().await.expect("the pool is alive");
            });
        });
    }
}

/// The single-threaded tree behind an uncontended lock.
pub struct Radix(Mutex<Tree>);

struct Tree(RadixTree);

// SAFETY: the tree's reference counts never leave it: it is moved and touched only as a whole, under the lock.
unsafe impl Send for Tree {}

impl Contender for Radix {
    const WAYS: &'static [&'static str] = &["dynamo-radix"];
    type Batch = Vec<RouterEvent>;
    type Prompt = Vec<LocalBlockHash>;

    fn new(_: Setup) -> Self {
        Self(Mutex::new(Tree(RadixTree::new())))
    }
    fn batch(&self, events: &[Event]) -> Self::Batch {
        batch(events)
    }
    fn prompt(&self, blocks: &[BlockHash]) -> Self::Prompt {
        prompt(blocks)
    }
    fn apply(&self, batch: Self::Batch) {
        let tree = &mut self.0.lock().0;
        for event in batch {
            let _ = tree.apply_event(event);
        }
    }
    fn settle(&self) {}
    fn ask(&self, _: usize, prompt: &Self::Prompt) -> Tally {
        tally(&self.0.lock().0.find_matches(prompt.clone(), false))
    }
    fn answer(&self, prompt: &Self::Prompt) -> Answer {
        answer(self.0.lock().0.find_matches(prompt.clone(), false))
    }
    fn remove(&self, worker: Worker) {
        self.0.lock().0.remove_worker(worker.instance.0);
    }
}
