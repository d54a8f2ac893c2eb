//! One lock's worth of state: a policy, the ledger and the learnt rates.
//!
//! The caller decides and books under one lock, so that the next request sees what this one reserved; without that, requests that arrive together
//! all choose the worker that was idle.

use crate::decision::{Decision, FilterReason, MAX_ORDER, MAX_TERMS, PickedBecause, Reject, Row};
use crate::hash::Map;
use crate::learn::{Answered, Learnt, Prefilled};
use crate::ledger::{BookError, Booking, Ledger, Load};
use crate::policy::{Fleet, Policy, Task, View};
use crate::pressure::{Busy, DEFAULT_KV_TOKENS, Pressure};
use crate::rates::Rates;
use crate::session::Sessions;
use crate::{Candidate, Request, RequestId, Rng};
use kvlane_index::Worker;

/// Pending prefill from which a worker is saturated: what is sent behind it cannot be taken back to a worker that gets free before. A few steps of
/// an engine, so that it never waits for the router.
pub const SATURATED_MS: f64 = 500.0;

/// Chooses workers and keeps account of what is in flight.
#[derive(Debug, Default)]
pub struct Scheduler {
    policy: Box<dyn Policy>,
    ledger: Ledger,
    /// What other routers have in flight at the same workers.
    elsewhere: Map<Worker, Load>,
    sessions: Sessions,
    pressure: Pressure,
    learnt: Learnt,
}

impl Scheduler {
    /// An idle scheduler.
    pub fn new(policy: Box<dyn Policy>) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Its policy.
    pub fn policy(&self) -> &dyn Policy {
        &*self.policy
    }

    /// What is in flight.
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The same, to change.
    pub(crate) fn ledger_mut(&mut self) -> &mut Ledger {
        &mut self.ledger
    }

    /// What real requests taught.
    pub(crate) fn learnt(&self) -> &Learnt {
        &self.learnt
    }

    /// Takes note of what other routers over the same workers have in flight, and of what they booked of late; replaces what was heard before.
    ///
    /// It counts in every decision like this scheduler's own, so that routers do not all choose the worker that each of them leaves idle. Times are on this
    /// scheduler's clock.
    pub fn hear(&mut self, loads: impl IntoIterator<Item = (Worker, Load)>, busy: Busy) {
        self.elsewhere.clear();
        self.elsewhere.extend(loads);
        self.pressure.hear(busy);
    }

    /// What other routers have in flight at `worker`, as they last said.
    pub fn elsewhere(&self, worker: Worker) -> Load {
        self.elsewhere.get(&worker).copied().unwrap_or_default()
    }

    /// What was booked here of late.
    pub fn busy(&self, now_ms: f64) -> Busy {
        self.pressure.busy(now_ms)
    }

    /// Everything that is known to be in flight at `worker`.
    fn load(&self, worker: Worker) -> Load {
        let own = self.ledger.load(worker);
        self.elsewhere.get(&worker).map_or(own, |other| own.and(other))
    }

    /// How fast `worker` is, as far as is known.
    pub fn rates(&self, worker: Worker) -> Rates {
        self.learnt.rates(worker)
    }

