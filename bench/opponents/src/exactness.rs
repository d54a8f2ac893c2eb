//! How often an answer is wrong, and by generated operations in which regimes.
//!
//! A fast wrong answer is no answer: each table of speeds carries the share of wrong ones. The regimes here are small and
//! hostile on purpose: 3 different blocks, so that paths meet and part all the time, and the naive oracle
//! (`kvlane_index::reference`) can judge every answer.

use std::collections::BTreeSet;
use std::ops::AddAssign;

use kvlane_index::reference::Oracle;
use kvlane_index::{BlockHash, BlockSize, EngineHash, IndexConfig, KvEvent, StoredBlock, Worker};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use crate::contender::{Answer, Event, Setup, Tally};
use crate::lane::Lane;
use crate::workload::{mix, random, removed, stored};

/// Answers compared with the right ones.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Wrong {
    /// Answers compared.
    pub answers: u64,
    /// Of them, not equal to the right one.
    pub wrong: u64,
    /// Workers given more than they hold, over all answers.
    pub over: u64,
    /// Workers given less.
    pub under: u64,
}

impl Wrong {
    /// Compares one answer.
    pub fn compare(&mut self, right: &Answer, got: &Answer) {
        self.answers += 1;
        if right == got {
            return;
        }
        self.wrong += 1;
        for worker in right.keys().chain(got.keys()).collect::<BTreeSet<_>>() {
            let [right, got] = [right, got].map(|a| a.get(worker).copied().unwrap_or(0));
            self.over += u64::from(got > right);
            self.under += u64::from(got < right);
        }
    }

    /// Compares one answer by its tally.
    pub fn tally(&mut self, right: Tally, got: Tally) {
        self.answers += 1;
        self.wrong += u64::from(right != got);
        self.over += u64::from(got.blocks > right.blocks || got.workers > right.workers);
        self.under += u64::from(got.blocks < right.blocks || got.workers < right.workers);
    }

    /// Share of wrong answers, in percent.
    pub fn percent(&self) -> f64 {
        self.wrong as f64 * 100.0 / self.answers.max(1) as f64
    }
}

impl AddAssign for Wrong {
    fn add_assign(&mut self, other: Self) {
        let Self { answers, wrong, over, under } = other;
        self.answers += answers;
        self.wrong += wrong;
        self.over += over;
        self.under += under;
    }
}

/// What engines do that a router must follow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Regime {
    /// Its name in tables.
    pub name: &'static str,
    /// Blocks may leave before those that follow them.
    any_order: bool,
    /// Each worker names a prefix differently (vLLM before 0.29 unless a hash seed is set).
    own_names: bool,
    /// A worker names one prefix by either of two engine hashes.
    twins: bool,
    /// A worker may hold a block twice and remove one copy.
    copies: bool,
}

/// From the one that all get right to the ones that engines show now and then.
pub const REGIMES: [Regime; 6] = {
    let plain = Regime {
        name: "leaf-first removal",
        any_order: false,
        own_names: false,
        twins: false,
        copies: false,
    };
    [
        plain,
        Regime { name: "any-order removal", any_order: true, ..plain },
        Regime { name: "per-worker engine hashes", own_names: true, ..plain },
        Regime {
            name: "any-order removal, per-worker engine hashes",
            any_order: true,
            own_names: true,
            ..plain
        },
        Regime { name: "two engine hashes for one block", twins: true, ..plain },
        Regime { name: "two copies of one block", copies: true, ..plain },
    ]
};

/// What one worker holds, for choosing what it does next: names, their paths and copies.
type Holdings = FxHashMap<EngineHash, (Vec<BlockHash>, u8)>;

/// Makes operations of one regime, always such as an engine could make.
pub struct Generator {
    regime: Regime,
    state: u64,
    held: Vec<Holdings>,
}

impl Generator {
    /// For `workers` workers.
    pub fn new(regime: Regime, seed: u64, workers: usize) -> Self {
        Self { regime, state: mix(seed), held: vec![Holdings::default(); workers] }
    }

    fn below(&mut self, n: usize) -> usize {
        random(&mut self.state) as usize % n
    }

    fn name(&mut self, worker: usize, path: &[BlockHash]) -> EngineHash {
        let chain = path.iter().fold(1, |chain, b| mix(chain ^ mix(b.0)));
        let own = if self.regime.own_names { mix(worker as u64 + 77) } else { 0 };
        let twin = if self.regime.twins { self.below(2) as u64 * 0x5555 } else { 0 };
        EngineHash(mix(chain ^ own ^ twin))
    }

    fn sorted(&self, worker: usize) -> Vec<(EngineHash, Vec<BlockHash>)> {
        let mut all: Vec<_> = self.held[worker].iter().map(|(n, (p, _))| (*n, p.clone())).collect();
        all.sort();
        all
    }

    /// The next operation.
    pub fn event(&mut self) -> Event {
        let worker = self.below(self.held.len());
        let id = Worker::new(worker as u64, 0);
        let held = self.sorted(worker);
        let dice = self.below(200);
        if dice == 0 {
            self.held[worker].clear();
            return (id, KvEvent::Cleared { tier: None });
        }
        if held.is_empty() || dice < 130 {
            self.store(worker, id, &held)
        } else {
            self.remove(worker, id, held)
        }
    }

