//! Follows one publisher: a worker's stream of batches, made whole and kept in order.
//!
//! Engines publish over PUB sockets that drop silently, restart without a marker, and keep only the last batches for replay. This
//! machine turns what arrives into what the index may believe: each batch applied once and in order, holes filled by a
//! replay, and where that fails a fence ([`Action::Reset`]) instead of a silent hole. It is sans-IO: whoever owns the sockets
//! passes in frames, connection changes and the time, and does what the actions say, in order.
//!
//! * Subscribe first, then ask for a replay from 0; live batches wait in a bounded buffer meanwhile.
//! * A hole asks for a replay *from the last applied batch*, not from the one after: if the engine answers with the same bytes it is
//!   the same life of the engine; with other bytes, or with nothing, it has restarted. The same question is asked after a
//!   reconnect, and after a long silence (a tail lost by PUB, or a half-open connection, shows no other way).
//! * A restart is also seen by a sequence number that falls back (with other bytes than were applied under it), and by a
//!   new process start time. Each fence begins a new epoch.
//! * Knowledge is *complete* from sequence 0 or from a clear on: [`State::Live`]. Otherwise it grows from what is published
//!   from now on: [`State::Rebuilding`].
//!
//! Nothing here waits or reads a clock; call [`Stream::handle`] with [`Input::Tick`] at [`Stream::next_deadline_ms`].

mod buffer;
mod frames;
mod limits;
mod recent;

pub use limits::Limits;

use crate::resolve::Resolver;
use crate::wire::{self, DropReason, EngineKind};
use buffer::{Buffer, Waiting};
use frames::{Message, Reply};
use kvlane_index::{BlockSize, KvEvent};
use recent::{Recent, Seen};

/// An engine's clock and its process start time may disagree by this much.
const CLOCK_SLACK_S: f64 = 0.5;

/// Unanswered questions after a silence before the stream counts as degraded.
const PROBES_UNANSWERED: u32 = 3;

/// So many batches in a row may be taken for rests of an earlier life because their clock is behind; then it is the clock.
const EARLIER_LIFE_MAX: u32 = 1024;

/// What a stream must know about its publisher.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StreamConfig {
    /// The engine.
    pub engine: EngineKind,
    /// The block size in which the worker's requests are hashed.
    pub block_size: BlockSize,
    /// The whole topic; messages under another are dropped. `None` = any (one publisher on the endpoint).
    pub topic: Option<Vec<u8>>,
    /// Whether there is a replay endpoint.
    pub replay: bool,
    /// Bounds.
    pub limits: Limits,
}

/// Something that happened.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Input<'a> {
    /// The subscription is up (again): from now on live batches arrive, unless dropped.
    Connected,
    /// The subscription's connection is lost.
    Disconnected,
    /// A published message, all its frames.
    Live(&'a [&'a [u8]]),
    /// A message of the replay socket, all its frames.
    Replay {
        /// The request that it answers.
        attempt: u64,
        /// The frames as a DEALER sees them.
        frames: &'a [&'a [u8]],
    },
    /// The replay could not be asked for, or its connection broke.
    ReplayFailed {
        /// The request.
        attempt: u64,
    },
    /// The engine's `process_start_time_seconds`, whenever it was read.
    ProcessStart(f64),
    /// What is known of the worker is not to be trusted (it was away, or it answered otherwise than the index said).
    Relearn,
    /// Time passed.
    Tick,
}

/// What to do, in the order given.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Apply to the worker.
    Apply(KvEvent),
    /// A fence: forget all that the worker held; what is applied later belongs to `epoch`.
    Reset {
        /// The epoch that begins.
        epoch: u64,
    },
    /// Open a new DEALER (closing any earlier one), send `["", from_seq as 8 bytes big-endian]`, and pass what comes as
    /// [`Input::Replay`] under this attempt.
    RequestReplay {
        /// Names this request; replies to earlier ones are dropped.
        attempt: u64,
        /// The first sequence number wanted.
        from_seq: u64,
    },
    /// How far the worker's knowledge can be trusted has changed.
    StateChanged(State),
    /// Something was not used.
    Dropped(DropReason),
}