    /// Chooses a worker for `request` and fills `decision` with the choice and the reasons; changes nothing else, so a dry run is the same
    /// call. `now_ms` is the caller's monotonic clock. After an error `decision.order` is empty and its rows name the filters.
    pub fn decide(
        &self,
        request: &Request<'_>,
        candidates: &[Candidate<'_>],
        now_ms: f64,
        rng: &mut Rng,
        decision: &mut Decision,
    ) -> Result<(), Reject> {
        self.decide_knowing(&self.learnt, request, candidates, now_ms, rng, decision)
    }

    /// Likewise, with speeds and lengths that somebody else learnt.
    pub(crate) fn decide_knowing(
        &self,
        learnt: &Learnt,
        request: &Request<'_>,
        candidates: &[Candidate<'_>],
        now_ms: f64,
        rng: &mut Rng,
        decision: &mut Decision,
    ) -> Result<(), Reject> {
        let task = Task {
            request,
            prompt_tokens: request.tokens(),
            output_tokens: request.output_tokens(learnt.output_tokens(request.model)),
        };
        decision.request = Some(request.id);
        decision.now_ms = now_ms;
        decision.policy = self.policy.name();
        decision.prompt_tokens = task.prompt_tokens;
        decision.output_tokens = task.output_tokens;
        decision.unit = self.policy.unit();
        decision.columns = self.policy.columns();
        decision.order.clear();
        decision.rows.clear();
        decision.ranking.clear();

        let mut fleet = Fleet { now_ms, ..Fleet::default() };
        decision.fleet_kv_tokens = 0;
        let bound = request.session.and_then(|s| self.sessions.get(s));
        for candidate in candidates {
            let row = Row {
                worker: candidate.worker,
                load: self.load(candidate.worker),
                cached_tokens: usable_tokens(candidate, task.prompt_tokens),
                terms: [0.0; MAX_TERMS],
                total: f64::INFINITY,
                filtered: filter(request, candidate),
            };
            if row.filtered.is_none() {
                fleet.eligible += 1;
                decision.fleet_kv_tokens += candidate.profile.kv_tokens().unwrap_or(DEFAULT_KV_TOKENS);
                fleet.requests += u64::from(row.load.requests());
                fleet.session_worker = fleet.session_worker.or(bound.filter(|b| *b == row.worker));
                decision.ranking.push(decision.rows.len() as u32);
            }
            decision.rows.push(row);
        }
        if decision.ranking.is_empty() {
            return Err(match request.pinned {
                _ if candidates.is_empty() => Reject::NoWorkers,
                Some(pin) if !candidates.iter().any(|c| pin.admits(c.worker)) => Reject::PinnedAbsent,
                _ => Reject::NoneEligible,
            });
        }
        if let Some(sample) = self.policy.sample() {
            draw(decision, sample, rng);
        }
        fleet.utilisation = self.pressure.utilisation(fleet.eligible, now_ms);
        fleet.arrivals_per_ms = self.pressure.arrivals_per_ms(fleet.eligible, now_ms);
        for i in &decision.ranking {
            let candidate = &candidates[*i as usize];
            let row = &mut decision.rows[*i as usize];
            let rates = learnt.rates(candidate.worker);
            let allocation = self.pressure.allocation(candidate.worker, fleet.eligible);
            self.policy.score(
                &task,
                &View { candidate, rates, allocation, fleet: &fleet, ledger: &self.ledger },
                row,
            );
            row.total = row.terms.iter().sum();
        }
        pick(decision, rng);
        Ok(())
    }

    /// Whether a worker that may serve the request can begin it soon. While none can, requests wait in a [`crate::queue::AdmissionQueue`].
    ///
    /// A worker is saturated when as many requests are in flight there as run at once, when their prompts and answers fill its memory, or when it
    /// has more than [`SATURATED_MS`] of prefill to do at its speed. An idle worker never is.
    pub fn has_room(&self, request: &Request<'_>, candidates: &[Candidate<'_>], now_ms: f64) -> bool {
        candidates.iter().any(|c| filter(request, c).is_none() && !self.saturated(request, c, now_ms))
    }

    /// Whether any of the candidates may serve the request, saturated or not.
    pub fn serves(&self, request: &Request<'_>, candidates: &[Candidate<'_>]) -> bool {
        candidates.iter().any(|c| filter(request, c).is_none())
    }

    /// Prefill that the request needs where most of it is held, in milliseconds: its size for those who wait with it.
    pub fn least_prefill_ms(&self, request: &Request<'_>, candidates: &[Candidate<'_>]) -> f64 {
        let tokens = request.tokens();
        let at = |candidate: &Candidate<'_>| {
            let cached = usable_tokens(candidate, tokens);
            self.rates(candidate.worker).prefill_ms(tokens - cached, cached)
        };
        candidates.iter().map(at).min_by(f64::total_cmp).unwrap_or(0.0)
    }

    fn saturated(&self, request: &Request<'_>, candidate: &Candidate<'_>, now_ms: f64) -> bool {
        let load = self.load(candidate.worker);
        let tokens = u64::from(request.tokens().saturating_sub(candidate.overlap.total()));
        load.requests() > 0
            && (candidate.profile.limits.max_running.is_some_and(|most| load.requests() >= most)
                || candidate.profile.kv_tokens().is_some_and(|most| load.kv_tokens() + tokens > most)
                || load.queue_ms(now_ms) > SATURATED_MS)
    }

    /// Reserves the request's work at `worker`, which is one of the rows of `decision`: its choice, or the one that was taken when that
    /// could not be reached.
    pub fn book(
        &mut self,
        request: &Request<'_>,
        decision: &Decision,
        worker: Worker,
        now_ms: f64,
    ) -> Result<(), BookError> {
        self.book_at(self.rates(worker), request, decision, worker, now_ms)
    }

    /// Likewise, at a worker of these rates.
    pub(crate) fn book_at(
        &mut self,
        rates: Rates,
        request: &Request<'_>,
        decision: &Decision,
        worker: Worker,
        now_ms: f64,
    ) -> Result<(), BookError> {
        let prompt_tokens = request.tokens();
        let cached_tokens = decision.row(worker).map_or(0, |r| r.cached_tokens).min(prompt_tokens);
        let prefill_ms = rates.prefill_ms(prompt_tokens - cached_tokens, cached_tokens);
        self.ledger.book(&Booking {
            id: request.id,
            worker,
            prompt_tokens,
            cached_tokens,
            prefill_ms,
            now_ms,
            streams: request.streams,
            model: request.model,
            blocks: request.blocks,
            block_id_tokens: request.block_id_tokens,
        })?;
        let allocated = u64::from(prompt_tokens - cached_tokens) + u64::from(decision.output_tokens);
        self.pressure.book(worker, prefill_ms, allocated, decision.fleet_kv_tokens, now_ms);
        if let Some(session) = request.session {
            self.sessions.put(session, worker);
        }
        Ok(())
    }

    /// The first token of a request came at `now_ms`. Repetitions and unknown ids change nothing.
    pub fn first_token(&mut self, id: RequestId, now_ms: f64) {
        if let Some(request) = self.ledger.first_token(id, now_ms)
            && request.streams
        {
            let factor = self.learnt.rates(request.worker).prefill_factor;
            self.learnt.prefilled(&Prefilled {
                worker: request.worker,
                waited_ms: now_ms - request.booked_ms,
                prompt_tokens: request.prompt_tokens,
                cached_tokens: request.cached_tokens,
                prior_queue_ms: request.queue_ms / factor,
            });
        }
    }

    /// `tokens` more output tokens came (the first included, if it was not reported).
    pub fn output(&mut self, id: RequestId, tokens: u32, now_ms: f64) {
        let mut more = tokens;
        if self.ledger.first_is_due(id) && tokens > 0 {
            self.first_token(id, now_ms);
            more -= 1;
        }
        self.ledger.output(id, more);
    }

    /// The request ended, however it did. Idempotent.
    pub fn end(&mut self, id: RequestId, now_ms: f64) {
        let Some(request) = self.ledger.end(id, now_ms) else { return };
        let Some((first_ms, load)) = request.first.filter(|_| request.streams) else { return };
        let now_load = self.ledger.load(request.worker);
        let prior = Rates::default();
        let step_ms = |load: &Load| prior.step_ms(load.decode_requests, load.decode_tokens);
        self.learnt.answered(&Answered {
            worker: request.worker,
            model: request.model,
            output_tokens: request.output,
            decoded_ms: now_ms - first_ms,
            prior_step_ms: (step_ms(&load) + step_ms(&now_load)) / 2.0,
        });
    }

    /// The worker left for good: nothing is remembered of it once its requests have ended.
    pub fn forget(&mut self, worker: Worker) {
        self.ledger.forget(worker);
        self.sessions.forget(worker);
        self.pressure.forget(worker);
        self.learnt.forget(worker);
    }
}

