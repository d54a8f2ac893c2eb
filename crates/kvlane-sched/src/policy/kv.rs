//! The default: the worker where this request costs the fleet the least time.
//!
//! Every term is expected milliseconds, so cache and load compete in one unit and neither needs a weight: a cached prefix is worth the prefill that
//! it saves, a queue costs the time that it takes. That also bounds imbalance: a worker is preferred for its cache only while its queue is longer
//! than the least by less than the prefill saved.

use super::{Policy, Task, View};
use crate::decision::Row;

/// Cost in milliseconds: queue, prefill, fetch from lower tiers, decode.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kv;

/// Share of a request's own decode time that counts beside its time to first token.
///
/// Not 1: the difference between workers in decode time is spread over a whole answer, and a reader notices the first token more.
const DECODE_SHARE: f64 = 0.1;

impl Policy for Kv {
    fn name(&self) -> &'static str {
        "kv"
    }

    fn needs_cache_knowledge(&self) -> bool {
        true
    }

    fn unit(&self) -> &'static str {
        "ms"
    }

    fn columns(&self) -> &'static [&'static str] {
        &["queue", "prefill", "fetch", "decode"]
    }

    fn score(&self, task: &Task<'_>, view: &View<'_>, row: &mut Row) {
        let overlap = &view.candidate.overlap;
        let rates = &view.rates;
        let load = &row.load;
        let uncached = task.prompt_tokens - row.cached_tokens;
        let context = load.decode_tokens + u64::from(task.prompt_tokens);
        row.terms[0] = load.prefill_ms;
        row.terms[1] = rates.prefill_ms(uncached, row.cached_tokens);
        row.terms[2] = f64::from(overlap.host) * rates.host_ms_per_token
            + f64::from(overlap.disk) * rates.disk_ms_per_token
            + f64::from(overlap.external) * rates.external_ms_per_token;
        row.terms[3] =
            DECODE_SHARE * f64::from(task.output_tokens) * rates.step_ms(load.requests() + 1, context);
    }
}
