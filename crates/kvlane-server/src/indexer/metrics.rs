//! What `/metrics` shows of the service: the reference's families under its names, for the dashboards that exist, and kvlane's own
//! beside them.

use super::listener::Status;
use super::registry::Registry;
use crate::metrics::Histogram;
use axum::extract::{MatchedPath, Request};
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry as Exposition;
use std::time::Instant;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfEndpoint {
    endpoint: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Requests {
    endpoint: String,
    method: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Errors {
    endpoint: String,
    status_class: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfStatus {
    status: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct OfPartition {
    model: String,
    routing_group: String,
}

/// The service's own counts; what the registry knows is read when they are shown.
#[derive(Debug)]
pub(super) struct Metrics {
    exposition: Exposition,
    durations: Family<OfEndpoint, Histogram>,
    requests: Family<Requests, Counter>,
    errors: Family<Errors, Counter>,
    models: Gauge,
    workers: Gauge,
    listeners: Family<OfStatus, Gauge>,
    pairs: Family<OfPartition, Gauge>,
    bytes: Family<OfPartition, Gauge>,
    waiting: Family<OfPartition, Gauge>,
}

impl Metrics {
    pub(super) fn new() -> Self {
        let mut exposition = Exposition::default();
        let r = &mut exposition;
        // The reference's histogram has its unit in its name, as ours have.
        Self {
            durations: family(
                r,
                "dynamo_kvindexer_request_duration_seconds",
                "From a request's head to its answer's",
            ),
            requests: family(r, "dynamo_kvindexer_requests", "Requests"),
            errors: family(r, "dynamo_kvindexer_errors", "Answers with status 4xx or 5xx"),
            models: family(r, "dynamo_kvindexer_models", "Partitions: a model and a routing group each"),
            workers: family(r, "dynamo_kvindexer_workers", "Registered instances"),
            listeners: family(r, "dynamo_kvindexer_listeners", "Followed publishers, by status"),
            pairs: family(r, "kvlane_indexer_pairs", "Pairs of a rank and a block that are held"),
            bytes: family(r, "kvlane_indexer_bytes", "Memory of the partition's index"),
            waiting: family(r, "kvlane_indexer_waiting", "Blocks and events heard that wait to be applied"),
            exposition,
        }
    }

    /// Everything, in the text format.
    pub(super) fn text(&self, registry: &Registry) -> String {
        let partitions = registry.partitions();
        let count = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        self.models.set(count(partitions.len()));
        self.workers.set(count(partitions.iter().map(|p| p.instances().len()).sum()));
        let mut listeners = [0; Status::ALL.len()];
        self.pairs.clear();
        self.bytes.clear();
        self.waiting.clear();
        for partition in &partitions {
            for (_, listener) in partition.listeners() {
                listeners[listener.status() as usize] += 1;
            }
            let of = OfPartition {
                model: partition.key.model.clone(),
                routing_group: partition.key.group.clone(),
            };
            let stats = partition.index.stats();
            let figure = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
            self.pairs.get_or_create(&of).set(figure(stats.pairs));
            self.bytes.get_or_create(&of).set(figure(stats.bytes));
            self.waiting.get_or_create(&of).set(figure(partition.lane.waiting()));
        }
        for (status, n) in Status::ALL.into_iter().zip(listeners) {
            self.listeners.get_or_create(&OfStatus { status: status.name() }).set(n);
        }
        let mut out = String::new();
        prometheus_client::encoding::text::encode(&mut out, &self.exposition)
            .expect("writing to a string succeeds");
        out
    }
}

/// Counts a request, its time and its failure.
pub(super) async fn measure(metrics: &Metrics, request: Request, next: Next) -> Response {
    let path = request.extensions().get::<MatchedPath>().map_or("unknown", MatchedPath::as_str);
    let endpoint = path.to_owned();
    let method = match *request.method() {
        axum::http::Method::GET => "GET",
        axum::http::Method::POST => "POST",
        axum::http::Method::DELETE => "DELETE",
        _ => "other",
    };
    let began = Instant::now();
    let response = next.run(request).await;
    metrics.durations.get_or_create(&OfEndpoint { endpoint: endpoint.clone() }).observe(began.elapsed());
    metrics.requests.get_or_create(&Requests { endpoint: endpoint.clone(), method }).inc();
    let status = response.status();
    if status.is_client_error() || status.is_server_error() {
        let status_class = if status.is_client_error() { "4xx" } else { "5xx" };
        metrics.errors.get_or_create(&Errors { endpoint, status_class }).inc();
    }
    response
}

fn family<M>(exposition: &mut Exposition, name: &str, help: &str) -> M
where
    M: Clone + Default + prometheus_client::registry::Metric,
{
    let metric = M::default();
    exposition.register(name, help, metric.clone());
    metric
}
