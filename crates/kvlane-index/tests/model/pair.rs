//! An index and the oracle, given the same operations.

use std::collections::HashMap;
use std::fmt::Debug;

use kvlane_index::reference::{Holding, Oracle};
use kvlane_index::{
    Applied, BlockHash, BlockSize, DepthGroups, HashedPrompt, Index, IndexConfig, IndexWriter, InstanceId,
    KvEvent, Overlap, Overlaps, Replacement, Tier, Worker, partition, snapshot,
};

use super::op::Op;
use super::regime::Regime;

/// An index beside the oracle. [`run`](Self::run) says where they differ.
pub struct Pair {
    pub config: IndexConfig,
    pub writer: IndexWriter,
    pub index: Index,
    pub oracle: Oracle,
    /// What `Op::Save` kept, as either dumped it.
    saved: HashMap<Worker, [Vec<KvEvent>; 2]>,
    /// Blocks of a part where replacements go on among the operations of other workers; `None`: they are done at once.
    pub part_blocks: Option<u32>,
    /// The replacement that goes on, and what the oracle is told at its end.
    replacing: Option<(Worker, Replacement, Vec<KvEvent>)>,
    overlaps: Overlaps,
    groups: DepthGroups,
    hashed: HashedPrompt,
    /// Queries compared, and those that had an answer.
    pub queries: [u64; 2],
    /// Pairs that the index shed, and blocks that it refused.
    pub given_up: [u64; 2],
}

fn same<T: PartialEq + Debug>(what: &str, ours: &T, theirs: &T) -> Result<(), String> {
    if ours == theirs { Ok(()) } else { Err(format!("{what}\n  index:  {ours:?}\n  oracle: {theirs:?}")) }
}

fn figures(o: &Overlap) -> [u32; 4] {
    [o.device, o.predicted, o.device + o.host + o.disk + o.external, o.mixed]
}

/// Whether nothing in `ours` is more than in `truth`.
pub fn within(ours: &Overlaps, truth: &Overlaps) -> bool {
    ours.ranks.iter().all(|o| {
        truth
            .get(o.worker)
            .is_some_and(|t| figures(o).iter().zip(figures(t)).all(|(ours, truth)| *ours <= truth))
    })
}

impl Pair {
    pub fn new(regime: &Regime, prefix_key: u64) -> Self {
        let mut config = IndexConfig::new(BlockSize::new(16).expect("16 is not 0"));
        config.prefix_key = prefix_key;
        config.max_orphans = regime.max_orphans;
        config.max_orphan_age_ms = regime.max_orphan_age_ms;
        if let Some(above) = regime.budget {
            config.budget_bytes = Some(partition(config).1.stats().bytes + above);
        }
        let (writer, index) = partition(config);
        let (saved, overlaps, hashed) = (HashMap::new(), Overlaps::default(), HashedPrompt::default());
        let groups = DepthGroups::default();
        let oracle = Oracle::new(&config);
        Self {
            config,
            writer,
            index,
            oracle,
            saved,
            part_blocks: None,
            replacing: None,
            overlaps,
            groups,
            hashed,
            queries: [0; 2],
            given_up: [0; 2],
        }
    }

    /// Does it on both sides and compares what they say of it.
    pub fn run(&mut self, op: &Op) -> Result<(), String> {
        self.run_seeing(op, |_| {})
    }

    /// The same; `between` sees both after the operation, before the oracle is told what the index shed to stay inside its budget.
    pub fn run_seeing(&mut self, op: &Op, between: impl FnOnce(&Self)) -> Result<(), String> {
        self.step(op)?;
        between(self);
        if self.config.budget_bytes.is_some() && !matches!(op, Op::Query(_)) {
            self.settle(op)
        } else {
            Ok(())
        }
    }

    /// Goes on with a replacement, or ends it where the operation is not one that may come between.
    fn replace_before(&mut self, op: &Op) {
        if matches!(op, Op::Query(_)) {
            return;
        }
        let Some((worker, mut replacement, theirs)) = self.replacing.take() else { return };
        let between = match op {
            Op::Event(other, _) | Op::Predict(other, ..) | Op::RemoveWorker(other) => *other != worker,
            _ => false,
        };
        let blocks = if between { self.part_blocks.unwrap_or(u32::MAX) } else { u32::MAX };
        while replacement.part(&mut self.writer, blocks).is_some() {
            if between {
                self.replacing = Some((worker, replacement, theirs));
                return;
            }
        }
        self.oracle.replace(worker, &theirs);
    }

