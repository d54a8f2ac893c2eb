//! How busy the fleet is with prefill, and whose caches turn over fastest: what one request costs all the others.
//!
//! Two measures that need nothing from the engines:
//!
//! * utilisation: booked prefill time per time and worker, over about [`WINDOW_MS`];
//! * allocation: tokens that each worker had to make room for, decayed over one filling of the fleet's caches. A worker above the mean drops
//!   blocks that are younger, so more likely to be asked for again, than the others drop.

use crate::hash::Map;
use kvlane_index::Worker;

/// Time over which utilisation is averaged: some prefills long, short against the changes of traffic.
const WINDOW_MS: f64 = 30_000.0;

/// Cache size of a worker that did not say.
pub(crate) const DEFAULT_KV_TOKENS: u64 = 500_000;

/// Exponent at which the scaled sums are scaled back.
const RESCALE_AT: f64 = 60.0;

/// What was booked of late, each booking weighed less the longer it is ago.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Busy {
    /// Milliseconds of prefill.
    pub prefill_ms: f64,
    /// Requests.
    pub bookings: f64,
    /// When it was so.
    pub at_ms: f64,
}

impl Busy {
    /// What is left of it at `now_ms`.
    pub fn at(&self, now_ms: f64) -> Self {
        let left = (-(now_ms - self.at_ms).max(0.0) / WINDOW_MS).exp();
        Self {
            prefill_ms: self.prefill_ms * left,
            bookings: self.bookings * left,
            at_ms: now_ms.max(self.at_ms),
        }
    }
}

/// Decayed sums over bookings.
#[derive(Debug, Default)]
pub(crate) struct Pressure {
    own: Busy,
    /// Of other routers over the same workers.
    elsewhere: Busy,
    /// Per worker, each booking weighed by `exp(age)`, so that only new entries need computing.
    allocated: Map<Worker, f64>,
    total: f64,
    age: f64,
}

impl Pressure {
    /// A request was booked.
    pub(crate) fn book(
        &mut self,
        worker: Worker,
        prefill_ms: f64,
        tokens: u64,
        fleet_kv_tokens: u64,
        now_ms: f64,
    ) {
        self.own = self.own.at(now_ms);
        self.own.bookings += 1.0;
        self.own.prefill_ms += prefill_ms;
        self.age += tokens as f64 / fleet_kv_tokens.max(1) as f64;
        if self.age > RESCALE_AT {
            let scale = (-self.age).exp();
            self.allocated.values_mut().for_each(|a| *a *= scale);
            self.total *= scale;
            self.age = 0.0;
        }
        let weighed = tokens as f64 * self.age.exp();
        *self.allocated.entry(worker).or_insert(0.0) += weighed;
        self.total += weighed;
    }

    /// Share of time, 0 to 1, that each of `workers` spends on prefill.
    pub(crate) fn utilisation(&self, workers: u32, now_ms: f64) -> f64 {
        let booked_ms = self.own.at(now_ms).prefill_ms + self.elsewhere.at(now_ms).prefill_ms;
        (booked_ms / (WINDOW_MS * f64::from(workers.max(1)))).min(1.0)
    }

    /// Requests that came for each of `workers`, per millisecond.
    pub(crate) fn arrivals_per_ms(&self, workers: u32, now_ms: f64) -> f64 {
        let bookings = self.own.at(now_ms).bookings + self.elsewhere.at(now_ms).bookings;
        bookings / (WINDOW_MS * f64::from(workers.max(1)))
    }

    /// The worker's recent allocation over the mean of `workers`; 1 = as the others.
    pub(crate) fn allocation(&self, worker: Worker, workers: u32) -> f64 {
        if self.total <= 0.0 {
            return 1.0;
        }
        self.allocated.get(&worker).copied().unwrap_or(0.0) * f64::from(workers) / self.total
    }

    /// The worker is gone.
    pub(crate) fn forget(&mut self, worker: Worker) {
        if let Some(a) = self.allocated.remove(&worker) {
            self.total = (self.total - a).max(0.0);
        }
    }

    /// What was booked here of late.
    pub(crate) fn busy(&self, now_ms: f64) -> Busy {
        self.own.at(now_ms)
    }

    /// What was booked by others of late; replaces what was heard before.
    pub(crate) fn hear(&mut self, elsewhere: Busy) {
        self.elsewhere = elsewhere;
    }
}
