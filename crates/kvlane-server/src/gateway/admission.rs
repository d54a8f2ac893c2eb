//! Requests that wait here because every worker that could take them is saturated.
//!
//! What is sent to an engine cannot be taken back when another gets free, and engines serve one tenant's burst before everybody else. So while all workers that
//! may serve a request have more than they can begin, it waits here, and whoever is first when there is room again is planned anew: the
//! workers, and what they hold, are those of that moment. The order is [`kvlane_sched::queue`]'s; this file gives it clients, time and
//! refusals.
//!
//! * Nobody waits while a worker has room: then a request passes without a lock of this file.
//! * While anybody waits, every newcomer joins, and one task lets them out in order, whenever a first token came, a request ended, the fleet
//!   changed, or [`TICK`] is over. Requests whose own workers have room are not held up by those whose workers have none.
//! * Whoever cannot wait is told why and when to come back: 429 if the queue is full, 503 if a deadline is over.
//! * A client that leaves takes its request out at once.

use super::Gateway;
use super::error::ClientError;
use super::inflight::InFlight;
use super::plan::Plan;
use crate::explain::Id;
use hyper::StatusCode;
use hyper::header::{AUTHORIZATION, HeaderMap};
use kvlane_sched::RequestId;
use kvlane_sched::queue::{AdmissionQueue, QueueLimits, Refusal, Waiting};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::{Notify, oneshot};
use xxhash_rust::xxh3::xxh3_64;

/// While requests wait, room is looked for at least so often: some comes by the clock alone, as a prefill that nobody reports gets done.
const TICK: Duration = Duration::from_millis(25);
/// Highest class that a request may name, and the lowest below 0.
const PRIORITY_MAX: i32 = 100;

const X_PRIORITY: &str = "x-kvlane-priority";
const X_TENANT: &str = "x-kvlane-tenant";
const X_DEADLINE: &str = "x-kvlane-deadline-ms";

/// What a request says about its turn.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Turn {
    /// Its class; greater = sooner, 0 = ordinary.
    pub priority: i32,
    /// Stands for whom it is served for; 0 = nobody in particular.
    tenant: u64,
    /// After the arrival; later it need not begin any more.
    deadline: Option<Duration>,
}

impl Turn {
    /// From `x-kvlane-priority`, `x-kvlane-tenant` (else the API key) and `x-kvlane-deadline-ms`.
    pub(super) fn of(headers: &HeaderMap) -> Result<Self, ClientError> {
        let number = |name: &str, most: i64, hint: &str| {
            let Some(value) = headers.get(name) else { return Ok(None) };
            let number = value.to_str().ok().and_then(|text| text.trim().parse::<i64>().ok());
            number
                .filter(|n| n.unsigned_abs() <= most.unsigned_abs())
                .map(Some)
                .ok_or_else(|| ClientError::bad_request(format!("`{name}` must be {hint}.")))
        };
        let priority =
            number(X_PRIORITY, PRIORITY_MAX.into(), "a whole number from -100 to 100; greater is sooner")?;
        let deadline = number(X_DEADLINE, i64::from(u32::MAX), "a whole number of milliseconds above 0")?;
        if deadline.is_some_and(|ms| ms < 1) {
            return Err(ClientError::bad_request(format!(
                "`{X_DEADLINE}` must be a whole number of milliseconds above 0."
            )));
        }
        let tenant = headers.get(X_TENANT).or_else(|| headers.get(AUTHORIZATION));
        Ok(Self {
            priority: priority.map_or(0, |n| n as i32),
            tenant: tenant.map_or(0, |name| xxh3_64(name.as_bytes())),
            deadline: deadline.map(|ms| Duration::from_millis(ms.unsigned_abs())),
        })
    }
}

/// The requests that wait, if any may.
#[derive(Debug)]
pub(crate) struct Admission {
    waits: Option<Mutex<Waits>>,
    /// How many wait, readable without the lock.
    waiting: AtomicUsize,
    /// Rung when there may be room.
    bell: Notify,
}

