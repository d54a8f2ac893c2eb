//! Exchanging all that a rank holds for what a dump says, some blocks at a time.
//!
//! Clearing the rank and storing the dump would show readers nothing of it for a while, and the fillers of a dump (blocks that stand
//! for holes) as if they were held. Instead, the dump goes into a tree of its own, and then:
//!
//! 1. what the rank holds and the dump does not have is removed, run by run;
//! 2. the groups that the dump shows become the rank's;
//! 3. what the dump has and the rank does not hold is stored at its place, run by run.
//!
//! What both have is not touched. So at each moment the rank holds a part of the old or a part of the new: no overlap comes from
//! blocks of both that neither holds together. In parts, between which others write.

use super::Tree;
use super::ranks::{Map, Shown};
use super::shared::{Class, MAX_TRIPLES, NONE};
use super::store::Known;
use crate::{Applied, IndexConfig, KvEvent, Worker};

/// Times that the old is gone through because it was split or shed meanwhile; the last time in one part.
const PASSES: u32 = 4;

/// What is still to be done.
#[derive(Debug)]
pub(crate) struct Plan {
    worker: Worker,
    /// The dump, alone in a tree; its rank in it.
    wanted: Tree,
    wanted_rank: Option<u32>,
    step: Step,
}

#[derive(Debug)]
enum Step {
    Begin,
    Leave { runs: Vec<u32>, alias_at: Map<u32, u64>, kept: u64, pass: u32 },
    Enter { runs: Vec<u32>, alias_at: Map<u32, u64>, path: Vec<u64> },
    Done,
}

impl Plan {
    pub(crate) fn new(config: &IndexConfig, worker: Worker, dump: &[KvEvent]) -> Self {
        let mut wanted = Tree::new(&IndexConfig { budget_bytes: None, ..*config });
        for event in dump {
            let _ = wanted.apply(worker, event);
        }
        let wanted_rank = wanted.by_worker.get(&worker).copied();
        Self { worker, wanted, wanted_rank, step: Step::Begin }
    }

    /// Runs that are left to look at, the last first.
    fn runs_to_enter(&self) -> Vec<u32> {
        let Some(rank) = self.wanted_rank else { return Vec::new() };
        let mut runs = self.wanted.runs_of(rank);
        runs.reverse();
        runs
    }
}

impl Tree {
    /// Where a rank holds a name in a class: the prefix hash there, and how many copies.
    fn held_as(&self, rank: u32, class: Class, name: u64) -> Option<(u64, u8)> {
        let Known::At(block) = self.known(rank, name) else { return None };
        let copies = match self.rank(rank).twins.get(&block) {
            Some(twins) => {
                let twin = twins.iter().find(|twin| twin.name == name)?;
                twin.copies.iter().find(|(c, _)| *c == class)?.1
            }
            None => {
                let (run, at) = self.locate(block);
                self.copies(rank, class, run, at, block)
            }
        };
        (copies > 0).then(|| (self.prefix_of(block), copies))
    }

    /// The class of the same tier and group in another tree.
    fn class_in(&self, other: &Self, class: Class) -> Option<Class> {
        other.class(class.tier(), self.groups[class.group_index()])
    }

    /// Does the next part of a replacement, of about `most` blocks; `None` when there is nothing left to do.
    pub(crate) fn replace_part(&mut self, plan: &mut Plan, most: u32) -> Option<Applied> {
        let mut applied = Applied::default();
        self.clock = self.clock.saturating_add(1);
        plan.step = match std::mem::replace(&mut plan.step, Step::Done) {
            Step::Done => return None,
            Step::Begin => match self.by_worker.get(&plan.worker).copied() {
                Some(rank) => {
                    applied.cleared = self.drop_orphans(rank, 0, 0);
                    self.begin_pass(rank, 1)
                }
                None => self.begin_entering(plan, &mut applied),
            },
            Step::Leave { mut runs, alias_at, mut kept, pass } => {
                match self.by_worker.get(&plan.worker).copied() {
                    Some(rank) => {
                        let mut blocks = 0;
                        while (blocks < most || pass == PASSES)
                            && let Some(run) = runs.pop()
                        {
                            blocks += 1 + self.len(run);
                            kept += self.leave(rank, run, plan, &alias_at, &mut applied);
                        }
                        let names: u64 = self.rank(rank).classes.iter().map(|shown| shown.names).sum();
                        if !runs.is_empty() {
                            Step::Leave { runs, alias_at, kept, pass }
                        } else if kept == names || pass == PASSES {
                            self.begin_entering(plan, &mut applied)
                        } else {
                            self.begin_pass(rank, pass + 1)
                        }
                    }
                    None => self.begin_entering(plan, &mut applied),
                }
            }
            Step::Enter { mut runs, alias_at, mut path } => {
                if let Some(rank) = self.by_worker.get(&plan.worker).copied() {
                    let (mut blocks, mut live) = (0, Vec::new());
                    while blocks < most
                        && let Some(run) = runs.pop()
                    {
                        let depth = plan.wanted.metas[run as usize].depth as usize;
                        path.truncate(depth);
                        live.truncate(depth);
                        let prefixes = (0..plan.wanted.len(run))
                            .map(|at| plan.wanted.prefix_of(plan.wanted.block_at(run, at)));
                        path.extend(prefixes);
                        blocks += 1 + plan.wanted.len(run);
                        self.enter(rank, run, plan, &alias_at, &path, &mut live, &mut applied);
                    }
                    if runs.is_empty() { Step::Done } else { Step::Enter { runs, alias_at, path } }
                } else {
                    Step::Done
                }
            }
        };
        self.reap();
        applied.shed = self.shed_if_due();
        Some(applied)
    }

