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
//! * What the engine has forgotten may come from a snapshot: a peer's, or this router's own ([`Input::Snapshot`]).
//! * Knowledge is *complete* from sequence 0 or from a clear on: [`State::Live`]. Otherwise it grows from what is published
//!   from now on: [`State::Rebuilding`].
//!
//! Nothing here waits or reads a clock; call [`Stream::handle`] with [`Input::Tick`] at [`Stream::next_deadline_ms`].

mod buffer;
mod frames;
mod life;
mod limits;
mod live;
mod recent;
mod replay;
mod snapshot;

pub use limits::Limits;
pub use snapshot::{PRINTS_MAX, Position};

use crate::resolve::Resolver;
use crate::wire::{Decoder, DropReason, EngineKind};
use buffer::Buffer;
use kvlane_index::hash::Scheme;
use kvlane_index::{BlockSize, KvEvent};
use recent::Recent;

/// An engine's clock and its process start time may disagree by this much.
const CLOCK_SLACK_S: f64 = 0.1;

/// Unanswered questions after a silence before the stream counts as degraded.
const PROBES_UNANSWERED: u32 = 3;

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
    /// Whether there may be snapshots of the worker to ask for.
    pub snapshots: bool,
    /// Bounds.
    pub limits: Limits,
}

/// Something that happened.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Input<'a> {
    /// The subscription is up (again): from now on live batches arrive, unless dropped. A few of them may be passed in before
    /// this is.
    Connected,
    /// The subscription's connection is lost; all that came over it has been passed in.
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
    /// Where a snapshot of the worker goes on; its content stays with the caller.
    Snapshot {
        /// The request that it answers.
        attempt: u64,
        /// After which batch it was taken.
        position: &'a Position,
    },
    /// There is no snapshot.
    SnapshotFailed {
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
        /// The engine was restarted, or may have been: its names may mean something else from now on.
        restarted: bool,
    },
    /// Open a new DEALER (closing any earlier one), send `["", from_seq as 8 bytes big-endian]`, and pass what comes as
    /// [`Input::Replay`] under this attempt.
    RequestReplay {
        /// Names this request; replies to earlier ones are dropped.
        attempt: u64,
        /// The first sequence number wanted.
        from_seq: u64,
    },
    /// Look for a snapshot of the worker (a peer's, or one's own of an earlier life), and pass its position in as [`Input::Snapshot`] under
    /// this attempt, or [`Input::SnapshotFailed`]. Live batches wait meanwhile, [`Limits::snapshot_ms`] at most.
    RequestSnapshot {
        /// Names this request; an answer to an earlier one is dropped.
        attempt: u64,
    },
    /// The snapshot whose position was passed in last is of this life: apply its content to the worker, of which nothing is held, now.
    AdoptSnapshot,
    /// The snapshot whose position was passed in last is of no use.
    DropSnapshot,
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
    /// A snapshot was asked for, live batches wait.
    Healing { until_ms: u64 },
    /// Reconnected without a replay endpoint: the process start time must say whether it is the same life.
    Confirming { until_ms: u64 },
}

/// The state machine of one publisher. See the module's description.
#[derive(Clone, Debug)]
pub struct Stream {
    config: StreamConfig,
    decoder: Decoder,
    resolver: Resolver,
    phase: Phase,
    epoch: u64,
    /// The number of the batch to apply next; `None` = whichever comes.
    next: Option<u64>,
    /// The first batch of what is known.
    since: Option<u64>,
    /// Nothing of this life is missing in what was applied.
    complete: bool,
    /// A reconnect happened since the last batch: it may be another life.
    unverified: bool,
    /// A replay was asked for a second time: another life may answer than did before.
    doubtful: bool,
    /// A snapshot from elsewhere waits for the proof that it is of the engine's present life; its content is not applied yet.
    adopting: bool,
    /// The engine's replay buffer has been seen to hold what it should.
    retains: bool,
    fault: Option<Fault>,
    recent: Recent,
    /// First and last number of what replays brought in this epoch.
    replayed: Option<(u64, u64)>,
    buffer: Buffer,
    /// A finished replay left `next` at this number although later ones are waiting.
    unhealed: Option<(u64, u32)>,
    /// Strays of an earlier life dropped since the last applied batch.
    strays: u32,
    /// Fingerprint of the batch that told of the last restart.
    restarted_by: Option<u64>,
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
    /// When a snapshot may be asked for again, and the pause after that.
    asked_elsewhere: Option<(u64, u64)>,
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
            decoder: Decoder::default(),
            resolver,
            phase: Phase::Blind,
            epoch: 0,
            next: None,
            since: None,
            complete: false,
            unverified: false,
            doubtful: false,
            adopting: false,
            retains: true,
            fault: None,
            recent: Recent::default(),
            replayed: None,
            buffer: Buffer::default(),
            unhealed: None,
            strays: 0,
            restarted_by: None,
            first_ts_s: None,
            last_ts_s: None,
            process_start_s: None,
            attempt: 0,
            heard_ms: 0,
            probes_unanswered: 0,
            stale_at_ms: None,
            again: None,
            asked_elsewhere: None,
            reported: State::Blind,
            counters: Counters::default(),
            events: Vec::new(),
            reasons: Vec::new(),
        }
    }

    /// The same, hashing blocks by other rules than kvlane's own.
    #[must_use]
    pub fn hashing_as(self, scheme: Scheme) -> Self {
        Self { resolver: self.resolver.hashing_as(scheme), ..self }
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
            Input::Snapshot { attempt, position } => self.snapshot(attempt, position, now_ms, out),
            Input::SnapshotFailed { attempt } => self.no_snapshot(attempt),
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
        self.ask_elsewhere(now_ms, out);
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
            Phase::Following => {
                [self.following_deadline_ms(), self.elsewhere_deadline_ms()].into_iter().flatten().min()
            }
            Phase::Asking { heard_ms, .. } => Some(heard_ms + self.config.limits.reply_idle_ms),
            Phase::Pausing { until_ms, .. }
            | Phase::Healing { until_ms }
            | Phase::Confirming { until_ms } => Some(until_ms),
        };
        [own, self.stale_at_ms].into_iter().flatten().min()
    }

    /// How far what was applied can be trusted.
    pub fn state(&self) -> State {
        match self.phase {
            Phase::Blind if self.next.is_none() => State::Blind,
            Phase::Blind | Phase::Confirming { .. } => State::Degraded(Fault::Disconnected),
            _ if self.adopting => State::Replaying,
            Phase::Healing { .. } => State::Replaying,
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

    /// What the stream was made with.
    pub fn config(&self) -> &StreamConfig {
        &self.config
    }

    /// The present life of the publisher, from 0; each fence begins the next.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// The number of the batch to apply next; `None` before the first.
    pub fn next_seq(&self) -> Option<u64> {
        self.next
    }

    /// The number of the first batch of what is known: all from there on was applied, without a hole. After a peer's snapshot: the one
    /// that it goes on with.
    pub fn since_seq(&self) -> Option<u64> {
        self.since
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
}

/// How far `seq` is from `from`, with wrap-around: negative = before.
fn distance(seq: u64, from: u64) -> i64 {
    seq.wrapping_sub(from) as i64
}

#[cfg(test)]
mod tests;