    fn step(&mut self, op: &Op) -> Result<(), String> {
        self.replace_before(op);
        match op {
            Op::Event(worker, event) => self.apply(*worker, event),
            Op::RemoveWorker(worker) => {
                let (ours, theirs) = (self.writer.remove_worker(*worker), self.oracle.remove_worker(*worker));
                same("worker removed", &ours, &theirs)
            }
            Op::RemoveInstance(instance) => {
                let instance = InstanceId(*instance);
                let ours = self.writer.remove_instance(instance);
                same("instance removed", &ours, &self.oracle.remove_instance(instance))
            }
            Op::Predict(worker, blocks, until) => {
                self.index.predict(*worker, blocks, *until);
                self.oracle.predict(*worker, blocks, *until);
                Ok(())
            }
            Op::Expire(now) => same("orphans expired", &self.index.expire(*now), &self.oracle.expire(*now)),
            Op::ForgetPredictions(worker) => {
                self.index.forget_predictions(*worker);
                self.oracle.forget_predictions(*worker);
                Ok(())
            }
            Op::Query(prompt) => self.query(prompt),
            Op::Restart(key) => self.restart(*key),
            Op::Save(worker) => {
                self.saved.insert(*worker, [self.index.dump(*worker), self.oracle.dump(*worker)]);
                Ok(())
            }
            Op::Replace(worker, saved) => {
                let Some([ours, theirs]) = self.saved.get(saved) else { return Ok(()) };
                let replacement = self.writer.replace(*worker, ours);
                if self.part_blocks.is_some() {
                    self.replacing = Some((*worker, replacement, theirs.clone()));
                } else {
                    let _ = replacement.finish(&mut self.writer);
                    self.oracle.replace(*worker, theirs);
                }
                Ok(())
            }
            Op::Check => self.check(),
        }
    }

    fn apply(&mut self, worker: Worker, event: &KvEvent) -> Result<(), String> {
        let ours = self.writer.apply(worker, event);
        if ours.refused > 0 {
            // The oracle knows no bounds, so it is told only which group the event showed. The generator sees to it that all is
            // refused or nothing.
            self.given_up[1] += u64::from(ours.refused);
            if let KvEvent::Stored { tier, group, .. } | KvEvent::StoredByHash { tier, group, .. } = event {
                let (tier, group) = (*tier, *group);
                let _ = self.oracle.apply(worker, &KvEvent::StoredByHash { tier, group, hashes: Vec::new() });
            }
            let shed = ours.shed;
            return same("refused", &ours, &Applied { refused: ours.refused, shed, ..Applied::default() });
        }
        let theirs = self.oracle.apply(worker, event);
        same("applied", &Applied { shed: 0, ..ours }, &theirs)
    }

    /// While a replacement goes on: its worker shows no more than the old content or no more than the new one, the others what they hold.
    fn query_between(&mut self, prompt: &[BlockHash]) -> Result<(), String> {
        let Some((worker, _, dump)) = &self.replacing else { return Ok(()) };
        let mut after = self.oracle.clone();
        after.replace(*worker, dump);
        let (old, new) = (self.oracle.overlap(prompt), after.overlap(prompt));
        self.index.overlap(prompt, &mut self.overlaps);
        let of_worker = |from: &Overlaps| Overlaps {
            ranks: from.ranks.iter().filter(|o| o.worker == *worker).copied().collect(),
        };
        let ours = of_worker(&self.overlaps);
        if !within(&ours, &old) && !within(&ours, &new) {
            return Err(format!("between parts\n  index: {ours:?}\n  old: {old:?}\n  new: {new:?}"));
        }
        let others = |from: &Overlaps| from.ranks.iter().filter(|o| o.worker != *worker).copied().collect();
        let (ours, theirs): (Vec<Overlap>, Vec<Overlap>) = (others(&self.overlaps), others(&old));
        same("overlap of others between parts", &ours, &theirs)
    }

    fn query(&mut self, prompt: &[BlockHash]) -> Result<(), String> {
        if self.replacing.is_some() {
            return self.query_between(prompt);
        }
        let theirs = self.oracle.overlap(prompt);
        self.index.overlap(prompt, &mut self.overlaps);
        self.queries[0] += 1;
        self.queries[1] += u64::from(!self.overlaps.ranks.is_empty());
        same("overlap", &self.overlaps, &theirs)?;
        self.index.hash_prompt(prompt, &mut self.hashed);
        self.index.overlap_hashed(&self.hashed, &mut self.overlaps);
        same("overlap of a hashed prompt", &self.overlaps, &theirs)?;
        self.index.depth_groups(prompt, &mut self.groups);
        self.same_groups("depth groups", &theirs)?;
        self.index.depth_groups_hashed(&self.hashed, &mut self.groups);
        self.same_groups("depth groups of a hashed prompt", &theirs)
    }

