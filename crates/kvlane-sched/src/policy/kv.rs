//! The default: the worker where this request costs everybody the least time.
//!
//! Every term is expected milliseconds, so cache and load compete in one unit:
//!
//! ```text
//! queue         prefill booked there and not yet done: what this request waits for
//! prefill       its own tokens that are not cached
//! fetch         copying what lies in lower tiers
//! delay_others  its prefill, once for each request that is expected to wait behind it
//! evict         computing as many tokens as it drives out, for those that are asked for again: more where the cache turns over faster
//! decode        what it slows decoding there, its own included
//! memory        how full the worker is of requests in flight
//! wishes        preferred labels that it lacks, and loading the request's adapter
//! ```
//!
//! The first three are the request's own time to first token. Deciding by them alone is greedy: as soon as queues differ, cached prefixes are
//! given up for a few milliseconds, their prefill is done twice, and the fleet is busier for it. `delay_others` is the price of that:
//!
//! ```text
//! delay_others = prefill * (2 u / (1 - u) + arrivals * queue)
//! ```
//!
//! The first summand, from the fleet's utilisation u, is what a queue holds on average; the second those that come to this worker while the queue
//! that is there now lasts. So an idle fleet is balanced and a busy one keeps its caches, and a long prompt, which would hold up a queue for
//! long, looks for a short one, whatever little of it is cached elsewhere; no weight has to be set for either.
//!
//! It also bounds imbalance: a worker's queue exceeds the least by at most its prefill saved times a factor below [`MOST_DELAYED`] + 2.
//!
//! What remains a choice and not a measurement (the 2, the shares below) was looked for on the first half of one chat trace and a quarter of an hour
//! of one agent trace; around the values the figures change by less than their spread over seeds.

use super::{Policy, Task, View};
use crate::Adapter;
use crate::decision::Row;
use crate::pressure::DEFAULT_KV_TOKENS;

/// Cost in milliseconds.
#[derive(Clone, Copy, Debug, Default)]
pub struct Kv;

/// Requests delayed at utilisation u, whatever the queue: this times u / (1 - u).
const DELAYED: f64 = 2.0;

/// Utilisation that is reckoned with at most: nearer to 1 the expectation runs away.
const MOST_BUSY: f64 = 0.9;

/// Bound of the requests that are reckoned as delayed.
pub const MOST_DELAYED: f64 = 64.0;

/// Share of the evicted blocks that somebody would have asked for: those at the end of the line are mostly dead.
const EVICTED_USEFUL: f64 = 0.2;

/// How many times as fast as the mean a cache may be reckoned to turn over: a worker that alone was used so far is not to be shunned for it.
const FASTEST_TURNOVER: f64 = 4.0;

/// Share of the slowed decoding that counts beside time to first token: it is spread over whole answers.
const DECODE_SHARE: f64 = 0.1;

/// Milliseconds that a worker full of requests in flight costs, at the prior speed; with the square of the fullness. A full one makes the
/// request wait for memory or throws another out.
const FULL_MS: f64 = 100.0;

/// Milliseconds to load an adapter: some 200 MB from disk. Not measured.
const ADAPTER_MS: f64 = 200.0;

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

    fn holds_back(&self) -> bool {
        true
    }

    fn columns(&self) -> &'static [&'static str] {
        &["queue", "prefill", "fetch", "delay_others", "evict", "decode", "memory", "wishes"]
    }

    fn score(&self, task: &Task<'_>, view: &View<'_>, row: &mut Row) {
        let (overlap, rates, fleet, load) = (&view.candidate.overlap, &view.rates, view.fleet, &row.load);
        let uncached = task.prompt_tokens - row.cached_tokens;
        let prefill_ms = rates.prefill_ms(uncached, row.cached_tokens);
        let queue_ms = load.queue_ms(fleet.now_ms);
        let busy = fleet.utilisation.min(MOST_BUSY);
        let delayed = DELAYED * busy / (1.0 - busy) + fleet.arrivals_per_ms * queue_ms;
        // Others' steps read this context; this request's steps read theirs.
        let contexts =
            load.decode_tokens as f64 + f64::from(load.decode_requests) * f64::from(task.prompt_tokens);
        let slowed_ms = f64::from(task.output_tokens) * rates.read_ms(contexts);
        let capacity = view.candidate.profile.kv_tokens().unwrap_or(DEFAULT_KV_TOKENS).max(1);
        let fullness = load.kv_tokens() as f64 / capacity as f64;

        let preferred = task
            .request
            .wishes
            .preferred
            .iter()
            .filter(|(label, _)| !view.candidate.profile.has_label(label));
        let adapter_ms = if view.candidate.adapter == Adapter::Absent { ADAPTER_MS } else { 0.0 };

        row.terms[..8].copy_from_slice(&[
            queue_ms,
            prefill_ms,
            rates.fetch_ms(overlap),
            prefill_ms * delayed.min(MOST_DELAYED),
            EVICTED_USEFUL * rates.computing_ms(uncached) * view.allocation.min(FASTEST_TURNOVER),
            DECODE_SHARE * slowed_ms,
            FULL_MS * rates.prefill_factor * fullness * fullness,
            adapter_ms + preferred.map(|(_, worth_ms)| worth_ms).sum::<f64>(),
        ]);
    }
}
