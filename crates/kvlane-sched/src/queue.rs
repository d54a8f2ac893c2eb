//! Requests that wait in the router because every worker that could take them is saturated.
//!
//! Engines queue too, first come first served and for good: what is sent cannot be taken back when a better worker gets free, and one
//! tenant's burst stands before everybody. So while all eligible workers have more than they can begin ([`crate::Scheduler::has_room`]), requests
//! wait here and are scored when they leave.
//!
//! Order, by the first that differs:
//!
//! 1. class: the request's priority, and one more for each [`AGING_MS`] that it waited, so no class waits for ever behind a higher one;
//! 2. tenant: the one that was given the least work so far (fair queueing with virtual clocks: a tenant that comes back begins at the least
//!    clock of those that wait, so idleness earns no credit);
//! 3. within a tenant, first come first served, or the least uncached work first ([`Order`]) with the same aging;
//! 4. arrival.
//!
//! Bounded: [`QueueLimits::max_requests`]. When it is full, a newcomer displaces the latest of the tenant that has most waiting, if that tenant has at least
//! two more than its own; else it is refused. A pop looks at every waiting request: some microseconds at the bound, and nothing to keep in order.

use crate::RequestId;
use crate::hash::Map;
use std::fmt;

/// Time after which a waiting request counts as one class higher.
pub const AGING_MS: f64 = 10_000.0;

/// Pops over which the time between two is averaged.
const DRAIN_SAMPLES: f64 = 16.0;

/// Order of one tenant's requests within a class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Order {
    /// First come, first served.
    Arrival,
    /// Least uncached work first; waiting counts as work done.
    #[default]
    LeastWork,
}

/// Bounds of the queue.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct QueueLimits {
    /// Requests that may wait.
    pub max_requests: usize,
    /// How long one may wait before it is given up.
    pub max_wait_ms: f64,
    /// Order within a tenant and class.
    pub order: Order,
}

impl Default for QueueLimits {
    fn default() -> Self {
        Self { max_requests: 4096, max_wait_ms: 60_000.0, order: Order::default() }
    }
}

/// A request that waits.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Waiting {
    /// Which.
    pub id: RequestId,
    /// Opaque number of the tenant that it is served for; 0 if there is only one.
    pub tenant: u64,
    /// Opaque number of the workers that may serve it: of those that wait for the same ones, none passes another; while they are saturated, others
    /// may find theirs free. 0 if all may go anywhere.
    pub lane: u64,
    /// Its class; greater = sooner.
    pub priority: i32,
    /// Its least prefill at any worker when it came, in milliseconds.
    pub work_ms: f64,
    /// When it is of no use any more; `None` = only [`QueueLimits::max_wait_ms`] counts.
    pub deadline_ms: Option<f64>,
    /// When it came.
    pub since_ms: f64,
}

impl Waiting {
    fn class(&self, now_ms: f64) -> i64 {
        i64::from(self.priority) + ((now_ms - self.since_ms).max(0.0) / AGING_MS) as i64
    }
}

/// Why a request may not wait.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Refusal {
    /// As many wait as may. Answer 429 with `Retry-After`.
    Full {
        /// When there should be room, from the recent pace.
        retry_after_ms: f64,
    },
    /// Its deadline is over before it began. Answer 503.
    TooLate,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full { retry_after_ms } => {
                write!(
                    f,
                    "every worker is saturated and the queue is full; retry in {:.0} s",
                    (retry_after_ms / 1000.0).ceil()
                )
            }
            Self::TooLate => f.write_str("the request's deadline is over"),
        }
    }
}

impl std::error::Error for Refusal {}

/// The waiting requests.
#[derive(Debug, Default)]
pub struct AdmissionQueue {
    limits: QueueLimits,
    waiting: Vec<(u64, Waiting)>,
    arrivals: u64,
    /// Work given to each tenant that has requests waiting, on a common clock.
    clocks: Map<u64, f64>,
    /// The clock of the latest pop: where tenants that come begin.
    clock: f64,
    last_pop_ms: Option<f64>,
    mean_gap_ms: f64,
}

impl AdmissionQueue {
    /// An empty queue.
    pub fn new(limits: QueueLimits) -> Self {
        Self { limits, ..Self::default() }
    }

