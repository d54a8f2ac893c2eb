//! Follows one rank's publisher: sockets and clock into `kvlane_events::stream`, its actions out into the lane.

use super::lane::{Change, ImageReply, Lane, Work};
use super::socket::{self, Heard, OwnedTask, Replayed};
use super::stats::RankCounters;
use super::weighed::{Closed, Receiver};
use super::zmtp::{MESSAGE_FRAMES_MAX, Message};
use crate::clock;
use crate::fleet::{Publisher, Trust};
use crate::state::{self, Origin, Sources};
use kvlane_events::stream::{Action, Counters, Fault, Input, Position, State, Stream, StreamConfig};
use kvlane_events::wire::DropReason;
use kvlane_index::hash::Scheme;
use kvlane_index::{KvEvent, Worker};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{mpsc, oneshot, watch};
use tokio_util::task::AbortOnDropHandle;

/// Events gathered before they go into the lane; one more batch of messages may come on top.
const EVENTS_AT_ONCE: usize = 1024;

/// Everything that following one publisher takes.
pub(crate) struct Following {
    pub(crate) worker: Worker,
    pub(crate) publisher: Publisher,
    pub(crate) config: StreamConfig,
    /// How the partition's blocks are hashed.
    pub(crate) scheme: Scheme,
    pub(crate) lane: Lane,
    pub(crate) counters: Arc<RankCounters>,
    /// The engine's `process_start_time_seconds`, sent again whenever it was read.
    pub(crate) process_start: watch::Receiver<Option<f64>>,
    /// Rises when what is known is not to be trusted any more.
    pub(crate) relearn: watch::Receiver<u64>,
    /// Where the stream may go on from, where the engine has forgotten its beginning.
    pub(crate) beginnings: Option<Beginnings>,
    /// Whoever wants to know what the rank holds; unanswered while the stream is not in step.
    pub(crate) images: mpsc::Receiver<ImageReply>,
}

/// Images of earlier lives of this process, and of others.
#[derive(Clone, Debug)]
pub(crate) struct Beginnings {
    /// Who has them.
    pub(crate) sources: Sources,
    /// What they call this stream.
    pub(crate) origin: Origin,
}

/// An image that was found, its events ready to be applied.
struct Beginning {
    from: state::From,
    position: Position,
    events: Vec<KvEvent>,
}

/// What following a publisher tells the fleet.
pub(crate) trait Report: Send + 'static {
    /// How far the rank can be trusted from now on.
    fn trust(&self, worker: Worker, trust: Trust);
    /// The subscription was lost or came back: what is known of the engine may be out of date.
    fn connection_changed(&self);
}

/// Runs until it is dropped, or until the partition is gone.
pub(crate) async fn follow(task: Following, report: impl Report) {
    let Following {
        worker,
        publisher,
        mut config,
        scheme,
        lane,
        counters,
        mut process_start,
        mut relearn,
        beginnings,
        mut images,
    } = task;
    config.snapshots = beginnings.is_some();
    let topic = publisher.topic.clone().unwrap_or_default();
    let (mut live, _subscription) = socket::subscribe(publisher.events.clone(), topic);
    let mut rank = Rank {
        worker,
        publisher,
        stream: Stream::new(config).hashing_as(scheme),
        lane,
        counters,
        report,
        actions: Vec::new(),
        // Nothing is known of the worker's earlier lives.
        changes: vec![Change::Fence { restarted: true }],
        lost: None,
        counted: Counters::default(),
        replay: None,
        replay_task: None,
        beginnings,
        search: None,
        beginning: None,
    };
    if let Some(start_s) = *process_start.borrow_and_update() {
        rank.handle(Input::ProcessStart(start_s));
    }
    let mut done = Ok(());
    while done.is_ok() {
        let deadline = rank.stream.next_deadline_ms();
        let until_deadline = deadline.map(|at| Duration::from_millis(at.saturating_sub(clock::now_ms())));
        tokio::select! {
            heard = live.recv() => {
                let Some(heard) = heard else { return };
                rank.heard(heard);
                while rank.changes.len() < EVENTS_AT_ONCE {
                    let Some(heard) = live.try_recv() else { break };
                    rank.heard(heard);
                }
            }
            reply = next_reply(&mut rank.replay) => {
                rank.replayed(reply);
                while rank.changes.len() < EVENTS_AT_ONCE {
                    let Some(reply) = rank.replay.as_mut().and_then(Receiver::try_recv) else { break };
                    rank.replayed(Some(reply));
                }
            }
            (attempt, found) = next_beginning(&mut rank.search) => rank.found(attempt, found),
            Some(reply) = images.recv() => {
                done = rank.flush().await;
                if done.is_ok() {
                    done = rank.image(reply).await;
                }
                continue;
            }
            () = sleep(until_deadline) => rank.handle(Input::Tick),
            changed = process_start.changed() => {
                let Ok(()) = changed else { return };
                let start_s = *process_start.borrow_and_update();
                if let Some(start_s) = start_s {
                    rank.handle(Input::ProcessStart(start_s));
                }
            }
            changed = relearn.changed() => {
                let Ok(()) = changed else { return };
                rank.handle(Input::Relearn);
            }
        }
        done = rank.flush().await;
    }
}