/// How far the index can be trusted about a worker.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum State {
    /// Complete: from sequence 0 or from a clear, without a hole.
    Live,
    /// A replay is under way; what is known may be behind.
    Replaying,
    /// What is known is true but not complete: the beginning was never seen.
    Rebuilding,
    /// Something that should work does not.
    Degraded(Fault),
    /// Nothing is known: no connection.
    Blind,
}

impl State {
    /// The label used in metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Live => "live",
            Self::Replaying => "replaying",
            Self::Rebuilding => "rebuilding",
            Self::Degraded(_) => "degraded",
            Self::Blind => "blind",
        }
    }
}

/// Why a stream is degraded.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fault {
    /// The connection is lost; what is known is kept for [`Limits::stale_ms`].
    Disconnected,
    /// The replay endpoint does not answer.
    ReplayUnanswered,
    /// Batches cannot be decoded.
    Undecodable,
    /// A removal could not be read: something may be claimed that is gone.
    RemovalLost,
}

impl Fault {
    /// The label used in metrics and JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Disconnected => "disconnected",
            Self::ReplayUnanswered => "replay_unanswered",
            Self::Undecodable => "undecodable",
            Self::RemovalLost => "removal_lost",
        }
    }
}

/// What a stream has seen since it was made. Only grows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters {
    /// Batches applied.
    pub batches: u64,
    /// Events applied.
    pub events: u64,
    /// Holes in the sequence of live batches.
    pub gaps: u64,
    /// Replays asked for.
    pub replays: u64,
    /// Restarts of the engine, by whatever sign.
    pub restarts: u64,
    /// Fences.
    pub resets: u64,
    /// Events whose medium is unknown (kept as external).
    pub unknown_media: u64,
}

/// Why a replay is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Purpose {
    /// From 0; nothing is held.
    Start,
    /// From 0, while incomplete knowledge is held: it is dropped when the first reply comes.
    Again,
    /// From the last applied batch, to fill a hole or to find out whether this is still the same life.
    Hole,
    /// From the last applied batch, after a silence.
    Probe,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Plan {
    purpose: Purpose,
    /// Tries without progress so far.
    tries: u32,
    /// The number that was missing inside an earlier reply.
    missing: Option<u64>,
}

impl Plan {
    const fn new(purpose: Purpose) -> Self {
        Self { purpose, tries: 0, missing: None }
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// No connection.
    Blind,
    /// Live batches are applied as they come.
    Following,
    /// A replay is under way, live batches wait.
    Asking { plan: Plan, heard_ms: u64, answered: bool },
    /// A replay will be tried again, live batches wait.
    Pausing { plan: Plan, until_ms: u64 },
    /// Reconnected without a replay endpoint: the process start time must say whether it is the same life.
    Confirming { until_ms: u64 },
}

/// The state machine of one publisher. See the module's description.
#[derive(Clone, Debug)]
pub struct Stream {
    config: StreamConfig,
    resolver: Resolver,
    phase: Phase,
    epoch: u64,
    /// The number of the batch to apply next; `None` = whichever comes.
    next: Option<u64>,
    /// Nothing of this life is missing in what was applied.
    complete: bool,
    /// A reconnect happened since the last batch: it may be another life.
    unverified: bool,
    /// The engine's replay buffer has been seen to hold what it should.
    retains: bool,
    fault: Option<Fault>,
    recent: Recent,
    /// First and last number of what replays brought in this epoch.
    replayed: Option<(u64, u64)>,
    buffer: Buffer,
    /// A finished replay left `next` at this number although later ones are waiting.
    unhealed: Option<(u64, u32)>,
    /// Batches dropped since the last applied one because they are older than it.
    earlier_lives: u32,
    first_ts_s: Option<f64>,
    last_ts_s: Option<f64>,
    process_start_s: Option<f64>,
    attempt: u64,
    heard_ms: u64,
    probes_unanswered: u32,
    /// When what is known must no longer be claimed.
    stale_at_ms: Option<u64>,
    /// When a whole replay is tried again, and the pause after that.
    again: Option<(u64, u64)>,
    reported: State,
    counters: Counters,
    events: Vec<KvEvent>,
    reasons: Vec<DropReason>,
}

impl Stream {
    /// A stream that is not connected yet.
    pub fn new(config: StreamConfig) -> Self {
        let resolver = Resolver::new(config.block_size);
        Self {
            config,
            resolver,
            phase: Phase::Blind,
            epoch: 0,
            next: None,
            complete: false,
            unverified: false,
            retains: true,
            fault: None,
            recent: Recent::default(),
            replayed: None,
            buffer: Buffer::default(),
            unhealed: None,
            earlier_lives: 0,
            first_ts_s: None,
            last_ts_s: None,
            process_start_s: None,
            attempt: 0,
            heard_ms: 0,
            probes_unanswered: 0,
            stale_at_ms: None,
            again: None,
            reported: State::Blind,
            counters: Counters::default(),
            events: Vec::new(),
            reasons: Vec::new(),
        }
    }

