//! One partition of the index: a writer that applies events and handles that answer.
//!
//! # Consistency
//!
//! An answer reflects every event whose `apply` returned before the call began, and perhaps events applied while it ran.

use std::sync::{Arc, RwLock, RwLockReadGuard, RwLockWriteGuard};

use crate::reference::Oracle;
use crate::{Applied, BlockHash, Held, IndexConfig, IndexStats, InstanceId, KvEvent, Overlaps, Worker};

/// Makes the writer and the first reader of an empty partition: one model family and one block size.
///
/// ```
/// use kvlane_index::{BlockHash, BlockSize, EngineHash, Group, IndexConfig, KvEvent, Overlaps, StoredBlock, Tier, Worker};
///
/// let size = BlockSize::new(16).expect("16 is not 0");
/// let (mut writer, index) = kvlane_index::partition(IndexConfig::new(size));
/// let worker = Worker::new(7, 0);
/// let blocks = vec![StoredBlock { engine: EngineHash(100), block: BlockHash(1) }];
/// let applied = writer.apply(
///     worker,
///     &KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent: None, blocks },
/// );
/// assert_eq!(applied.stored, 1);
///
/// let mut overlaps = Overlaps::default();
/// index.overlap(&[BlockHash(1), BlockHash(2)], &mut overlaps);
/// assert_eq!(overlaps.get(worker).expect("it holds the first block").device, 1);
/// ```
pub fn partition(config: IndexConfig) -> (IndexWriter, Index) {
    let shared = Arc::new(RwLock::new(Oracle::new(&config)));
    (IndexWriter { shared: Arc::clone(&shared) }, Index { shared })
}

/// Applies the events of a partition, each worker's in the order of its publisher.
#[derive(Debug)]
pub struct IndexWriter {
    shared: Arc<RwLock<Oracle>>,
}

/// Answers questions about a partition; cheap to clone and to share.
#[derive(Clone, Debug)]
pub struct Index {
    shared: Arc<RwLock<Oracle>>,
}

impl IndexWriter {
    /// Applies one event of `worker`; never fails: what it could not do, it counts.
    pub fn apply(&mut self, worker: Worker, event: &KvEvent) -> Applied {
        self.write().apply(worker, event)
    }

    /// Forgets everything about one rank.
    pub fn remove_worker(&mut self, worker: Worker) -> Applied {
        self.write().remove_worker(worker)
    }

    /// Forgets everything about all ranks of one instance.
    pub fn remove_instance(&mut self, instance: InstanceId) -> Applied {
        self.write().remove_instance(instance)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Oracle> {
        self.shared.write().expect("no apply panics")
    }
}

impl Index {
    /// Who holds the beginning of `prompt`, into `out` (which is emptied first).
    pub fn overlap(&self, prompt: &[BlockHash], out: &mut Overlaps) {
        *out = self.read().overlap(prompt);
    }

    /// Notes that `worker` will soon hold these blocks, which begin at the root of a prompt.
    ///
    /// Visible to the next `overlap` of every handle. A prefix predicted twice keeps the later deadline.
    pub fn predict(&self, worker: Worker, blocks: &[BlockHash], until_ms: u64) {
        self.write().predict(worker, blocks, until_ms);
    }

    /// Drops the predictions with `until_ms <= now_ms`.
    pub fn expire(&self, now_ms: u64) {
        self.write().expire(now_ms);
    }

    /// Drops the predictions of one rank.
    pub fn forget_predictions(&self, worker: Worker) {
        self.write().forget_predictions(worker);
    }

    /// What each rank holds, sorted by worker, tier and group; a group that was shown is listed even if it is empty.
    pub fn workers(&self) -> Vec<Held> {
        self.read().workers()
    }

    /// Figures of the partition.
    pub fn stats(&self) -> IndexStats {
        self.read().stats()
    }

    /// The events that give an empty index what `worker` holds.
    ///
    /// Chains come before what follows them. Predictions are not part of it, and neither are orphans.
    pub fn dump(&self, worker: Worker) -> Vec<KvEvent> {
        self.read().dump(worker)
    }

    fn read(&self) -> RwLockReadGuard<'_, Oracle> {
        self.shared.read().expect("no apply panics")
    }

    fn write(&self) -> RwLockWriteGuard<'_, Oracle> {
        self.shared.write().expect("no apply panics")
    }
}
