//! What is in flight at each worker: prefill still to be computed, and requests that decode.
//!
//! A request is booked when its worker is chosen, reports its first token and its output, and is ended once by its owner's guard. Nothing
//! expires by time: a long answer is load until it ends. Blocks that running requests share are counted once, by opaque prefix ids.

use crate::RequestId;
use crate::hash::Map;
use kvlane_index::Worker;
use std::collections::VecDeque;
use std::fmt;

/// Work in flight at one worker.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Load {
    /// Requests booked and without a first token.
    pub prefill_requests: u32,
    /// Prompt tokens that those still have to compute.
    pub prefill_tokens: u64,
    /// Milliseconds that their prefill was expected to take when each was booked.
    pub prefill_ms: f64,
    /// Requests that had their first token and have not ended.
    pub decode_requests: u32,
    /// Tokens in the contexts of those: prompt and output so far.
    pub decode_tokens: u64,
    /// Prompt tokens of requests in flight, prefixes that they share counted once.
    pub prompt_tokens: u64,
    /// Of those, tokens behind the last whole block of prompts whose blocks are known.
    pub partial_tokens: u64,
    /// Output tokens so far of requests in flight.
    pub output_tokens: u64,
    /// The part of `prefill_ms` that is the oldest request's: engines compute prompts in the order in which they came, so it is being computed now.
    pub head_prefill_ms: f64,
    /// When the prefill that is computed now began, at the earliest: when the one before it ended, or the booking that ended an idle
    /// time.
    pub prefill_since_ms: f64,
    /// The number of the latest booking here, counted over all workers from 1; 0 = none yet.
    pub last_booking: u64,
}

impl Load {
    /// Requests in flight.
    pub const fn requests(&self) -> u32 {
        self.prefill_requests + self.decode_requests
    }

    /// Milliseconds of booked prefill that are not done yet, as far as can be told: the one that is computed now may be done in part, but has
    /// not ended.
    pub fn queue_ms(&self, now_ms: f64) -> f64 {
        /// Share of the prefill that is computed now that may be taken as done.
        const MOST_DONE: f64 = 0.95;
        let done_ms =
            (now_ms - self.prefill_since_ms).clamp(0.0, (self.head_prefill_ms * MOST_DONE).max(0.0));
        (self.prefill_ms - done_ms).max(0.0)
    }

    /// This load and what another router has in flight at the same worker.
    ///
    /// An engine computes prompts in the order in which they came, so of the two prefills that may be computed now it is the one that began first. Blocks that
    /// requests of both share are counted twice: neither knows the other's.
    pub fn and(&self, other: &Self) -> Self {
        let others_first = other.prefill_requests > 0
            && (self.prefill_requests == 0 || other.prefill_since_ms < self.prefill_since_ms);
        let head = if others_first { other } else { self };
        Self {
            prefill_requests: self.prefill_requests.saturating_add(other.prefill_requests),
            prefill_tokens: self.prefill_tokens.saturating_add(other.prefill_tokens),
            prefill_ms: self.prefill_ms + other.prefill_ms,
            decode_requests: self.decode_requests.saturating_add(other.decode_requests),
            decode_tokens: self.decode_tokens.saturating_add(other.decode_tokens),
            prompt_tokens: self.prompt_tokens.saturating_add(other.prompt_tokens),
            partial_tokens: self.partial_tokens.saturating_add(other.partial_tokens),
            output_tokens: self.output_tokens.saturating_add(other.output_tokens),
            head_prefill_ms: head.head_prefill_ms,
            prefill_since_ms: head.prefill_since_ms,
            last_booking: self.last_booking,
        }
    }

    /// Tokens of device memory that requests in flight occupy.
    pub const fn kv_tokens(&self) -> u64 {
        self.prompt_tokens + self.output_tokens
    }
}

/// What is reserved for one request.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Booking<'a> {
    /// For which request.
    pub(crate) id: RequestId,
    /// Where.
    pub(crate) worker: Worker,
    /// Length of its prompt.
    pub(crate) prompt_tokens: u32,
    /// How many of those are expected to come from a cache.
    pub(crate) cached_tokens: u32,
    /// What the rest is expected to take.
    pub(crate) prefill_ms: f64,
    /// When.
    pub(crate) now_ms: f64,
    /// Whether its first token will be reported.
    pub(crate) streams: bool,
    /// Opaque number of its model.
    pub(crate) model: u64,
    /// Opaque prefix ids of its leading blocks, see [`crate::Request::blocks`].
    pub(crate) blocks: &'a [u64],
    /// Tokens that each id stands for.
    pub(crate) block_id_tokens: u32,
}

/// Why a request could not be booked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum BookError {
    /// This id is in flight already: the caller made ids that are not unique. Nothing was booked.
    Duplicate,
}

impl fmt::Display for BookError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Duplicate => f.write_str("a request of this id is in flight already"),
        }
    }
}

impl std::error::Error for BookError {}