    /// Takes one input at the caller's time (milliseconds, never going back) and appends what is to be done to `out`.
    pub fn handle(&mut self, input: Input<'_>, now_ms: u64, out: &mut Vec<Action>) {
        match input {
            Input::Connected => self.connected(now_ms, out),
            Input::Disconnected => self.disconnected(now_ms),
            Input::Live(frames) => self.live(frames, now_ms, out),
            Input::Replay { attempt, frames } => self.replay(attempt, frames, now_ms, out),
            Input::ReplayFailed { attempt } => {
                if attempt == self.attempt && matches!(self.phase, Phase::Asking { .. }) {
                    self.retry(now_ms, out);
                }
            }
            Input::ProcessStart(start_s) => self.process_start(start_s, now_ms, out),
            Input::Relearn => {
                self.fence(out);
                self.buffer.clear();
                if self.phase != Phase::Blind {
                    self.learn(now_ms, out);
                }
            }
            Input::Tick => {}
        }
        self.on_time(now_ms, out);
        self.drain(now_ms, out);
        let state = self.state();
        if state != self.reported {
            self.reported = state;
            out.push(Action::StateChanged(state));
        }
    }

    /// When to call [`Stream::handle`] with [`Input::Tick`] if nothing else happens before.
    pub fn next_deadline_ms(&self) -> Option<u64> {
        let own = match self.phase {
            Phase::Blind => None,
            Phase::Following => self.following_deadline_ms(),
            Phase::Asking { heard_ms, .. } => Some(heard_ms + self.config.limits.reply_idle_ms),
            Phase::Pausing { until_ms, .. } | Phase::Confirming { until_ms } => Some(until_ms),
        };
        [own, self.stale_at_ms].into_iter().flatten().min()
    }

