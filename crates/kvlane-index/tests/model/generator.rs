//! Operations as engines send them, and as they never should: a small alphabet, so that prompts collide and branch.

use std::collections::BTreeMap;

use kvlane_index::{BlockHash, EngineHash, Group, GroupId, GroupKind, KvEvent, StoredBlock, Tier, Worker};

use super::choice::{Choice, mix};
use super::op::Op;
use super::regime::{Names, Regime};

/// Names that the generator remembers of a worker.
const REMEMBERED: usize = 120;

/// A name, the prompt that it ends, and where it is.
#[derive(Clone)]
struct Held {
    name: EngineHash,
    path: Vec<BlockHash>,
    tier: Tier,
    group: Group,
}

/// Makes operations. What it believes of each worker is good enough to name things that exist; it need not be true.
pub struct Generator<'a> {
    pub regime: Regime,
    pub choice: Choice<'a>,
    beliefs: BTreeMap<Worker, Vec<Held>>,
    /// Lives of each instance.
    lives: BTreeMap<u64, u64>,
    saved: Vec<Worker>,
    now_ms: u64,
    /// Where the last operation did something.
    touched: Vec<BlockHash>,
}

impl<'a> Generator<'a> {
    pub fn new(regime: Regime, choice: Choice<'a>) -> Self {
        let (beliefs, lives) = (BTreeMap::new(), BTreeMap::new());
        Self { regime, choice, beliefs, lives, saved: Vec::new(), now_ms: 0, touched: Vec::new() }
    }

    fn worker(&mut self) -> Worker {
        let instance = self.choice.below(self.regime.workers);
        Worker::new(instance, self.choice.below(u64::from(self.regime.ranks)) as u32)
    }

    fn block(&mut self) -> BlockHash {
        // The ends of the range are contents like any other.
        match self.choice.below(self.regime.alphabet) {
            2 => BlockHash(u64::MAX),
            content => BlockHash(content),
        }
    }

    fn name(&mut self, worker: Worker, path: &[BlockHash]) -> EngineHash {
        let life =
            if self.regime.restarts { self.lives.get(&worker.instance.0).copied().unwrap_or(0) } else { 0 };
        let chained = path.iter().fold(7 + life, |sum, block| mix(sum ^ block.0));
        EngineHash(match self.regime.names {
            Names::Chained => chained,
            Names::PerWorker => mix(chained ^ mix(worker.instance.0 + 1)),
            Names::Several => mix(chained ^ self.choice.below(3)),
            Names::Unchained => {
                path.last().map_or(0, |b| b.0).wrapping_mul(10).wrapping_add(self.choice.below(4))
            }
            Names::Colliding => u64::MAX.wrapping_add(self.choice.below(24)),
        })
    }

    fn place(&mut self) -> (Tier, Group) {
        let tier = if self.regime.tiers { Tier::ALL[self.choice.below(4) as usize] } else { Tier::Device };
        if !self.regime.groups {
            return (tier, Group::default());
        }
        let group = match self.choice.below(8) {
            0 | 1 => Group { id: GroupId(1), kind: GroupKind::Sliding { window_tokens: 33 } },
            2 | 3 => Group { id: GroupId(2), kind: GroupKind::Recurrent },
            4 if self.choice.one_in(4) => Group { id: GroupId(u16::MAX), kind: GroupKind::Full },
            // An engine that changes its mind.
            5 if self.choice.one_in(8) => {
                let window_tokens = [0, 1, 2, 16, 17, 100, u32::MAX][self.choice.below(7) as usize];
                Group { id: GroupId(self.choice.below(3) as u16), kind: GroupKind::Sliding { window_tokens } }
            }
            _ => Group::default(),
        };
        (tier, group)
    }

