//! Prompts and events made from numbers.
//!
//! A *family*: prompts of `length` blocks, of which a quarter is a system prompt shared by all workers, a quarter is shared by a group
//! of 8 workers, and half is the conversation's own. Every query with a hit therefore lists all workers.

use kvlane_index::{BlockHash, EngineHash, Group, GroupId, KvEvent, StoredBlock, Tier, Worker};

use crate::contender::Event;

/// Steps a counter into a well-mixed number (SplitMix64).
pub fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// A well-mixed function of `x`.
pub fn mix(mut x: u64) -> u64 {
    random(&mut x)
}

/// Names blocks as an engine does whose hashes chain and are equal on all workers: opaque to a router.
pub fn engine_hashes(blocks: &[BlockHash]) -> Vec<EngineHash> {
    let mut chain = 0x5EED;
    let step = |b: &BlockHash| {
        chain = mix(chain ^ mix(b.0));
        EngineHash(chain)
    };
    blocks.iter().map(step).collect()
}

/// A store on the device.
pub fn stored(worker: Worker, parent: Option<EngineHash>, blocks: Vec<StoredBlock>) -> Event {
    (worker, KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent, blocks })
}

/// A removal from the device.
pub fn removed(worker: Worker, hashes: Vec<EngineHash>) -> Event {
    (worker, KvEvent::Removed { tier: Tier::Device, group: GroupId(0), hashes })
}

/// Blocks that an event names.
pub fn blocks_of(event: &KvEvent) -> usize {
    match event {
        KvEvent::Stored { blocks, .. } => blocks.len(),
        KvEvent::Removed { hashes, .. } | KvEvent::StoredByHash { hashes, .. } => hashes.len(),
        KvEvent::Cleared { .. } => 0,
    }
}

/// A family of prompts; see the module.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    /// Workers.
    pub workers: usize,
    /// Blocks of a prompt.
    pub length: usize,
    /// Conversations of each worker.
    pub conversations: usize,
    /// All workers hold the same conversations.
    pub shared: bool,
    /// Tells families apart.
    pub seed: u64,
}

impl Family {
    /// As many conversations as make about `pairs` (worker, block) pairs.
    pub fn sized(workers: usize, length: usize, pairs: usize, shared: bool) -> Self {
        let own = (length / 2).max(1) * workers;
        Self { workers, length, conversations: (pairs / own).max(1), shared, seed: 42 }
    }

    fn head(&self) -> usize {
        self.length / 4 * 2
    }

    fn block(&self, kind: u64, key: u64, position: usize) -> BlockHash {
        BlockHash(mix(self.seed ^ mix(kind ^ mix(key ^ mix(position as u64 + 0x0012_3456)))))
    }

    /// The prompt of one conversation.
    pub fn prompt(&self, worker: usize, conversation: usize) -> Vec<BlockHash> {
        let quarter = self.length / 4;
        let group = if self.shared { 0 } else { worker / 8 };
        let own = if self.shared { conversation } else { worker * self.conversations + conversation };
        let system = (0..quarter).map(|i| self.block(1, 0, i));
        let group = (0..quarter).map(|i| self.block(2, group as u64, i));
        let own = (0..self.length - self.head()).map(|i| self.block(3, own as u64, i));
        system.chain(group).chain(own).collect()
    }

    /// (worker, block) pairs when everything is stored.
    pub fn pairs(&self) -> usize {
        self.workers * (self.head() + self.conversations * (self.length - self.head()))
    }

    /// The stores of all conversations, `per_event` blocks each, conversation by conversation and worker by worker.
    /// The head is stored with the first one, or (`with_heads` = false) held already. One call of `take` a conversation.
    pub fn stores(&self, per_event: usize, with_heads: bool, mut take: impl FnMut(Vec<Event>)) {
        for conversation in 0..self.conversations {
            for w in 0..self.workers {
                let prompt = self.prompt(w, conversation);
                let names = engine_hashes(&prompt);
                let from = if with_heads && conversation == 0 { 0 } else { self.head() };
                let mut events = Vec::new();
                for start in (from..prompt.len()).step_by(per_event) {
                    let end = (start + per_event).min(prompt.len());
                    let blocks =
                        (start..end).map(|i| StoredBlock { engine: names[i], block: prompt[i] }).collect();
                    let parent = start.checked_sub(1).map(|i| names[i]);
                    events.push(stored(Worker::new(w as u64, 0), parent, blocks));
                }
                take(events);
            }
        }
    }

    /// The removal of every conversation's own blocks, deepest first, as engines do.
    pub fn removals(&self, per_event: usize, mut take: impl FnMut(Vec<Event>)) {
        for conversation in 0..self.conversations {
            for w in 0..self.workers {
                let names = engine_hashes(&self.prompt(w, conversation));
                let own: Vec<EngineHash> = names[self.head()..].iter().rev().copied().collect();
                let worker = Worker::new(w as u64, 0);
                take(own.chunks(per_event).map(|c| removed(worker, c.to_vec())).collect());
            }
        }
    }

    /// The removal of the shared heads, after [`Family::removals`].
    pub fn head_removals(&self) -> Vec<Event> {
        let of = |w: usize| {
            let names = engine_hashes(&self.prompt(w, 0)[..self.head()]);
            removed(Worker::new(w as u64, 0), names.into_iter().rev().collect())
        };
        (0..self.workers).map(of).collect()
    }

    /// `count` prompts of random conversations, right for `hit_percent` of their length and random after it.
    pub fn prompts(&self, hit_percent: usize, count: usize) -> Vec<Vec<BlockHash>> {
        let mut state = 7;
        let mut one = || {
            let worker = random(&mut state) as usize % self.workers;
            let mut prompt = self.prompt(worker, random(&mut state) as usize % self.conversations);
            for block in &mut prompt[self.length * hit_percent / 100..] {
                *block = BlockHash(random(&mut state));
            }
            prompt
        };
        (0..count).map(|_| one()).collect()
    }
}