    /// How far what was applied can be trusted.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Blind if self.next.is_none() => State::Blind,
            Phase::Blind | Phase::Confirming { .. } => State::Degraded(Fault::Disconnected),
            Phase::Asking { plan, .. } | Phase::Pausing { plan, .. }
                if !matches!(plan.purpose, Purpose::Probe | Purpose::Again) =>
            {
                State::Replaying
            }
            _ => match self.fault {
                Some(fault) => State::Degraded(fault),
                None if self.complete => State::Live,
                None => State::Rebuilding,
            },
        }
    }

    /// The present life of the publisher, from 0; each fence begins the next.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of the batch to apply next; `None` before the first.
    pub fn next_seq(&self) -> Option<u64> {
        self.next
    }

    /// The engine's clock in the batch applied last: seconds since the Unix epoch.
    pub fn last_ts_s(&self) -> Option<f64> {
        self.last_ts_s
    }

    /// Live batches that wait for a replay, and their bytes.
    pub fn waiting(&self) -> (usize, usize) {
        (self.buffer.len(), self.buffer.bytes())
    }

    /// What was seen since the stream was made.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    fn connected(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.buffer.clear();
        self.retains = true;
        self.heard_ms = now_ms;
        if self.next.is_none() {
            self.learn(now_ms, out);
        } else if self.config.replay {
            self.unverified = true;
            self.claim_until(now_ms);
            self.ask(Plan::new(Purpose::Hole), now_ms, out);
        } else if self.process_start_s.is_some() {
            self.phase = Phase::Confirming { until_ms: now_ms + self.config.limits.reply_idle_ms };
        } else {
            self.fence(out);
            self.phase = Phase::Following;
        }
    }

    fn disconnected(&mut self, now_ms: u64) {
        self.buffer.clear();
        self.phase = Phase::Blind;
        if self.next.is_some() {
            self.claim_until(now_ms);
        }
    }

    /// Begins to learn a publisher of which nothing is known.
    fn learn(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.config.replay {
            self.ask(Plan::new(Purpose::Start), now_ms, out);
        } else {
            self.phase = Phase::Following;
        }
    }

    fn live(&mut self, frames: &[&[u8]], now_ms: u64, out: &mut Vec<Action>) {
        let message = match frames::live(frames, self.config.topic.as_deref()) {
            Ok(message) => message,
            Err(reason) => return out.push(Action::Dropped(reason)),
        };
        if self.phase == Phase::Blind {
            // The socket speaks before its monitor does.
            self.connected(now_ms, out);
        }
        if let Phase::Asking { plan, .. } | Phase::Pausing { plan, .. } = self.phase
            && plan.purpose == Purpose::Probe
        {
            // Not silent any more: no need to ask.
            self.attempt += 1;
            self.phase = Phase::Following;
        }
        self.heard_ms = now_ms;
        if self.phase == Phase::Following {
            self.in_order(message, now_ms, out);
        } else if !self.buffer.push(message.seq, message.payload, &self.config.limits) {
            out.push(Action::Dropped(DropReason::BufferFull));
        }
    }

    /// Applies what waited, until it runs out or leads to another question.
    fn drain(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        while self.phase == Phase::Following {
            let Some(Waiting { seq, payload }) = self.buffer.pop() else { break };
            self.in_order(Message { seq, payload: &payload }, now_ms, out);
        }
    }

    /// Takes a live batch while following.
    fn in_order(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let Some(next) = self.next else {
            if message.seq != 0 && self.config.replay && self.retains && self.fault.is_none() {
                if self.unhealed.is_none() {
                    // The replay was empty, and then the first batches were missed: ask once more.
                    self.unhealed = Some((0, 1));
                    self.put_back(message);
                    return self.ask(Plan::new(Purpose::Start), now_ms, out);
                }
                self.retains = false;
            }
            return self.begin(message, now_ms, out);
        };
        match distance(message.seq, next) {
            0 => self.apply_live(message, now_ms, out),
            1.. => self.gap(message, next, now_ms, out),
            _ => self.backwards(message, now_ms, out),
        }
    }

    /// The first batch of what will be known.
    fn begin(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        self.next = Some(message.seq);
        self.complete = message.seq == 0;
        self.apply_live(message, now_ms, out);
    }

    fn gap(&mut self, message: Message<'_>, next: u64, now_ms: u64, out: &mut Vec<Action>) {
        let limits = self.config.limits;
        let asked = self.unhealed.filter(|&(at, _)| at == next).map_or(0, |(_, tries)| tries);
        if asked == 0 {
            self.counters.gaps += 1;
        } else if self.earlier_lives < EARLIER_LIFE_MAX && self.earlier_than_last(message.payload) {
            // A replay went past it and it is older than what was applied: a rest of the life before.
            self.earlier_lives += 1;
            return out.push(Action::Dropped(DropReason::EarlierLife));
        }
        if !self.config.replay || !self.retains || asked >= limits.tries {
            self.fence(out);
            return self.begin(message, now_ms, out);
        }
        self.put_back(message);
        self.unhealed = Some((next, asked + 1));
        self.claim_until(now_ms);
        let plan = Plan::new(Purpose::Hole);
        if asked == 0 {
            self.ask(plan, now_ms, out);
        } else {
            self.phase = Phase::Pausing { plan, until_ms: now_ms + self.backoff_ms(asked) };
        }
    }

    /// A number below the expected one: seen before, or a restart.
    fn backwards(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let seen = match self.recent.look(message.seq, message.payload) {
            Seen::Forgotten => {
                let in_replay = self.replayed.is_some_and(|(first, last)| {
                    distance(message.seq, first) >= 0 && distance(message.seq, last) <= 0
                });
                in_replay && self.earlier_than_last(message.payload)
            }
            seen => seen == Seen::Same,
        };
        if seen {
            return out.push(Action::Dropped(DropReason::Duplicate));
        }
        self.counters.restarts += 1;
        self.fence(out);
        if self.config.replay && self.retains {
            self.put_back(message);
            self.ask(Plan::new(Purpose::Start), now_ms, out);
        } else {
            self.begin(message, now_ms, out);
        }
    }

    fn put_back(&mut self, message: Message<'_>) {
        self.buffer.unpop(Waiting { seq: message.seq, payload: message.payload.to_vec() });
    }

    fn earlier_than_last(&self, payload: &[u8]) -> bool {
        let ts_s = wire::decode(self.config.engine, payload).map(|batch| batch.ts_s);
        match (ts_s, self.last_ts_s) {
            (Ok(ts_s), Some(last_ts_s)) => ts_s <= last_ts_s,
            _ => false,
        }
    }

    /// Applies the next batch of the live stream.
    fn apply_live(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let Err(reason) = self.apply(message, out) else { return };
        out.push(Action::Dropped(reason));
        if self.config.replay && self.retains && self.fault != Some(Fault::Undecodable) {
            // The engine's own copy may be whole. If not, `replay_batch` gives it up.
            self.claim_until(now_ms);
            self.ask(Plan::new(Purpose::Hole), now_ms, out);
        } else {
            self.pass_over(message, out);
        }
    }

    /// Gives up a batch that cannot be decoded: a hole that nothing fills.
    fn pass_over(&mut self, message: Message<'_>, out: &mut Vec<Action>) {
        if self.fault != Some(Fault::Undecodable) {
            self.fence(out);
        }
        self.fault = Some(Fault::Undecodable);
        self.complete = false;
        self.applied(message);
    }

    /// Decodes the next batch and emits its events.
    fn apply(&mut self, message: Message<'_>, out: &mut Vec<Action>) -> Result<(), DropReason> {
        let batch = wire::decode(self.config.engine, message.payload)?;
        self.reasons.clear();
        self.reasons.extend(&batch.dropped);
        self.resolver.resolve(&batch, &mut self.events, &mut self.reasons);
        if self.fault == Some(Fault::Undecodable) {
            self.fault = None;
        }
        for &reason in &self.reasons {
            if reason == DropReason::BadRemoval {
                self.fault = Some(Fault::RemovalLost);
            }
            out.push(Action::Dropped(reason));
        }
        self.counters.batches += 1;
        self.counters.events += self.events.len() as u64;
        self.counters.unknown_media += u64::from(batch.unknown_media);
        for event in self.events.drain(..) {
            if event == (KvEvent::Cleared { tier: None }) {
                self.complete = true;
                self.fault = self.fault.filter(|&fault| fault != Fault::RemovalLost);
            }
            out.push(Action::Apply(event));
        }
        self.first_ts_s.get_or_insert(batch.ts_s);
        self.last_ts_s = Some(batch.ts_s);
        self.applied(message);
        Ok(())
    }

    fn applied(&mut self, message: Message<'_>) {
        self.recent.push(message.seq, message.payload);
        self.next = Some(message.seq.wrapping_add(1));
        self.unhealed = None;
        self.earlier_lives = 0;
    }

    fn replay(&mut self, attempt: u64, frames: &[&[u8]], now_ms: u64, out: &mut Vec<Action>) {
        let Phase::Asking { plan, answered, .. } = self.phase else {
            return out.push(Action::Dropped(DropReason::LateReply));
        };
        if attempt != self.attempt {
            return out.push(Action::Dropped(DropReason::LateReply));
        }
        let reply = match frames::reply(frames, self.config.topic.as_deref()) {
            Ok(reply) => reply,
            Err(reason) => return out.push(Action::Dropped(reason)),
        };
        self.phase = Phase::Asking { plan, heard_ms: now_ms, answered: true };
        match reply {
            Reply::End => self.replay_end(plan, answered, now_ms, out),
            Reply::Batch(message) if answered => self.replay_next(message, plan, now_ms, out),
            Reply::Batch(message) => self.replay_first(message, plan, now_ms, out),
        }
    }

    /// The first batch of a replay says which life it comes from and how far back it reaches.
    fn replay_first(&mut self, message: Message<'_>, plan: Plan, now_ms: u64, out: &mut Vec<Action>) {
        if matches!(plan.purpose, Purpose::Start | Purpose::Again) {
            if plan.purpose == Purpose::Again {
                self.fence(out);
                self.set_plan(Plan::new(Purpose::Start));
            }
            self.next = Some(message.seq);
            self.complete = message.seq == 0;
            return self.replay_batch(message, now_ms, out);
        }
        let next = self.next.expect("a hole is after an applied batch");
        match distance(message.seq, next) {
            // Just what was asked for: the batch applied last.
            -1 if self.recent.look(message.seq, message.payload) == Seen::Same => self.unverified = false,
            0 if !self.unverified => self.replay_batch(message, now_ms, out),
            // Same numbers, but no proof that it is the same life.
            0 => self.restarted(now_ms, out),
            1.. => {
                self.fence(out);
                self.next = Some(message.seq);
                self.replay_batch(message, now_ms, out);
            }
            _ if self.recent.look(message.seq, message.payload) == Seen::Other => self.restarted(now_ms, out),
            _ => out.push(Action::Dropped(DropReason::Duplicate)),
        }
    }

    fn replay_next(&mut self, message: Message<'_>, mut plan: Plan, now_ms: u64, out: &mut Vec<Action>) {
        let next = self.next.expect("set by the first batch of the replay");
        match distance(message.seq, next) {
            0 => self.replay_batch(message, now_ms, out),
            // Missing twice at one place: the engine does not have it.
            1.. if plan.missing == Some(next) => {
                self.fence(out);
                self.next = Some(message.seq);
                self.replay_batch(message, now_ms, out);
            }
            // The engine's reply queue overflowed: ask for the rest.
            1.. => {
                plan.missing = Some(next);
                self.set_plan(plan);
                self.retry(now_ms, out);
            }
            _ => out.push(Action::Dropped(DropReason::Duplicate)),
        }
    }

    fn replay_batch(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let (first, _) = self.replayed.unwrap_or((message.seq, message.seq));
        if let Err(reason) = self.apply(message, out) {
            out.push(Action::Dropped(reason));
            self.pass_over(message, out);
        }
        self.replayed = Some((first, message.seq));
        if let Phase::Asking { plan, .. } = &mut self.phase {
            plan.tries = 0;
        }
        self.heard_ms = now_ms;
    }

    fn replay_end(&mut self, plan: Plan, answered: bool, now_ms: u64, out: &mut Vec<Action>) {
        if !answered && matches!(plan.purpose, Purpose::Hole | Purpose::Probe) {
            // Not even the last batch: it has none of this life's.
            return self.restarted(now_ms, out);
        }
        self.heard_ms = now_ms;
        self.probes_unanswered = 0;
        self.fault = self.fault.filter(|&fault| fault != Fault::ReplayUnanswered);
        self.again = None;
        self.follow();
    }

    fn restarted(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.counters.restarts += 1;
        self.fence(out);
        self.learn(now_ms, out);
    }

    fn process_start(&mut self, start_s: f64, now_ms: u64, out: &mut Vec<Action>) {
        let before = self.process_start_s.replace(start_s);
        let same = before == Some(start_s);
        if let Phase::Confirming { .. } = self.phase {
            if !same {
                self.counters.restarts += 1;
                self.fence(out);
            }
            return self.follow();
        }
        let known_already = self.first_ts_s.is_some_and(|ts_s| ts_s + CLOCK_SLACK_S >= start_s);
        if before.is_none() || same || known_already || self.next.is_none() {
            return;
        }
        self.counters.restarts += 1;
        self.fence(out);
        if self.phase != Phase::Blind {
            self.buffer.clear();
            self.learn(now_ms, out);
        }
    }

    fn on_time(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let limits = self.config.limits;
        if self.stale_at_ms.is_some_and(|at| now_ms >= at) {
            self.fence(out);
            match self.phase {
                Phase::Blind => {}
                Phase::Confirming { .. } => self.follow(),
                _ => self.learn(now_ms, out),
            }
        }
        match self.phase {
            Phase::Asking { heard_ms, .. } if now_ms >= heard_ms + limits.reply_idle_ms => {
                self.retry(now_ms, out);
            }
            Phase::Pausing { plan, until_ms } if now_ms >= until_ms => self.ask(plan, now_ms, out),
            Phase::Confirming { until_ms } if now_ms >= until_ms => {
                self.fence(out);
                self.follow();
            }
            Phase::Following if self.following_deadline_ms().is_some_and(|at| now_ms >= at) => {
                let again = self.again.is_some_and(|(at, _)| now_ms >= at);
                let purpose = if again { Purpose::Again } else { Purpose::Probe };
                self.ask(Plan { tries: limits.tries - 1, ..Plan::new(purpose) }, now_ms, out);
            }
            _ => {}
        }
    }

    fn following_deadline_ms(&self) -> Option<u64> {
        let again = self.again.filter(|_| !self.complete).map(|(at, _)| at);
        let can_probe = self.config.replay && self.retains && self.next.is_some();
        let quiet = can_probe.then(|| {
            self.heard_ms + (self.config.limits.quiet_ms << self.probes_unanswered.min(PROBES_UNANSWERED))
        });
        [again, quiet].into_iter().flatten().min()
    }

    fn ask(&mut self, plan: Plan, now_ms: u64, out: &mut Vec<Action>) {
        let from_seq = match (plan.purpose, self.next) {
            (Purpose::Hole | Purpose::Probe, Some(next)) => next.wrapping_sub(1),
            _ => 0,
        };
        self.attempt += 1;
        self.counters.replays += 1;
        self.phase = Phase::Asking { plan, heard_ms: now_ms, answered: false };
        out.push(Action::RequestReplay { attempt: self.attempt, from_seq });
    }

    fn set_plan(&mut self, new: Plan) {
        if let Phase::Asking { plan, .. } = &mut self.phase {
            *plan = new;
        }
    }

    /// The replay under way brings nothing more: pause and try again, or give it up.
    fn retry(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let Phase::Asking { mut plan, .. } = self.phase else { return };
        plan.tries += 1;
        if plan.purpose == Purpose::Start && self.next.is_some() {
            plan.purpose = Purpose::Hole;
        }
        if plan.tries < self.config.limits.tries {
            let until_ms = now_ms + self.backoff_ms(plan.tries);
            self.phase = Phase::Pausing { plan, until_ms };
            return;
        }
        match plan.purpose {
            Purpose::Probe => {
                self.probes_unanswered += 1;
                if self.probes_unanswered >= PROBES_UNANSWERED {
                    self.fault = Some(Fault::ReplayUnanswered);
                }
                self.heard_ms = now_ms;
            }
            Purpose::Start | Purpose::Hole | Purpose::Again => {
                if plan.purpose == Purpose::Hole {
                    self.fence(out);
                }
                self.fault = Some(Fault::ReplayUnanswered);
                let limits = self.config.limits;
                let pause = self.again.map_or(limits.again_ms, |(_, pause)| pause);
                self.again = Some((now_ms + pause, (pause * 2).min(limits.again_max_ms)));
            }
        }
        self.follow();
    }

    fn backoff_ms(&self, tries: u32) -> u64 {
        let limits = self.config.limits;
        (limits.backoff_ms << tries.saturating_sub(1).min(16)).min(limits.backoff_max_ms)
    }

    fn follow(&mut self) {
        self.phase = Phase::Following;
        self.stale_at_ms = None;
        self.unverified = false;
    }

    /// From now on what is known may be out of date; it is claimed for a while longer.
    fn claim_until(&mut self, now_ms: u64) {
        self.stale_at_ms.get_or_insert(now_ms + self.config.limits.stale_ms);
    }

    /// Ends the present epoch: all that was known is void.
    fn fence(&mut self, out: &mut Vec<Action>) {
        self.epoch += 1;
        self.counters.resets += 1;
        self.next = None;
        self.complete = false;
        self.unverified = false;
        self.fault = None;
        self.recent.clear();
        self.replayed = None;
        self.unhealed = None;
        self.first_ts_s = None;
        self.last_ts_s = None;
        self.stale_at_ms = None;
        out.push(Action::Reset { epoch: self.epoch });
    }
}

/// How far `seq` is from `from`, with wrap-around: negative = before.
fn distance(seq: u64, from: u64) -> i64 {
    seq.wrapping_sub(from) as i64
}

#[cfg(test)]
mod tests;
