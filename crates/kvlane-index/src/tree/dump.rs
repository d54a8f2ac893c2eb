//! What a rank holds, in the form of [`dump`](crate::dump).

use super::Tree;
use super::ranks::Map;
use super::shared::{Class, NONE};
use crate::dump::{Entry, Places, Section, events};
use crate::{BlockHash, Group, KvEvent, Tier, Worker};

/// A rank's blocks and names.
struct View<'a> {
    tree: &'a Tree,
    rank: u32,
    /// The classes of the sections.
    classes: Vec<Class>,
    /// The names of blocks that have one name, which is not the main one.
    alias_at: Map<u32, u64>,
}

impl View<'_> {
    fn names(&self, class: Class, block: u32, out: &mut Vec<(u64, u8)>) {
        self.tree.names_at(self.rank, class, block, &self.alias_at, out);
    }

    fn entries(&self, class: Class, runs: &[u32]) -> Vec<Entry<u32>> {
        let (mut out, mut names) = (Vec::new(), Vec::new());
        for &run in runs {
            let cover = self.tree.cover(run, self.rank, class);
            for at in (0..self.tree.len(run)).filter(|&at| self.tree.covers(cover, at)) {
                let place = self.tree.block_at(run, at);
                self.names(class, place, &mut names);
                out.extend(names.iter().map(|&(name, copies)| Entry { place, name, copies }));
            }
        }
        out
    }
}

impl Places for View<'_> {
    type Place = u32;

    fn before(&self, block: u32) -> Option<u32> {
        let before = match self.tree.locate(block) {
            (run, 0) => self.tree.metas[run as usize].parent,
            (run, at) => self.tree.block_at(run, at - 1),
        };
        (before != NONE).then_some(before)
    }

    fn content(&self, block: u32) -> BlockHash {
        self.tree.block_hash(block)
    }

    fn handle(&self, block: u32, sections: usize) -> Option<u64> {
        let (run, at) = self.tree.locate(block);
        let class =
            self.classes[..sections].iter().find(|&&class| self.tree.holds(run, at, self.rank, class))?;
        let mut names = Vec::new();
        self.names(*class, block, &mut names);
        names.first().map(|(name, _)| *name)
    }
}

impl Tree {
    /// The names of a rank's blocks that have one name, which is not the main one.
    pub(super) fn alias_at(&self, rank: u32) -> Map<u32, u64> {
        self.rank(rank).aliases.iter().map(|(name, block)| (*block, *name)).collect()
    }

    /// Names and copies of a held block in one class, the smallest first.
    pub(super) fn names_at(
        &self,
        rank: u32,
        class: Class,
        block: u32,
        alias_at: &Map<u32, u64>,
        out: &mut Vec<(u64, u8)>,
    ) {
        out.clear();
        let state = self.rank(rank);
        match state.twins.get(&block) {
            Some(twins) => {
                for twin in twins {
                    out.extend(twin.copies.iter().filter(|(c, _)| *c == class).map(|(_, n)| (twin.name, *n)));
                }
                out.sort_unstable();
            }
            None => {
                // What was noted may have changed since, between the parts of a replacement.
                let noted = alias_at.get(&block).filter(|name| state.aliases.get(name) == Some(&block));
                let name = match noted {
                    Some(name) if state.is_aliased(block) => *name,
                    _ => self.only_name(rank, block),
                };
                out.push((name, 1 + state.copies.get(&(class.0, block)).copied().unwrap_or(0)));
            }
        }
    }

    /// The runs that the rank has something in and the ones on the way there, as a walk through the tree meets them.
    pub(super) fn runs_of(&self, rank: u32) -> Vec<u32> {
        let mut after: Map<u32, Vec<(BlockHash, u32)>> = Map::default();
        let mut seen: Map<u32, ()> = Map::default();
        for &held in self.rank(rank).runs.iter().filter(|&&run| self.len(run) > 0) {
            let mut run = held;
            while seen.insert(run, ()).is_none() {
                let parent = self.metas[run as usize].parent;
                let before = if parent == NONE { NONE } else { self.locate(parent).0 };
                after.entry(before).or_default().push((self.block_hash(self.block_at(run, 0)), run));
                if before == NONE {
                    break;
                }
                run = before;
            }
        }
        let (mut out, mut todo) = (Vec::new(), vec![NONE]);
        while let Some(run) = todo.pop() {
            if run != NONE {
                out.push(run);
            }
            if let Some(mut next) = after.remove(&run) {
                next.sort_unstable_by(|a, b| b.cmp(a));
                todo.extend(next.into_iter().map(|(_, run)| run));
            }
        }
        out
    }

    /// What a rank holds, in all tiers or in one.
    pub(crate) fn dump(&self, worker: Worker, tier: Option<Tier>) -> Vec<KvEvent> {
        let Some(&rank) = self.by_worker.get(&worker) else { return Vec::new() };
        let state = self.rank(rank);
        let mut shown: Vec<(Tier, Group, Class)> = state
            .classes
            .iter()
            .map(|shown| {
                let group = Group { id: self.groups[shown.class.group_index()], kind: shown.kind };
                (shown.class.tier(), group, shown.class)
            })
            .filter(|(of, ..)| tier.is_none_or(|tier| tier == *of))
            .collect();
        shown.sort_unstable_by_key(|(tier, group, _)| (*tier, group.id));
        let alias_at = self.alias_at(rank);
        let classes = shown.iter().map(|(.., class)| *class).collect();
        let view = View { tree: self, rank, classes, alias_at };
        let runs = self.runs_of(rank);
        let sections: Vec<Section<u32>> = shown
            .into_iter()
            .map(|(tier, group, class)| Section { tier, group, entries: view.entries(class, &runs) })
            .collect();
        events(&view, &sections)
    }
}
