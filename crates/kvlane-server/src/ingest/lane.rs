//! The ordered way into one partition's index, and the thread at its end.
//!
//! Events of a worker and the news of its death come through the same lane, so a late event never revives what a death cleared.
//! The writer is a thread of its own, not a task: applying a large batch takes milliseconds, in which a task would hold up requests.

use super::learner::Learner;
use super::stats::RankCounters;
use super::weighed::{Closed, Sender, weighed};
use crate::clock;
use kvlane_events::rebuild::Regained;
use kvlane_events::stream::Position;
use kvlane_index::{Applied, Index, IndexConfig, IndexWriter, KvEvent, Worker};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;

/// Blocks (and events) that may wait for the writer.
const LANE_BLOCKS: u32 = 1 << 18;

/// What a rank held at one place of its stream, as events for an empty index.
pub(crate) type ImageReply = oneshot::Sender<(Position, Vec<KvEvent>)>;

/// What happened to one rank, in order.
#[derive(Debug)]
pub(crate) enum Change {
    /// The engine said so.
    Event(KvEvent),
    /// Nothing is known of it any more. `restarted`: its names may mean something else from now on.
    Fence { restarted: bool },
    /// All that it holds is known.
    Complete,
}

/// Something for the writer to do.
pub(crate) enum Work {
    /// Events of one worker, in order.
    Apply {
        worker: Worker,
        changes: Vec<Change>,
        counters: Arc<RankCounters>,
        /// When the engine published the last of them (Unix seconds), if it says.
        published_s: Option<f64>,
        /// When they were put into the lane.
        queued: Instant,
    },
    /// The worker is gone: forget it with its predictions.
    Remove(Worker),
    /// Answer with what the worker holds once all work before this is done.
    Image { worker: Worker, position: Position, reply: ImageReply },
    /// Answer when all work before this is done.
    Barrier(oneshot::Sender<()>),
}

/// Sends work to a partition's writer. Cheap to clone; the writer ends with the last of them.
#[derive(Clone)]
pub(crate) struct Lane {
    sender: Sender<Work>,
    pub(crate) learner: Learner,
}

impl std::fmt::Debug for Lane {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Lane({} of {LANE_BLOCKS} blocks)", self.sender.used())
    }
}

impl Lane {
    /// Makes an empty partition with its writer thread.
    pub(crate) fn open(config: IndexConfig) -> (Self, Index) {
        let (mut writer, index) = kvlane_index::partition(config);
        let (sender, mut receiver) = weighed(LANE_BLOCKS);
        let (for_predictions, learner) = (index.clone(), Learner::new());
        let by_writer = learner.clone();
        std::thread::Builder::new()
            .name("kvlane-index".to_owned())
            .spawn(move || {
                while let Some(work) = receiver.blocking_recv() {
                    carry_out(&mut writer, &for_predictions, &by_writer, work);
                }
            })
            .expect("a thread for each partition: the system has none left");
        (Self { sender, learner }, index)
    }

    /// Queues work, waiting while the lane is full.
    pub(crate) async fn send(&self, work: Work) -> Result<(), Closed> {
        let weight = match &work {
            Work::Apply { changes, .. } => changes.iter().map(weight).sum(),
            Work::Remove(_) | Work::Image { .. } | Work::Barrier(_) => 1,
        };
        self.sender.send(work, weight).await
    }

    /// Blocks and events that wait for the writer now.
    pub(crate) fn waiting(&self) -> u64 {
        self.sender.used()
    }

    /// Waits until everything queued so far is applied.
    pub(crate) async fn flush(&self) {
        let (done, wait) = oneshot::channel();
        if self.send(Work::Barrier(done)).await.is_ok() {
            let _ = wait.await;
        }
    }
}

fn weight(change: &Change) -> usize {
    1 + match change {
        Change::Event(KvEvent::Stored { blocks, .. }) => blocks.len(),
        Change::Event(KvEvent::StoredByHash { hashes, .. } | KvEvent::Removed { hashes, .. }) => hashes.len(),
        Change::Event(KvEvent::Cleared { .. }) | Change::Fence { .. } | Change::Complete => 0,
    }
}

fn carry_out(writer: &mut IndexWriter, index: &Index, learner: &Learner, work: Work) {
    match work {
        Work::Apply { worker, changes, counters, published_s, queued } => {
            let mut kinds = [0u64; 3];
            for change in &changes {
                match change {
                    Change::Event(KvEvent::Stored { .. } | KvEvent::StoredByHash { .. }) => kinds[0] += 1,
                    Change::Event(KvEvent::Removed { .. }) => kinds[1] += 1,
                    Change::Event(KvEvent::Cleared { .. }) => kinds[2] += 1,
                    Change::Fence { .. } | Change::Complete => {}
                }
            }
            let mut events = Vec::with_capacity(changes.len());
            let regained = learner.with(|rebuild| {
                let mut regained = Regained::default();
                for change in changes {
                    match change {
                        Change::Event(event) => regained += rebuild.event(worker, event, &mut events),
                        Change::Fence { restarted } => {
                            rebuild.fence(worker, restarted);
                            events.push(KvEvent::Cleared { tier: None });
                        }
                        Change::Complete => rebuild.complete(worker),
                    }
                }
                regained
            });
            let mut sum = Applied::default();
            for event in &events {
                sum += writer.apply(worker, event);
                if matches!(event, KvEvent::Cleared { tier: None }) {
                    index.forget_predictions(worker);
                }
            }
            counters.update(|stats| {
                stats.stored_events += kinds[0];
                stats.removed_events += kinds[1];
                stats.cleared_events += kinds[2];
                stats.applied.add(&sum);
                stats.regained += regained;
                stats.queue_wait = queued.elapsed();
                if let Some(published_s) = published_s {
                    stats.lag_s = Some((clock::unix_s() - published_s).max(0.0));
                }
            });
        }
        Work::Remove(worker) => {
            learner.with(|rebuild| rebuild.forget(worker));
            let _ = writer.remove_worker(worker);
            index.forget_predictions(worker);
        }
        Work::Image { worker, position, reply } => {
            if !reply.is_closed() {
                let _ = reply.send((position, index.dump(worker)));
            }
        }
        Work::Barrier(done) => {
            let _ = done.send(());
        }
    }
}