    fn same_groups(&mut self, what: &str, theirs: &Overlaps) -> Result<(), String> {
        let depths: Vec<u32> = self.groups.iter().map(|group| group.depth).collect();
        let in_order = depths.is_sorted_by(|deeper, depth| deeper > depth);
        let members =
            |group: kvlane_index::DepthGroup<'_>| group.len() > 0 && group.workers().count() == group.len();
        if !in_order || !self.groups.iter().all(members) {
            return Err(format!("{what}\n  index:  {:?}", self.groups));
        }
        self.groups.list(&mut self.overlaps);
        same(what, &self.overlaps, theirs)
    }

    /// What a dump gives an empty oracle: the form in which two dumps are equal if they say the same.
    fn content(&self, worker: Worker, dump: &[KvEvent]) -> Vec<Holding> {
        let mut oracle = Oracle::new(&self.config);
        for event in dump {
            let _ = oracle.apply(worker, event);
        }
        oracle.holdings(worker)
    }

    fn workers(&self) -> Vec<Worker> {
        let mut workers: Vec<Worker> = self.oracle.workers().into_iter().map(|held| held.worker).collect();
        workers.dedup();
        workers
    }

    fn check(&mut self) -> Result<(), String> {
        same("workers", &self.index.workers(), &self.oracle.workers())?;
        let (ours, theirs) = (self.index.stats(), self.oracle.stats());
        let figures = |s: kvlane_index::IndexStats| [s.pairs, s.orphans, s.predicted];
        same("pairs, orphans and predicted", &figures(ours), &figures(theirs))?;
        for worker in self.workers() {
            let dump = self.index.dump(worker);
            same("dump", &dump, &self.oracle.dump(worker))?;
            let held = self.oracle.holdings(worker);
            same("what a dump says", &self.content(worker, &dump), &held)?;
            let tiers =
                Tier::ALL.iter().flat_map(|&tier| self.content(worker, &self.index.dump_tier(worker, tier)));
            same("what the dumps of the tiers say", &tiers.collect(), &held)?;
        }
        Ok(())
    }

    fn restart(&mut self, key: u64) -> Result<(), String> {
        let bytes = snapshot::write(&self.index);
        self.config.prefix_key = key;
        let config = IndexConfig { budget_bytes: None, ..self.config };
        let (mut writer, index) = partition(config);
        snapshot::restore(&bytes, &index, &mut writer).map_err(|error| format!("restart: {error}"))?;
        let mut oracle = Oracle::new(&self.config);
        for worker in self.workers() {
            for event in self.oracle.dump(worker) {
                let _ = oracle.apply(worker, &event);
            }
        }
        (self.writer, self.index, self.oracle) = (writer, index, oracle);
        Ok(())
    }

    /// Takes from the oracle what the index has shed since it was asked last; what remains must be equal.
    fn settle(&mut self, op: &Op) -> Result<(), String> {
        let (ours, theirs) = (self.index.stats(), self.oracle.stats());
        if (ours.pairs, ours.orphans, ours.predicted) == (theirs.pairs, theirs.orphans, theirs.predicted) {
            return Ok(());
        }
        self.given_up[0] += theirs.pairs.saturating_sub(ours.pairs);
        for worker in self.workers() {
            let dump = self.index.dump(worker);
            let mut left = self.content(worker, &dump).into_iter().peekable();
            for held in self.oracle.holdings(worker) {
                let kept = match left.peek() {
                    Some(same) if same.is_same_name(&held) => left.next().map_or(0, |same| same.copies),
                    _ => 0,
                };
                if kept > held.copies {
                    return Err(format!("after {op:?} {worker} has more than {held:?}"));
                }
                for _ in kept..held.copies {
                    let (tier, group, hashes) = (held.tier, held.group, vec![held.engine]);
                    let _ = self.oracle.apply(worker, &KvEvent::Removed { tier, group, hashes });
                }
            }
            if let Some(more) = left.next() {
                return Err(format!("after {op:?} {worker} has {more:?}, which the oracle has not"));
            }
        }
        if ours.predicted != theirs.predicted {
            // Which of them were shed cannot be seen.
            for worker in (0..64).flat_map(|instance| (0..4).map(move |rank| Worker::new(instance, rank))) {
                self.index.forget_predictions(worker);
                self.oracle.forget_predictions(worker);
            }
        }
        self.check()
    }

    /// Removes all workers; nothing may be left.
    pub fn drain(&mut self) -> Result<(), String> {
        self.replace_before(&Op::Check);
        for worker in self.workers() {
            let (ours, theirs) = (self.writer.remove_worker(worker), self.oracle.remove_worker(worker));
            same("worker removed at the end", &ours, &theirs)?;
        }
        self.index.expire(u64::MAX);
        let left = self.index.stats();
        // (A worker that was only predicted is known still.)
        same("left of nothing", &[left.places, left.runs, left.pairs, left.orphans, left.predicted], &[0; 5])
    }
}
