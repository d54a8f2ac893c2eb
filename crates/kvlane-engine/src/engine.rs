//! One rank of an engine: requests in, steps over time, tokens and cache events out.
//!
//! Continuous batching as vLLM's scheduler does it (`vllm/v1/core/sched/scheduler.py`, 0.32, first come first served):
//! a step has a budget of tokens; running requests are served first, one token or the next chunk of their prompt each; then
//! waiting ones are admitted in order while budget and places last and the whole prompt fits into free blocks. A running
//! request that finds no block takes those of the youngest one, which starts again (preemption).
//!
//! Blocks become findable when the step that computes them is *scheduled*, so two equal prompts admitted to one step share
//! all but the last; their events leave when the step ends. At least the last prompt token is always computed, so a prompt of n
//! tokens hits at most `(n - 1) / block_size` blocks.
//!
//! With a host tier, blocks are copied to host memory when they become full, as vLLM's offloading connector does, and kept
//! there least recently used last. A prompt that continues there after its device hit waits until those blocks are copied back,
//! while others compute; they are then in both tiers.
//!
//! Time is whatever the caller says: [`Engine::next_step_at`] names the next moment at which something happens, and
//! [`Engine::step`] makes it happen.

use crate::{BlockId, BlockPool, CacheEvent, Content, Request, RequestId, StepLoad, StoredContent, Timing};
use kvlane_index::{BlockHash, BlockSize, EngineHash, Group, GroupId, KvEvent, StoredBlock, Tier};
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::fmt;
use std::sync::Arc;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What an engine is.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Tokens in a block.
    pub block_size: BlockSize,
    /// Blocks of the device, one of which is a placeholder (as in vLLM's `num_gpu_blocks`); at least 2.
    pub blocks: u32,
    /// Blocks of host memory, one of which is a placeholder; below 2 = no host tier.
    pub host_blocks: u32,
    /// Requests that run at once (`max_num_seqs`); at least 1.
    pub max_running: u32,
    /// Tokens that a step computes at most (`max_num_batched_tokens`); at least 1.
    pub step_tokens: u32,
    /// Requests that may wait to be admitted; more are refused.
    pub max_waiting: u32,
    /// Whether prefixes are cached at all.
    pub prefix_caching: bool,
    /// Whether a step is put together while the one before it runs (vLLM's default): a request that comes to a busy engine
    /// misses the step that follows, which was decided before.
    pub async_scheduling: bool,
    /// Seed of the engine hashes: equal seeds give equal names to equal prefixes, as in vLLM from 0.29 on.
    pub hash_seed: u64,
    /// How long things take.
    pub timing: Timing,
}

impl EngineConfig {
    /// The engine that was measured: Llama-3.1-8B on one H200, with its cache and its limits.
    pub fn h200_llama_8b() -> Self {
        Self {
            block_size: BlockSize::new(16).expect("16 is not 0"),
            blocks: 56_057,
            host_blocks: 0,
            max_running: 1_024,
            step_tokens: 8_192,
            max_waiting: 1 << 20,
            prefix_caching: true,
            async_scheduling: true,
            hash_seed: 0,
            timing: Timing::h200_llama_8b(),
        }
    }
}

/// Why a request was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SubmitError {
    /// A prompt or an answer of 0 tokens: nothing to compute.
    Empty,
    /// Prompt and answer need more blocks than the pool has: shorten it, or configure a larger pool.
    NeverFits {
        /// Blocks that it needs.
        needed: u32,
        /// Blocks that there are.
        usable: u32,
    },
    /// Too many requests wait already: try another engine, or later.
    Full,
    /// A request of this name is still in the engine.
    DuplicateId,
}

impl fmt::Display for SubmitError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Empty => write!(f, "a prompt and an answer need at least one token each"),
            Self::NeverFits { needed, usable } => {
                write!(f, "prompt and answer need {needed} cache blocks, the engine has {usable}")
            }
            Self::Full => write!(f, "too many requests are waiting"),
            Self::DuplicateId => write!(f, "a request of this name is still in the engine"),
        }
    }
}

impl std::error::Error for SubmitError {}

/// A token that a request got.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Token {
    /// Whose.
    pub request: RequestId,
    /// Which of its answer, from 0.
    pub index: u32,
    /// Prompt tokens that were found in the cache when the request was first admitted.
    pub cached_tokens: u32,
    /// Whether it is the last one: the request has left the engine.
    pub last: bool,
}

