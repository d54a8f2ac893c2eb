//! Blocks whose place is not known yet, because their parent is not held.
//!
//! Kept beside the tree, for each rank: name → (anchor, path below it). Names that arrived in one chain share the path.

use std::collections::HashSet;
use std::hash::BuildHasherDefault;
use std::sync::Arc;

use super::Tree;
use super::ranks::{Map, Spread};
use super::shared::Class;
use super::store::{Known, add_copies};
use crate::reference::MAX_COPIES;
use crate::{Applied, BlockHash, EngineHash, StoredBlock};

/// Bytes of paths kept for each orphan that is allowed, on average.
const PATH_BYTES: u64 = 256;

#[derive(Clone, Debug)]
struct Orphan {
    anchor: u64,
    path: Arc<[BlockHash]>,
    /// How much of `path` is this orphan's. 0: known by name only, anchored in itself.
    len: u32,
    /// This orphan's share of the bytes of `path`.
    bytes: u64,
    held: Vec<(Class, u8)>,
    /// The time of the first `expire` after it was stored last.
    since_ms: Option<u64>,
}

impl Orphan {
    fn place(&self) -> &[BlockHash] {
        &self.path[..self.len as usize]
    }
}

/// A path and what has been made of it, for the orphans that share it.
type Moved<T> = Option<(Arc<[BlockHash]>, T)>;

/// The orphans of one rank.
#[derive(Debug, Default)]
pub(super) struct Orphans {
    names: Map<u64, Orphan>,
    /// Anchor → the orphans anchored in it.
    waiting: Map<u64, HashSet<u64, BuildHasherDefault<Spread>>>,
    path_bytes: u64,
}

/// What becomes of an orphan that is stored at a known place.
pub(super) enum Fate {
    /// It was known by name only: it keeps what it held.
    Placed(Vec<(Class, u8)>),
    /// It belonged elsewhere.
    Forgotten,
}

impl Orphans {
    #[inline]
    pub(super) fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.names.len()
    }

    pub(super) fn holds(&self, name: u64) -> bool {
        self.names.contains_key(&name)
    }

    pub(super) fn bytes(&self) -> u64 {
        self.path_bytes + (self.names.capacity() * 96 + self.waiting.capacity() * 64) as u64
    }

    fn insert(&mut self, name: u64, orphan: Orphan) {
        self.path_bytes += orphan.bytes;
        self.waiting.entry(orphan.anchor).or_default().insert(name);
        self.names.insert(name, orphan);
    }

    fn remove(&mut self, name: u64) -> Option<Orphan> {
        let orphan = self.names.remove(&name)?;
        self.path_bytes -= orphan.bytes;
        if let Some(waiting) = self.waiting.get_mut(&orphan.anchor) {
            waiting.remove(&name);
            if waiting.is_empty() {
                self.waiting.remove(&orphan.anchor);
            }
        }
        Some(orphan)
    }

    /// Takes one copy; `None` if there is none, else whether it was the last of its class.
    pub(super) fn revoke(&mut self, name: u64, class: Class) -> Option<bool> {
        let orphan = self.names.get_mut(&name)?;
        let at = orphan.held.iter().position(|(c, _)| *c == class)?;
        orphan.held[at].1 -= 1;
        if orphan.held[at].1 > 0 {
            return Some(false);
        }
        orphan.held.swap_remove(at);
        if orphan.held.is_empty() {
            self.remove(name);
        }
        Some(true)
    }

    /// Takes all copies of some classes.
    pub(super) fn drop_classes(&mut self, gone: impl Fn(Class) -> bool) {
        let mut empty = Vec::new();
        for (name, orphan) in &mut self.names {
            orphan.held.retain(|(class, _)| !gone(*class));
            if orphan.held.is_empty() {
                empty.push(*name);
            }
        }
        for name in empty {
            self.remove(name);
        }
    }

    /// Takes those that have waited for `max_age_ms`, and begins to count for those that were stored since the last call; what they held.
    fn drop_old(&mut self, now_ms: u64, max_age_ms: u64) -> Vec<(Class, u8)> {
        let mut old = Vec::new();
        for (name, orphan) in &mut self.names {
            let since_ms = *orphan.since_ms.get_or_insert(now_ms);
            if now_ms.saturating_sub(since_ms) >= max_age_ms {
                old.push(*name);
            }
        }
        old.into_iter().filter_map(|name| self.remove(name)).flat_map(|orphan| orphan.held).collect()
    }

    fn has_room(&self, names: usize, path: usize, max: u32) -> bool {
        let max = u64::from(max);
        (self.names.len() + names) as u64 <= max && self.path_bytes + path as u64 * 8 <= max * PATH_BYTES
    }
}

