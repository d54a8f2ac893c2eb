//! The policies that are blind to the cache: what a plain load balancer does, and the baselines of every comparison.

use super::{Policy, Task, View};
use crate::decision::Row;

/// The worker whose latest booking is longest ago.
///
/// Told by bookings, not by a cursor into a list, so it stays fair while workers come and go and when requests differ in their candidates.
#[derive(Clone, Copy, Debug, Default)]
pub struct RoundRobin;

impl Policy for RoundRobin {
    fn name(&self) -> &'static str {
        "round-robin"
    }

    fn needs_cache_knowledge(&self) -> bool {
        false
    }

    fn unit(&self) -> &'static str {
        "number of the latest booking"
    }

    fn columns(&self) -> &'static [&'static str] {
        &["last_booking"]
    }

    fn score(&self, _: &Task<'_>, _: &View<'_>, row: &mut Row) {
        row.terms[0] = row.load.last_booking as f64;
    }
}

/// Any worker, each as likely.
#[derive(Clone, Copy, Debug, Default)]
pub struct Random;

impl Policy for Random {
    fn name(&self) -> &'static str {
        "random"
    }

    fn needs_cache_knowledge(&self) -> bool {
        false
    }

    fn unit(&self) -> &'static str {
        "none"
    }

    fn columns(&self) -> &'static [&'static str] {
        &[]
    }

    fn score(&self, _: &Task<'_>, _: &View<'_>, _: &mut Row) {}
}

/// The worker with the fewest requests in flight.
#[derive(Clone, Copy, Debug, Default)]
pub struct LeastLoaded;

impl Policy for LeastLoaded {
    fn name(&self) -> &'static str {
        "least-loaded"
    }

    fn needs_cache_knowledge(&self) -> bool {
        false
    }

    fn unit(&self) -> &'static str {
        "requests in flight"
    }

    fn columns(&self) -> &'static [&'static str] {
        &["prefill_requests", "decode_requests"]
    }

    fn score(&self, _: &Task<'_>, _: &View<'_>, row: &mut Row) {
        row.terms[0] = f64::from(row.load.prefill_requests);
        row.terms[1] = f64::from(row.load.decode_requests);
    }
}

/// Of two workers drawn at random, the one with fewer requests in flight.
///
/// Nearly as even as comparing all, and it does not herd when many routers decide from the same stale loads. Mitzenmacher, "The power of two choices
/// in randomized load balancing", 2001.
#[derive(Clone, Copy, Debug, Default)]
pub struct PowerOfTwo;

impl Policy for PowerOfTwo {
    fn name(&self) -> &'static str {
        "power-of-two"
    }

    fn needs_cache_knowledge(&self) -> bool {
        false
    }

    fn unit(&self) -> &'static str {
        "requests in flight"
    }

    fn columns(&self) -> &'static [&'static str] {
        LeastLoaded.columns()
    }

    fn sample(&self) -> Option<usize> {
        Some(2)
    }

    fn score(&self, task: &Task<'_>, view: &View<'_>, row: &mut Row) {
        LeastLoaded.score(task, view, row);
    }
}