    /// Requests that wait.
    pub fn len(&self) -> usize {
        self.waiting.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }

    /// Whether a newcomer of this class has to wait even if a worker has room: it would pass one that waits already.
    pub fn must_wait(&self, priority: i32, now_ms: f64) -> bool {
        self.waiting.iter().any(|(_, w)| w.class(now_ms) >= i64::from(priority))
    }

    /// Lets a request wait. `Ok(Some(id))` names one that had to make place for it and is to be refused.
    pub fn park(&mut self, request: Waiting) -> Result<Option<RequestId>, Refusal> {
        if request.deadline_ms.is_some_and(|d| d <= request.since_ms) {
            return Err(Refusal::TooLate);
        }
        let displaced = if self.waiting.len() < self.limits.max_requests {
            None
        } else {
            let full = Refusal::Full { retry_after_ms: self.retry_after_ms() };
            Some(self.displace(request.tenant).ok_or(full)?)
        };
        self.arrivals += 1;
        self.clocks.entry(request.tenant).or_insert(self.clock);
        self.waiting.push((self.arrivals, request));
        Ok(displaced)
    }

    /// The request that is to be dispatched next; it stays until [`Self::take`], so the caller can see first whether a worker has room for it.
    /// `blocked` are the lanes in which the first had none.
    pub fn first(&self, now_ms: f64, blocked: &[u64]) -> Option<Waiting> {
        self.first_index(now_ms, blocked).map(|i| self.waiting[i].1)
    }

    /// Takes the request out because it is dispatched now: its tenant is charged. `false` if it does not wait (any more).
    pub fn take(&mut self, id: RequestId, now_ms: f64) -> bool {
        let Some(i) = self.waiting.iter().position(|(_, w)| w.id == id) else { return false };
        let (_, request) = self.waiting.swap_remove(i);
        if let Some(clock) = self.clocks.get_mut(&request.tenant) {
            self.clock = self.clock.max(*clock);
            *clock += request.work_ms.max(0.0);
        }
        self.retire(request.tenant);
        if let Some(last) = self.last_pop_ms {
            self.mean_gap_ms += ((now_ms - last).max(0.0) - self.mean_gap_ms) / DRAIN_SAMPLES;
        }
        self.last_pop_ms = Some(now_ms);
        true
    }

    /// Takes a request out because its client is gone. `false` if it does not wait (any more).
    pub fn cancel(&mut self, id: RequestId) -> bool {
        let Some(i) = self.waiting.iter().position(|(_, w)| w.id == id) else { return false };
        let (_, request) = self.waiting.swap_remove(i);
        self.retire(request.tenant);
        true
    }

    /// Takes out those that waited too long and appends their ids: they are to be refused.
    pub fn expire(&mut self, now_ms: f64, expired: &mut Vec<RequestId>) {
        let most = self.limits.max_wait_ms;
        let from = expired.len();
        self.waiting.retain(|(_, w)| {
            let over = now_ms - w.since_ms >= most || w.deadline_ms.is_some_and(|d| d <= now_ms);
            if over {
                expired.push(w.id);
            }
            !over
        });
        if expired.len() > from {
            let waiting = &self.waiting;
            self.clocks.retain(|tenant, _| waiting.iter().any(|(_, w)| w.tenant == *tenant));
        }
    }

    /// When a request that is refused now should come back, in milliseconds from now, from the recent pace; at least 1,000.
    pub fn retry_after_ms(&self) -> f64 {
        (self.mean_gap_ms * self.waiting.len() as f64).min(self.limits.max_wait_ms).max(1_000.0)
    }

    fn first_index(&self, now_ms: f64, blocked: &[u64]) -> Option<usize> {
        let work = |w: &Waiting| match self.limits.order {
            Order::Arrival => 0.0,
            Order::LeastWork => w.work_ms - (now_ms - w.since_ms).max(0.0),
        };
        let clock = |w: &Waiting| self.clocks.get(&w.tenant).copied().unwrap_or(self.clock);
        let open = (0..self.waiting.len()).filter(|i| !blocked.contains(&self.waiting[*i].1.lane));
        open.min_by(|a, b| {
            let ((order_a, a), (order_b, b)) = (&self.waiting[*a], &self.waiting[*b]);
            b.class(now_ms)
                .cmp(&a.class(now_ms))
                .then(clock(a).total_cmp(&clock(b)))
                .then(a.tenant.cmp(&b.tenant))
                .then(work(a).total_cmp(&work(b)))
                .then(order_a.cmp(order_b))
        })
    }