/// What one step brought.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct StepOutput {
    /// When the step ended, on the caller's clock; where none did, when it was asked.
    pub at_us: u64,
    /// The tokens, in the order of the batch.
    pub tokens: Vec<Token>,
    /// Changes of the cache, in order: one engine publishes them as one batch.
    pub events: Vec<CacheEvent>,
}

/// What an engine is busy with right now.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Load {
    /// Requests in the batch.
    pub running: u32,
    /// Requests that wait, those on their way through the front end or loading from host memory included.
    pub waiting: u32,
    /// Blocks that running requests hold.
    pub held_blocks: u32,
    /// Blocks that requests can hold.
    pub usable_blocks: u32,
}

/// What an engine did since it was made. Counters: they only grow.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Totals {
    /// Prompt tokens for which the cache was asked.
    pub queried_tokens: u64,
    /// Prompt tokens that it had, in any tier.
    pub hit_tokens: u64,
    /// Those of them that came from host memory.
    pub host_hit_tokens: u64,
    /// Tokens of prompts computed or found.
    pub prompt_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Requests that ended with their last token.
    pub finished: u64,
    /// Requests that were cancelled.
    pub cancelled: u64,
    /// Times that a running request lost its blocks to another.
    pub preemptions: u64,
    /// Steps computed.
    pub steps: u64,
    /// Microseconds spent in steps.
    pub busy_us: u64,
}

/// A request inside the engine.
struct Live {
    id: RequestId,
    prompt: u32,
    output: u32,
    content: Option<Arc<Content>>,
    /// Content and name of each whole block that will ever be full.
    chain: Vec<StoredBlock>,
    /// Blocks held, in order.
    blocks: Vec<BlockId>,
    /// Tokens whose keys and values are there, or will be when the running step ends.
    computed: u32,
    /// Tokens generated.
    produced: u32,
    /// Blocks that were published or hit.
    published: u32,
    /// Hit at the first admission; `None` before it.
    cached_tokens: Option<u32>,
    /// Position in the running step's batch, to recognise a slot that was reused meanwhile.
    generation: u32,
}

impl Live {
    fn tokens(&self) -> u32 {
        self.prompt + self.produced
    }

    /// The event that says that its blocks from `first` up to `end` entered `tier`.
    fn stored(&self, tier: Tier, first: u32, end: u32) -> CacheEvent {
        let content = self.content.as_ref();
        CacheEvent {
            event: KvEvent::Stored {
                tier,
                group: Group::default(),
                parent: first.checked_sub(1).map(|parent| self.chain[parent as usize].engine),
                blocks: self.chain[first as usize..end as usize].to_vec(),
            },
            content: content
                .map(|content| StoredContent { content: Arc::clone(content), first_block: first }),
        }
    }
}

/// What becomes of the request at the head of the queue.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Admission {
    /// It has to wait: its prompt does not fit into free blocks.
    Refused,
    /// It holds what is cached of it and may run.
    Runs,
    /// It holds all its blocks and waits for some of them to come from host memory.
    Loads,
}

/// One data-parallel rank of an engine.
pub struct Engine {
    config: EngineConfig,
    pool: BlockPool,
    /// Blocks in host memory: nobody holds them, so all are in the pool's order of eviction.
    host: Option<BlockPool>,
    slots: Vec<Option<Live>>,
    vacant: Vec<u32>,
    by_id: HashMap<RequestId, u32>,
    generation: u32,
    /// On their way through the front end: (ready, order of arrival, slot).
    arriving: BTreeSet<(u64, u64, u32)>,
    arrivals: u64,
    waiting: VecDeque<u32>,
    /// Waiting for blocks from host memory: (ready, order of arrival, slot, device blocks hit, host blocks hit).
    loading: BTreeSet<(u64, u64, u32, u32, u32)>,
    /// Loaded: these hold blocks for their whole prompt, so they run before any other is admitted.
    loaded: VecDeque<u32>,
    running: Vec<u32>,
    /// The batch of the step in progress: (slot, generation, whether it yields a token).
    batch: Vec<(u32, u32, bool)>,
    /// When the step in progress began and ends.
    in_progress: Option<(u64, u64)>,
    /// The latest moment that anything happened at.
    clock: u64,
    events: Vec<CacheEvent>,
    evicted: Vec<EngineHash>,
    totals: Totals,
}

