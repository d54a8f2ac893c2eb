//! Operations as engines send them, and as they never should: a small alphabet, so that paths collide and branch.

use std::collections::HashMap;

use kvlane_index::{BlockHash, EngineHash, Group, GroupId, GroupKind, KvEvent, StoredBlock, Tier, Worker};

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'a, T>(&mut self, from: &'a [T]) -> Option<&'a T> {
        if from.is_empty() { None } else { from.get(self.below(from.len() as u64) as usize) }
    }
}

/// What kinds of operations a run generates.
#[derive(Clone, Copy, Debug)]
pub struct Regime {
    pub name: &'static str,
    pub workers: u64,
    pub ranks: u32,
    /// Different content hashes; few make prompts collide.
    pub alphabet: u64,
    /// Longest chain of one event.
    pub chain: u64,
    /// Engine hashes: 0 = equal everywhere, 1 = differ by worker, 2 = several for one block of a worker, 3 = do not chain.
    pub hashes: u8,
    pub tiers: bool,
    pub groups: bool,
    pub predictions: bool,
    pub orphans: bool,
    /// Only leaves are removed.
    pub leaf_first: bool,
    pub copies: bool,
}

pub const PLAIN: Regime = Regime {
    name: "plain",
    workers: 4,
    ranks: 1,
    alphabet: 3,
    chain: 6,
    hashes: 0,
    tiers: false,
    groups: false,
    predictions: false,
    orphans: false,
    leaf_first: false,
    copies: false,
};

pub const REGIMES: [Regime; 14] = [
    Regime { name: "leaf first", leaf_first: true, ..PLAIN },
    PLAIN,
    Regime { name: "per-worker hashes", hashes: 1, ..PLAIN },
    Regime { name: "twins", hashes: 2, ..PLAIN },
    Regime { name: "unchained hashes", hashes: 3, ..PLAIN },
    Regime { name: "copies", copies: true, ..PLAIN },
    Regime { name: "long chains", chain: 60, alphabet: 2, workers: 6, ..PLAIN },
    Regime { name: "many workers", workers: 200, alphabet: 2, ..PLAIN },
    Regime { name: "predictions", predictions: true, ..PLAIN },
    Regime { name: "tiers", tiers: true, ranks: 2, ..PLAIN },
    Regime { name: "groups", groups: true, predictions: true, ..PLAIN },
    Regime { name: "orphans", orphans: true, hashes: 1, ..PLAIN },
    Regime { name: "orphans of twins", orphans: true, hashes: 2, copies: true, tiers: true, ..PLAIN },
    Regime {
        name: "everything",
        ranks: 2,
        chain: 20,
        hashes: 2,
        tiers: true,
        groups: true,
        predictions: true,
        orphans: true,
        copies: true,
        ..PLAIN
    },
];

/// One operation on a partition.
#[derive(Clone, Debug)]
pub enum Op {
    Event(Worker, KvEvent),
    RemoveWorker(Worker),
    RemoveInstance(u64),
    Predict(Worker, Vec<BlockHash>, u64),
    Expire(u64),
    ForgetPredictions(Worker),
    Query(Vec<BlockHash>),
}

/// What the generator believes a worker to hold: good enough to name things that exist.
#[derive(Default)]
struct Belief {
    names: Vec<(EngineHash, Vec<BlockHash>, Tier, Group)>,
}

pub struct Generator {
    pub regime: Regime,
    pub random: Random,
    beliefs: HashMap<Worker, Belief>,
    now_ms: u64,
}

fn mix(x: u64) -> u64 {
    Random(x).next()
}

impl Generator {
    pub fn new(regime: Regime, seed: u64) -> Self {
        Self { regime, random: Random(seed), beliefs: HashMap::new(), now_ms: 0 }
    }

    fn worker(&mut self) -> Worker {
        Worker::new(
            self.random.below(self.regime.workers),
            self.random.below(u64::from(self.regime.ranks)) as u32,
        )
    }

    fn block(&mut self) -> BlockHash {
        BlockHash(1 + self.random.below(self.regime.alphabet))
    }

    fn name(&mut self, worker: Worker, path: &[BlockHash]) -> EngineHash {
        let chained = path.iter().fold(7, |sum, block| mix(sum ^ block.0));
        EngineHash(match self.regime.hashes {
            0 => chained,
            1 => mix(chained ^ mix(worker.instance.0 + 1)),
            2 => mix(chained ^ self.random.below(3)),
            _ => path[path.len() - 1].0 + 10 * self.random.below(4),
        })
    }

    fn place(&mut self) -> (Tier, Group) {
        let tier = if self.regime.tiers { Tier::ALL[self.random.below(4) as usize] } else { Tier::Device };
        let group = if self.regime.groups {
            match self.random.below(4) {
                0 => Group { id: GroupId(1), kind: GroupKind::Sliding { window_tokens: 33 } },
                1 => Group { id: GroupId(2), kind: GroupKind::Recurrent },
                2 if self.random.one_in(4) => Group { id: GroupId(3), kind: GroupKind::Full },
                _ => Group::default(),
            }
        } else {
            Group::default()
        };
        (tier, group)
    }

    fn path(&mut self) -> Vec<BlockHash> {
        let workers: Vec<Worker> = self.beliefs.keys().copied().collect::<Vec<_>>();
        let mut workers = workers;
        workers.sort_unstable();
        let held = self.random.pick(&workers).copied();
        let mut path = Vec::new();
        if let Some(worker) = held
            && let Some((_, known, ..)) = self.random.pick(&self.beliefs[&worker].names)
        {
            path.clone_from(known);
        }
        for _ in 0..self.random.below(5) {
            path.push(self.block());
        }
        path
    }