    /// Takes out the latest request of the tenant with most waiting, if `newcomer` has at least two fewer.
    fn displace(&mut self, newcomer: u64) -> Option<RequestId> {
        let mut counts: Map<u64, usize> = Map::default();
        for (_, w) in &self.waiting {
            *counts.entry(w.tenant).or_insert(0) += 1;
        }
        let own = counts.get(&newcomer).copied().unwrap_or(0);
        let (tenant, most) = counts.into_iter().max_by_key(|(tenant, n)| (*n, *tenant))?;
        if most < own + 2 {
            return None;
        }
        let latest = (0..self.waiting.len())
            .filter(|i| self.waiting[*i].1.tenant == tenant)
            .max_by_key(|i| (std::cmp::Reverse(self.waiting[*i].1.priority), self.waiting[*i].0))?;
        Some(self.waiting.swap_remove(latest).1.id)
    }

    /// Forgets the clock of a tenant of whom nothing waits.
    fn retire(&mut self, tenant: u64) {
        if !self.waiting.iter().any(|(_, w)| w.tenant == tenant) {
            self.clocks.remove(&tenant);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    fn waiting(id: u64, tenant: u64, priority: i32, work_ms: f64, since_ms: f64) -> Waiting {
        Waiting { id: RequestId(id), tenant, lane: 0, priority, work_ms, deadline_ms: None, since_ms }
    }

    fn pops(queue: &mut AdmissionQueue, now_ms: f64) -> Vec<u64> {
        let mut out = Vec::new();
        while let Some(first) = queue.first(now_ms, &[]) {
            assert!(queue.take(first.id, now_ms));
            out.push(first.id.0);
        }
        out
    }

    #[test]
    fn higher_classes_first_until_the_lower_have_aged() {
        let mut q = AdmissionQueue::default();
        q.park(waiting(1, 0, 0, 1.0, 0.0)).unwrap();
        q.park(waiting(2, 0, 1, 1.0, 500.0)).unwrap();
        assert!(q.must_wait(0, 600.0) && q.must_wait(1, 600.0) && !q.must_wait(2, 600.0));
        assert_eq!(q.first(600.0, &[]).unwrap().id, RequestId(2));
        // Ten seconds on, the first counts as of class 1 too, and came earlier.
        assert_eq!(pops(&mut q, AGING_MS), [1, 2]);
    }

    #[test]
    fn tenants_get_equal_work_whatever_they_send() {
        let mut q = AdmissionQueue::default();
        for i in 0..60 {
            q.park(waiting(i, 1, 0, 10.0, 0.0)).unwrap();
        }
        for i in 0..6 {
            q.park(waiting(100 + i, 2, 0, 100.0, 0.0)).unwrap();
        }
        let order = pops(&mut q, 1.0);
        let at = |id| order.iter().position(|o| *o == id).unwrap();
        // The second tenant's third request has 200 ms before it, so about twenty of the first's.
        assert!((18..=24).contains(&at(102)), "{}", at(102));
    }

    #[test]
    fn idleness_earns_no_credit() {
        let mut q = AdmissionQueue::default();
        for i in 0..100 {
            q.park(waiting(i, 1, 0, 10.0, 0.0)).unwrap();
        }
        for _ in 0..50 {
            let first = q.first(0.0, &[]).unwrap();
            q.take(first.id, 0.0);
        }
        for i in 0..50 {
            q.park(waiting(200 + i, 2, 0, 10.0, 0.0)).unwrap();
        }
        let order = pops(&mut q, 0.0);
        let second = order[..20].iter().filter(|id| **id >= 200).count();
        assert!((9..=11).contains(&second), "{second} of the next 20");
    }

    #[test]
    fn least_work_first_starves_nobody() {
        let limits = QueueLimits { order: Order::LeastWork, max_wait_ms: 1e9, ..QueueLimits::default() };
        let mut q = AdmissionQueue::new(limits);
        q.park(waiting(0, 0, 0, 5_000.0, 0.0)).unwrap();
        let mut popped_at = None;
        for step in 1..10_000_u32 {
            let now = f64::from(step) * 10.0;
            q.park(waiting(u64::from(step), 0, 0, 10.0, now)).unwrap();
            let first = q.first(now, &[]).unwrap();
            q.take(first.id, now);
            if first.id == RequestId(0) {
                popped_at = Some(now);
                break;
            }
        }
        assert!(popped_at.is_some_and(|t| t <= 6_000.0), "{popped_at:?}");
    }

    #[test]
    fn a_full_queue_refuses_or_makes_the_greediest_tenant_give_way() {
        let mut q = AdmissionQueue::new(QueueLimits { max_requests: 4, ..QueueLimits::default() });
        for i in 0..4 {
            assert_eq!(q.park(waiting(i, 1, 0, 1.0, 0.0)), Ok(None));
        }
        assert!(matches!(q.park(waiting(9, 1, 0, 1.0, 0.0)), Err(Refusal::Full { .. })));
        assert_eq!(q.park(waiting(10, 2, 0, 1.0, 0.0)), Ok(Some(RequestId(3))));
        assert_eq!(q.park(waiting(11, 2, 0, 1.0, 0.0)), Ok(Some(RequestId(2))));
        assert!(matches!(q.park(waiting(12, 2, 0, 1.0, 0.0)), Err(Refusal::Full { .. })));
        assert_eq!(q.len(), 4);
    }

    #[test]
    fn deadlines_and_cancelled_clients_leave_at_once() {
        let mut q = AdmissionQueue::default();
        q.park(Waiting { deadline_ms: Some(50.0), ..waiting(1, 0, 0, 1.0, 0.0) }).unwrap();
        q.park(waiting(2, 0, 0, 1.0, 0.0)).unwrap();
        q.park(waiting(3, 0, 0, 1.0, 0.0)).unwrap();
        let late = Waiting { deadline_ms: Some(5.0), ..waiting(4, 0, 0, 1.0, 10.0) };
        assert_eq!(q.park(late), Err(Refusal::TooLate));
        let mut expired = Vec::new();
        q.expire(50.0, &mut expired);
        assert_eq!(expired, [RequestId(1)]);
        assert!(q.cancel(RequestId(2)) && !q.cancel(RequestId(2)));
        q.expire(60_000.0, &mut expired);
        assert_eq!(expired, [RequestId(1), RequestId(3)]);
        assert!(q.is_empty() && q.clocks.is_empty());
    }

    /// Whatever is parked, taken, cancelled or expired leaves exactly once, and the wait is bounded.
    #[test]
    fn everybody_leaves_once() {
        for seed in 0..100 {
            let mut rng = Rng::new(seed);
            let limits = QueueLimits { max_requests: 20, max_wait_ms: 500.0, order: Order::LeastWork };
            let mut q = AdmissionQueue::new(limits);
            let (mut inside, mut expired) = (Vec::new(), Vec::new());
            for step in 0..500_u32 {
                let now = f64::from(step) * 5.0;
                match rng.below(4) {
                    0 | 1 => {
                        let id = u64::from(step);
                        let priority = rng.below(3) as i32;
                        match q.park(waiting(id, rng.below(4) as u64, priority, rng.unit() * 50.0, now)) {
                            Ok(displaced) => {
                                inside.push(id);
                                inside.retain(|i| displaced != Some(RequestId(*i)));
                            }
                            Err(_) => assert_eq!(q.len(), 20, "seed {seed}"),
                        }
                    }
                    2 => {
                        if let Some(first) = q.first(now, &[]) {
                            assert!(q.take(first.id, now) && now - first.since_ms <= 500.0 + 5.0);
                            inside.retain(|i| *i != first.id.0);
                        }
                    }
                    _ => {
                        let id = rng.below(step as usize + 1) as u64;
                        assert_eq!(q.cancel(RequestId(id)), inside.contains(&id), "seed {seed}");
                        inside.retain(|i| *i != id);
                    }
                }
                expired.clear();
                q.expire(now, &mut expired);
                inside.retain(|i| !expired.contains(&RequestId(*i)));
                assert_eq!(q.len(), inside.len(), "seed {seed} step {step}");
                assert!(q.len() <= 20);
            }
        }
    }
}