async fn next_reply(replay: &mut Option<Receiver<Replayed>>) -> Option<Replayed> {
    match replay {
        Some(receiver) => receiver.recv().await,
        None => std::future::pending().await,
    }
}

type Found = (u64, Option<Beginning>);

/// A search for a beginning, given up when this is dropped.
struct Search {
    attempt: u64,
    found: oneshot::Receiver<Option<Beginning>>,
    #[expect(dead_code, reason = "ends with the search")]
    task: AbortOnDropHandle<()>,
}

async fn next_beginning(search: &mut Option<Search>) -> Found {
    match search {
        Some(running) => {
            let found = (&mut running.found).await.ok().flatten();
            let attempt = running.attempt;
            *search = None;
            (attempt, found)
        }
        None => std::future::pending().await,
    }
}

async fn sleep(duration: Option<Duration>) {
    match duration {
        Some(duration) => tokio::time::sleep(duration).await,
        None => std::future::pending().await,
    }
}

struct Rank<R> {
    worker: Worker,
    publisher: Publisher,
    stream: Stream,
    lane: Lane,
    counters: Arc<RankCounters>,
    report: R,
    actions: Vec<Action>,
    /// Not in the lane yet.
    changes: Vec<Change>,
    /// Why the last connection ended or could not be made.
    lost: Option<String>,
    /// The stream's counters as far as they are in `counters`, which outlive the stream.
    counted: Counters,
    replay: Option<Receiver<Replayed>>,
    replay_task: Option<OwnedTask>,
    beginnings: Option<Beginnings>,
    search: Option<Search>,
    /// Found, and not proved to be of this life of the engine yet.
    beginning: Option<Beginning>,
}

impl<R: Report> Rank<R> {
    fn heard(&mut self, heard: Heard) {
        match heard {
            Heard::Connected => {
                self.lost = None;
                self.counters.update(|stats| {
                    stats.connected = true;
                    stats.connect_error = None;
                    stats.connects += 1;
                });
                self.handle(Input::Connected);
                self.report.connection_changed();
            }
            Heard::Messages(messages) => {
                let bytes: usize = messages.iter().map(Message::weight).sum();
                self.counters.update(|stats| {
                    stats.messages += messages.len() as u64;
                    stats.bytes += bytes as u64;
                    stats.heard = Some(Instant::now());
                });
                for message in &messages {
                    let mut slots = [&[][..]; MESSAGE_FRAMES_MAX];
                    let count = message.fill(&mut slots);
                    self.handle(Input::Live(&slots[..count]));
                }
            }
            Heard::Lost(error) => {
                let error = error.to_string();
                let was_connected = self.lost.is_none();
                self.counters.update(|stats| {
                    stats.connected = false;
                    stats.connect_error = Some(error.clone());
                });
                let news = self.lost.as_ref() != Some(&error);
                self.lost = Some(error);
                self.handle(Input::Disconnected);
                if was_connected {
                    self.report.connection_changed();
                }
                if news {
                    self.tell(self.stream.state());
                }
            }
        }
    }

    fn replayed(&mut self, reply: Option<Replayed>) {
        let Some(Replayed { attempt, messages }) = reply else {
            self.replay = None;
            self.replay_task = None;
            return;
        };
        let Some(messages) = messages else { return self.handle(Input::ReplayFailed { attempt }) };
        self.counters.update(|stats| {
            stats.replay_messages += messages.len() as u64;
            stats.heard = Some(Instant::now());
        });
        for message in &messages {
            let mut slots = [&[][..]; MESSAGE_FRAMES_MAX];
            let count = message.fill(&mut slots);
            self.handle(Input::Replay { attempt, frames: &slots[..count] });
        }
    }

