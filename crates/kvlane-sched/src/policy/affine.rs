//! Affinity without cache knowledge: the same key goes to the same worker while that worker is there.

use super::{Policy, Task, View};
use crate::decision::Row;
use crate::rng::mix;

/// A cost beyond every number of requests in flight.
const LAST_RESORT: f64 = 1e9;

/// Sessions stay where their latest request went; a new session goes to the worker with the fewest requests in flight.
#[derive(Clone, Copy, Debug, Default)]
pub struct StickySession;

impl Policy for StickySession {
    fn name(&self) -> &'static str {
        "sticky-session"
    }

    fn needs_cache_knowledge(&self) -> bool {
        false
    }

    fn unit(&self) -> &'static str {
        "requests in flight"
    }

    fn columns(&self) -> &'static [&'static str] {
        &["bound_elsewhere", "requests"]
    }

    fn score(&self, _: &Task<'_>, view: &View<'_>, row: &mut Row) {
        row.terms[0] = match view.fleet.session_worker {
            Some(bound) if bound != row.worker => LAST_RESORT,
            _ => 0.0,
        };
        row.terms[1] = f64::from(row.load.requests());
    }
}

/// Rendezvous hashing with bounded load: the worker that draws the lowest number for the request's key, unless it has a quarter more requests
/// than the mean.
///
/// The key is the session, else the first block of the prompt, else the request itself. Bounded load is from Mirrokni, Thorup and Zadimoghaddam,
/// "Consistent hashing with bounded loads", 2016; without it one hot key is one hot worker.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConsistentHash;

/// How far above the mean a worker may be, in percent.
const LOAD_BOUND_PERCENT: u64 = 125;

impl Policy for ConsistentHash {
    fn name(&self) -> &'static str {
        "consistent-hash"
    }

    fn needs_cache_knowledge(&self) -> bool {
        false
    }

    fn unit(&self) -> &'static str {
        "draw of the hash"
    }

    fn columns(&self) -> &'static [&'static str] {
        &["overloaded", "draw"]
    }

    fn score(&self, task: &Task<'_>, view: &View<'_>, row: &mut Row) {
        let key = task.request.session.or(task.request.blocks.first().copied()).unwrap_or(task.request.id.0);
        let bound =
            ((view.fleet.requests + 1) * LOAD_BOUND_PERCENT).div_ceil(100 * u64::from(view.fleet.eligible));
        row.terms[0] = f64::from(u8::from(u64::from(row.load.requests()) + 1 > bound));
        let draw = mix(mix(key) ^ mix(row.worker.instance.0 ^ (u64::from(row.worker.rank) << 48)));
        row.terms[1] = (draw >> 11) as f64 / (1u64 << 53) as f64;
    }
}
