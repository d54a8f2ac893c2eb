//! The naive oracle: what the index means, in the plainest code, whatever it costs.
//!
//! The production structure is compared with this one on generated operations; so are the command line's answers
//! (`kvlane index run FILE --check`). Where the two differ, this one is right. It is slow (a path of block hashes
//! for each engine hash) and single-threaded, and it ignores budgets and bounds.
//!
//! # Semantics
//!
//! *Residency.* For each (worker rank, tier, group), a multiset of engine hashes: `stored` adds a copy, of which at
//! most [`MAX_COPIES`] are counted; `removed` takes one; a removal of what is not held is counted and does
//! nothing.
//!
//! *Place.* An engine hash that a rank holds, in any tier or group, has one place at that rank: an anchor and the
//! path of block hashes below it. The anchor is the root of all prompts or, for an orphan, an engine hash not held
//! yet. The place of a stored chain is the place of its parent, which is resolved among the engine hashes that
//! this rank holds now in any tier and group, and the block hashes from there on.
//!
//! *A place is its own.* It stays when the parent leaves. A block below a hole is not counted, and is counted again when the
//! hole is filled, under whatever engine hash. Two engine hashes may have the same place: each is a holder of its own, and
//! the place is held while any of them is.
//!
//! *Orphans.* A chain whose parent is not held is anchored in the parent's engine hash. It is kept, removable, and a
//! parent for others (whose paths go through it), but in no overlap. When the rank stores the anchor, everything anchored in
//! it moves below its place. An anchor whose own place would be below itself links nothing. An orphan that is not stored again is dropped
//! by the first `expire` that comes `max_orphan_age_ms` after the first one that saw it.
//!
//! *Known by name only.* [`KvEvent::StoredByHash`] gives a held engine hash a copy at its place. One that is not held is
//! anchored in itself, and takes the place of the next `stored` that names it.
//!
//! *Rebinding.* An engine hash stored again at its place is a copy. At another place (an engine whose hashes do not
//! chain, a restart that nobody noticed) the latest wins: all that the hash held at that rank is forgotten first. When the
//! re-store's parent is not held, the hash keeps its place if the block hash is the one known there, and is rebound as an
//! orphan otherwise.
//!
//! *Predictions* are prefixes from the root with a deadline for each rank and place; the latest wins. `expire(now)` drops those with
//! `until <= now`.
//!
//! *Clearing.* `Cleared { tier: None }` leaves nothing of the rank: no copies, orphans, predictions or known groups. With a tier,
//! the copies and known groups of that tier go. The removal of a worker is the same as clearing it whole.
//!
//! # Overlap of a prompt with n blocks at one rank
//!
//! * `device`: the largest p such that, for each group that the rank has shown in the device tier since it was cleared,
//!   the device tier holds: `[0, p)` for full attention; the last `ceil((window_tokens - 1) / block_size)` blocks of `[0, p)`,
//!   and at least one, for a sliding window; block `p - 1` for recurrent state. 0 if no group was shown.
//! * `predicted`: the same, where a predicted block counts as held in each group (as in one full group if none was shown).
//! * A block is in a *lower tier* if that tier holds it in each full-attention group that the rank has shown there. (Sliding and
//!   recurrent groups of lower tiers are not asked: what they would add is part of the block's load, not of its presence.)
//!   A tier that has shown no full group holds nothing.
//! * `host`, `disk`, `external`: the run in host memory from `device` on, then the run on disk from where that ended, then the
//!   run in external storage.
//! * `mixed`: `device` and the blocks after it while each is in some lower tier, or in the device tier (asked as a lower tier
//!   is, and only at a rank whose device groups are all full: elsewhere the device depth is the last usable point).
//!   At least the sum of the single pass.

use std::collections::{BTreeMap, HashMap};

use crate::dump::{self, Entry, Places, Section};
use crate::{
    Applied, BlockHash, EngineHash, Group, GroupId, GroupKind, Held, IndexConfig, IndexStats, InstanceId,
    KvEvent, Overlap, Overlaps, StoredBlock, Tier, Worker,
};

/// Copies of one engine hash that are counted in one tier and group.
pub const MAX_COPIES: u8 = 3;

/// Blocks before the end of a hit that a sliding window needs, at least 1: where nothing is held, nothing is hit.
pub(crate) fn window_blocks(window_tokens: u32, block_tokens: u32) -> u32 {
    window_tokens.saturating_sub(1).div_ceil(block_tokens).max(1)
}

type Path = Vec<BlockHash>;
type Class = (Tier, GroupId);

