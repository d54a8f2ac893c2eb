//! The workers: their classes, aliases, second copies, twins and orphans.

use std::collections::HashMap;
use std::hash::{BuildHasherDefault, Hasher};

use super::Tree;
use super::orphans::Orphans;
use super::shared::{Class, Listed, MAX_GROUPS, MAX_RANKS, MAX_TRIPLES, encode_kind};
use crate::{Group, GroupId, GroupKind, Held, Tier, Worker};

/// Hashes keys that are hashes already, or block ids.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Spread(u64);

impl Hasher for Spread {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u32(&mut self, value: u32) {
        self.write_u64(u64::from(value));
    }

    fn write_u64(&mut self, value: u64) {
        self.0 = super::names::spread(self.0.rotate_left(23) ^ value);
    }
}

pub(super) type Map<K, V> = HashMap<K, V, BuildHasherDefault<Spread>>;

/// A (tier, group) that a rank has shown.
#[derive(Clone, Copy, Debug)]
pub(super) struct Shown {
    pub(super) class: Class,
    pub(super) kind: GroupKind,
    /// Engine hashes held, orphans included.
    pub(super) names: u64,
}

/// One of several names that a rank has for one block: what it holds under it.
#[derive(Clone, Debug)]
pub(super) struct Twin {
    pub(super) name: u64,
    pub(super) copies: Vec<(Class, u8)>,
}

/// What the writer knows about a rank beside the runs.
///
/// A block that the rank holds under one name is held as the runs say; that name is the block's main name, unless the
/// block is in `aliased`. Second copies of it are in `copies`. A block that it holds under several names is in `twins`, with all of them.
#[derive(Debug)]
pub(super) struct Rank {
    pub(super) worker: Worker,
    pub(super) classes: Vec<Shown>,
    /// Name → block, for the names of this rank that are not main names.
    pub(super) aliases: Map<u64, u32>,
    /// Blocks held under exactly one name, which is an alias: bits by block / 64.
    pub(super) aliased: Map<u32, u64>,
    /// Copies beyond the first of blocks with one name.
    pub(super) copies: Map<(u32, u32), u8>,
    pub(super) twins: Map<u32, Vec<Twin>>,
    pub(super) orphans: Orphans,
    /// Runs in which the rank has something, and some in which it had.
    pub(super) runs: Vec<u32>,
    /// Length of `runs` at which it is cleaned.
    pub(super) runs_max: usize,
    /// Predicted blocks alive are looked for only if this is above 0: predictions made and not all dropped.
    pub(super) predicts: bool,
    /// The list of kinds as published.
    pub(super) kinds: u64,
}

impl Rank {
    /// Whether every name of this rank is a main name.
    #[inline]
    pub(super) fn plain(&self) -> bool {
        self.aliases.is_empty() && self.twins.is_empty() && self.orphans.is_empty()
    }

    /// Whether a block with one name is held in a class more than once.
    #[inline]
    pub(super) fn has_copies(&self, class: Class, block: u32) -> bool {
        !self.copies.is_empty() && self.copies.contains_key(&(class.0, block))
    }

    pub(super) fn shown(&mut self, class: Class) -> &mut Shown {
        self.classes.iter_mut().find(|c| c.class == class).expect("a class is shown before it is used")
    }

    pub(super) fn is_aliased(&self, block: u32) -> bool {
        self.aliased.get(&(block / 64)).is_some_and(|bits| bits >> (block % 64) & 1 == 1)
    }

    pub(super) fn set_aliased(&mut self, block: u32, value: bool) {
        if value {
            *self.aliased.entry(block / 64).or_default() |= 1 << (block % 64);
        } else if let Some(bits) = self.aliased.get_mut(&(block / 64)) {
            *bits &= !(1 << (block % 64));
            if *bits == 0 {
                self.aliased.remove(&(block / 64));
            }
        }
    }

    /// Whether the device tier has shown another group than group 0 with full attention.
    fn hybrid(&self) -> bool {
        let plain = |c: &Shown| c.class == Class::PRIMARY && c.kind == GroupKind::Full;
        self.classes.iter().any(|c| c.class.tier() == Tier::Device && !plain(c))
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.aliases.capacity() * 18
            + self.aliased.capacity() * 18
            + self.copies.capacity() * 14
            + self.twins.capacity() * 96
            + self.runs.capacity() * 4
            + size_of::<Self>()) as u64
            + self.orphans.bytes()
    }
}

impl Tree {
    pub(super) fn rank(&self, rank: u32) -> &Rank {
        self.ranks[rank as usize].as_ref().expect("a rank index is in use")
    }

    pub(super) fn rank_mut(&mut self, rank: u32) -> &mut Rank {
        self.ranks[rank as usize].as_mut().expect("a rank index is in use")
    }

    /// The class of a tier and group that some rank has shown.
    pub(super) fn class(&self, tier: Tier, group: GroupId) -> Option<Class> {
        self.groups.iter().position(|g| *g == group).map(|index| Class::new(tier, index))
    }