/// Tokens that the worker need not compute: an engine always computes the last one, and only whole blocks are cached.
fn usable_tokens(candidate: &Candidate<'_>, prompt_tokens: u32) -> u32 {
    let block = candidate.profile.block_size_tokens.max(1);
    let most = (prompt_tokens - 1) / block * block;
    let believed = f64::from(candidate.overlap.total()) * candidate.trust.clamp(0.0, 1.0);
    (believed as u32).min(most)
}

fn filter(request: &Request<'_>, candidate: &Candidate<'_>) -> Option<FilterReason> {
    let wishes = &request.wishes;
    if request.pinned.is_some_and(|pin| !pin.admits(candidate.worker)) {
        Some(FilterReason::NotPinned)
    } else if wishes.allowed.is_some_and(|allowed| !allowed.contains(&candidate.worker)) {
        Some(FilterReason::NotAllowed)
    } else if !wishes.required.iter().all(|label| candidate.profile.has_label(label)) {
        Some(FilterReason::MissingLabel)
    } else if candidate.draining {
        Some(FilterReason::Draining)
    } else {
        None
    }
}

/// Leaves `sample` of the eligible rows, drawn at random, in the ranking.
fn draw(decision: &mut Decision, sample: usize, rng: &mut Rng) {
    let Decision { rows, ranking, .. } = decision;
    for place in 0..sample.min(ranking.len()) {
        let drawn = place + rng.below(ranking.len() - place);
        ranking.swap(place, drawn);
    }
    for i in ranking.drain(sample.clamp(1, ranking.len())..) {
        rows[i as usize].filtered = Some(FilterReason::NotSampled);
    }
}

/// Orders the best rows and draws among equals.
fn pick(decision: &mut Decision, rng: &mut Rng) {
    let Decision { rows, ranking, order, best, picked_because, .. } = decision;
    // Shuffling first makes every order of equals as likely, also after the first: failover must not herd either.
    for i in (1..ranking.len()).rev() {
        ranking.swap(i, rng.below(i + 1));
    }
    let cost = |i: u32| rows[i as usize].total;
    best.clear();
    for i in ranking.iter() {
        if best.len() == MAX_ORDER && cost(*i) >= cost(best[MAX_ORDER - 1]) {
            continue;
        }
        best.truncate(MAX_ORDER - 1);
        let place = best.partition_point(|b| cost(*b) <= cost(*i));
        best.insert(place, *i);
    }
    order.extend(best.iter().map(|i| rows[*i as usize].worker));
    let least = cost(best[0]);
    let among = ranking.iter().filter(|i| cost(**i) <= least).count() as u32;
    *picked_because = match (ranking.len(), among) {
        (1, _) => PickedBecause::OnlyOne,
        (_, 1) => PickedBecause::LeastCost,
        (_, among) => PickedBecause::Tie { among },
    };
}