impl Engine {
    /// An idle engine with an empty cache.
    ///
    /// # Panics
    /// If the configuration has fewer than 2 blocks, no place to run, or no tokens for a step.
    pub fn new(config: EngineConfig) -> Self {
        assert!(
            config.max_running > 0 && config.step_tokens > 0,
            "an engine needs room for a request and a token"
        );
        Self {
            pool: BlockPool::new(config.blocks),
            host: (config.host_blocks >= 2 && config.prefix_caching)
                .then(|| BlockPool::new(config.host_blocks)),
            config,
            slots: Vec::new(),
            vacant: Vec::new(),
            by_id: HashMap::new(),
            generation: 0,
            arriving: BTreeSet::new(),
            arrivals: 0,
            waiting: VecDeque::new(),
            loading: BTreeSet::new(),
            loaded: VecDeque::new(),
            running: Vec::new(),
            batch: Vec::new(),
            in_progress: None,
            clock: 0,
            events: Vec::new(),
            evicted: Vec::new(),
            totals: Totals::default(),
        }
    }

    /// Takes a request that arrives at `now_us`; it enters the queue when the front end is done with it.
    ///
    /// # Errors
    /// See [`SubmitError`]; the engine is unchanged then.
    pub fn submit(&mut self, now_us: u64, request: Request) -> Result<(), SubmitError> {
        let Request { id, prompt_tokens, output_tokens, blocks, content } = request;
        let total = prompt_tokens.saturating_add(output_tokens);
        if prompt_tokens == 0 || output_tokens == 0 {
            return Err(SubmitError::Empty);
        }
        let (needed, usable) = ((total - 1).div_ceil(self.block_size()), self.pool.usable());
        if needed > usable {
            return Err(SubmitError::NeverFits { needed, usable });
        }
        if self.waiting.len() + self.arriving.len() >= self.config.max_waiting as usize {
            return Err(SubmitError::Full);
        }
        if self.by_id.contains_key(&id) {
            return Err(SubmitError::DuplicateId);
        }
        self.generation = self.generation.wrapping_add(1);
        let live = Live {
            id,
            prompt: prompt_tokens,
            output: output_tokens,
            chain: self.chain(id, &blocks, (total - 1) / self.block_size()),
            content,
            blocks: Vec::new(),
            computed: 0,
            produced: 0,
            published: 0,
            cached_tokens: None,
            generation: self.generation,
        };
        let slot = match self.vacant.pop() {
            Some(slot) => {
                self.slots[slot as usize] = Some(live);
                slot
            }
            None => {
                self.slots.push(Some(live));
                (self.slots.len() - 1) as u32
            }
        };
        self.by_id.insert(id, slot);
        self.arrivals += 1;
        let ready = now_us + self.config.timing.front_end_us(prompt_tokens);
        self.arriving.insert((ready, self.arrivals, slot));
        Ok(())
    }

