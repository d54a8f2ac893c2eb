//! The production structure against the oracle, on generated operations.
//!
//! `KVLANE_OPS` sets the operations for each regime (default 3,000 in 4 seeds), `KVLANE_SEED` the first seed. A failure
//! prints the regime and seed, and the last operations before it.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test, set by the environment"
)]

mod generator;

use generator::{Generator, Op, REGIMES, Regime};
use kvlane_index::reference::Oracle;
use kvlane_index::{BlockSize, Index, IndexConfig, IndexWriter, InstanceId, Overlaps, Worker};

struct Pair {
    writer: IndexWriter,
    index: Index,
    oracle: Oracle,
    overlaps: Overlaps,
    /// Queries, and those with an answer.
    queries: [u64; 2],
}

impl Pair {
    fn new(seed: u64) -> Self {
        let mut config = IndexConfig::new(BlockSize::new(16).unwrap());
        config.prefix_key = seed;
        let (writer, index) = kvlane_index::partition(config);
        Self { writer, index, oracle: Oracle::new(&config), overlaps: Overlaps::default(), queries: [0; 2] }
    }

    fn run(&mut self, op: &Op) -> Result<(), String> {
        let same = |what, ours: &dyn std::fmt::Debug, theirs: &dyn std::fmt::Debug| {
            let (ours, theirs) = (format!("{ours:?}"), format!("{theirs:?}"));
            if ours == theirs { Ok(()) } else { Err(format!("{what}\n  ours:   {ours}\n  oracle: {theirs}")) }
        };
        match op {
            Op::Event(worker, event) => {
                let (ours, oracle) = (self.writer.apply(*worker, event), self.oracle.apply(*worker, event));
                same("applied", &ours, &oracle)
            }
            Op::RemoveWorker(worker) => {
                let (ours, oracle) = (self.writer.remove_worker(*worker), self.oracle.remove_worker(*worker));
                same("removed worker", &ours, &oracle)
            }
            Op::RemoveInstance(instance) => {
                let instance = InstanceId(*instance);
                let (ours, oracle) =
                    (self.writer.remove_instance(instance), self.oracle.remove_instance(instance));
                same("removed instance", &ours, &oracle)
            }
            Op::Predict(worker, blocks, until) => {
                self.index.predict(*worker, blocks, *until);
                self.oracle.predict(*worker, blocks, *until);
                Ok(())
            }
            Op::Expire(now) => {
                self.index.expire(*now);
                self.oracle.expire(*now);
                Ok(())
            }
            Op::ForgetPredictions(worker) => {
                self.index.forget_predictions(*worker);
                self.oracle.forget_predictions(*worker);
                Ok(())
            }
            Op::Query(prompt) => {
                self.index.overlap(prompt, &mut self.overlaps);
                self.queries[0] += 1;
                self.queries[1] += u64::from(!self.overlaps.ranks.is_empty());
                same("overlap", &self.overlaps, &self.oracle.overlap(prompt))
            }
        }
    }

    fn check_figures(&self) -> Result<(), String> {
        if self.index.workers() != self.oracle.workers() {
            return Err(format!("workers\n  {:?}\n  {:?}", self.index.workers(), self.oracle.workers()));
        }
        let (ours, oracle) = (self.index.stats(), self.oracle.stats());
        if (ours.pairs, ours.orphans, ours.predicted) != (oracle.pairs, oracle.orphans, oracle.predicted) {
            return Err(format!("stats\n  {ours:?}\n  {oracle:?}"));
        }
        Ok(())
    }

    /// An index that is given all dumps answers like the oracle, except for predictions and orphans.
    fn check_dump(&self, prompts: &[Vec<kvlane_index::BlockHash>]) -> Result<(), String> {
        let mut copy = Self::new(1);
        let mut workers: Vec<Worker> = self.index.workers().iter().map(|held| held.worker).collect();
        workers.dedup();
        let mut bare = self.oracle.clone();
        for worker in workers {
            bare.forget_predictions(worker);
            for event in self.index.dump(worker) {
                let _ = copy.writer.apply(worker, &event);
                let _ = copy.oracle.apply(worker, &event);
            }
        }
        for prompt in prompts {
            copy.index.overlap(prompt, &mut copy.overlaps);
            let mut wanted = bare.overlap(prompt);
            wanted.ranks.retain(|o| o.device + o.host + o.disk + o.external > 0);
            if copy.overlaps != wanted {
                return Err(format!("dump {prompt:?}\n  {:?}\n  {wanted:?}", copy.overlaps));
            }
        }
        Ok(())
    }

    fn check_empty(mut self, workers: &[Worker]) {
        for worker in workers {
            let _ = self.writer.remove_worker(*worker);
        }
        let stats = self.index.stats();
        assert_eq!((stats.places, stats.runs, stats.pairs), (0, 0, 0), "something is left of nothing");
    }
}