    /// Something that some worker may hold, and a little more.
    fn path(&mut self) -> Vec<BlockHash> {
        let workers: Vec<Worker> = self.beliefs.keys().copied().collect();
        let mut path = Vec::new();
        if let Some(worker) = self.choice.pick(&workers)
            && let Some(held) = self.choice.pick(&self.beliefs[worker])
        {
            path.clone_from(&held.path);
        }
        for _ in 0..self.choice.below(5) {
            path.push(self.block());
        }
        path
    }

    fn remember(&mut self, worker: Worker, held: Held) {
        if held.path.len() < self.regime.depth {
            self.beliefs.entry(worker).or_default().push(held);
        }
    }

    fn known(&mut self, worker: Worker) -> Option<Held> {
        self.choice.pick(self.beliefs.get(&worker)?).cloned()
    }

    /// A chain below `path`, as the worker names it.
    fn chain(
        &mut self,
        worker: Worker,
        mut path: Vec<BlockHash>,
        (tier, group): (Tier, Group),
        more: &[BlockHash],
    ) -> Vec<StoredBlock> {
        let mut blocks = Vec::with_capacity(more.len());
        // Of a very long chain, only some places are remembered.
        let every = more.len() / 40 + 1;
        for (at, &block) in more.iter().enumerate() {
            path.push(block);
            let engine = self.name(worker, &path);
            blocks.push(StoredBlock { engine, block });
            if at % every == 0 || at + 1 == more.len() {
                self.remember(worker, Held { name: engine, path: path.clone(), tier, group });
            }
        }
        self.touched = path;
        blocks
    }

    fn stored(&mut self) -> Op {
        let worker = self.worker();
        let (tier, group) = self.place();
        if self.regime.orphans && self.choice.one_in(12) {
            return self.stored_by_hash(worker, tier, group);
        }
        if self.regime.copies
            && self.choice.one_in(3)
            && let Some(held) = self.known(worker)
        {
            // The same chain once more, from somewhere on.
            let from = self.choice.below(held.path.len() as u64) as usize;
            let (before, more) = held.path.split_at(from);
            let parent = (from > 0).then(|| self.name(worker, before));
            let blocks = self.chain(worker, before.to_vec(), (tier, group), more);
            return Op::Event(worker, KvEvent::Stored { tier, group, parent, blocks });
        }
        let (mut parent, mut path) = (None, Vec::new());
        if !self.choice.one_in(3)
            && let Some(held) = self.known(worker)
        {
            (parent, path) = (Some(held.name), held.path);
        }
        if self.regime.orphans && self.choice.one_in(4) {
            // A parent that is not held, but may come.
            for _ in 0..=self.choice.below(2) {
                path.push(self.block());
            }
            parent = Some(self.name(worker, &path));
        }
        let more: Vec<BlockHash> = (0..=self.choice.below(self.regime.chain)).map(|_| self.block()).collect();
        let blocks = self.chain(worker, path, (tier, group), &more);
        Op::Event(worker, KvEvent::Stored { tier, group, parent, blocks })
    }

    fn stored_by_hash(&mut self, worker: Worker, tier: Tier, group: Group) -> Op {
        // One alone where the index may refuse some: then the event is taken whole or not at all.
        let count = if self.regime.max_orphans < 1000 { 1 } else { 1 + self.choice.below(3) };
        let mut hashes = Vec::new();
        for _ in 0..count {
            hashes.push(match self.known(worker) {
                Some(held) if !self.choice.one_in(3) => {
                    self.remember(worker, Held { tier, group, ..held.clone() });
                    held.name
                }
                _ => EngineHash(self.choice.below(40)),
            });
        }
        Op::Event(worker, KvEvent::StoredByHash { tier, group, hashes })
    }

