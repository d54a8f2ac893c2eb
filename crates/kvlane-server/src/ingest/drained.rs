//! Follows an engine whose events are fetched over HTTP (TensorRT-LLM's buffered path): polls, lets `kvlane_events::drain` make sense of
//! the answers, and puts what they come to into the lane.
//!
//! `POST /kv_cache_events` empties the engine's ring, so this is its one reader, on one connection that is kept. While the lane is full
//! nothing is fetched: the engine's ring then fills, drops its oldest events, and the gap in their numbers is a fence that is counted.

use super::lane::{Change, Lane, Work};
use super::publisher::Report;
use super::socket::OwnedTask;
use super::stats::RankCounters;
use super::weighed::Closed;
use crate::clock;
use crate::fleet::Trust;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use kvlane_events::drain::{Drain, Input};
use kvlane_events::stream::{Action, Counters, Fault, State};
use kvlane_events::wire::DropReason;
use kvlane_index::{BlockSize, InstanceId, Worker};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};

/// Time between two questions.
const POLL_EVERY: Duration = Duration::from_millis(10);
/// The same while the engine does not answer, or has no such route.
const POLL_FAILED_EVERY: Duration = Duration::from_millis(500);
/// Time for one answer.
const ANSWER_LIMIT: Duration = Duration::from_secs(5);
/// The most bytes of one answer; a full ring of 100,000 events of a block has about 60 MB.
const ANSWER_BYTES_MAX: usize = 128 << 20;
/// What was drained is claimed so long after the engine fell silent.
const STALE_MS: u64 = 10_000;

/// Where the events are.
const PATH: &str = "/kv_cache_events";

/// Everything that draining one instance takes.
pub(crate) struct Draining {
    pub(crate) instance: InstanceId,
    pub(crate) base: http::Uri,
    pub(crate) block_size: BlockSize,
    pub(crate) lane: Lane,
    /// Of each rank; further ranks are dropped.
    pub(crate) counters: Vec<Arc<RankCounters>>,
    /// The engine's `process_start_time_seconds`, sent again whenever it was read.
    pub(crate) process_start: watch::Receiver<Option<f64>>,
    /// Rises when what is known is not to be trusted any more.
    pub(crate) relearn: watch::Receiver<u64>,
}

/// Runs until it is dropped, or until the partition is gone.
pub(crate) async fn drain(task: Draining, report: impl Report) {
    let Draining { instance, base, block_size, lane, counters, mut process_start, mut relearn } = task;
    let mut ranks = Ranks {
        instance,
        drain: Drain::new(block_size, STALE_MS),
        lane,
        each: counters
            .into_iter()
            // Nothing is known of the worker's earlier lives.
            .map(|counters| Rank {
                counters,
                changes: vec![Change::Fence { restarted: true }],
                counted: Counters::default(),
            })
            .collect(),
        failed: None,
        report,
        actions: Vec::new(),
    };
    if let Some(start_s) = *process_start.borrow_and_update() {
        ranks.handle(Input::ProcessStart(start_s));
    }
    let mut connection = None;
    let mut pause = Duration::ZERO;
    let mut done = Ok(());
    while done.is_ok() {
        tokio::select! {
            () = sleep(pause) => match poll(&base, &mut connection).await {
                Ok(body) => {
                    pause = POLL_EVERY;
                    ranks.answered(&body);
                }
                Err(why) => {
                    pause = POLL_FAILED_EVERY;
                    connection = None;
                    ranks.failed(why);
                }
            },
            changed = process_start.changed() => {
                let Ok(()) = changed else { return };
                let start_s = *process_start.borrow_and_update();
                if let Some(start_s) = start_s {
                    ranks.handle(Input::ProcessStart(start_s));
                }
            }
            changed = relearn.changed() => {
                let Ok(()) = changed else { return };
                ranks.handle(Input::Relearn);
            }
        }
        done = ranks.flush().await;
    }
}

/// A connection that is kept, and the task that drives it.
type Connection = (SendRequest<Full<Bytes>>, OwnedTask);

/// The body of one answer; why there is none.
async fn poll(base: &http::Uri, connection: &mut Option<Connection>) -> Result<Bytes, String> {
    let exchange = async {
        let (sender, _driver) = match connection {
            Some(connection) if !connection.0.is_closed() => connection,
            _ => connection.insert(connect(base).await?),
        };
        let request = hyper::Request::post(format!("{}{PATH}", base.path().trim_end_matches('/')))
            .header(hyper::header::HOST, base.authority().map_or("", |a| a.as_str()))
            .header(hyper::header::USER_AGENT, "kvlane")
            .header(hyper::header::CONTENT_TYPE, "application/json")
            .body(Full::default())
            .map_err(|e| e.to_string())?;
        let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
        let status = response.status();
        if status != hyper::StatusCode::OK {
            return Err(format!(
                "POST {PATH} says {status}: start the engine with kv_cache_config.enable_block_reuse and a \
                 kv_cache_config.event_buffer_max_size above 0"
            ));
        }
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX)
            .collect()
            .await
            .map_err(|e| e.to_string())?;
        Ok(body.to_bytes())
    };
    timeout(ANSWER_LIMIT, exchange)
        .await
        .unwrap_or_else(|_| Err(format!("POST {PATH} has no answer within {} s", ANSWER_LIMIT.as_secs())))
}