    /// Passes one input to the stream and does what it says.
    fn handle(&mut self, input: Input<'_>) {
        let mut actions = std::mem::take(&mut self.actions);
        self.stream.handle(input, clock::now_ms(), &mut actions);
        for action in actions.drain(..) {
            match action {
                Action::Apply(event) => self.changes.push(Change::Event(event)),
                Action::Reset { restarted, .. } => {
                    self.changes.push(Change::Fence { restarted });
                    self.counters.update(|stats| stats.epoch += 1);
                }
                Action::RequestReplay { attempt, from_seq } => {
                    (self.replay, self.replay_task) = (None, None);
                    if let Some(endpoint) = self.publisher.replay.clone() {
                        let (receiver, task) = socket::replay(endpoint, attempt, from_seq);
                        (self.replay, self.replay_task) = (Some(receiver), Some(task));
                    }
                }
                Action::RequestSnapshot { attempt } => self.look_for_beginning(attempt),
                Action::AdoptSnapshot => {
                    if let Some(Beginning { from, events, .. }) = self.beginning.take() {
                        let endpoint = &self.publisher.events;
                        tracing::info!(worker = %self.worker, %endpoint, from = from.name(), "its stream goes on from an image");
                        self.counters.update(|stats| stats.images_adopted += 1);
                        self.changes.extend(events.into_iter().map(Change::Event));
                    }
                }
                Action::DropSnapshot => {
                    if self.beginning.take().is_some() {
                        self.counters.update(|stats| stats.images_dropped += 1);
                    }
                }
                Action::StateChanged(state) => {
                    if state == State::Live {
                        self.changes.push(Change::Complete);
                    }
                    self.tell(state);
                }
                Action::Dropped(reason) => {
                    let at = DropReason::ALL.iter().position(|r| *r == reason);
                    self.counters.update(|stats| {
                        if let Some(count) = at.and_then(|at| stats.drops.get_mut(at)) {
                            *count += 1;
                        }
                    });
                }
            }
        }
        self.actions = actions;
    }

    fn look_for_beginning(&mut self, attempt: u64) {
        let Some(Beginnings { sources, origin }) = self.beginnings.clone() else { return };
        let (send, found) = oneshot::channel();
        let task = tokio::spawn(async move {
            let _ = send.send(beginning(&sources, &origin).await);
        });
        self.search = Some(Search { attempt, found, task: AbortOnDropHandle::new(task) });
    }

    fn found(&mut self, attempt: u64, found: Option<Beginning>) {
        let Some(found) = found else { return self.handle(Input::SnapshotFailed { attempt }) };
        let position = found.position.clone();
        self.beginning = Some(found);
        self.handle(Input::Snapshot { attempt, position: &position });
    }

    /// Has the writer answer with what the rank holds, if the stream is in step.
    async fn image(&mut self, reply: ImageReply) -> Result<(), Closed> {
        let Some(mut position) = self.stream.position() else { return Ok(()) };
        // Orphans are in no dump: with some, what an image says is true but not all.
        position.complete &= self.counters.look(|stats| stats.applied.orphaned <= stats.applied.linked);
        self.lane.send(Work::Image { worker: self.worker, position, reply }).await
    }

    fn tell(&self, state: State) {
        let lost = || {
            let endpoint = &self.publisher.events;
            self.lost.as_ref().map_or_else(
                || format!("connecting to {endpoint}"),
                |why| format!("no connection to {endpoint}: {why}"),
            )
        };
        let trust = match state {
            State::Live => Trust::Live,
            State::Replaying => Trust::Replaying,
            State::Rebuilding if self.stream.next_seq().is_none() => {
                Trust::Rebuilding("nothing was published yet, and there is no replay to say so".to_owned())
            }
            State::Rebuilding => Trust::Rebuilding("what was published before is not known".to_owned()),
            State::Blind => Trust::Blind(lost()),
            State::Degraded(Fault::Disconnected) => Trust::Degraded(lost()),
            State::Degraded(Fault::ReplayUnanswered) => Trust::Degraded(match &self.publisher.replay {
                Some(endpoint) => format!("{endpoint} does not answer replay requests"),
                None => "there is no replay endpoint".to_owned(),
            }),
            State::Degraded(Fault::Undecodable) => {
                Trust::Degraded("its event batches cannot be decoded".to_owned())
            }
            State::Degraded(Fault::RemovalLost) => {
                Trust::Degraded("a removal could not be decoded".to_owned())
            }
        };
        self.report.trust(self.worker, trust);
    }

    /// Puts what was gathered into the lane, waiting while it is full.
    async fn flush(&mut self) -> Result<(), Closed> {
        let (seen, before) = (self.stream.counters(), self.counted);
        self.counted = seen;
        self.counters.update(|stats| {
            stats.batches += seen.batches - before.batches;
            stats.gaps += seen.gaps - before.gaps;
            stats.replays += seen.replays - before.replays;
            stats.restarts += seen.restarts - before.restarts;
            stats.unknown_media += seen.unknown_media - before.unknown_media;
        });
        if self.changes.is_empty() {
            return Ok(());
        }
        let work = Work::Apply {
            worker: self.worker,
            changes: std::mem::take(&mut self.changes),
            counters: Arc::clone(&self.counters),
            published_s: self.stream.last_ts_s(),
            queued: Instant::now(),
        };
        self.lane.send(work).await
    }
}

/// Finds an image and reads its events, off the runtime's threads.
async fn beginning(sources: &Sources, origin: &Origin) -> Option<Beginning> {
    let (from, image) = sources.find(origin).await?;
    let position = image.position()?;
    let events = tokio::task::spawn_blocking(move || image.events()).await.ok()?.ok()?;
    Some(Beginning { from, position, events })
}
