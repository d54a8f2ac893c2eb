//! One run: a trace, a fleet of engines and a policy, from the first request to the last answer.
//!
//! Discrete events in simulated microseconds, ordered by time and then by the order in which they were made, so a seed has one outcome. Every request
//! crosses the network to the router, is decided and booked at once, and crosses it again to its engine; what an engine says of its cache reaches
//! the router a lag later.

use crate::knowledge::{Held, Knowledge};
use crate::outcome::{Outcome, Served, WorkerTotals};
use crate::trace::{Start, Trace};
use kvlane_engine::{Engine, EngineConfig, StepOutput};
use kvlane_index::{BlockHash, BlockSize, KvEvent, Worker};
use kvlane_sched::queue::{AdmissionQueue, QueueLimits, Waiting};
use kvlane_sched::{
    Candidate, Decision, EngineLimits, OverlapTokens, Policy, Profile, Request, RequestId, Rng, Scheduler,
    rates::Rates,
};
use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// What a fleet is.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// How many engines, one rank each.
    pub workers: u32,
    /// What each engine is. Its block size is set to the trace's, its blocks so that it holds as many tokens.
    pub engine: EngineConfig,
    /// How many times as fast as `engine` each worker is; those beyond the list are as fast.
    pub speeds: Vec<f64>,
    /// From client to engine and back, one way.
    pub network_us: u64,
    /// Mean lag of cache events, exponential over a floor of a third of it.
    pub event_lag_us: u64,
    /// How long a routing decision counts as a predicted placement; 0 = no predictions.
    pub predict_us: u64,
    /// Bounds of the queue in which requests wait at the router while every worker is saturated; `None` = all are sent at once.
    pub admission: Option<QueueLimits>,
    /// What happens to its workers.
    pub incidents: Vec<Incident>,
    /// Seed of the scheduler's draws and of the lags.
    pub seed: u64,
}

/// Something that happens to a worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Incident {
    /// When.
    pub at_us: u64,
    /// To whom, counted from 0.
    pub worker: u32,
    /// What.
    pub what: What,
}

/// What happens to a worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// It is gone for good, with its cache; what ran there starts again elsewhere.
    Dies,
    /// It comes with an empty cache, and was not there before.
    Joins,
}

impl FleetConfig {
    /// `workers` engines as calibrated, with events as lagged as measured on one machine.
    pub fn new(workers: u32) -> Self {
        Self {
            workers,
            engine: EngineConfig::h200_llama_8b(),
            speeds: Vec::new(),
            network_us: 200,
            event_lag_us: 1_000,
            predict_us: 30_000_000,
            admission: Some(QueueLimits {
                max_requests: usize::MAX,
                max_wait_ms: f64::INFINITY,
                ..QueueLimits::default()
            }),
            incidents: Vec::new(),
            seed: 1,
        }
    }

    /// Tokens that one worker's cache holds.
    pub fn cache_tokens(&self) -> u64 {
        u64::from(self.engine.blocks.saturating_sub(1)) * u64::from(self.engine.block_size.tokens())
    }
}

/// Requests that one simulated second may leave unanswered at the end: the run stops after the last arrival plus this long, and what is
/// unanswered counts as such.
const DRAIN_US: u64 = 3_600_000_000;

/// Block ids given to the ledger are at least this coarse: it counts shared memory, for which this is fine enough.
const LEDGER_BLOCK_TOKENS: u32 = 512;

enum Happening {
    /// A request reaches the router.
    Arrives(u32),
    /// A request reaches its engine.
    Submits(u32, u32),
    /// An engine ends or begins a step.
    Steps(u32),
    /// Events of an engine reach the router.
    Tells(u32, Vec<KvEvent>),
    /// A worker dies or comes.
    Befalls(u32, What),
    /// A request whose worker died is sent again.
    StartsAgain(u32),
}

struct Queue {
    heap: BinaryHeap<Reverse<(u64, u64)>>,
    slots: std::collections::HashMap<u64, Happening>,
    next: u64,
}

impl Queue {
    fn push(&mut self, at_us: u64, what: Happening) {
        self.heap.push(Reverse((at_us, self.next)));
        self.slots.insert(self.next, what);
        self.next += 1;
    }

    fn pop(&mut self) -> Option<(u64, Happening)> {
        let Reverse((at, number)) = self.heap.pop()?;
        Some((at, self.slots.remove(&number).expect("every number in the heap has its happening")))
    }
}

/// Runs `trace` on a fleet under `policy`.
pub fn run(trace: &Trace, config: &FleetConfig, policy: Box<dyn Policy>) -> Outcome {
    Run::new(trace, config, policy).finish()
}