/// Where an engine hash lies in the prompts of one rank.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Place {
    /// `None` = the root; otherwise the engine hash that is missing.
    anchor: Option<EngineHash>,
    path: Path,
}

impl Place {
    fn child(&self, block: BlockHash) -> Self {
        let mut path = self.path.clone();
        path.push(block);
        Self { anchor: self.anchor, path }
    }
}

#[derive(Clone, Debug)]
struct Name {
    place: Place,
    copies: BTreeMap<Class, u8>,
    /// As an orphan: the time of the first `expire` after it was stored last.
    since_ms: Option<u64>,
}

#[derive(Clone, Debug, Default)]
struct Rank {
    names: HashMap<EngineHash, Name>,
    /// Rooted places, with the number of names that hold them.
    places: HashMap<Class, HashMap<Path, u32>>,
    groups: BTreeMap<Class, GroupKind>,
    predicted: HashMap<Path, u64>,
}

impl Rank {
    fn holds(&self, class: Class, prefix: &[BlockHash]) -> bool {
        self.places.get(&class).is_some_and(|held| held.contains_key(prefix))
    }

    fn count(&mut self, name: EngineHash, up: bool) {
        let Some(Name { place, copies, .. }) = self.names.get(&name) else { return };
        if place.anchor.is_some() {
            return;
        }
        for class in copies.keys() {
            let held = self.places.entry(*class).or_default();
            if up {
                *held.entry(place.path.clone()).or_default() += 1;
            } else if let Some(names) = held.get_mut(&place.path) {
                *names -= 1;
                if *names == 0 {
                    held.remove(&place.path);
                }
            }
        }
    }

    /// Forgets an engine hash with all its copies.
    fn forget(&mut self, name: EngineHash) {
        self.count(name, false);
        self.names.remove(&name);
    }

    fn add(&mut self, name: EngineHash, place: Place, class: Class, applied: &mut Applied) {
        let orphan = place.anchor.is_some();
        self.count(name, false);
        let entry = self.names.entry(name).or_insert(Name { place, copies: BTreeMap::new(), since_ms: None });
        entry.since_ms = None;
        let copies = entry.copies.entry(class).or_default();
        match *copies {
            0 => applied.stored += 1,
            MAX_COPIES => applied.duplicates += 1,
            _ => applied.copies += 1,
        }
        *copies = (*copies + 1).min(MAX_COPIES);
        applied.orphaned += u32::from(orphan);
        self.count(name, true);
    }

    /// Moves what is anchored in `name` below its place.
    fn link(&mut self, name: EngineHash, applied: &mut Applied) {
        let Some(base) = self.names.get(&name).map(|n| n.place.clone()) else { return };
        if base.anchor == Some(name) {
            return;
        }
        let waiting: Vec<EngineHash> =
            self.names.iter().filter(|(_, n)| n.place.anchor == Some(name)).map(|(e, _)| *e).collect();
        for orphan in waiting {
            let entry = self.names.get_mut(&orphan).expect("listed a moment ago");
            let mut path = base.path.clone();
            path.extend_from_slice(&entry.place.path);
            entry.place = Place { anchor: base.anchor, path };
            if base.anchor.is_none() {
                applied.linked += 1;
                self.count(orphan, true);
            }
        }
    }

    fn store(
        &mut self,
        class: Class,
        parent: Option<EngineHash>,
        blocks: &[StoredBlock],
        applied: &mut Applied,
    ) {
        let mut before = match parent {
            None => Some(Place { anchor: None, path: Path::new() }),
            Some(parent) => self.names.get(&parent).map(|n| n.place.clone()),
        };
        for &StoredBlock { engine, block } in blocks {
            let known = self.names.get(&engine).map(|n| n.place.clone());
            let place = match (&before, &known) {
                (Some(before), _) => before.child(block),
                (None, Some(known)) if known.path.last() == Some(&block) => known.clone(),
                (None, _) => Place { anchor: parent, path: vec![block] },
            };
            match known {
                // A name without a place takes this one.
                Some(known) if known.anchor == Some(engine) && known.path.is_empty() => {
                    self.names.get_mut(&engine).expect("known").place = place.clone();
                    if place.anchor.is_none() {
                        applied.linked += 1;
                    }
                    self.count(engine, true);
                }
                Some(known) if known != place => {
                    applied.rebound += 1;
                    self.forget(engine);
                }
                _ => {}
            }
            self.add(engine, place.clone(), class, applied);
            self.link(engine, applied);
            before = Some(place);
        }
    }

