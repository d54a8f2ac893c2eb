//! What is registered: partitions, their instances, and who listens to each.

use super::listener::Listener;
use super::partition::{Key, Partition};
use super::{Knowledge, Registration};
use crate::clock;
use crate::config::Peers;
use crate::ingest::Work;
use crate::state::{Image, Ranks, Sources};
use kvlane_index::hash::Scheme;
use kvlane_index::{BlockSize, Worker};
use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;
use tokio::sync::mpsc;

/// Most partitions: each has a thread.
const PARTITIONS_MAX: usize = 1_024;
/// Most listeners over all partitions.
const LISTENERS_MAX: usize = 65_536;
/// Longest name of a model or routing group, in bytes.
pub(crate) const NAME_BYTES_MAX: usize = 1_024;
/// Nobody takes work out of a lane any more once its process ends: waiting for it has an end.
const LANE_WAIT: Duration = Duration::from_secs(5);

/// Why something was not registered or not found; the text is for the client.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub(crate) enum RegistryError {
    #[error("instance {0} is already registered for model={model} routing_group={group}", model = .1.model, group = .1.group)]
    Elsewhere(u64, Key),
    #[error("instance {0} dp_rank {1} already registered")]
    Twice(u64, u32),
    #[error(
        "block_size mismatch for model={model} routing_group={group}: existing={existing}, requested={requested}",
        model = .key.model,
        group = .key.group
    )]
    BlockSize { key: Key, existing: u32, requested: u32 },
    #[error(
        "this indexer is told routing decisions and hears no engines: register at one that was started without --decisions"
    )]
    Approximate,
    #[error("this indexer has {PARTITIONS_MAX} partitions already: unregister some first")]
    TooManyPartitions,
    #[error("this indexer has {LISTENERS_MAX} listeners already: unregister some first")]
    TooManyListeners,
    #[error("instance {0} not found")]
    NoInstance(u64),
    #[error("instance {0} dp_rank {1} not found")]
    NoRank(u64, u32),
    #[error("instance {0} is registered for model={model} routing_group={group}", model = .1.model, group = .1.group)]
    OtherPartition(u64, Key),
    #[error("instance {0} dp_rank {1} cannot be {2} from status {3}")]
    WrongState(u64, u32, &'static str, &'static str),
}

/// Everything that is registered.
#[derive(Debug)]
pub(crate) struct Registry {
    pub(crate) knowledge: Knowledge,
    pub(crate) scheme: Scheme,
    pub(crate) peers: Arc<Peers>,
    /// Tells this process from its peers.
    pub(crate) boot: u64,
    sources: Sources,
    partitions: RwLock<BTreeMap<Key, Arc<Partition>>>,
    /// Held while registrations change; queries need it not.
    changing: tokio::sync::Mutex<()>,
}

impl Registry {
    /// An empty registry; `saved` is what an earlier life of this process knew.
    pub(crate) fn new(knowledge: Knowledge, scheme: Scheme, boot: u64, saved: Vec<Image>) -> Self {
        let peers = Arc::new(Peers::default());
        let listed = Arc::clone(&peers);
        Self {
            knowledge,
            scheme,
            peers,
            boot,
            sources: Sources::new(saved, boot, move || listed.all()),
            partitions: RwLock::default(),
            changing: tokio::sync::Mutex::default(),
        }
    }

    /// The partition of this name.
    pub(crate) fn partition(&self, key: &Key) -> Option<Arc<Partition>> {
        self.partitions.read().unwrap_or_else(PoisonError::into_inner).get(key).map(Arc::clone)
    }

    /// All partitions, in order.
    pub(crate) fn partitions(&self) -> Vec<Arc<Partition>> {
        self.partitions.read().unwrap_or_else(PoisonError::into_inner).values().map(Arc::clone).collect()
    }

    /// The partition of this name, made if need be.
    pub(crate) fn open(&self, key: &Key, block_size: BlockSize) -> Result<Arc<Partition>, RegistryError> {
        let mut partitions = self.partitions.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(partition) = partitions.get(key) {
            if partition.block_size != block_size {
                return Err(RegistryError::BlockSize {
                    key: key.clone(),
                    existing: partition.block_size.tokens(),
                    requested: block_size.tokens(),
                });
            }
            return Ok(Arc::clone(partition));
        }
        if partitions.len() >= PARTITIONS_MAX {
            return Err(RegistryError::TooManyPartitions);
        }
        tracing::info!(
            model = key.model,
            routing_group = key.group,
            block_size = block_size.tokens(),
            "new partition"
        );
        let partition = Arc::new(Partition::new(key.clone(), block_size, self.scheme));
        partitions.insert(key.clone(), Arc::clone(&partition));
        Ok(partition)
    }

    /// Where an instance is registered.
    fn home(&self, instance: u64) -> Option<Arc<Partition>> {
        self.partitions().into_iter().find(|p| p.instances().contains_key(&instance))
    }