struct Run<'t> {
    trace: &'t Trace,
    config: &'t FleetConfig,
    scheduler: Scheduler,
    reads_cache: bool,
    profile: Profile,
    engines: Vec<Engine>,
    /// Whether each worker is there.
    there: Vec<bool>,
    /// Where each request runs.
    runs_at: Vec<Option<u32>>,
    /// When a step of each engine is in the queue.
    step_at: Vec<Option<u64>>,
    knowledge: Knowledge,
    queue: Queue,
    /// Requests that wait at the router.
    parked: Option<AdmissionQueue>,
    rng: Rng,
    decision: Decision,
    held: Vec<Held>,
    output: StepOutput,
    /// The turn that waits for the end of each request.
    next_turn: Vec<Option<u32>>,
    served: Vec<Served>,
    unfinished: usize,
    /// Latest arrival of events of each worker: they never overtake each other.
    told_at: Vec<u64>,
}

impl<'t> Run<'t> {
    fn new(trace: &'t Trace, config: &'t FleetConfig, policy: Box<dyn Policy>) -> Self {
        let workers = config.workers as usize;
        let block_size = BlockSize::new(trace.block_tokens).expect("a trace's blocks have tokens");
        let blocks = (config.cache_tokens() / u64::from(trace.block_tokens)) as u32 + 1;
        let engine = |w: usize| {
            let speed = config.speeds.get(w).copied().unwrap_or(1.0);
            let mut engine = config.engine.clone();
            engine.block_size = block_size;
            engine.blocks = blocks;
            engine.timing = engine.timing.faster(speed);
            Engine::new(engine)
        };
        let policy_queues = policy.holds_back();
        let mut queue = Queue { heap: BinaryHeap::new(), slots: std::collections::HashMap::new(), next: 0 };
        let mut next_turn = vec![None; trace.requests.len()];
        let mut latest: Vec<Option<u32>> = vec![None; trace.sessions() as usize];
        for (i, request) in trace.requests.iter().enumerate() {
            match request.start {
                Start::AtMs(at) => queue.push((at * 1000.0) as u64, Happening::Arrives(i as u32)),
                Start::AfterMs(_) => {
                    let before = latest[request.session as usize]
                        .expect("readers give the first turn of a session a time");
                    next_turn[before as usize] = Some(i as u32);
                }
            }
            latest[request.session as usize] = Some(i as u32);
        }
        let mut there = vec![true; workers];
        for Incident { at_us, worker, what } in &config.incidents {
            queue.push(*at_us, Happening::Befalls(*worker, *what));
            there[*worker as usize] &= *what != What::Joins;
        }
        Self {
            trace,
            config,
            reads_cache: policy.needs_cache_knowledge(),
            scheduler: Scheduler::new(policy),
            profile: Profile {
                block_size_tokens: trace.block_tokens,
                limits: EngineLimits {
                    max_running: Some(config.engine.max_running),
                    kv_blocks: Some(blocks - 1),
                    max_batched_tokens: Some(config.engine.step_tokens),
                },
                labels: Vec::new(),
            },
            engines: (0..workers).map(engine).collect(),
            there,
            runs_at: vec![None; trace.requests.len()],
            step_at: vec![None; workers],
            knowledge: Knowledge::new(workers, trace.distinct_blocks()),
            queue,
            parked: config.admission.filter(|_| policy_queues).map(AdmissionQueue::new),
            rng: Rng::new(config.seed),
            decision: Decision::default(),
            held: Vec::new(),
            output: StepOutput::default(),
            next_turn,
            served: vec![Served::default(); trace.requests.len()],
            unfinished: trace.requests.len(),
            told_at: vec![0; workers],
        }
    }

    fn finish(mut self) -> Outcome {
        let last_start = self.trace.requests.iter().fold(0.0_f64, |latest, r| match r.start {
            Start::AtMs(at) => latest.max(at),
            Start::AfterMs(_) => latest,
        });
        let mut deadline_us = (last_start * 1000.0) as u64 + DRAIN_US;
        let mut now_us = 0;
        while let Some((at_us, what)) = self.queue.pop() {
            if self.unfinished == 0 || at_us > deadline_us {
                break;
            }
            now_us = at_us;
            match what {
                Happening::Arrives(request) => {
                    deadline_us = deadline_us.max(at_us + DRAIN_US);
                    self.served[request as usize].arrived_us = at_us;
                    self.enters(at_us, request);
                }
                Happening::StartsAgain(request) => self.enters(at_us, request),
                Happening::Befalls(worker, What::Dies) => self.dies(at_us, worker),
                Happening::Befalls(worker, What::Joins) => {
                    self.there[worker as usize] = true;
                    self.drains(at_us);
                }
                Happening::Submits(request, worker) => self.submits(at_us, request, worker),
                Happening::Steps(worker) => self.steps(at_us, worker),
                Happening::Tells(worker, _) if !self.there[worker as usize] => {}
                Happening::Tells(worker, events) => {
                    for event in &events {
                        self.knowledge.apply(worker as usize, event);
                    }
                }
            }
        }
        let workers = self
            .engines
            .iter()
            .map(|e| {
                let t = e.totals();
                WorkerTotals {
                    busy_us: t.busy_us,
                    computed_tokens: t.prompt_tokens - t.hit_tokens,
                    hit_tokens: t.hit_tokens,
                    requests: t.finished,
                    preemptions: t.preemptions,
                }
            })
            .collect();
        Outcome { policy: self.scheduler.policy().name(), end_us: now_us, served: self.served, workers }
    }

