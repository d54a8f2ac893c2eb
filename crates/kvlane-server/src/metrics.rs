//! What `/metrics` shows of the gateway.
//!
//! Handles are resolved once for each worker and kept beside its connections, so counting on the request path is
//! an atomic addition. `prometheus-client`'s own histogram takes a lock for every observation; [`Histogram`] here
//! does not.

use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::{MetricType, TypedMetric};
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Upper bounds of the latency buckets, in microseconds: from a cheap decision to a very long answer.
const BOUNDS_US: [u64; 19] = [
    50,
    100,
    250,
    500,
    1_000,
    2_500,
    5_000,
    10_000,
    25_000,
    50_000,
    100_000,
    250_000,
    500_000,
    1_000_000,
    2_500_000,
    5_000_000,
    15_000_000,
    60_000_000,
    300_000_000,
];

/// A histogram of durations without a lock. Cheap to clone; clones share the counts.
///
/// A scrape during an observation may see the sum before the count; both are right at the next one.
#[derive(Clone, Debug, Default)]
pub(crate) struct Histogram {
    inner: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    /// One per bound, and one for what is above all.
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

impl Histogram {
    /// Counts one duration.
    pub(crate) fn observe(&self, took: Duration) {
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.partition_point(|bound| *bound < us);
        self.inner.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.inner.sum_us.fetch_add(us, Ordering::Relaxed);
    }
}

impl TypedMetric for Histogram {
    const TYPE: MetricType = MetricType::Histogram;
}

impl EncodeMetric for Histogram {
    fn encode(&self, mut encoder: MetricEncoder<'_>) -> Result<(), std::fmt::Error> {
        let bounds = BOUNDS_US.iter().map(|us| *us as f64 / 1e6).chain([f64::INFINITY]);
        let counts = self.inner.buckets.iter().map(|count| count.load(Ordering::Relaxed));
        let buckets: Vec<(f64, u64)> = bounds.zip(counts).collect();
        let sum = self.inner.sum_us.load(Ordering::Relaxed) as f64 / 1e6;
        let count = buckets.iter().map(|(_, n)| n).sum();
        encoder.encode_histogram::<NoLabelSet>(sum, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        Self::TYPE
    }
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfWorker {
    worker: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Outcomes {
    worker: String,
    outcome: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Reasons {
    reason: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Audits {
    result: &'static str,
    cause: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Choices {
    policy: &'static str,
    role: &'static str,
    same: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfPolicy {
    policy: &'static str,
    role: &'static str,
}

/// How a request that was sent to a worker ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// The whole answer went to the client.
    Ok,
    /// The engine refused it (4xx), which is passed on.
    ClientError,
    /// The engine failed (5xx), and no other worker was left to ask.
    ServerError,
    /// The engine broke off after its first byte.
    Broken,
    /// The client left before the end.
    ClientGone,
}

impl Outcome {
    const ALL: [Self; 5] = [Self::Ok, Self::ClientError, Self::ServerError, Self::Broken, Self::ClientGone];

    /// The name used in JSON, logs and metrics.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::ClientError => "client_error",
            Self::ServerError => "server_error",
            Self::Broken => "broken",
            Self::ClientGone => "client_gone",
        }
    }
}

/// The counters of one worker (an instance; its ranks together), resolved.
#[derive(Clone, Debug)]
pub(crate) struct WorkerMetrics {
    outcomes: [Counter; Outcome::ALL.len()],
    /// Attempts that ended without a byte for the client, after which another worker was asked or none was left.
    pub failed_attempts: Counter,
    /// From the request's arrival to the first byte of the answer's body.
    pub first_byte: Histogram,
    /// From the request's arrival to its end.
    pub whole: Histogram,
    /// Prompt tokens of audited requests.
    pub prompt_tokens: Counter,
    /// Of those, what was predicted to be cached.
    pub predicted_cached_tokens: Counter,
    /// Of those, what the engine said was cached.
    pub cached_tokens: Counter,
}

impl WorkerMetrics {
    /// Counts the end of a request.
    pub(crate) fn outcome(&self, outcome: Outcome) {
        self.outcomes[outcome as usize].inc();
    }
}

/// All of the gateway's metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Outcomes, Counter>,
    rejected: Family<Reasons, Counter>,
    failed_attempts: Family<OfWorker, Counter>,
    first_byte: Family<OfWorker, Histogram>,
    whole: Family<OfWorker, Histogram>,
    prompt_tokens: Family<OfWorker, Counter>,
    predicted_cached_tokens: Family<OfWorker, Counter>,
    cached_tokens: Family<OfWorker, Counter>,
    audits: Family<Audits, Counter>,
    handovers: Family<Reasons, Counter>,
    choices: Family<Choices, Counter>,
    choices_cached_tokens: Family<OfPolicy, Counter>,
    choices_cost: Family<OfPolicy, Counter<f64, AtomicU64>>,
    /// From the end of the request's body to the decision.
    pub routing: Histogram,
    /// Of that, finding the prompt's tokens.
    pub tokenizing: Histogram,
    /// Of requests that waited for a worker with room, how long.
    pub waited: Histogram,
    /// Open client connections.
    pub connections: Gauge,
    /// Requests that were sent to a worker and have not ended.
    pub in_flight: Gauge,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("kvlane");
        let r = &mut registry;
        Self {
            requests: family(r, "requests", "Requests sent to a worker, by how they ended"),
            rejected: family(r, "rejected_requests", "Requests answered here with an error, by reason"),
            failed_attempts: family(r, "failed_attempts", "Attempts at a worker without a first byte"),
            first_byte: family(r, "time_to_first_byte_seconds", "Arrival to first byte of the answer"),
            whole: family(r, "request_seconds", "Arrival to end of the answer"),
            prompt_tokens: family(r, "audited_prompt_tokens", "Prompt tokens of audited requests"),
            predicted_cached_tokens: family(
                r,
                "audited_predicted_cached_tokens",
                "Prompt tokens of audited requests that were predicted to be cached",
            ),
            cached_tokens: family(
                r,
                "audited_cached_tokens",
                "Prompt tokens of audited requests that the engine took from its cache",
            ),
            audits: family(
                r,
                "audits",
                "Predictions against the engines' cached_tokens, by result and cause",
            ),
            handovers: family(
                r,
                "prefill_handovers",
                "Where workers are set aside for prefill: requests by what became of the hand-over",
            ),
            choices: family(
                r,
                "policy_choices",
                "With --shadow: choices by policy, and whether the acting one chose the same worker",
            ),
            choices_cached_tokens: family(
                r,
                "policy_cached_tokens",
                "With --shadow: prompt tokens believed to be cached at the policy's choices",
            ),
            choices_cost: family(
                r,
                "policy_cost",
                "With --shadow: cost of the policy's choices, as the acting one reckons it (kv: milliseconds)",
            ),
            routing: single(r, "routing_seconds", "End of the request's body to the decision"),
            tokenizing: single(r, "tokenizing_seconds", "Finding the tokens of a prompt"),
            waited: single(
                r,
                "queue_seconds",
                "Wait in the router of requests that found no worker with room",
            ),
            connections: single(r, "client_connections", "Open client connections"),
            in_flight: single(r, "requests_in_flight", "Requests sent to a worker that have not ended"),
            registry,
        }
    }

    /// The handles of one worker.
    pub(crate) fn worker(&self, worker: &str) -> WorkerMetrics {
        let of = OfWorker { worker: worker.to_owned() };
        WorkerMetrics {
            outcomes: Outcome::ALL.map(|outcome| {
                let labels = Outcomes { worker: worker.to_owned(), outcome: outcome.name() };
                self.requests.get_or_create_owned(&labels)
            }),
            failed_attempts: self.failed_attempts.get_or_create_owned(&of),
            first_byte: self.first_byte.get_or_create_owned(&of),
            whole: self.whole.get_or_create_owned(&of),
            prompt_tokens: self.prompt_tokens.get_or_create_owned(&of),
            predicted_cached_tokens: self.predicted_cached_tokens.get_or_create_owned(&of),
            cached_tokens: self.cached_tokens.get_or_create_owned(&of),
        }
    }

    /// Counts a request that was answered here with an error.
    pub(crate) fn rejected(&self, reason: &'static str) {
        self.rejected.get_or_create(&Reasons { reason }).inc();
    }

    /// Counts what became of a hand-over.
    pub(crate) fn handed_over(&self, reason: &'static str) {
        self.handovers.get_or_create(&Reasons { reason }).inc();
    }

    /// Counts a choice of the acting policy, or of one that looks on.
    pub(crate) fn chose(
        &self,
        policy: &'static str,
        acting: bool,
        same: bool,
        cached_tokens: u32,
        cost: Option<f64>,
    ) {
        let role = if acting { "acting" } else { "shadow" };
        let same = if same { "true" } else { "false" };
        self.choices.get_or_create(&Choices { policy, role, same }).inc();
        let of = OfPolicy { policy, role };
        self.choices_cached_tokens.get_or_create(&of).inc_by(u64::from(cached_tokens));
        self.choices_cost.get_or_create(&of).inc_by(cost.unwrap_or(0.0).max(0.0));
    }

    /// Counts the result of an audit.
    pub(crate) fn audited(&self, result: &'static str, cause: &'static str) {
        self.audits.get_or_create(&Audits { result, cause }).inc();
    }

    /// The text that Prometheus reads: these figures and those of `others`.
    pub(crate) fn text(&self, others: &Registry) -> String {
        use prometheus_client::encoding::text::{encode_eof, encode_registry};
        let mut text = String::new();
        encode_registry(&mut text, &self.registry)
            .and_then(|()| encode_registry(&mut text, others))
            .and_then(|()| encode_eof(&mut text))
            .expect("writing to a string does not fail");
        text
    }
}

fn family<L, M>(registry: &mut Registry, name: &str, help: &str) -> Family<L, M>
where
    Family<L, M>: Clone + Default + prometheus_client::registry::Metric,
{
    single(registry, name, help)
}

fn single<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: Clone + Default + prometheus_client::registry::Metric,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_counts_each_duration_once() {
        let metrics = Metrics::new();
        for us in [10, 50, 51, 400_000_000] {
            metrics.routing.observe(Duration::from_micros(us));
        }
        let text = metrics.text(&Registry::default());
        let counts: Vec<&str> = text
            .lines()
            .filter(|line| line.starts_with("kvlane_routing_seconds_bucket"))
            .filter_map(|line| line.split(' ').nth(1))
            .collect();
        assert_eq!((counts[0], counts[1], counts[counts.len() - 1]), ("2", "3", "4"), "{text}");
        assert!(text.contains("kvlane_routing_seconds_count 4"), "{text}");
    }

    #[test]
    fn a_worker_has_its_series_before_its_first_request() {
        let metrics = Metrics::new();
        metrics.worker("a:1").outcome(Outcome::ClientGone);
        let text = metrics.text(&Registry::default());
        assert!(text.contains("kvlane_requests_total{worker=\"a:1\",outcome=\"client_gone\"} 1"), "{text}");
        assert!(text.contains("kvlane_requests_total{worker=\"a:1\",outcome=\"ok\"} 0"), "{text}");
    }
}