impl Tree {
    fn orphans(&mut self, rank: u32) -> &mut Orphans {
        &mut self.rank_mut(rank).orphans
    }

    fn uncount(&mut self, rank: u32, held: &[(Class, u8)]) {
        for (class, _) in held {
            self.rank_mut(rank).shown(*class).names -= 1;
        }
    }

    /// Drops a rank's orphans that have waited for `max_age_ms`; how many pairs of (tier, group) and name that were.
    pub(super) fn drop_orphans(&mut self, rank: u32, now_ms: u64, max_age_ms: u64) -> u32 {
        if self.rank(rank).orphans.is_empty() {
            return 0;
        }
        let held = self.orphans(rank).drop_old(now_ms, max_age_ms);
        self.uncount(rank, &held);
        held.len() as u32
    }

    /// Takes an orphan out because its name is stored at a known place.
    pub(super) fn adopt(&mut self, rank: u32, name: u64) -> Fate {
        let orphan = self.orphans(rank).remove(name).expect("the caller found it here");
        if orphan.len == 0 && orphan.anchor == name {
            return Fate::Placed(orphan.held);
        }
        self.uncount(rank, &orphan.held);
        Fate::Forgotten
    }

    /// Gives a name without a place one more copy.
    pub(super) fn store_placeless(&mut self, rank: u32, class: Class, name: u64, applied: &mut Applied) {
        let max = self.config.max_orphans;
        let orphans = self.orphans(rank);
        if !orphans.holds(name) {
            if !orphans.has_room(1, 0, max) {
                applied.refused += 1;
                return;
            }
            orphans.insert(
                name,
                Orphan {
                    anchor: name,
                    path: Arc::new([]),
                    len: 0,
                    bytes: 0,
                    held: Vec::new(),
                    since_ms: None,
                },
            );
        }
        self.add_orphan_copy(rank, class, name, applied);
    }

    fn add_orphan_copy(&mut self, rank: u32, class: Class, name: u64, applied: &mut Applied) {
        let orphan = self.orphans(rank).names.get_mut(&name).expect("the caller put it here");
        orphan.since_ms = None;
        applied.orphaned += 1;
        match add_copies(&mut orphan.held, class, 1) {
            0 => {
                applied.stored += 1;
                self.rank_mut(rank).shown(class).names += 1;
            }
            MAX_COPIES => applied.duplicates += 1,
            _ => applied.copies += 1,
        }
    }

    /// Stores a chain below a parent that is not held or is an orphan.
    pub(super) fn store_orphans(
        &mut self,
        rank: u32,
        class: Class,
        parent: u64,
        blocks: &[StoredBlock],
        applied: &mut Applied,
    ) {
        let max = self.config.max_orphans;
        let orphans = self.orphans(rank);
        let first = blocks[0];
        // Blocks of the path that are not new: those of the parent, or all of the first block's when its place is kept.
        let (anchor, base, mut rest) = match orphans.names.get(&parent) {
            Some(parent) => (parent.anchor, parent.place().to_vec(), blocks),
            None => match orphans.names.get(&first.engine.0) {
                Some(kept) if kept.place().last() == Some(&first.block) => {
                    (kept.anchor, kept.place().to_vec(), &blocks[1..])
                }
                _ => (parent, Vec::new(), blocks),
            },
        };
        if !orphans.has_room(blocks.len(), base.len() + rest.len(), max) {
            applied.refused += blocks.len() as u32;
            return;
        }
        if rest.len() < blocks.len() {
            self.add_orphan_copy(rank, class, first.engine.0, applied);
        }
        let path: Arc<[BlockHash]> = base.iter().copied().chain(rest.iter().map(|b| b.block)).collect();
        let bytes = path.len() as u64 * 8 / rest.len().max(1) as u64;
        let mut len = base.len() as u32;
        while let Some((StoredBlock { engine: EngineHash(name), .. }, more)) = rest.split_first() {
            let name = *name;
            rest = more;
            len += 1;
            let place = &path[..len as usize];
            let fresh =
                Orphan { anchor, path: Arc::clone(&path), len, bytes, held: Vec::new(), since_ms: None };
            match self.known(rank, name) {
                Known::At(block) => {
                    applied.rebound += 1;
                    self.forget(rank, name, block);
                    self.orphans(rank).insert(name, fresh);
                }
                Known::No => self.orphans(rank).insert(name, fresh),
                Known::Orphan => {
                    let known = &self.orphans(rank).names[&name];
                    if known.anchor == name && known.len == 0 {
                        let held = self.orphans(rank).remove(name).map(|o| o.held).unwrap_or_default();
                        self.orphans(rank).insert(name, Orphan { held, ..fresh });
                    } else if known.anchor != anchor || known.place() != place {
                        applied.rebound += 1;
                        let old = self.orphans(rank).remove(name).map(|o| o.held).unwrap_or_default();
                        self.uncount(rank, &old);
                        self.orphans(rank).insert(name, fresh);
                    }
                }
            }
            self.add_orphan_copy(rank, class, name, applied);
            if anchor != name {
                self.move_below(rank, name, anchor, &path[..len as usize]);
            }
        }
    }