    fn remove(&mut self, class: Class, name: EngineHash, applied: &mut Applied) {
        if !self.names.get(&name).is_some_and(|n| n.copies.contains_key(&class)) {
            applied.unknown += 1;
            return;
        }
        applied.removed += 1;
        self.count(name, false);
        let entry = self.names.get_mut(&name).expect("checked above");
        let copies = entry.copies.get_mut(&class).expect("checked above");
        *copies -= 1;
        if *copies == 0 {
            entry.copies.remove(&class);
        }
        if entry.copies.is_empty() {
            self.names.remove(&name);
        } else {
            self.count(name, true);
        }
    }

    fn clear_tier(&mut self, tier: Tier, applied: &mut Applied) {
        let names: Vec<EngineHash> = self.names.keys().copied().collect();
        for name in names {
            self.count(name, false);
            let entry = self.names.get_mut(&name).expect("listed a moment ago");
            let before = entry.copies.len();
            entry.copies.retain(|class, _| class.0 != tier);
            applied.cleared += (before - entry.copies.len()) as u32;
            if entry.copies.is_empty() {
                self.names.remove(&name);
            } else {
                self.count(name, true);
            }
        }
        self.groups.retain(|class, _| class.0 != tier);
    }

    fn pairs(&self) -> u64 {
        self.names.values().map(|n| n.copies.len() as u64).sum()
    }

    fn hit(&self, prompt: &[BlockHash], block_tokens: u32, with_predicted: bool) -> usize {
        let mut groups: Vec<(Class, GroupKind)> =
            self.groups.iter().filter(|(class, _)| class.0 == Tier::Device).map(|(c, k)| (*c, *k)).collect();
        if groups.is_empty() {
            if !with_predicted {
                return 0;
            }
            groups.push(((Tier::Device, GroupId(0)), GroupKind::Full));
        }
        let held = |class, i: usize| {
            self.holds(class, &prompt[..=i]) || with_predicted && self.predicted.contains_key(&prompt[..=i])
        };
        let usable = |p: usize| {
            groups.iter().all(|&(class, kind)| {
                let from = match kind {
                    GroupKind::Full => 0,
                    GroupKind::Sliding { window_tokens } => {
                        p.saturating_sub(window_blocks(window_tokens, block_tokens) as usize)
                    }
                    GroupKind::Recurrent => p.saturating_sub(1),
                };
                (from..p).all(|i| held(class, i))
            })
        };
        (0..=prompt.len()).rev().find(|&p| usable(p)).expect("a hit of length 0 needs nothing")
    }

    fn overlap(&self, worker: Worker, prompt: &[BlockHash], block_tokens: u32) -> Overlap {
        let device = self.hit(prompt, block_tokens, false);
        let predicted = self.hit(prompt, block_tokens, true);
        let in_tier = |tier: Tier, i: usize| {
            let mut full = self
                .groups
                .iter()
                .filter(|(class, kind)| class.0 == tier && **kind == GroupKind::Full)
                .map(|(class, _)| *class)
                .peekable();
            full.peek().is_some() && full.all(|class| self.holds(class, &prompt[..=i]))
        };
        let run = |from: usize, tier| (from..prompt.len()).take_while(|&i| in_tier(tier, i)).count();
        let host = run(device, Tier::Host);
        let disk = run(device + host, Tier::Disk);
        let external = run(device + host + disk, Tier::External);
        let device_blocks_count =
            self.groups.iter().all(|(class, kind)| class.0 != Tier::Device || *kind == GroupKind::Full);
        let mixed = device
            + (device..prompt.len())
                .take_while(|&i| {
                    in_tier(Tier::Host, i)
                        || in_tier(Tier::Disk, i)
                        || in_tier(Tier::External, i)
                        || device_blocks_count && in_tier(Tier::Device, i)
                })
                .count();
        let [device, predicted, host, disk, external, mixed] =
            [device, predicted, host, disk, external, mixed].map(|n| n as u32);
        Overlap { worker, device, predicted, host, disk, external, mixed }
    }
}

/// One engine hash that a rank holds at a known place, in one tier and group.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Holding {
    /// Where.
    pub tier: Tier,
    /// For which group.
    pub group: GroupId,
    /// The block hashes from the root to the block.
    pub path: Vec<BlockHash>,
    /// The engine's name for it.
    pub engine: EngineHash,
    /// Copies counted, 1 to [`MAX_COPIES`].
    pub copies: u8,
}

impl Holding {
    /// Whether both are of one name at one place, tier and group.
    pub fn is_same_name(&self, other: &Self) -> bool {
        let key = |h: &Self| (h.tier, h.group, h.engine);
        key(self) == key(other) && self.path == other.path
    }
}

