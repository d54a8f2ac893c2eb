//! The production structure: an implicit radix tree over compressed runs in flat arrays.
//!
//! A *run* is a stretch of blocks that follow one another in some prompts, found through its first block's prefix hash.
//! There are no child pointers: what follows a run is found by the next prefix hash of the prompt. Runs are cut where prompts
//! diverge, so a run mostly is held whole, and its holders are one set of bits.
//!
//! A block has an id (its place in the arrays) for as long as its run keeps it; splitting a run moves no block. With the
//! block lie its prefix hash and its *main name*, the first engine hash that it got. Whoever calls it otherwise has an alias of its own.
//!
//! The writer owns a [`Tree`]; readers share its [`Shared`] part and never wait.
//!
//! Contents: [`words`] memory for readers; [`shared`] layout and protocol; [`run_table`], [`names`] the two tables;
//! [`runs`] life of runs; [`cover`] who holds what of a run; [`ranks`] the workers; [`store`], [`remove`],
//! [`orphans`], [`predict`], [`dump`], [`replace`], [`shed`] the operations; [`lookup`], [`prompt`], [`aside`] the queries.

mod aside;
mod cover;
mod dump;
mod lookup;
mod names;
mod orphans;
mod predict;
mod prefetch;
mod prompt;
mod ranks;
mod remove;
mod replace;
mod run_table;
mod runs;
mod shared;
mod shed;
mod store;
mod words;

use std::collections::BinaryHeap;
use std::sync::Arc;

pub(crate) use replace::Plan;
pub(crate) use shared::Shared;

use crate::{Applied, BlockHash, GroupId, Held, IndexConfig, IndexStats, InstanceId, KvEvent, Worker};
use names::{Home, Names};
use ranks::{Map, Rank};
use run_table::RunTableWriter;
use runs::{Engines, Meta, Pages};
use words::Slab;

/// The writer's side of a partition.
#[derive(Debug)]
pub(crate) struct Tree {
    shared: Arc<Shared>,
    config: IndexConfig,
    slab: Slab,
    pages: Pages,
    engines: Engines,
    metas: Vec<Meta>,
    free_runs: Vec<u32>,
    table: RunTableWriter,
    names: Names,
    ranks: Vec<Option<Box<Rank>>>,
    by_worker: Map<Worker, u32>,
    groups: Vec<GroupId>,
    triples: u32,
    /// Runs that may have lost their last holder, looked at when the event is done.
    dying: Vec<u32>,
    /// Deadlines and the runs in which a prediction has them, soonest first.
    deadlines: BinaryHeap<std::cmp::Reverse<(u64, u32)>>,
    /// Events and predictions applied: the time by which runs are cold.
    clock: u32,
    orphans_expired: u64,
    /// Scratch of `store`.
    prefixes: Vec<u64>,
    /// The contents of an event, the homes of names, and blocks with them: scratch as well.
    contents: Vec<BlockHash>,
    homes: Vec<(Home, u32)>,
}

impl Tree {
    pub(crate) fn new(config: &IndexConfig) -> Self {
        Self {
            shared: Arc::new(Shared::new(config)),
            config: *config,
            slab: Slab::default(),
            pages: Pages::default(),
            engines: Engines::default(),
            metas: Vec::new(),
            free_runs: Vec::new(),
            table: RunTableWriter::new(),
            names: Names::new(),
            ranks: Vec::new(),
            by_worker: Map::default(),
            groups: vec![GroupId(0)],
            triples: 0,
            dying: Vec::new(),
            deadlines: BinaryHeap::new(),
            clock: 0,
            orphans_expired: 0,
            prefixes: Vec::new(),
            contents: Vec::new(),
            homes: Vec::new(),
        }
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    pub(crate) fn apply(&mut self, worker: Worker, event: &KvEvent) -> Applied {
        let mut applied = Applied::default();
        self.clock = self.clock.saturating_add(1);
        match event {
            KvEvent::Stored { tier, group, parent, blocks } => match self.show(worker, *tier, *group) {
                Some((rank, class)) => self.store(rank, class, *parent, blocks, &mut applied),
                None => applied.refused += blocks.len() as u32,
            },
            KvEvent::StoredByHash { tier, group, hashes } => match self.show(worker, *tier, *group) {
                Some((rank, class)) => self.store_by_hash(rank, class, hashes, &mut applied),
                None => applied.refused += hashes.len() as u32,
            },
            KvEvent::Removed { tier, group, hashes } => {
                match (self.by_worker.get(&worker), self.class(*tier, *group)) {
                    (Some(&rank), Some(class)) => self.remove(rank, class, hashes, &mut applied),
                    _ => applied.unknown += hashes.len() as u32,
                }
            }
            KvEvent::Cleared { tier: Some(tier) } => {
                if let Some(&rank) = self.by_worker.get(&worker) {
                    self.clear_tier(rank, *tier, &mut applied);
                }
            }
            KvEvent::Cleared { tier: None } => applied = self.remove_worker(worker),
        }
        self.reap();
        applied.shed = self.shed_if_due();
        applied
    }

    pub(crate) fn remove_worker(&mut self, worker: Worker) -> Applied {
        let mut applied = Applied::default();
        if let Some(rank) = self.by_worker.get(&worker).copied() {
            applied.cleared = self.clear_rank(rank);
            self.reap();
        }
        applied
    }

    pub(crate) fn remove_instance(&mut self, instance: InstanceId) -> Applied {
        let mut applied = Applied::default();
        let ranks: Vec<Worker> = self.by_worker.keys().filter(|w| w.instance == instance).copied().collect();
        for worker in ranks {
            applied += self.remove_worker(worker);
        }
        applied
    }

    pub(crate) fn workers(&self) -> Vec<Held> {
        let mut out: Vec<Held> = self.ranks.iter().flatten().flat_map(|rank| self.held(rank)).collect();
        out.sort_unstable_by_key(|held| (held.worker, held.tier, held.group.id));
        out
    }

    pub(crate) fn stats(&self) -> IndexStats {
        let ranks = || self.ranks.iter().flatten();
        IndexStats {
            workers: self.by_worker.len() as u64,
            pairs: ranks().flat_map(|r| r.classes.iter().map(|c| c.names)).sum(),
            places: self.live_runs().map(|run| u64::from(self.len(run))).sum(),
            runs: self.live_runs().count() as u64,
            orphans: ranks().map(|r| r.orphans.len() as u64).sum(),
            orphans_expired: self.orphans_expired,
            predicted: self.predicted_pairs(),
            bytes: self.bytes(),
        }
    }

    /// Bytes in use, by kind of content.
    fn bytes(&self) -> u64 {
        let runs = (self.metas.len() - self.free_runs.len()) as u64;
        self.pages.live() * u64::from(shared::PAGE) * 16
            + self.pages.bytes()
            + runs * (u64::from(shared::HEADER) * 8 + size_of::<Meta>() as u64)
            + self.slab.live * 8
            + self.names.bytes()
            + self.table.bytes(&self.shared.table)
            + self.deadlines.capacity() as u64 * 16
            + self.ranks.iter().flatten().map(|r| r.bytes()).sum::<u64>()
    }
}