    fn begin_pass(&self, rank: u32, pass: u32) -> Step {
        let mut runs = self.rank(rank).runs.clone();
        runs.sort_unstable();
        runs.dedup();
        Step::Leave { runs, alias_at: self.alias_at(rank), kept: 0, pass }
    }

    /// The rank's groups become the dump's, all at once: what a group limits is limited by the old ones or by the new ones.
    fn begin_entering(&mut self, plan: &Plan, applied: &mut Applied) -> Step {
        let wanted: Vec<_> = plan.wanted.workers().into_iter().map(|held| (held.tier, held.group)).collect();
        if !wanted.is_empty() && self.meet(plan.worker).is_none() {
            applied.refused += wanted.len() as u32;
            return Step::Done;
        }
        if let Some(rank) = self.by_worker.get(&plan.worker).copied() {
            let mut classes = Vec::new();
            for (tier, group) in wanted {
                match self.intern(tier, group.id) {
                    Some(class) => classes.push(Shown { class, kind: group.kind, names: 0 }),
                    None => applied.refused += 1,
                }
            }
            let before = std::mem::take(&mut self.rank_mut(rank).classes);
            self.triples -= before.len() as u32;
            for old in before {
                match classes.iter_mut().find(|new| new.class == old.class) {
                    Some(new) => new.names = old.names,
                    None if old.names > 0 => classes.push(old),
                    None => {}
                }
            }
            classes.sort_unstable_by_key(|shown| shown.class);
            // Those that hold nothing make room where there is none.
            while self.triples + classes.len() as u32 > MAX_TRIPLES
                && let Some(at) = classes.iter().rposition(|shown| shown.names == 0)
            {
                classes.remove(at);
                applied.refused += 1;
            }
            self.triples += classes.len() as u32;
            self.rank_mut(rank).classes = classes;
            self.publish_kinds(rank);
        }
        let alias_at = plan.wanted_rank.map(|rank| plan.wanted.alias_at(rank)).unwrap_or_default();
        Step::Enter { runs: plan.runs_to_enter(), alias_at, path: Vec::new() }
    }

    /// Removes what a rank holds in a run and the dump does not have; how many (tier, group, name) stay.
    fn leave(
        &mut self,
        rank: u32,
        run: u32,
        plan: &Plan,
        alias_at: &Map<u32, u64>,
        applied: &mut Applied,
    ) -> u64 {
        let (mut kept, mut names) = (0, Vec::new());
        let classes: Vec<Class> = self.rank(rank).classes.iter().map(|shown| shown.class).collect();
        // From the end, so that the run is only shortened.
        for at in (0..self.len(run)).rev() {
            let block = self.block_at(run, at);
            let mut held = Vec::new();
            for &class in &classes {
                if self.holds(run, at, rank, class) {
                    self.names_at(rank, class, block, alias_at, &mut names);
                    held.extend(names.iter().map(|&(name, copies)| (class, name, copies)));
                }
            }
            for (class, name, copies) in held {
                let wanted = plan
                    .wanted_rank
                    .zip(self.class_in(&plan.wanted, class))
                    .and_then(|(rank, class)| plan.wanted.held_as(rank, class, name))
                    .filter(|(prefix, _)| *prefix == self.prefix_of(block))
                    .map_or(0, |(_, copies)| copies);
                for _ in wanted..copies {
                    self.revoke(rank, class, name, block);
                    applied.removed += 1;
                }
                kept += u64::from(wanted > 0);
            }
        }
        kept
    }

    /// Stores what the dump has in a run of its tree and the rank does not hold. `path`: the prefix hashes from the root to the end of the
    /// run; `live`: the blocks here of as much of it as is known in this part.
    #[expect(clippy::too_many_arguments, reason = "the state of one walk, which lives in two places")]
    fn enter(
        &mut self,
        rank: u32,
        run: u32,
        plan: &Plan,
        alias_at: &Map<u32, u64>,
        path: &[u64],
        live: &mut Vec<u32>,
        applied: &mut Applied,
    ) {
        let (wanted, Some(theirs)) = (&plan.wanted, plan.wanted_rank) else { return };
        let mut names = Vec::new();
        for shown in &wanted.rank(theirs).classes {
            let Some(class) = wanted.class_in(self, shown.class) else { continue };
            if !self.rank(rank).classes.iter().any(|shown| shown.class == class) {
                continue;
            }
            let cover = wanted.cover(run, theirs, shown.class);
            for at in (0..wanted.len(run)).filter(|&at| wanted.covers(cover, at)) {
                let block = wanted.block_at(run, at);
                wanted.names_at(theirs, shown.class, block, alias_at, &mut names);
                for &(name, copies) in &names {
                    let prefix = wanted.prefix_of(block);
                    let had = self
                        .held_as(rank, class, name)
                        .filter(|(at, _)| *at == prefix)
                        .map_or(0, |(_, copies)| copies);
                    if had >= copies {
                        continue;
                    }
                    if !self.has_room(path.len()) {
                        applied.refused += u32::from(copies - had);
                        continue;
                    }
                    self.reach(rank, path, live);
                    let here = live[wanted.metas[run as usize].depth as usize + at as usize];
                    for _ in had..copies {
                        self.store_one(rank, class, name, here, applied);
                    }
                }
            }
        }
    }

    /// Makes the places of a path, as far as they are not in `live` yet.
    fn reach(&mut self, rank: u32, path: &[u64], live: &mut Vec<u32>) {
        while live.len() < path.len() {
            let after = live.last().copied().unwrap_or(NONE);
            let segment = self.advance(after, live.len() as u32, &path[live.len()..], rank);
            for at in segment.from..segment.from + segment.count {
                live.push(self.block_at(segment.run, at));
            }
        }
    }
}
