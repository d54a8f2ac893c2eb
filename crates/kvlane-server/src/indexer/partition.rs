//! One index of the service: the workers of a model and routing group.

use super::listener::Listener;
use crate::clock;
use crate::ingest::Lane;
use kvlane_index::hash::{Namespace, Scheme, prompt_hashes};
use kvlane_index::{BlockHash, BlockSize, Group, Index, IndexConfig, Overlaps, Worker};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The rules of the groups of each rank are read from the index at most this often: reading holds up the writer.
const RULES_FOR: Duration = Duration::from_secs(1);

/// What names a partition.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct Key {
    pub(crate) model: String,
    pub(crate) group: String,
}

impl Key {
    /// The routing group where a call names none.
    pub(crate) const DEFAULT_GROUP: &'static str = "default";
}

/// The listeners of each instance, by rank.
pub(crate) type Instances = BTreeMap<u64, BTreeMap<u32, Arc<Listener>>>;

/// Who records decisions, and when the last of them expires.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Writer {
    pub(crate) name: String,
    pub(crate) until_ms: u64,
}

/// One index with what feeds it.
#[derive(Debug)]
pub(crate) struct Partition {
    pub(crate) key: Key,
    pub(crate) block_size: BlockSize,
    pub(crate) scheme: Scheme,
    pub(crate) index: Index,
    pub(crate) lane: Lane,
    instances: Mutex<Instances>,
    writer: Mutex<Option<Writer>>,
    rules: Mutex<Rules>,
}

#[derive(Debug, Default)]
struct Rules {
    read: Option<Instant>,
    of: Arc<BTreeMap<Worker, Vec<Group>>>,
}

impl Partition {
    pub(crate) fn new(key: Key, block_size: BlockSize, scheme: Scheme) -> Self {
        let mut config = IndexConfig::new(block_size);
        config.prefix_key = RandomState::new().hash_one(0);
        let (lane, index) = Lane::open(config);
        Self {
            key,
            block_size,
            scheme,
            index,
            lane,
            instances: Mutex::default(),
            writer: Mutex::default(),
            rules: Mutex::default(),
        }
    }

    pub(crate) fn instances(&self) -> MutexGuard<'_, Instances> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Every rank that is followed, in order.
    pub(crate) fn listeners(&self) -> Vec<(Worker, Arc<Listener>)> {
        let instances = self.instances();
        let ranks = |(instance, ranks): (&u64, &BTreeMap<u32, Arc<Listener>>)| {
            let instance = *instance;
            ranks
                .iter()
                .map(move |(rank, l)| (Worker::new(instance, *rank), Arc::clone(l)))
                .collect::<Vec<_>>()
        };
        instances.iter().flat_map(ranks).collect()
    }

    /// The hashes of a prompt's whole blocks, as this partition's events are hashed.
    pub(crate) fn hash(&self, tokens: &[u32], adapter: Option<&str>, salt: Option<&str>) -> Vec<BlockHash> {
        let mut hashes = Vec::with_capacity(tokens.len() / self.block_size.tokens() as usize);
        let namespace = Namespace { adapter, salt, scheme: self.scheme };
        prompt_hashes(tokens, self.block_size, &namespace, &mut hashes);
        hashes
    }

    pub(crate) fn overlaps(&self, blocks: &[BlockHash]) -> Overlaps {
        let mut overlaps = Overlaps::default();
        self.index.overlap(blocks, &mut overlaps);
        overlaps
    }

    /// The KV-cache groups that each rank has shown; up to a second old.
    pub(crate) fn rules(&self) -> Arc<BTreeMap<Worker, Vec<Group>>> {
        let mut rules = self.rules.lock().unwrap_or_else(PoisonError::into_inner);
        if rules.read.is_none_or(|at| at.elapsed() > RULES_FOR) {
            let mut of: BTreeMap<Worker, Vec<Group>> = BTreeMap::new();
            for held in self.index.workers() {
                let groups = of.entry(held.worker).or_default();
                if !groups.contains(&held.group) {
                    groups.push(held.group);
                }
            }
            *rules = Rules { read: Some(Instant::now()), of: Arc::new(of) };
        }
        Arc::clone(&rules.of)
    }

    /// Takes the partition's one right to record decisions, until `until_ms`; the other writer who has it, else.
    pub(crate) fn claim(&self, name: &str, until_ms: u64) -> Result<(), Writer> {
        let mut writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        match &mut *writer {
            Some(other) if other.name != name && other.until_ms > clock::now_ms() => Err(other.clone()),
            Some(same) if same.name == name => {
                same.until_ms = same.until_ms.max(until_ms);
                Ok(())
            }
            free => {
                *free = Some(Writer { name: name.to_owned(), until_ms });
                Ok(())
            }
        }
    }

    /// Whether nothing is known here any more.
    pub(crate) fn is_idle(&self) -> bool {
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner);
        let written = writer.as_ref().is_some_and(|w| w.until_ms > clock::now_ms());
        !written && self.instances().is_empty()
    }
}