/// One request in flight.
#[derive(Debug)]
pub(crate) struct InFlight {
    pub(crate) worker: Worker,
    pub(crate) model: u64,
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    pub(crate) booked_ms: f64,
    /// Of its own.
    pub(crate) prefill_ms: f64,
    /// Of those before it, when it was booked.
    pub(crate) queue_ms: f64,
    /// Whether its first token is reported; else it is reckoned, see [`Ledger::settle`].
    pub(crate) streams: bool,
    /// When its first token came and at which load; `None` before.
    pub(crate) first: Option<(f64, Load)>,
    /// Output tokens so far.
    pub(crate) output: u32,
    /// Tokens of the prompt that no block id covers.
    tail_tokens: u32,
    blocks: Vec<u64>,
}

impl InFlight {
    fn partial_tokens(&self) -> u64 {
        if self.blocks.is_empty() { 0 } else { u64::from(self.tail_tokens) }
    }
}

/// One worker's side of the ledger.
#[derive(Debug, Default)]
struct Account {
    load: Load,
    /// Requests in flight that hold each block, and the tokens that it was counted as.
    holders: Map<u64, (u32, u32)>,
    /// Requests in the order of their booking with the prefill of each, from the oldest whose first token is due; later ones may have theirs.
    order: VecDeque<(RequestId, f64)>,
    /// Forget it when nothing is in flight any more.
    retired: bool,
}

/// Everything in flight, by worker.
#[derive(Debug, Default)]
pub struct Ledger {
    accounts: Map<Worker, Account>,
    requests: Map<RequestId, InFlight>,
    bookings: u64,
}

impl Ledger {
    /// An empty ledger.
    pub fn new() -> Self {
        Self::default()
    }

    /// The load of `worker`; all zero if it never had any.
    pub fn load(&self, worker: Worker) -> Load {
        self.accounts.get(&worker).map(|a| a.load).unwrap_or_default()
    }