    /// The index of a worker, made if it is new; `None` at the limit.
    pub(super) fn meet(&mut self, worker: Worker) -> Option<u32> {
        if let Some(&rank) = self.by_worker.get(&worker) {
            return Some(rank);
        }
        let index = match self.ranks.iter().position(Option::is_none) {
            Some(free) => free,
            None if self.ranks.len() < MAX_RANKS as usize => {
                self.ranks.push(None);
                self.ranks.len() - 1
            }
            None => return None,
        };
        self.ranks[index] = Some(Box::new(Rank {
            worker,
            classes: Vec::new(),
            aliases: Map::default(),
            aliased: Map::default(),
            copies: Map::default(),
            twins: Map::default(),
            orphans: Orphans::default(),
            runs: Vec::new(),
            runs_max: 64,
            predicts: false,
            kinds: 0,
        }));
        self.by_worker.insert(worker, index as u32);
        self.publish_ranks();
        Some(index as u32)
    }

    /// The class of a tier and group, new if need be; `None` at the limit.
    pub(super) fn intern(&mut self, tier: Tier, group: GroupId) -> Option<Class> {
        match self.class(tier, group) {
            Some(class) => Some(class),
            None if self.groups.len() < MAX_GROUPS => {
                self.groups.push(group);
                Some(Class::new(tier, self.groups.len() - 1))
            }
            None => None,
        }
    }

    /// Notes that a worker uses a tier and group; `None` at a limit.
    pub(super) fn show(&mut self, worker: Worker, tier: Tier, group: Group) -> Option<(u32, Class)> {
        let class = self.intern(tier, group.id)?;
        let rank = self.meet(worker)?;
        let may_add = self.triples < MAX_TRIPLES;
        match self.rank_mut(rank).classes.iter_mut().find(|c| c.class == class) {
            Some(shown) if shown.kind == group.kind => return Some((rank, class)),
            Some(shown) => shown.kind = group.kind,
            None if may_add => {
                self.triples += 1;
                let classes = &mut self.rank_mut(rank).classes;
                classes.push(Shown { class, kind: group.kind, names: 0 });
                classes.sort_unstable_by_key(|c| c.class);
            }
            None => return None,
        }
        self.publish_kinds(rank);
        Some((rank, class))
    }

    /// Publishes what a rank has shown.
    pub(super) fn publish_kinds(&mut self, rank: u32) {
        let words: Vec<u64> = self.rank(rank).classes.iter().map(|c| encode_kind(c.class, c.kind)).collect();
        let old = self.rank(rank).kinds;
        // The new list is made before the old one is given back, so that a reader of the old one sees it whole or sees the directory's
        // version change.
        let new = self.list_from(&words);
        self.rank_mut(rank).kinds = new;
        self.publish_ranks();
        self.list_free(old);
    }

    pub(super) fn publish_ranks(&mut self) {
        let mut listed: Vec<Listed> = self
            .by_worker
            .iter()
            .map(|(&worker, &index)| Listed { worker, hybrid: self.rank(index).hybrid(), index })
            .collect();
        listed.sort_unstable_by_key(|l| l.worker);
        self.shared.directory.publish(&listed, |index| self.rank(index).kinds);
    }

    pub(super) fn held<'a>(&'a self, rank: &'a Rank) -> impl Iterator<Item = Held> + 'a {
        rank.classes.iter().map(|shown| Held {
            worker: rank.worker,
            tier: shown.class.tier(),
            group: Group { id: self.groups[shown.class.group_index()], kind: shown.kind },
            blocks: shown.names,
        })
    }

    /// Forgets a rank with all it holds; how many names (by class) that were.
    pub(super) fn clear_rank(&mut self, rank: u32) -> u32 {
        let runs = std::mem::take(&mut self.rank_mut(rank).runs);
        // The last first: what follows a run was mostly stored after it.
        for run in runs.into_iter().rev() {
            if self.is_all_of(run, rank) {
                self.free_run(run);
            } else {
                self.drop_all(run, rank);
            }
        }
        let gone = self.ranks[rank as usize].take().expect("a rank index is in use");
        self.by_worker.remove(&gone.worker);
        self.triples -= gone.classes.len() as u32;
        self.publish_ranks();
        self.list_free(gone.kinds);
        gone.classes.iter().map(|c| c.names).sum::<u64>() as u32
    }

    /// Notes that a rank has something in a run in which it had nothing.
    pub(super) fn enters(&mut self, rank: u32, run: u32) {
        let state = self.rank_mut(rank);
        state.runs.push(run);
        if state.runs.len() < state.runs_max {
            return;
        }
        let mut runs = std::mem::take(&mut state.runs);
        runs.sort_unstable();
        runs.dedup();
        runs.retain(|&run| self.has_any(run, rank));
        let state = self.rank_mut(rank);
        state.runs_max = runs.len() * 2 + 64;
        state.runs = runs;
    }
}