    /// Ends a request at once, wherever it is; its whole blocks stay cached. `false` if there is none of this name.
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let Some(slot) = self.by_id.get(&id).copied() else { return false };
        self.arriving.retain(|entry| entry.2 != slot);
        self.waiting.retain(|waiting| *waiting != slot);
        self.loading.retain(|entry| entry.2 != slot);
        self.loaded.retain(|loaded| *loaded != slot);
        self.running.retain(|running| *running != slot);
        self.vacate(slot);
        self.totals.cancelled += 1;
        true
    }

    /// When [`Self::step`] has something to do; `None` while the engine is idle. May lie in the past.
    pub fn next_step_at(&self) -> Option<u64> {
        if let Some((_, ends_at)) = self.in_progress {
            return Some(ends_at);
        }
        // With nothing running and blocks held only by what is loading, the queue's head may have to wait for that.
        let stuck = self.running.is_empty() && self.loaded.is_empty() && !self.loading.is_empty();
        if !self.running.is_empty() || !self.loaded.is_empty() || (!self.waiting.is_empty() && !stuck) {
            return Some(self.clock);
        }
        let arrives = self.arriving.first().map(|entry| entry.0);
        let loads = self.loading.first().map(|entry| entry.0);
        arrives.into_iter().chain(loads).min()
    }

    /// Ends the step that is over by `now_us`, if any, and starts the next one; `out` is overwritten.
    ///
    /// Does nothing before [`Self::next_step_at`]. Called late, the next step starts where the last one ended, so that a
    /// caller's late timer costs the engine nothing.
    pub fn step(&mut self, now_us: u64, out: &mut StepOutput) {
        out.at_us = now_us;
        out.tokens.clear();
        out.events.clear();
        let Some(at) = self.next_step_at().filter(|at| *at <= now_us) else { return };
        self.clock = self.clock.max(at);
        let mut decided_at = self.clock;
        if let Some((began_at, _)) = self.in_progress.take() {
            out.at_us = at;
            self.end_step(out);
            if self.config.async_scheduling {
                decided_at = began_at;
            }
        }
        while let Some((ready, _, slot)) = self.arriving.first().copied() {
            if ready > decided_at {
                break;
            }
            self.arriving.pop_first();
            self.waiting.push_back(slot);
        }
        while let Some((ready, _, slot, hit, host_hit)) = self.loading.first().copied() {
            if ready > self.clock {
                break;
            }
            self.loading.pop_first();
            self.publish(slot, hit, hit + host_hit);
            self.loaded.push_back(slot);
        }
        let load = self.schedule();
        if !load.is_empty() {
            let length = self.config.timing.step_us(&load);
            self.totals.steps += 1;
            self.totals.busy_us += length;
            self.in_progress = Some((self.clock, self.clock + length));
        }
    }

    /// Empties the cache; refused (`false`) while any request holds blocks.
    ///
    /// As in vLLM, the announcement leaves with the next step, so an idle engine says nothing yet.
    pub fn reset_prefix_cache(&mut self) -> bool {
        let cleared = self.pool.clear();
        if let Some(host) = self.host.as_mut().filter(|_| cleared) {
            host.clear();
        }
        if cleared && self.config.prefix_caching {
            self.events.push(CacheEvent { event: KvEvent::Cleared { tier: None }, content: None });
        }
        cleared
    }

    /// Changes how long things take, from the next step on.
    pub fn set_timing(&mut self, timing: Timing) {
        self.config.timing = timing;
    }

    /// What the engine is busy with.
    pub fn load(&self) -> Load {
        Load {
            running: self.running.len() as u32,
            waiting: (self.waiting.len() + self.arriving.len() + self.loading.len() + self.loaded.len())
                as u32,
            held_blocks: self.pool.usable() - self.pool.free(),
            usable_blocks: self.pool.usable(),
        }
    }

    /// What the engine did so far.
    pub fn totals(&self) -> Totals {
        self.totals
    }

    /// The configuration.
    pub fn config(&self) -> &EngineConfig {
        &self.config
    }

    /// The cache itself: the truth that the events tell of, once all that were returned have been applied and the step in
    /// progress has ended.
    pub fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// What lies in host memory; `None` without a host tier.
    pub fn host_pool(&self) -> Option<&BlockPool> {
        self.host.as_ref()
    }

    /// The engine hashes of a chain of blocks from the root.
    pub fn engine_hashes(&self, blocks: &[BlockHash]) -> Vec<EngineHash> {
        let mut parent = None;
        blocks
            .iter()
            .map(|block| {
                let hash = engine_hash(self.config.hash_seed, parent, *block);
                parent = Some(hash);
                hash
            })
            .collect()
    }

    fn block_size(&self) -> u32 {
        self.config.block_size.tokens()
    }

    fn live(&mut self, slot: u32) -> &mut Live {
        self.slots[slot as usize].as_mut().expect("queues name only occupied slots")
    }

    /// The first `count` blocks of a request; those that it does not name get contents found nowhere else.
    fn chain(&self, id: RequestId, blocks: &[BlockHash], count: u32) -> Vec<StoredBlock> {
        let mut parent = None;
        (0..count)
            .map(|i| {
                let block = blocks.get(i as usize).copied().unwrap_or_else(|| private_block(id, i));
                let engine = engine_hash(self.config.hash_seed, parent, block);
                parent = Some(engine);
                StoredBlock { engine, block }
            })
            .collect()
    }

    fn vacate(&mut self, slot: u32) {
        let live = self.slots[slot as usize].take().expect("a slot is vacated once");
        self.pool.release(&live.blocks);
        self.by_id.remove(&live.id);
        self.vacant.push(slot);
    }

    fn end_step(&mut self, out: &mut StepOutput) {
        out.events.append(&mut self.events);
        let mut finished = false;
        for (slot, generation, yields) in std::mem::take(&mut self.batch) {
            let Some(live) = self.slots[slot as usize].as_mut().filter(|l| l.generation == generation) else {
                continue; // cancelled during the step
            };
            if !yields {
                continue;
            }
            let last = live.produced + 1 == live.output;
            out.tokens.push(Token {
                request: live.id,
                index: live.produced,
                cached_tokens: live.cached_tokens.unwrap_or(0),
                last,
            });
            live.produced += 1;
            self.totals.output_tokens += 1;
            if last {
                finished = true;
                self.totals.finished += 1;
                self.vacate(slot);
            }
        }
        if finished {
            let slots = &self.slots;
            self.running.retain(|slot| slots[*slot as usize].is_some());
        }
    }

    /// Fills the next step's batch.
    fn schedule(&mut self) -> StepLoad {
        let mut step = StepLoad::default();
        let mut budget = self.config.step_tokens;
        let mut preempted = false;

        let mut i = 0;
        while i < self.running.len() && budget > 0 {
            let slot = self.running[i];
            let live = self.live(slot);
            let new = (live.tokens() - live.computed).min(budget);
            while !self.grow(slot, new) {
                preempted = true;
                let victim = self.running.pop().expect("the request itself is still running");
                self.preempt(victim);
                if victim == slot {
                    break;
                }
            }
            if i >= self.running.len() {
                break; // it was the youngest itself
            }
            budget -= new;
            self.book(slot, new, &mut step);
            i += 1;
        }

        while !preempted && budget > 0 && self.running.len() < self.config.max_running as usize {
            let slot = if let Some(slot) = self.loaded.pop_front() {
                slot
            } else {
                let Some(slot) = self.waiting.front().copied() else { break };
                let admitted = self.admit(slot);
                if admitted != Admission::Refused {
                    self.waiting.pop_front();
                }
                match admitted {
                    Admission::Refused => break,
                    Admission::Loads => continue,
                    Admission::Runs => slot,
                }
            };
            self.running.push(slot);
            let live = self.live(slot);
            let new = (live.tokens() - live.computed).min(budget);
            let grown = self.grow(slot, new);
            debug_assert!(grown, "admission made sure of blocks for the whole prompt");
            budget -= new;
            self.book(slot, new, &mut step);
        }
        step
    }

    /// Takes up a waiting request: holds what is cached of it, if the rest of its prompt fits into free blocks.
    fn admit(&mut self, slot: u32) -> Admission {
        let block_size = self.block_size();
        let caching = self.config.prefix_caching;
        let live = self.slots[slot as usize].as_mut().expect("the queue names only occupied slots");
        let tokens = live.tokens();
        let reach = if caching { ((tokens - 1) / block_size) as usize } else { 0 };
        let hashes: Vec<EngineHash> = live.chain[..reach].iter().map(|block| block.engine).collect();
        let hit = self.pool.cached_run(&hashes);
        let needed = tokens.div_ceil(block_size) - hit as u32;
        if needed + self.pool.unheld(&hashes[..hit]) > self.pool.free() {
            return Admission::Refused;
        }
        for hash in &hashes[..hit] {
            live.blocks.push(self.pool.hold(*hash).expect("found a moment ago"));
        }
        let mut host_hit = 0;
        if let Some(host) = &mut self.host {
            host_hit = host.cached_run(&hashes[hit..]);
            host.refresh(&hashes[..hit + host_hit]);
        }
        let found = (hit + host_hit) as u32;
        live.computed = found * block_size;
        live.published = found;
        if live.cached_tokens.is_none() {
            live.cached_tokens = Some(live.computed);
            self.totals.prompt_tokens += u64::from(live.prompt);
            self.totals.queried_tokens += u64::from(if caching { live.prompt } else { 0 });
            self.totals.hit_tokens += u64::from(live.computed);
            self.totals.host_hit_tokens += host_hit as u64 * u64::from(block_size);
        }
        if host_hit == 0 {
            return Admission::Runs;
        }
        // All at once, so that it never waits for blocks while it holds some.
        let allocated = self.allocate(slot, needed);
        debug_assert!(allocated, "counted a moment ago");
        self.arrivals += 1;
        let ready = self.clock + self.config.timing.host_load_us(host_hit as u32 * block_size);
        self.loading.insert((ready, self.arrivals, slot, hit as u32, host_hit as u32));
        Admission::Loads
    }

    /// Gives a request the blocks for `new` more tokens and publishes those that these fill; `false` if there are too few.
    fn grow(&mut self, slot: u32, new: u32) -> bool {
        let block_size = self.block_size();
        let live = self.live(slot);
        let end = live.computed + new;
        let published = live.published;
        let needed = end.div_ceil(block_size).saturating_sub(live.blocks.len() as u32);
        if !self.allocate(slot, needed) {
            return false;
        }
        let full = end / block_size;
        if self.config.prefix_caching && full > published {
            self.live(slot).published = full;
            self.publish(slot, published, full);
            self.offload(slot, published, full);
        }
        true
    }

    /// Takes free blocks for a request and announces what that evicts.
    fn allocate(&mut self, slot: u32, count: u32) -> bool {
        let live = self.slots[slot as usize].as_mut().expect("queues name only occupied slots");
        self.evicted.clear();
        let allocated = count == 0 || self.pool.allocate(count, &mut live.blocks, &mut self.evicted);
        self.announce_evicted(Tier::Device);
        allocated
    }

    /// Makes a request's blocks from `first` up to `end` findable in the device tier.
    fn publish(&mut self, slot: u32, first: u32, end: u32) {
        let live = self.slots[slot as usize].as_ref().expect("queues name only occupied slots");
        let range = first as usize..end as usize;
        for (block, physical) in live.chain[range.clone()].iter().zip(&live.blocks[range]) {
            self.pool.publish(*physical, block.engine);
        }
        let event = live.stored(Tier::Device, first, end);
        self.events.push(event);
    }

    /// Copies a request's blocks from `first` up to `end` to host memory, where they are not there yet.
    fn offload(&mut self, slot: u32, first: u32, end: u32) {
        let Some(host) = &mut self.host else { return };
        let live = self.slots[slot as usize].as_ref().expect("queues name only occupied slots");
        self.evicted.clear();
        let mut new = Vec::new();
        for position in first..end {
            let hash = live.chain[position as usize].engine;
            if host.refresh(std::slice::from_ref(&hash)) {
                continue;
            }
            let mut block = Vec::with_capacity(1);
            if host.allocate(1, &mut block, &mut self.evicted) {
                host.publish(block[0], hash);
                host.release(&block);
                new.push(position);
            }
        }
        self.announce_evicted(Tier::Host);
        let live = self.slots[slot as usize].as_ref().expect("as a moment ago");
        for run in new.chunk_by(|a, b| a + 1 == *b) {
            self.events.push(live.stored(Tier::Host, run[0], run[run.len() - 1] + 1));
        }
    }

    fn announce_evicted(&mut self, tier: Tier) {
        if !self.evicted.is_empty() {
            let event = KvEvent::Removed { tier, group: GroupId::default(), hashes: self.evicted.clone() };
            self.events.push(CacheEvent { event, content: None });
        }
    }

    /// Counts a request's part of the step.
    fn book(&mut self, slot: u32, new: u32, step: &mut StepLoad) {
        let live = self.live(slot);
        if live.produced > 0 && new == 1 {
            step.add_decode(live.computed);
        } else {
            step.add_chunk(new, live.computed);
        }
        live.computed += new;
        let entry = (slot, live.generation, live.computed == live.tokens());
        self.batch.push(entry);
    }

    /// Sends a running request back to the head of the queue, without its blocks.
    fn preempt(&mut self, slot: u32) {
        let live = self.slots[slot as usize].as_mut().expect("queues name only occupied slots");
        self.pool.release(&live.blocks);
        live.blocks.clear();
        live.computed = 0;
        live.published = 0;
        self.waiting.push_front(slot);
        self.totals.preemptions += 1;
    }
}

/// The name of a block after its parent: a chain, so that equal names mean equal prefixes.
fn engine_hash(seed: u64, parent: Option<EngineHash>, block: BlockHash) -> EngineHash {
    let mut bytes = [0; 17];
    if let Some(parent) = parent {
        bytes[0] = 1;
        bytes[1..9].copy_from_slice(&parent.0.to_le_bytes());
    }
    bytes[9..].copy_from_slice(&block.0.to_le_bytes());
    EngineHash(xxh3_64_with_seed(&bytes, seed))
}

/// A content that no other request has.
fn private_block(id: RequestId, position: u32) -> BlockHash {
    let mut bytes = [0; 13];
    bytes[0] = b'P';
    bytes[1..9].copy_from_slice(&id.0.to_le_bytes());
    bytes[9..].copy_from_slice(&position.to_le_bytes());
    BlockHash(xxh3_64_with_seed(&bytes, 0))
}