    /// Begins to follow a publisher.
    pub(crate) async fn register(&self, registration: &Registration) -> Result<(), RegistryError> {
        let Registration { instance, rank, endpoint, replay, model, group, block_size } = registration;
        if self.knowledge == Knowledge::Decisions {
            return Err(RegistryError::Approximate);
        }
        let _changing = self.changing.lock().await;
        let key = Key { model: model.clone(), group: group.clone() };
        if let Some(home) = self.home(*instance) {
            if home.key != key {
                return Err(RegistryError::Elsewhere(*instance, home.key.clone()));
            }
            if home.instances().get(instance).is_some_and(|ranks| ranks.contains_key(rank)) {
                return Err(RegistryError::Twice(*instance, *rank));
            }
        }
        let listeners: usize = self.partitions().iter().map(|p| p.listeners().len()).sum();
        if listeners >= LISTENERS_MAX {
            return Err(RegistryError::TooManyListeners);
        }
        let partition = self.open(&key, *block_size)?;
        let worker = Worker::new(*instance, *rank);
        let listener = Listener::start(&partition, worker, endpoint.clone(), replay.clone(), &self.sources);
        partition.instances().entry(*instance).or_default().insert(*rank, Arc::new(listener));
        Ok(())
    }

    /// Stops following an instance, or one rank of it, and forgets what it holds; says which ranks those were. `group: None` = whichever
    /// it is in.
    pub(crate) async fn unregister(
        &self,
        instance: u64,
        model: &str,
        group: Option<&str>,
        rank: Option<u32>,
    ) -> Result<Vec<Worker>, RegistryError> {
        let _changing = self.changing.lock().await;
        let partition = self.home(instance).ok_or(RegistryError::NoInstance(instance))?;
        if partition.key.model != model || group.is_some_and(|group| group != partition.key.group) {
            return Err(RegistryError::OtherPartition(instance, partition.key.clone()));
        }
        let gone: Vec<Arc<Listener>> = {
            let mut instances = partition.instances();
            let ranks = instances.get_mut(&instance).ok_or(RegistryError::NoInstance(instance))?;
            let gone = match rank {
                Some(rank) => {
                    vec![ranks.remove(&rank).ok_or(RegistryError::NoRank(instance, rank))?]
                }
                None => std::mem::take(ranks).into_values().collect(),
            };
            if ranks.is_empty() {
                instances.remove(&instance);
            }
            gone
        };
        for listener in &gone {
            listener.end().await;
            let _ = tokio::time::timeout(LANE_WAIT, partition.lane.send(Work::Remove(listener.worker))).await;
        }
        partition.lane.flush().await;
        self.drop_if_idle(&partition);
        Ok(gone.iter().map(|listener| listener.worker).collect())
    }

    fn drop_if_idle(&self, partition: &Arc<Partition>) {
        let mut partitions = self.partitions.write().unwrap_or_else(PoisonError::into_inner);
        if partition.is_idle() {
            partitions.remove(&partition.key);
        }
    }

    fn listener(&self, instance: u64, rank: u32) -> Result<(Arc<Partition>, Arc<Listener>), RegistryError> {
        let partition = self.home(instance).ok_or(RegistryError::NoInstance(instance))?;
        let listener =
            partition.instances().get(&instance).and_then(|ranks| ranks.get(&rank)).map(Arc::clone);
        Ok((partition, listener.ok_or(RegistryError::NoRank(instance, rank))?))
    }

    /// Stops listening to a rank; what it holds is kept.
    pub(crate) async fn pause(&self, instance: u64, rank: u32) -> Result<(), RegistryError> {
        let _changing = self.changing.lock().await;
        let (_, listener) = self.listener(instance, rank)?;
        let status = listener.status().name();
        if listener.end().await {
            Ok(())
        } else {
            Err(RegistryError::WrongState(instance, rank, "paused", status))
        }
    }

    /// Listens again: what was kept is forgotten and learnt anew.
    pub(crate) async fn resume(&self, instance: u64, rank: u32) -> Result<(), RegistryError> {
        let _changing = self.changing.lock().await;
        let (partition, listener) = self.listener(instance, rank)?;
        if !listener.is_paused() {
            let status = listener.status().name();
            return Err(RegistryError::WrongState(instance, rank, "resumed", status));
        }
        let _ = partition.lane.send(Work::Remove(listener.worker)).await;
        listener.follow(&partition);
        Ok(())
    }

    /// Drops decisions that have expired, and partitions that only they had made.
    pub(crate) fn expire(&self) {
        for partition in self.partitions() {
            partition.index.expire(clock::now_ms());
            if self.knowledge == Knowledge::Decisions {
                self.drop_if_idle(&partition);
            }
        }
    }

    /// Ends all listeners.
    pub(crate) async fn stop(&self) {
        for partition in self.partitions() {
            for (_, listener) in partition.listeners() {
                listener.end().await;
            }
        }
    }
}

impl Ranks for Arc<Registry> {
    async fn images(&self, out: mpsc::Sender<Image>) {
        for partition in self.partitions() {
            for (_, listener) in partition.listeners() {
                if out.send(listener.image_to_save().await).await.is_err() {
                    return;
                }
            }
        }
    }
}