    fn dies(&mut self, now_us: u64, worker: u32) {
        let w = worker as usize;
        self.there[w] = false;
        self.step_at[w] = None;
        self.knowledge.clear(w);
        for index in 0..self.runs_at.len() {
            if self.runs_at[index] == Some(worker) {
                self.runs_at[index] = None;
                self.scheduler.end(RequestId(index as u64), now_us as f64 / 1000.0);
                self.queue.push(now_us + self.config.network_us, Happening::StartsAgain(index as u32));
            }
        }
        self.scheduler.forget(Worker::new(u64::from(worker), 0));
    }

    fn enters(&mut self, now_us: u64, index: u32) {
        if self.parked.is_none() {
            self.dispatches(now_us, index, false);
            return;
        }
        let now_ms = now_us as f64 / 1000.0;
        let must_wait = self.parked.as_ref().is_some_and(|q| q.must_wait(0, now_ms));
        if must_wait || !self.dispatches(now_us, index, true) {
            let work_ms = self.least_work_ms(index);
            let waiting = Waiting {
                id: RequestId(u64::from(index)),
                tenant: 0,
                lane: 0,
                priority: 0,
                work_ms,
                deadline_ms: None,
                since_ms: now_ms,
            };
            let parked = self.parked.as_mut().expect("looked at above");
            if parked.park(waiting).is_err() {
                self.served[index as usize].refused = true;
                self.ends(now_us, index);
            }
        }
    }

    /// Sends those that wait for as long as a worker has room.
    fn drains(&mut self, now_us: u64) {
        let now_ms = now_us as f64 / 1000.0;
        while let Some(first) = self.parked.as_ref().and_then(|q| q.first(now_ms, &[])) {
            if !self.dispatches(now_us, first.id.0 as u32, true) {
                break;
            }
            self.parked.as_mut().expect("it had a first").take(first.id, now_ms);
        }
    }

    /// Prefill that the request needs where most of it is held, in milliseconds.
    fn least_work_ms(&mut self, index: u32) -> f64 {
        let request = &self.trace.requests[index as usize];
        if self.reads_cache {
            self.knowledge.overlap(self.trace.blocks(request), &mut self.held);
        }
        let most = self.held.iter().map(|h| h.predicted).max().unwrap_or(0) * self.trace.block_tokens;
        let cached = most.min(request.input_tokens - 1);
        Rates::default().prefill_ms(request.input_tokens - cached, cached)
    }