#[derive(Debug)]
struct Waits {
    queue: AdmissionQueue,
    parked: HashMap<RequestId, Parked>,
}

type Admitted = Result<(Plan, InFlight), ClientError>;

#[derive(Debug)]
struct Parked {
    id: Id,
    plan: Plan,
    since_ms: f64,
    answer: oneshot::Sender<Admitted>,
}

impl Admission {
    /// Nobody waits yet; `None` = nobody ever does.
    pub(super) fn new(limits: Option<QueueLimits>) -> Self {
        let waits = limits
            .map(|limits| Mutex::new(Waits { queue: AdmissionQueue::new(limits), parked: HashMap::new() }));
        Self { waits, waiting: AtomicUsize::new(0), bell: Notify::new() }
    }

    /// Requests that wait.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::Relaxed)
    }

    /// A worker may have room now.
    pub(super) fn room_may_be(&self) {
        if self.waiting() > 0 {
            self.bell.notify_one();
        }
    }

    fn lock(&self) -> Option<MutexGuard<'_, Waits>> {
        Some(self.waits.as_ref()?.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_waiting(&self, waits: &Waits) {
        self.waiting.store(waits.parked.len(), Ordering::Relaxed);
    }

    /// Takes a request out whose client is gone.
    fn leave(&self, id: RequestId) {
        let Some(mut waits) = self.lock() else { return };
        waits.queue.cancel(id);
        let left = waits.parked.remove(&id);
        self.note_waiting(&waits);
        drop(waits);
        drop(left);
    }
}

/// Keeps a request's place for as long as its client is there.
struct Place<'a>(&'a Admission, RequestId);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.leave(self.1);
    }
}

impl Gateway {
    /// Books a request at the best worker, after it waited for one if all are saturated.
    pub(super) async fn admit(self: &Arc<Self>, plan: Plan) -> Admitted {
        let id = self.explanations.next_id();
        let may_wait = self.admission.waits.is_some() && plan.may_wait();
        if (!may_wait || self.admission.waiting() == 0)
            && let Some(inflight) = self.book(&plan, id, may_wait)?
        {
            return Ok((plan, inflight));
        }
        let answer = self.park(id, plan)?;
        let place = Place(&self.admission, RequestId(id.sequence));
        self.admission.bell.notify_one();
        let admitted = answer.await;
        drop(place);
        admitted.unwrap_or_else(|_| Err(ClientError::unavailable("This router is shutting down; try again.")))
    }

    fn park(&self, id: Id, plan: Plan) -> Result<oneshot::Receiver<Admitted>, ClientError> {
        let request_id = RequestId(id.sequence);
        let work_ms = self
            .desk
            .with(|books, _| books.scheduler.least_prefill_ms(&plan.request(request_id), &plan.candidates()));
        let since_ms = self.desk.now_ms();
        let left_ms = |deadline: Duration| {
            (deadline.as_secs_f64() - plan.arrived.elapsed().as_secs_f64()) * 1e3 + since_ms
        };
        let waiting = Waiting {
            id: request_id,
            tenant: plan.turn.tenant,
            lane: plan.lane(),
            priority: plan.turn.priority,
            work_ms,
            deadline_ms: plan.turn.deadline.map(left_ms),
            since_ms,
        };
        let mut waits = self.admission.lock().expect("only where requests may wait");
        let displaced = waits.queue.park(waiting).map_err(|refusal| match refusal {
            Refusal::Full { retry_after_ms } => full(retry_after_ms),
            Refusal::TooLate => too_late(),
        })?;
        let displaced = displaced.and_then(|id| waits.parked.remove(&id));
        let (answer, admitted) = oneshot::channel();
        waits.parked.insert(request_id, Parked { id, plan, since_ms, answer });
        let retry_after_ms = waits.queue.retry_after_ms();
        self.admission.note_waiting(&waits);
        drop(waits);
        if let Some(displaced) = displaced {
            // Whoever left in the meantime need not be told.
            let _ = displaced.answer.send(Err(displaced_by_others(retry_after_ms)));
        }
        Ok(admitted)
    }