    fn removed(&mut self) -> Op {
        let worker = self.worker();
        let leaf_first = self.regime.leaf_first;
        let Some(Held { tier, group, .. }) = self.known(worker) else { return self.stored() };
        let choice = &mut self.choice;
        let held = self.beliefs.entry(worker).or_default();
        let mut hashes = Vec::new();
        // Sometimes a stretch, as engines evict, from the end of a prompt or from its beginning.
        let stretch = choice.below(4);
        let mut at = choice.below(held.len() as u64) as usize;
        let most = if stretch < 2 { self.regime.chain } else { 4 };
        for _ in 0..=choice.below(most) {
            if held.is_empty() {
                break;
            }
            if stretch > 1 {
                at = choice.below(held.len() as u64) as usize;
            }
            at = at.min(held.len() - 1);
            if leaf_first {
                let path = held[at].path.clone();
                let deeper = |i: &usize| held[*i].path.starts_with(&path);
                at = (0..held.len()).filter(deeper).max_by_key(|i| held[*i].path.len()).unwrap_or(at);
            }
            let Held { name, path, .. } = held.remove(at);
            hashes.push(name);
            self.touched = path;
            if stretch == 0 {
                at = at.saturating_sub(1);
            }
        }
        if choice.one_in(10) {
            hashes.push(EngineHash(choice.below(50)));
        }
        let (tier, group) =
            if self.regime.tiers && self.choice.one_in(5) { self.place() } else { (tier, group) };
        Op::Event(worker, KvEvent::Removed { tier, group: group.id, hashes })
    }

    fn cleared(&mut self) -> Op {
        let worker = self.worker();
        match self.choice.below(8) {
            0 => {
                self.beliefs.remove(&worker);
                Op::RemoveWorker(worker)
            }
            1 => {
                self.beliefs.retain(|w, _| w.instance != worker.instance);
                *self.lives.entry(worker.instance.0).or_default() += 1;
                Op::RemoveInstance(worker.instance.0)
            }
            2..5 if self.regime.tiers => {
                let tier = Tier::ALL[self.choice.below(4) as usize];
                self.beliefs.entry(worker).or_default().retain(|held| held.tier != tier);
                Op::Event(worker, KvEvent::Cleared { tier: Some(tier) })
            }
            n => {
                // What is remembered of a life that nobody announced the end of is named again.
                if n != 7 {
                    self.beliefs.remove(&worker);
                }
                *self.lives.entry(worker.instance.0).or_default() += 1;
                Op::Event(worker, KvEvent::Cleared { tier: None })
            }
        }
    }

    fn predicted(&mut self) -> Op {
        let worker = self.worker();
        match self.choice.below(12) {
            0 => Op::ForgetPredictions(worker),
            1..4 => {
                self.now_ms += self.choice.below(50);
                Op::Expire(self.now_ms)
            }
            _ => {
                let path = self.path();
                self.touched.clone_from(&path);
                Op::Predict(worker, path, self.now_ms + self.choice.below(100))
            }
        }
    }

    fn saved(&mut self) -> Op {
        let worker = self.worker();
        match self.choice.below(10) {
            0 => Op::Restart(self.choice.below(1000)),
            1..6 => {
                self.saved.push(worker);
                Op::Save(worker)
            }
            _ => match self.choice.pick(&self.saved).copied() {
                Some(from) => Op::Replace(if self.choice.one_in(3) { worker } else { from }, from),
                None => Op::Save(worker),
            },
        }
    }

    /// The next operation.
    pub fn next(&mut self) -> Op {
        for held in self.beliefs.values_mut() {
            if held.len() > REMEMBERED {
                held.drain(..REMEMBERED / 2);
            }
        }
        if self.choice.one_in(self.regime.clear_every) {
            return self.cleared();
        }
        match self.choice.below(100) {
            0..37 => self.stored(),
            37..57 => self.removed(),
            57..68 if self.regime.predictions => self.predicted(),
            68..71 if self.regime.snapshots => self.saved(),
            _ => Op::Query(self.path()),
        }
    }

    /// A prompt that goes where the last operation did something.
    pub fn probe(&mut self) -> Vec<BlockHash> {
        let mut path = std::mem::take(&mut self.touched);
        if self.choice.one_in(4) {
            path.push(self.block());
        }
        path
    }
}