/// Places by their number among the sorted paths.
struct PathPlaces<'a> {
    paths: Vec<&'a [BlockHash]>,
    before: Vec<Option<usize>>,
    sections: &'a [Section<usize>],
}

impl Places for PathPlaces<'_> {
    type Place = usize;

    fn before(&self, place: usize) -> Option<usize> {
        self.before[place]
    }

    fn content(&self, place: usize) -> BlockHash {
        *self.paths[place].last().expect("a place has a block")
    }

    fn handle(&self, place: usize, sections: usize) -> Option<u64> {
        self.sections[..sections].iter().find_map(|section| {
            let first = section.entries.partition_point(|entry| entry.place < place);
            section.entries.get(first).filter(|entry| entry.place == place).map(|entry| entry.name)
        })
    }
}

/// The oracle of one partition.
#[derive(Clone, Debug)]
pub struct Oracle {
    block_tokens: u32,
    max_orphan_age_ms: u64,
    ranks: BTreeMap<Worker, Rank>,
}

impl Oracle {
    /// An empty oracle; bounds and budgets of `config` are ignored, but for the age of orphans.
    pub fn new(config: &IndexConfig) -> Self {
        Self {
            block_tokens: config.block_size.tokens(),
            max_orphan_age_ms: config.max_orphan_age_ms,
            ranks: BTreeMap::new(),
        }
    }

    /// Applies one event of `worker`.
    pub fn apply(&mut self, worker: Worker, event: &KvEvent) -> Applied {
        let mut applied = Applied::default();
        match event {
            KvEvent::Stored { tier, group, parent, blocks } => {
                let rank = self.ranks.entry(worker).or_default();
                rank.groups.insert((*tier, group.id), group.kind);
                rank.store((*tier, group.id), *parent, blocks, &mut applied);
            }
            KvEvent::StoredByHash { tier, group, hashes } => {
                let rank = self.ranks.entry(worker).or_default();
                rank.groups.insert((*tier, group.id), group.kind);
                for &name in hashes {
                    let place = match rank.names.get(&name) {
                        Some(known) => known.place.clone(),
                        None => Place { anchor: Some(name), path: Path::new() },
                    };
                    rank.add(name, place, (*tier, group.id), &mut applied);
                }
            }
            KvEvent::Removed { tier, group, hashes } => match self.ranks.get_mut(&worker) {
                Some(rank) => {
                    for &name in hashes {
                        rank.remove((*tier, *group), name, &mut applied);
                    }
                }
                None => applied.unknown += hashes.len() as u32,
            },
            KvEvent::Cleared { tier: Some(tier) } => {
                if let Some(rank) = self.ranks.get_mut(&worker) {
                    rank.clear_tier(*tier, &mut applied);
                }
            }
            KvEvent::Cleared { tier: None } => applied = self.remove_worker(worker),
        }
        applied
    }

    /// Forgets one rank.
    pub fn remove_worker(&mut self, worker: Worker) -> Applied {
        let cleared = self.ranks.remove(&worker).map_or(0, |rank| rank.pairs());
        Applied { cleared: cleared as u32, ..Applied::default() }
    }

    /// Forgets all ranks of one instance.
    pub fn remove_instance(&mut self, instance: InstanceId) -> Applied {
        let mut applied = Applied::default();
        let ranks: Vec<Worker> = self.ranks.keys().filter(|w| w.instance == instance).copied().collect();
        for worker in ranks {
            applied += self.remove_worker(worker);
        }
        applied
    }

    /// Notes that `worker` will soon hold these blocks, which begin at the root.
    pub fn predict(&mut self, worker: Worker, blocks: &[BlockHash], until_ms: u64) {
        if blocks.is_empty() {
            return;
        }
        let rank = self.ranks.entry(worker).or_default();
        for end in 1..=blocks.len() {
            let deadline = rank.predicted.entry(blocks[..end].to_vec()).or_insert(until_ms);
            *deadline = (*deadline).max(until_ms);
        }
    }

    /// Drops the predictions with `until_ms <= now_ms`, and the orphans that have waited too long; how many pairs of (tier, group) and
    /// engine hash those were.
    pub fn expire(&mut self, now_ms: u64) -> u64 {
        let mut dropped = 0;
        for rank in self.ranks.values_mut() {
            rank.predicted.retain(|_, until| *until > now_ms);
            rank.names.retain(|_, name| {
                if name.place.anchor.is_none() {
                    return true;
                }
                let since_ms = *name.since_ms.get_or_insert(now_ms);
                let keep = now_ms.saturating_sub(since_ms) < self.max_orphan_age_ms;
                dropped += if keep { 0 } else { name.copies.len() as u64 };
                keep
            });
        }
        dropped
    }