    /// Every worker that ever had load and has not been forgotten, in no order.
    pub fn loads(&self) -> impl Iterator<Item = (Worker, Load)> + '_ {
        self.accounts.iter().map(|(w, a)| (*w, a.load))
    }

    /// Requests in flight.
    pub fn requests(&self) -> usize {
        self.requests.len()
    }

    /// Where a request in flight was booked.
    pub fn worker_of(&self, id: RequestId) -> Option<Worker> {
        self.requests.get(&id).map(|r| r.worker)
    }

    /// How many of the leading `blocks` requests in flight at `worker` hold.
    pub fn held_blocks(&self, worker: Worker, blocks: &[u64]) -> usize {
        let Some(account) = self.accounts.get(&worker) else { return 0 };
        blocks.iter().take_while(|b| account.holders.contains_key(b)).count()
    }

    /// Reserves the work of a request.
    pub(crate) fn book(&mut self, booking: &Booking<'_>) -> Result<(), BookError> {
        if self.requests.contains_key(&booking.id) {
            return Err(BookError::Duplicate);
        }
        self.settle(booking.worker, booking.now_ms);
        self.bookings += 1;
        let cached_tokens = booking.cached_tokens.min(booking.prompt_tokens);
        let block_tokens = (booking.blocks.len() as u64 * u64::from(booking.block_id_tokens))
            .min(u64::from(booking.prompt_tokens)) as u32;
        let account = self.accounts.entry(booking.worker).or_default();
        account.retired = false;
        let request = InFlight {
            worker: booking.worker,
            model: booking.model,
            booked_ms: booking.now_ms,
            queue_ms: account.load.queue_ms(booking.now_ms),
            prompt_tokens: booking.prompt_tokens,
            cached_tokens,
            prefill_ms: booking.prefill_ms.max(0.0),
            streams: booking.streams,
            first: None,
            output: 0,
            tail_tokens: booking.prompt_tokens - block_tokens,
            blocks: booking.blocks.to_vec(),
        };
        account.load.last_booking = self.bookings;
        if account.load.prefill_requests == 0 {
            account.load.prefill_since_ms = booking.now_ms;
        }
        account.load.prefill_requests += 1;
        account.load.prefill_tokens += u64::from(booking.prompt_tokens - cached_tokens);
        account.load.prefill_ms += request.prefill_ms;
        account.order.push_back((booking.id, request.prefill_ms));
        account.load.head_prefill_ms = account.order[0].1;
        account.load.prompt_tokens += u64::from(request.tail_tokens);
        account.load.partial_tokens += request.partial_tokens();
        for block in &request.blocks {
            let (holders, _) = account.holders.entry(*block).or_insert((0, booking.block_id_tokens));
            *holders += 1;
            if *holders == 1 {
                account.load.prompt_tokens += u64::from(booking.block_id_tokens);
            }
        }
        self.requests.insert(booking.id, request);
        Ok(())
    }

    /// The first token came: prefill is done. Unknown ids and repetitions change nothing and give `None`.
    pub(crate) fn first_token(&mut self, id: RequestId, now_ms: f64) -> Option<&InFlight> {
        let request = self.requests.get_mut(&id).filter(|r| r.first.is_none())?;
        let worker = request.worker;
        let account =
            self.accounts.get_mut(&worker).expect("an account lives while a request is booked on it");
        account.begin_decode(request, now_ms);
        self.find_head(worker, now_ms);
        self.settle(worker, now_ms);
        self.requests.get(&id)
    }

    /// Ends the prefill of those at the head whose first token nobody will see, at the time at which it should have ended.
    ///
    /// Called at every event of the worker; between two, a queue of such requests is reckoned too long by what is done by then.
    fn settle(&mut self, worker: Worker, now_ms: f64) {
        let Self { accounts, requests, .. } = self;
        let Some(account) = accounts.get_mut(&worker) else { return };
        while let Some((id, prefill_ms)) = account.order.front().copied() {
            let ends_ms = account.load.prefill_since_ms + prefill_ms;
            match requests.get_mut(&id).filter(|r| r.worker == worker && r.first.is_none()) {
                Some(request) if request.streams || ends_ms > now_ms => break,
                Some(request) => {
                    account.begin_decode(request, ends_ms);
                    account.load.prefill_since_ms = ends_ms;
                }
                None => {}
            }
            account.order.pop_front();
        }
        account.load.head_prefill_ms = account.order.front().map_or(0.0, |head| head.1);
    }

    /// Whether this request is in flight and without its first token.
    pub(crate) fn first_is_due(&self, id: RequestId) -> bool {
        self.requests.get(&id).is_some_and(|r| r.first.is_none())
    }

    /// `tokens` more output tokens came after the first. Unknown ids change nothing.
    pub(crate) fn output(&mut self, id: RequestId, tokens: u32) {
        if let Some(request) = self.requests.get_mut(&id)
            && let Some(account) = self.accounts.get_mut(&request.worker)
            && request.first.is_some()
        {
            let tokens = tokens.min(u32::MAX - request.output);
            request.output += tokens;
            account.load.decode_tokens += u64::from(tokens);
            account.load.output_tokens += u64::from(tokens);
        }
    }

    /// The request ended, whatever ended it: all that it reserved is released. `None` if it had ended before or never began.
    pub(crate) fn end(&mut self, id: RequestId, now_ms: f64) -> Option<InFlight> {
        let worker = self.requests.get(&id)?.worker;
        self.settle(worker, now_ms);
        let request = self.requests.remove(&id)?;
        let account =
            self.accounts.get_mut(&request.worker).expect("an account lives while a request is booked on it");
        if request.first.is_some() {
            account.load.decode_requests -= 1;
            account.load.decode_tokens -= u64::from(request.prompt_tokens) + u64::from(request.output);
            account.load.output_tokens -= u64::from(request.output);
        } else {
            account.end_prefill(&request);
        }
        account.load.prompt_tokens -= u64::from(request.tail_tokens);
        account.load.partial_tokens -= request.partial_tokens();
        for block in &request.blocks {
            let Some((holders, tokens)) = account.holders.get_mut(block) else { continue };
            *holders -= 1;
            if *holders == 0 {
                account.load.prompt_tokens -= u64::from(*tokens);
                account.holders.remove(block);
            }
        }
        if account.retired && account.load.requests() == 0 {
            self.accounts.remove(&request.worker);
        } else {
            self.find_head(request.worker, now_ms);
        }
        Some(request)
    }

    /// Drops those from the front of a worker's order that are not in prefill there any more.
    fn find_head(&mut self, worker: Worker, now_ms: f64) {
        let Self { accounts, requests, .. } = self;
        let Some(account) = accounts.get_mut(&worker) else { return };
        let in_prefill =
            |id: &RequestId| requests.get(id).is_some_and(|r| r.worker == worker && r.first.is_none());
        while account.order.front().is_some_and(|(id, _)| !in_prefill(id)) {
            account.order.pop_front();
            account.load.prefill_since_ms = now_ms;
        }
        account.load.head_prefill_ms = account.order.front().map_or(0.0, |head| head.1);
    }

    /// The worker is gone for good: drops its account as soon as nothing is in flight there.
    pub(crate) fn forget(&mut self, worker: Worker) {
        if let Some(account) = self.accounts.get_mut(&worker) {
            account.retired = true;
            if account.load.requests() == 0 {
                self.accounts.remove(&worker);
            }
        }
    }
}

impl Account {
    fn begin_decode(&mut self, request: &mut InFlight, now_ms: f64) {
        self.end_prefill(request);
        self.load.decode_requests += 1;
        self.load.decode_tokens += u64::from(request.prompt_tokens) + 1;
        self.load.output_tokens += 1;
        request.first = Some((now_ms, self.load));
        request.output = 1;
    }

    fn end_prefill(&mut self, request: &InFlight) {
        self.load.prefill_requests -= 1;
        self.load.prefill_tokens -= u64::from(request.prompt_tokens - request.cached_tokens);
        self.load.prefill_ms -= request.prefill_ms;
        // Sums of floats drift; an idle worker is exactly idle.
        if self.load.prefill_requests == 0 {
            self.load.prefill_ms = 0.0;
        }
    }
}