    fn stored(&mut self) -> Op {
        let worker = self.worker();
        let (tier, group) = self.place();
        let belief = self.beliefs.entry(worker).or_default();
        if self.regime.orphans && self.random.one_in(12) {
            let hashes: Vec<EngineHash> = (0..1 + self.random.below(3))
                .map(|_| match self.random.pick(&belief.names) {
                    Some((name, ..)) if !self.random.one_in(3) => *name,
                    _ => EngineHash(self.random.below(40)),
                })
                .collect();
            for name in &hashes {
                if let Some((_, path, ..)) = belief.names.iter().find(|(n, ..)| n == name).cloned() {
                    belief.names.push((*name, path, tier, group));
                }
            }
            return Op::Event(worker, KvEvent::StoredByHash { tier, group, hashes });
        }
        let (mut parent, mut path) = (None, Vec::new());
        if !self.random.one_in(3)
            && let Some((name, known, ..)) = self.random.pick(&belief.names)
        {
            (parent, path) = (Some(*name), known.clone());
        }
        if self.regime.orphans && self.random.one_in(4) {
            // A parent that is not held, but may come.
            for _ in 0..=self.random.below(2) {
                path.push(self.block());
            }
            parent = Some(self.name(worker, &path));
        }
        if self.regime.copies && self.random.one_in(3) {
            // The same chain once more.
            if let Some((_, known, ..)) = self.random.pick(&self.beliefs[&worker].names).cloned() {
                let from = self.random.below(known.len() as u64) as usize;
                parent = (from > 0).then(|| self.name(worker, &known[..from]));
                let mut blocks = Vec::new();
                for end in from + 1..=known.len() {
                    let engine = self.name(worker, &known[..end]);
                    blocks.push(StoredBlock { engine, block: known[end - 1] });
                    let names = &mut self.beliefs.get_mut(&worker).expect("made above").names;
                    names.push((engine, known[..end].to_vec(), tier, group));
                }
                return Op::Event(worker, KvEvent::Stored { tier, group, parent, blocks });
            }
        }
        let mut blocks = Vec::new();
        for _ in 0..1 + self.random.below(self.regime.chain) {
            let block = self.block();
            path.push(block);
            let engine = self.name(worker, &path);
            blocks.push(StoredBlock { engine, block });
            let names = &mut self.beliefs.get_mut(&worker).expect("made above").names;
            names.push((engine, path.clone(), tier, group));
        }
        Op::Event(worker, KvEvent::Stored { tier, group, parent, blocks })
    }

    fn removed(&mut self) -> Op {
        let worker = self.worker();
        let leaf_first = self.regime.leaf_first;
        let names = &mut self.beliefs.entry(worker).or_default().names;
        let Some((_, _, tier, group)) = self.random.pick(names).cloned() else { return self.stored() };
        let mut hashes = Vec::new();
        // Sometimes a stretch from the end of a chain, as engines evict.
        let stretch = self.random.one_in(2);
        let mut at = self.random.below(names.len() as u64) as usize;
        for _ in 0..1 + self.random.below(if stretch { self.regime.chain } else { 4 }) {
            if names.is_empty() {
                break;
            }
            if !stretch {
                at = self.random.below(names.len() as u64) as usize;
            }
            at = at.min(names.len() - 1);
            if leaf_first {
                let path = names[at].1.clone();
                let deepest = |i: &usize| names[*i].1.starts_with(&path);
                at = (0..names.len()).filter(deepest).max_by_key(|i| names[*i].1.len()).expect("itself");
            }
            hashes.push(names.remove(at).0);
            at = at.saturating_sub(1);
        }
        if self.random.one_in(10) {
            hashes.push(EngineHash(self.random.below(50)));
        }
        if self.regime.tiers && self.random.one_in(5) {
            let (tier, group) = self.place();
            return Op::Event(worker, KvEvent::Removed { tier, group: group.id, hashes });
        }
        Op::Event(worker, KvEvent::Removed { tier, group: group.id, hashes })
    }

    pub fn next(&mut self) -> Op {
        // Forget what grows too large: paths get deep, and deep paths rarely meet.
        for belief in self.beliefs.values_mut() {
            if belief.names.len() > 120 {
                belief.names.drain(..60);
            }
            belief.names.retain(|(_, path, ..)| path.len() < 150);
        }
        match self.random.below(100) {
            0..35 => self.stored(),
            35..55 => self.removed(),
            55..56 => {
                let worker = self.worker();
                let tier = self.regime.tiers.then(|| Tier::ALL[self.random.below(4) as usize]);
                let tier = if self.random.one_in(2) { tier } else { None };
                let names = &mut self.beliefs.entry(worker).or_default().names;
                names.retain(|(_, _, t, _)| tier.is_some_and(|tier| tier != *t));
                match self.random.below(6) {
                    0 => {
                        names.clear();
                        Op::RemoveWorker(worker)
                    }
                    1 => {
                        self.beliefs.retain(|w, _| w.instance != worker.instance);
                        Op::RemoveInstance(worker.instance.0)
                    }
                    _ => Op::Event(worker, KvEvent::Cleared { tier }),
                }
            }
            56..66 if self.regime.predictions => {
                let worker = self.worker();
                let path = self.path();
                match self.random.below(12) {
                    0 => Op::ForgetPredictions(worker),
                    1..4 => {
                        self.now_ms += self.random.below(50);
                        Op::Expire(self.now_ms)
                    }
                    _ => Op::Predict(worker, path, self.now_ms + self.random.below(100)),
                }
            }
            _ => Op::Query(self.path()),
        }
    }
}
