//! The ordered way into one partition's index, and the thread at its end.
//!
//! Events of a worker and the news of its death come through the same lane, so a late event never revives what a death cleared.
//! The writer is a thread of its own, not a task: applying a large batch takes milliseconds, in which a task would hold up requests.

use super::stats::RankCounters;
use super::weighed::{Closed, Sender, weighed};
use crate::clock;
use kvlane_index::{Applied, Index, IndexConfig, IndexWriter, KvEvent, Worker};
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::oneshot;

/// Blocks (and events) that may wait for the writer.
const LANE_BLOCKS: u32 = 1 << 18;

/// Something for the writer to do.
pub(crate) enum Work {
    /// Events of one worker, in order.
    Apply {
        worker: Worker,
        events: Vec<KvEvent>,
        counters: Arc<RankCounters>,
        /// When the engine published the last of them (Unix seconds), if it says.
        published_s: Option<f64>,
        /// When they were put into the lane.
        queued: Instant,
    },
    /// The worker is gone: forget it with its predictions.
    Remove(Worker),
    /// Answer when all work before this is done.
    Barrier(oneshot::Sender<()>),
}

/// Sends work to a partition's writer. Cheap to clone; the writer ends with the last of them.
#[derive(Clone)]
pub(crate) struct Lane {
    sender: Sender<Work>,
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
        let for_predictions = index.clone();
        std::thread::Builder::new()
            .name("kvlane-index".to_owned())
            .spawn(move || {
                while let Some(work) = receiver.blocking_recv() {
                    carry_out(&mut writer, &for_predictions, work);
                }
            })
            .expect("a thread for each partition: the system has none left");
        (Self { sender }, index)
    }

    /// Queues work, waiting while the lane is full.
    pub(crate) async fn send(&self, work: Work) -> Result<(), Closed> {
        let weight = match &work {
            Work::Apply { events, .. } => events.iter().map(weight).sum(),
            Work::Remove(_) | Work::Barrier(_) => 1,
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

fn weight(event: &KvEvent) -> usize {
    1 + match event {
        KvEvent::Stored { blocks, .. } => blocks.len(),
        KvEvent::StoredByHash { hashes, .. } | KvEvent::Removed { hashes, .. } => hashes.len(),
        KvEvent::Cleared { .. } => 0,
    }
}

fn carry_out(writer: &mut IndexWriter, index: &Index, work: Work) {
    match work {
        Work::Apply { worker, events, counters, published_s, queued } => {
            let mut sum = Applied::default();
            let mut kinds = [0u64; 3];
            for event in &events {
                sum += writer.apply(worker, event);
                kinds[match event {
                    KvEvent::Stored { .. } | KvEvent::StoredByHash { .. } => 0,
                    KvEvent::Removed { .. } => 1,
                    KvEvent::Cleared { .. } => 2,
                }] += 1;
                if matches!(event, KvEvent::Cleared { tier: None }) {
                    index.forget_predictions(worker);
                }
            }
            counters.update(|stats| {
                stats.stored_events += kinds[0];
                stats.removed_events += kinds[1];
                stats.cleared_events += kinds[2];
                stats.applied.add(&sum);
                stats.queue_wait = queued.elapsed();
                if let Some(published_s) = published_s {
                    stats.lag_s = Some((clock::unix_s() - published_s).max(0.0));
                }
            });
        }
        Work::Remove(worker) => {
            let _ = writer.remove_worker(worker);
            index.forget_predictions(worker);
        }
        Work::Barrier(done) => {
            let _ = done.send(());
        }
    }
}