    fn store(&mut self, worker: usize, id: Worker, held: &[(EngineHash, Vec<BlockHash>)]) -> Event {
        let mut parent = None;
        let mut path = Vec::new();
        if !held.is_empty() && self.below(3) > 0 {
            let (name, of) = &held[self.below(held.len())];
            // An engine extends only a prefix that it holds whole.
            let paths: BTreeSet<&[BlockHash]> = held.iter().map(|(_, p)| &p[..]).collect();
            if (1..of.len()).all(|end| paths.contains(&of[..end])) {
                parent = Some(*name);
                path.clone_from(of);
            }
        }
        let mut blocks = Vec::new();
        for _ in 0..=self.below(6) {
            let block = BlockHash(1 + self.below(3) as u64);
            path.push(block);
            let name = self.name(worker, &path);
            let copies = self.held[worker].get(&name).map_or(0, |(_, copies)| *copies);
            let limit = if self.regime.copies { 2 } else { 1 };
            let copies = (copies + 1).min(limit);
            // An engine does not announce again what it holds, unless it holds a further copy.
            let known = self.held[worker].insert(name, (path.clone(), copies)).is_some_and(|k| k.1 == limit);
            if known && blocks.is_empty() {
                parent = Some(name);
                continue;
            }
            if known {
                break;
            }
            blocks.push(StoredBlock { engine: name, block });
        }
        if blocks.is_empty() {
            // All of it was there: say so by removing nothing.
            return removed(id, Vec::new());
        }
        stored(id, parent, blocks)
    }

    fn remove(&mut self, worker: usize, id: Worker, mut held: Vec<(EngineHash, Vec<BlockHash>)>) -> Event {
        let mut hashes = Vec::new();
        for _ in 0..=self.below(4) {
            let leaf = |i: &usize| {
                let path = &held[*i].1;
                !held.iter().any(|(_, p)| p.len() > path.len() && p.starts_with(path))
            };
            let may: Vec<usize> = (0..held.len()).filter(|i| self.regime.any_order || leaf(i)).collect();
            if may.is_empty() {
                break;
            }
            let chosen = may[self.below(may.len())];
            let name = held[chosen].0;
            hashes.push(name);
            let (_, copies) = self.held[worker].get_mut(&name).expect("listed as held");
            *copies -= 1;
            if *copies == 0 {
                self.held[worker].remove(&name);
                held.remove(chosen);
            }
        }
        removed(id, hashes)
    }

    /// A prompt that somebody may hold the beginning of.
    pub fn prompt(&mut self) -> Vec<BlockHash> {
        let all: Vec<_> = (0..self.held.len()).flat_map(|w| self.sorted(w)).collect();
        let mut prompt = if all.is_empty() { vec![] } else { all[self.below(all.len())].1.clone() };
        for _ in 0..=self.below(4) {
            prompt.push(BlockHash(1 + self.below(3) as u64));
        }
        prompt
    }
}

/// What is right by the oracle's device depths.
pub fn oracle_answer(oracle: &Oracle, prompt: &[BlockHash]) -> Answer {
    let ranks = oracle.overlap(prompt).ranks.into_iter();
    ranks.filter(|o| o.device > 0).map(|o| (o.worker, o.device)).collect()
}

/// An oracle for blocks of 16 tokens.
pub fn oracle() -> Oracle {
    Oracle::new(&IndexConfig::new(BlockSize::new(16).expect("not 0")))
}

/// Runs `steps` operations of `regime` for each seed, and asks four prompts after every fourth, with everything settled.
pub fn judge(lane: &mut dyn Lane, regime: Regime, seeds: u64, steps: usize) -> Wrong {
    const WORKERS: usize = 4;
    let mut wrong = Wrong::default();
    for seed in 0..seeds {
        let mut generator = Generator::new(regime, seed, WORKERS);
        let mut oracle = oracle();
        lane.start(Setup { workers: WORKERS, event_threads: 1 });
        for step in 0..steps {
            let event = generator.event();
            let _ = oracle.apply(event.0, &event.1);
            lane.step(&event);
            if step % 4 == 0 {
                for _ in 0..4 {
                    let prompt = generator.prompt();
                    wrong.compare(&oracle_answer(&oracle, &prompt), &lane.answer(&prompt));
                }
            }
        }
    }
    lane.stop();
    wrong
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::witness::Witness;

    #[test]
    fn the_witness_is_the_oracle() {
        for regime in REGIMES {
            for seed in 0..40 {
                let mut generator = Generator::new(regime, seed, 4);
                let (mut oracle, mut witness) = (oracle(), Witness::default());
                for step in 0..300 {
                    let event = generator.event();
                    let _ = oracle.apply(event.0, &event.1);
                    witness.apply(&event);
                    let prompt = generator.prompt();
                    assert_eq!(
                        witness.answer(&prompt),
                        oracle_answer(&oracle, &prompt),
                        "{} seed {seed} step {step}",
                        regime.name
                    );
                }
            }
        }
    }
}