fn check(regime: Regime, seed: u64, ops: usize) {
    let mut generator = Generator::new(regime, seed);
    let mut pair = Pair::new(seed);
    let mut trail: Vec<Op> = Vec::new();
    let mut prompts = Vec::new();
    let mut workers = Vec::new();
    for step in 0..ops {
        let op = generator.next();
        match &op {
            Op::Query(prompt) => prompts.push(prompt.clone()),
            Op::Event(worker, _) | Op::Predict(worker, ..) => workers.push(*worker),
            _ => {}
        }
        let mut result = pair.run(&op);
        trail.push(op);
        if result.is_ok() && step % 500 == 499 {
            workers.sort_unstable();
            workers.dedup();
            result = pair.check_figures();
            if result.is_ok() && step % 1000 == 999 {
                result = pair.check_dump(&prompts[prompts.len().saturating_sub(100)..]);
            }
        }
        if let Err(difference) = result {
            let from = trail.len().saturating_sub(25);
            let trail: Vec<String> = trail[from..].iter().map(|op| format!("{op:?}")).collect();
            panic!("{}\nregime {:?}, seed {seed}, step {step}: {difference}", trail.join("\n"), regime.name);
        }
    }
    let [queries, answered] = pair.queries;
    assert!(
        answered * 4 > queries,
        "regime {:?} asks too much about nothing: {answered} of {queries}",
        regime.name
    );
    pair.check_empty(&workers);
}

#[test]
fn production_equals_the_oracle() {
    let number = |name, or| std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(or);
    let (ops, first): (usize, u64) = (number("KVLANE_OPS", 3_000) as usize, number("KVLANE_SEED", 1));
    let only = std::env::var("KVLANE_REGIME").unwrap_or_default();
    for regime in REGIMES.into_iter().filter(|r| r.name.contains(&only)) {
        for seed in first..first + 4 {
            check(regime, seed * 7919, ops / 4);
        }
    }
}

/// With a budget, what remains is exact: the oracle, told to remove what was shed, would answer the same. Seen from outside:
/// nothing is over-counted, the budget holds, and predictions go first.
#[test]
fn a_budget_holds_and_only_under_counts() {
    let mut config = IndexConfig::new(BlockSize::new(16).unwrap());
    let fixed = kvlane_index::partition(config).1.stats().bytes;
    config.budget_bytes = Some(fixed + 200_000);
    let (mut writer, index) = kvlane_index::partition(config);
    let mut oracle = Oracle::new(&config);
    let mut generator =
        Generator::new(Regime { alphabet: 40, chain: 30, tiers: true, hashes: 2, ..generator::PLAIN }, 3);
    let (mut shed, mut overlaps) = (0u64, Overlaps::default());
    for step in 0..12_000 {
        match generator.next() {
            Op::Event(worker, event) => {
                shed += u64::from(writer.apply(worker, &event).shed);
                let _ = oracle.apply(worker, &event);
            }
            Op::Query(prompt) => {
                index.overlap(&prompt, &mut overlaps);
                let truth = oracle.overlap(&prompt);
                for ours in &overlaps.ranks {
                    let theirs = truth.get(ours.worker).expect("the oracle knows all that we know");
                    assert!(ours.device <= theirs.device, "{ours:?} {theirs:?}");
                    assert!(ours.mixed <= theirs.mixed, "{ours:?} {theirs:?}");
                }
            }
            _ => {}
        }
        if step % 640 == 639 {
            assert!(index.stats().bytes <= fixed + 300_000, "step {step}: {:?}", index.stats());
        }
    }
    assert!(shed > 1000, "{shed}");
    // Figures still agree with what the runs say.
    let workers: Vec<Worker> = index.workers().iter().map(|held| held.worker).collect();
    for worker in workers {
        let _ = writer.remove_worker(worker);
    }
    let stats = index.stats();
    assert_eq!((stats.places, stats.runs, stats.pairs), (0, 0, 0), "something is left of nothing");
}

#[test]
fn predictions_are_shed_first() {
    let mut config = IndexConfig::new(BlockSize::new(16).unwrap());
    config.budget_bytes = Some(kvlane_index::partition(config).1.stats().bytes + 500_000);
    let (mut writer, index) = kvlane_index::partition(config);
    let mut shed = 0;
    for i in 0..3_000u64 {
        let blocks: Vec<_> = (0..20).map(|k| kvlane_index::BlockHash(1000 * i + k)).collect();
        index.predict(Worker::new(1, 0), &blocks, 1_000 + i);
        if i < 60 {
            let stored = blocks.iter().map(|&block| kvlane_index::StoredBlock {
                engine: kvlane_index::EngineHash(block.0 + 7),
                block,
            });
            let (tier, group) = (kvlane_index::Tier::Device, kvlane_index::Group::default());
            let event = kvlane_index::KvEvent::Stored { tier, group, parent: None, blocks: stored.collect() };
            shed += writer.apply(Worker::new(2, 0), &event).shed;
        }
    }
    let stats = index.stats();
    assert!(stats.predicted > 0 && stats.predicted < 60_000, "{stats:?}");
    assert_eq!((stats.pairs, shed), (60 * 20, 0), "{stats:?}");
}