    /// Lets those that wait out as workers get room, until it is dropped.
    pub(super) async fn let_out(self: Arc<Self>) {
        let mut changed = self.fleet.changed();
        loop {
            let somebody = self.admission.waiting() > 0;
            tokio::select! {
                () = self.admission.bell.notified() => {}
                () = tokio::time::sleep(TICK), if somebody => {}
                more = changed.changed(), if somebody => {
                    if more.is_err() {
                        return;
                    }
                }
            }
            self.dispatch_waiting();
        }
    }

    fn dispatch_waiting(self: &Arc<Self>) {
        let Some(mut waits) = self.admission.lock() else { return };
        let now_ms = self.desk.now_ms();
        let mut expired = Vec::new();
        waits.queue.expire(now_ms, &mut expired);
        let mut answers = Vec::new();
        for parked in expired.into_iter().filter_map(|id| waits.parked.remove(&id)) {
            let over = parked.plan.turn.deadline.is_some_and(|most| parked.plan.arrived.elapsed() >= most);
            let error = if over { too_late() } else { waited_too_long(now_ms - parked.since_ms) };
            answers.push((parked.answer, Err(error)));
        }
        let mut blocked = Vec::new();
        while let Some(first) = waits.queue.first(now_ms, &blocked) {
            let Waits { queue, parked } = &mut *waits;
            let Some(waiting) = parked.get_mut(&first.id) else {
                queue.cancel(first.id);
                continue;
            };
            waiting.plan.waited = Duration::from_secs_f64((now_ms - waiting.since_ms).max(0.0) / 1e3);
            let booked =
                self.renew(&mut waiting.plan).and_then(|()| self.book(&waiting.plan, waiting.id, true));
            let admitted = match booked {
                Ok(Some(inflight)) => {
                    queue.take(first.id, now_ms);
                    self.metrics.waited.observe(waiting.plan.waited);
                    Ok(inflight)
                }
                Ok(None) => {
                    blocked.push(first.lane);
                    continue;
                }
                Err(error) => {
                    queue.cancel(first.id);
                    Err(error)
                }
            };
            let Parked { plan, answer, .. } = parked.remove(&first.id).expect("it was just looked at");
            answers.push((answer, admitted.map(|inflight| (plan, inflight))));
        }
        self.admission.note_waiting(&waits);
        drop(waits);
        for (answer, admitted) in answers {
            // Whoever left in the meantime need not be told; what was booked for it is released with it.
            let _ = answer.send(admitted);
        }
    }
}

fn seconds(ms: f64) -> u64 {
    (ms / 1e3).ceil().max(1.0) as u64
}

/// The queue is full.
fn full(retry_after_ms: f64) -> ClientError {
    ClientError {
        code: Some("queue_full"),
        retry_after_s: Some(seconds(retry_after_ms)),
        ..ClientError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "Every worker is saturated and as many requests wait as may; try again after `Retry-After` seconds.",
        )
    }
}

/// The queue was full, and others had far fewer in it.
fn displaced_by_others(retry_after_ms: f64) -> ClientError {
    ClientError {
        code: Some("queue_displaced"),
        retry_after_s: Some(seconds(retry_after_ms)),
        ..ClientError::new(
            StatusCode::TOO_MANY_REQUESTS,
            "Every worker is saturated, the queue is full, and this tenant has most requests in it; try again after `Retry-After` seconds.",
        )
    }
}

/// The request's own deadline passed before it could begin.
fn too_late() -> ClientError {
    ClientError {
        code: Some("deadline_over"),
        ..ClientError::unavailable(format!(
            "Every worker is saturated, and the time that `{X_DEADLINE}` gives is over; try again with more time."
        ))
    }
}

/// It waited as long as any request may.
fn waited_too_long(waited_ms: f64) -> ClientError {
    ClientError {
        code: Some("queue_timeout"),
        ..ClientError::unavailable(format!(
            "No worker had room within {} s; try again soon.",
            seconds(waited_ms)
        ))
    }
}
