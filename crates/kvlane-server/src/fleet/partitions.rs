//! Which workers share an index: those of one base model with one block size.

use super::Partition;
use crate::ingest::Lane;
use kvlane_index::{BlockSize, IndexConfig};
use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// All partitions that somebody uses; one that nobody uses any more ends with its writer thread.
#[derive(Debug, Default)]
pub(super) struct Partitions(Mutex<HashMap<(String, BlockSize), Weak<Partition>>>);

impl Partitions {
    /// The partition of this model and block size, made if need be.
    pub(super) fn get(&self, model: &str, block_size: BlockSize) -> Arc<Partition> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, partition| partition.strong_count() > 0);
        let key = (model.to_owned(), block_size);
        if let Some(partition) = known.get(&key).and_then(Weak::upgrade) {
            return partition;
        }
        let mut config = IndexConfig::new(block_size);
        config.prefix_key = RandomState::new().hash_one(0);
        let (lane, index) = Lane::open(config);
        let partition = Arc::new(Partition { model: model.to_owned(), block_size, index, lane });
        known.insert(key, Arc::downgrade(&partition));
        partition
    }
}