    /// The orphans anchored in a name, in the order of their chains.
    fn waiting_for(&mut self, rank: u32, name: u64) -> Vec<(u64, Orphan)> {
        let orphans = self.orphans(rank);
        let Some(names) = orphans.waiting.get(&name) else { return Vec::new() };
        let names: Vec<u64> = names.iter().copied().collect();
        let mut out: Vec<(u64, Orphan)> =
            names.into_iter().filter_map(|n| Some((n, orphans.remove(n)?))).collect();
        out.sort_unstable_by_key(|(_, o)| (o.path.as_ptr() as usize, o.len));
        out
    }

    /// Moves the orphans anchored in `name`, an orphan itself, below its place.
    fn move_below(&mut self, rank: u32, name: u64, anchor: u64, place: &[BlockHash]) {
        let mut chain: Moved<Arc<[BlockHash]>> = None;
        for (waiting, orphan) in self.waiting_for(rank, name) {
            let path = match &chain {
                Some((old, new)) if Arc::ptr_eq(old, &orphan.path) => Arc::clone(new),
                _ => place.iter().chain(orphan.path.iter()).copied().collect(),
            };
            chain = Some((Arc::clone(&orphan.path), Arc::clone(&path)));
            let len = place.len() as u32 + orphan.len;
            let bytes =
                orphan.bytes + place.len() as u64 * 8 * orphan.bytes / (orphan.path.len() as u64 * 8).max(1);
            self.orphans(rank).insert(waiting, Orphan { anchor, path, len, bytes, ..orphan });
        }
    }

    /// Moves the orphans anchored in `name`, which the rank holds at `block` now, into the tree below it.
    pub(super) fn link(&mut self, rank: u32, name: u64, block: u32, applied: &mut Applied) {
        if !self.rank(rank).orphans.waiting.contains_key(&name) {
            return;
        }
        let mut chain: Moved<Vec<u32>> = None;
        for (waiting, orphan) in self.waiting_for(rank, name) {
            self.uncount(rank, &orphan.held);
            let mut at = match chain.take() {
                Some((path, at)) if Arc::ptr_eq(&path, &orphan.path) => at,
                _ => vec![block],
            };
            if !self.has_room(orphan.len as usize) {
                applied.refused += 1;
                continue;
            }
            let mut depth = self.depth_after(at[at.len() - 1]);
            let mut before = self.prefix_of(at[at.len() - 1]);
            let mut prefixes = Vec::new();
            for content in &orphan.place()[at.len() - 1..] {
                before = self.shared.hasher.next(before, *content, depth + prefixes.len() as u32);
                prefixes.push(before);
            }
            let mut done = 0;
            while done < prefixes.len() {
                let segment = self.advance(at[at.len() - 1], depth, &prefixes[done..], rank);
                for i in segment.from..segment.from + segment.count {
                    at.push(self.block_at(segment.run, i));
                }
                done += segment.count as usize;
                depth += segment.count;
            }
            applied.linked += 1;
            for (class, copies) in &orphan.held {
                self.grant(rank, *class, waiting, at[orphan.len as usize], *copies);
            }
            chain = Some((Arc::clone(&orphan.path), at));
        }
    }
}