    /// Decides on a request and sends it; `false` if `wait_for_room` and no worker has any.
    fn dispatches(&mut self, now_us: u64, index: u32, wait_for_room: bool) -> bool {
        let trace = self.trace;
        let request = &trace.requests[index as usize];
        let blocks = trace.blocks(request);
        if self.reads_cache {
            self.knowledge.expire(now_us);
            self.knowledge.overlap(blocks, &mut self.held);
        } else {
            self.held.clear();
            self.held.resize(self.engines.len(), Held::default());
        }
        let profile = &self.profile;
        let candidates: Vec<Candidate<'_>> = self
            .held
            .iter()
            .enumerate()
            .filter(|(w, _)| self.there[*w])
            .map(|(w, held)| {
                let mut candidate = Candidate::new(Worker::new(w as u64, 0), profile);
                candidate.overlap = OverlapTokens {
                    device: held.device * trace.block_tokens,
                    predicted: (held.predicted - held.device) * trace.block_tokens,
                    ..OverlapTokens::default()
                };
                candidate
            })
            .collect();
        let stride = (LEDGER_BLOCK_TOKENS / trace.block_tokens).max(1);
        let ledger_blocks: Vec<u64> = blocks
            .chunks_exact(stride as usize)
            .map(|c| u64::from(*c.last().expect("chunks are not empty")))
            .collect();
        let mut asked = Request::new(RequestId(u64::from(index)), request.input_tokens);
        asked.session = Some(u64::from(request.session));
        asked.blocks = &ledger_blocks;
        asked.block_id_tokens = stride * trace.block_tokens;
        let now_ms = now_us as f64 / 1000.0;
        if wait_for_room && !self.scheduler.has_room(&asked, &candidates, now_ms) {
            return false;
        }
        self.scheduler
            .decide(&asked, &candidates, now_ms, &mut self.rng, &mut self.decision)
            .expect("incidents leave a worker, and a simulated worker is always eligible");
        let worker = self.decision.order[0];
        self.scheduler
            .book(&asked, &self.decision, worker, now_ms)
            .expect("requests of a trace have different numbers");
        let w = worker.instance.0 as usize;
        let served = &mut self.served[index as usize];
        served.sent_us = now_us;
        served.worker = w as u32;
        self.runs_at[index as usize] = Some(w as u32);
        served.expected_cached_tokens = self.decision.row(worker).map_or(0, |r| r.cached_tokens);
        if self.reads_cache && self.config.predict_us > 0 {
            self.knowledge.predict(w, blocks, now_us + self.config.predict_us);
        }
        self.queue.push(now_us + self.config.network_us, Happening::Submits(index, w as u32));
        true
    }

    fn submits(&mut self, now_us: u64, index: u32, worker: u32) {
        if self.runs_at[index as usize] != Some(worker) {
            return; // it died meanwhile
        }
        let request = &self.trace.requests[index as usize];
        let blocks = self.trace.blocks(request).iter().map(|id| BlockHash(u64::from(*id))).collect();
        let submitted = kvlane_engine::Request {
            id: kvlane_engine::RequestId(u64::from(index)),
            prompt_tokens: request.input_tokens,
            output_tokens: request.output_tokens,
            blocks,
            content: None,
        };
        if self.engines[worker as usize].submit(now_us, submitted).is_err() {
            self.served[index as usize].refused = true;
            self.ends(now_us, index);
        }
        self.wake(worker);
    }

    /// Puts the engine's next step into the queue, unless an earlier or equal one is there.
    fn wake(&mut self, worker: u32) {
        let w = worker as usize;
        if let Some(at) = self.engines[w].next_step_at()
            && self.step_at[w].is_none_or(|queued| at < queued)
        {
            self.step_at[w] = Some(at);
            self.queue.push(at, Happening::Steps(worker));
        }
    }

    fn steps(&mut self, now_us: u64, worker: u32) {
        let w = worker as usize;
        if self.step_at[w] != Some(now_us) {
            return; // an earlier one was queued after this
        }
        self.step_at[w] = None;
        let mut output = std::mem::take(&mut self.output);
        self.engines[w].step(now_us, &mut output);
        let client_us = now_us + self.config.network_us;
        let client_ms = client_us as f64 / 1000.0;
        for token in &output.tokens {
            let index = token.request.0 as u32;
            let served = &mut self.served[index as usize];
            if token.index == 0 {
                served.first_token_us.get_or_insert(client_us);
                served.cached_tokens = token.cached_tokens;
                self.scheduler.first_token(RequestId(token.request.0), client_ms);
            } else {
                self.scheduler.output(RequestId(token.request.0), 1, client_ms);
            }
            if token.last {
                served.ended_us = Some(client_us);
                self.ends(client_us, index);
            }
        }
        if self.reads_cache && !output.events.is_empty() {
            let events = output.events.drain(..).map(|e| e.event).collect();
            let floor = self.config.event_lag_us as f64 / 3.0;
            let lag = floor - 2.0 * floor * (1.0 - self.rng.unit()).ln();
            let at = (now_us + lag as u64).max(self.told_at[w]);
            self.told_at[w] = at;
            self.queue.push(at, Happening::Tells(worker, events));
        }
        self.output = output;
        self.wake(worker);
        if self.parked.as_ref().is_some_and(|q| !q.is_empty()) {
            self.drains(client_us);
        }
    }

    fn ends(&mut self, now_us: u64, index: u32) {
        self.runs_at[index as usize] = None;
        self.scheduler.end(RequestId(u64::from(index)), now_us as f64 / 1000.0);
        self.unfinished -= 1;
        if let Some(next) = self.next_turn[index as usize]
            && let Start::AfterMs(delay) = self.trace.requests[next as usize].start
        {
            self.queue.push(now_us + (delay * 1000.0) as u64, Happening::Arrives(next));
        }
    }
}

#[cfg(test)]
mod tests;