async fn connect(base: &http::Uri) -> Result<Connection, String> {
    let host = base.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let stream =
        TcpStream::connect((host, base.port_u16().unwrap_or(80))).await.map_err(|e| e.to_string())?;
    stream.set_nodelay(true).map_err(|e| e.to_string())?;
    let (sender, driver) = handshake(TokioIo::new(stream)).await.map_err(|e| e.to_string())?;
    // Its end shows at the next question.
    let driver = OwnedTask::spawn(async move { drop(driver.await) });
    Ok((sender, driver))
}

fn count(counters: &RankCounters, reason: DropReason) {
    let at = DropReason::ALL.iter().position(|r| *r == reason);
    counters.update(|stats| {
        if let Some(count) = at.and_then(|at| stats.drops.get_mut(at)) {
            *count += 1;
        }
    });
}

struct Ranks<R> {
    instance: InstanceId,
    drain: Drain,
    lane: Lane,
    each: Vec<Rank>,
    /// Why the last question had no answer.
    failed: Option<String>,
    report: R,
    actions: Vec<(u32, Action)>,
}

struct Rank {
    counters: Arc<RankCounters>,
    /// Not in the lane yet.
    changes: Vec<Change>,
    /// The drain's counters as far as they are in `counters`, which outlive it.
    counted: Counters,
}

impl<R: Report> Ranks<R> {
    fn answered(&mut self, body: &[u8]) {
        let again = self.failed.take().is_some();
        for (number, rank) in (0..).zip(&self.each) {
            rank.counters.update(|stats| {
                stats.connects += u64::from(!stats.connected);
                stats.connected = true;
                stats.connect_error = None;
                // One answer has the events of all ranks; an empty one says nothing.
                if number == 0 && body.len() > 2 {
                    stats.messages += 1;
                    stats.bytes += body.len() as u64;
                    stats.heard = Some(Instant::now());
                }
            });
        }
        self.handle(Input::Body(body));
        if again {
            self.report.connection_changed();
        }
    }

    fn failed(&mut self, why: String) {
        let first = self.failed.is_none();
        let news = self.failed.as_ref() != Some(&why);
        if news {
            for rank in &self.each {
                rank.counters.update(|stats| {
                    stats.connected = false;
                    stats.connect_error = Some(why.clone());
                });
            }
        }
        self.failed = Some(why);
        self.handle(Input::Failed);
        if news {
            for number in self.numbers() {
                self.tell(number, self.drain.state(number));
            }
        }
        if first {
            self.report.connection_changed();
        }
    }

    fn numbers(&self) -> std::ops::Range<u32> {
        0..u32::try_from(self.each.len()).unwrap_or(u32::MAX)
    }

    /// Passes one input on and does what is said.
    fn handle(&mut self, input: Input<'_>) {
        let mut actions = std::mem::take(&mut self.actions);
        self.drain.handle(input, clock::now_ms(), &mut actions);
        for (number, action) in actions.drain(..) {
            let Some(rank) = self.each.get_mut(number as usize) else {
                // Of a rank beyond those that the worker was said to have: counted where it can be seen.
                if let (Action::Apply(_), Some(first)) = (action, self.each.first()) {
                    count(&first.counters, DropReason::BadField);
                }
                continue;
            };
            match action {
                Action::Apply(event) => rank.changes.push(Change::Event(event)),
                Action::Reset { restarted, .. } => {
                    rank.changes.push(Change::Fence { restarted });
                    rank.counters.update(|stats| stats.epoch += 1);
                }
                Action::StateChanged(state) => {
                    if state == State::Live {
                        rank.changes.push(Change::Complete);
                    }
                    self.tell(number, state);
                }
                Action::Dropped(reason) => count(&rank.counters, reason),
                // Of streams only.
                Action::RequestReplay { .. }
                | Action::RequestSnapshot { .. }
                | Action::AdoptSnapshot
                | Action::DropSnapshot => {}
            }
        }
        self.actions = actions;
    }

    fn tell(&self, number: u32, state: State) {
        let failed = || self.failed.clone().unwrap_or_else(|| format!("asking for {PATH}"));
        let trust = match state {
            State::Live => Trust::Live,
            State::Replaying => Trust::Replaying,
            State::Rebuilding if self.drain.counters(number).batches == 0 => {
                Trust::Rebuilding("it has no event to give yet".to_owned())
            }
            State::Rebuilding => Trust::Rebuilding("what happened before is not known".to_owned()),
            State::Blind => Trust::Blind(failed()),
            State::Degraded(Fault::RemovalLost) => {
                Trust::Degraded("a removal could not be decoded".to_owned())
            }
            State::Degraded(_) => Trust::Degraded(failed()),
        };
        self.report.trust(Worker { instance: self.instance, rank: number }, trust);
    }

    /// Puts what was gathered into the lane, waiting while it is full.
    async fn flush(&mut self) -> Result<(), Closed> {
        for (number, rank) in (0..).zip(&mut self.each) {
            let (seen, before) = (self.drain.counters(number), rank.counted);
            rank.counted = seen;
            rank.counters.update(|stats| {
                stats.batches += seen.batches - before.batches;
                stats.gaps += seen.gaps - before.gaps;
                stats.restarts += seen.restarts - before.restarts;
            });
            if rank.changes.is_empty() {
                continue;
            }
            let work = Work::Apply {
                worker: Worker { instance: self.instance, rank: number },
                changes: std::mem::take(&mut rank.changes),
                counters: Arc::clone(&rank.counters),
                published_s: None,
                queued: Instant::now(),
            };
            self.lane.send(work).await?;
        }
        Ok(())
    }
}