    /// Makes `worker` hold what `dump` says, which is what another one or itself was dumped as: as if it were cleared and given the
    /// events, but that its predictions stay.
    pub fn replace(&mut self, worker: Worker, dump: &[KvEvent]) {
        let predicted = self.ranks.remove(&worker).map(|rank| rank.predicted).unwrap_or_default();
        for event in dump {
            let _ = self.apply(worker, event);
        }
        if !predicted.is_empty() {
            self.ranks.entry(worker).or_default().predicted = predicted;
        }
    }

    /// Drops the predictions of one rank.
    pub fn forget_predictions(&mut self, worker: Worker) {
        if let Some(rank) = self.ranks.get_mut(&worker) {
            rank.predicted.clear();
        }
    }

    /// Who holds the beginning of `prompt`.
    pub fn overlap(&self, prompt: &[BlockHash]) -> Overlaps {
        let ranks = self
            .ranks
            .iter()
            .map(|(worker, rank)| rank.overlap(*worker, prompt, self.block_tokens))
            .filter(|o| o.device + o.predicted + o.host + o.disk + o.external > 0)
            .collect();
        Overlaps { ranks }
    }

    /// What each rank holds, sorted by worker, tier and group; a group that was shown is listed even if it is empty.
    pub fn workers(&self) -> Vec<Held> {
        let mut out = Vec::new();
        for (worker, rank) in &self.ranks {
            for (&(tier, id), &kind) in &rank.groups {
                let blocks =
                    rank.names.values().filter(|n| n.copies.contains_key(&(tier, id))).count() as u64;
                out.push(Held { worker: *worker, tier, group: Group { id, kind }, blocks });
            }
        }
        out
    }

    /// What `worker` holds at known places, sorted: two ranks hold the same if these are equal and the same groups are shown.
    pub fn holdings(&self, worker: Worker) -> Vec<Holding> {
        let rooted = |rank: &Rank| {
            let names = rank.names.iter().filter(|(_, n)| n.place.anchor.is_none());
            let each = names.flat_map(|(&engine, Name { place, copies, .. })| {
                copies.iter().map(move |(&(tier, group), &copies)| Holding {
                    tier,
                    group,
                    path: place.path.clone(),
                    engine,
                    copies,
                })
            });
            let mut all: Vec<Holding> = each.collect();
            all.sort_unstable();
            all
        };
        self.ranks.get(&worker).map(rooted).unwrap_or_default()
    }

    /// The events that give an empty index what `worker` holds at known places, in the form of [`Index::dump`](crate::Index::dump).
    pub fn dump(&self, worker: Worker) -> Vec<KvEvent> {
        let Some(rank) = self.ranks.get(&worker) else { return Vec::new() };
        let held = self.holdings(worker);
        let mut paths: Vec<&[BlockHash]> =
            held.iter().flat_map(|h| (1..=h.path.len()).map(|end| &h.path[..end])).collect();
        paths.sort_unstable();
        paths.dedup();
        let at = |path: &[BlockHash]| paths.binary_search(&path).ok();
        let section = |(&(tier, id), &kind): (&Class, &GroupKind)| {
            let here = held.iter().filter(|h| (h.tier, h.group) == (tier, id));
            let entry = |h: &Holding| {
                let place = at(&h.path).expect("every path is listed");
                Entry { place, name: h.engine.0, copies: h.copies }
            };
            Section { tier, group: Group { id, kind }, entries: here.map(entry).collect() }
        };
        let sections: Vec<Section<usize>> = rank.groups.iter().map(section).collect();
        let before = paths.iter().map(|path| at(&path[..path.len() - 1])).collect();
        dump::events(&PathPlaces { paths, before, sections: &sections }, &sections)
    }

    /// The figures that mean the same in every structure; the others are 0.
    pub fn stats(&self) -> IndexStats {
        let orphans = |rank: &Rank| rank.names.values().filter(|n| n.place.anchor.is_some()).count() as u64;
        IndexStats {
            workers: self.ranks.len() as u64,
            pairs: self.ranks.values().map(Rank::pairs).sum(),
            orphans: self.ranks.values().map(orphans).sum(),
            predicted: self.ranks.values().map(|r| r.predicted.len() as u64).sum(),
            ..IndexStats::default()
        }
    }
}
