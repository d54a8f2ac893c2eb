//! The figures of `/metrics` that others count: the fleet's, the index's, the ledger's, the tokenizers'.
//!
//! They are read when somebody asks, so nothing is counted twice and nothing of a worker that is gone stays.

use super::Gateway;
use kvlane_events::rebuild::Regained;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Of {
    worker: String,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Kind {
    worker: String,
    kind: &'static str,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Model {
    model: String,
    block_size: u32,
}

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Tokenizer {
    model: String,
    kind: &'static str,
}

type Counts<L> = Family<L, Counter>;
type Gauges<L> = Family<L, Gauge>;
type Floats<L> = Family<L, Gauge<f64, AtomicU64>>;

fn register<M>(registry: &mut Registry, name: &str, help: &str) -> M
where
    M: Clone + Default + prometheus_client::registry::Metric,
{
    let metric = M::default();
    registry.register(name, help, metric.clone());
    metric
}

impl Gateway {
    /// A registry filled with the figures of this moment.
    pub(super) fn collect(&self) -> Registry {
        let mut registry = Registry::with_prefix("kvlane");
        let r = &mut registry;
        let waiting: Gauge = register(r, "queue_requests", "Requests that wait here for a worker with room");
        waiting.set(i64::try_from(self.admission.waiting()).unwrap_or(i64::MAX));
        self.collect_workers(r);
        self.collect_events(r);
        self.collect_indexes(r);
        if let Some(replicas) = &self.replicas {
            replicas.collect(r);
        }
        if let Some(remote) = &self.remote {
            remote.collect(r);
        }
        let checks: Counts<Tokenizer> = register(
            r,
            "token_checks",
            "Comparisons of the tokens computed here with the engine's, by result",
        );
        let degraded: Gauges<Tokenizer> =
            register(r, "tokenizer", "1 for where a model's tokens come from now");
        for (model, standing) in self.prompts.standings() {
            let of = |kind| Tokenizer { model: model.clone(), kind };
            checks.get_or_create_owned(&of("equal")).inc_by(standing.equal);
            checks.get_or_create_owned(&of("different")).inc_by(standing.different);
            checks.get_or_create_owned(&of("impossible")).inc_by(standing.impossible);
            degraded.get_or_create_owned(&of(standing.source)).set(1);
        }
        registry
    }

    fn collect_workers(&self, r: &mut Registry) {
        let healthy: Gauges<Of> = register(r, "worker_healthy", "Whether requests may go to the worker");
        let trust: Gauges<Kind> =
            register(r, "worker_events", "1 for the state of the worker's event stream");
        let ledger: Gauges<Kind> = register(r, "ledger_requests", "Requests in flight, by phase");
        let tokens: Gauges<Kind> =
            register(r, "ledger_tokens", "Tokens in flight: to prefill, or in contexts");
        let table = self.table.load_full();
        for instance in &table.view.instances {
            let worker = instance.name().to_owned();
            healthy.get_or_create_owned(&Of { worker }).set(instance.health.is_healthy().into());
            for rank in &instance.ranks {
                let worker = table.worker_name(rank.worker);
                let of = |kind| Kind { worker: worker.clone(), kind };
                trust.get_or_create_owned(&of(rank.trust.name())).set(1);
                let load = self.desk.with(|books, _| books.scheduler.ledger().load(rank.worker));
                ledger.get_or_create_owned(&of("prefill")).set(load.prefill_requests.into());
                ledger.get_or_create_owned(&of("decode")).set(load.decode_requests.into());
                let gauge = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
                tokens.get_or_create_owned(&of("prefill")).set(gauge(load.prefill_tokens));
                tokens.get_or_create_owned(&of("decode")).set(gauge(load.decode_tokens));
            }
        }
    }

    fn collect_events(&self, r: &mut Registry) {
        let stream: Counts<Kind> = register(
            r,
            "event_stream",
            "What happened on the worker's event stream: messages, gaps, replays, …",
        );
        let events: Counts<Kind> = register(r, "events", "Events applied to the index, by kind");
        let blocks: Counts<Kind> =
            register(r, "event_blocks", "What events did to the index, in blocks, by status");
        let drops: Counts<Kind> =
            register(r, "event_drops", "Events and messages that were dropped, by reason");
        let regained: Counts<Kind> = register(
            r,
            "event_regained_blocks",
            "Blocks that a fence had made unknown and that were regained, by how their place was learnt",
        );
        let lag: Floats<Of> = register(
            r,
            "event_lag_seconds",
            "Publishing of the last applied batch to its being in the index, by both machines' clocks",
        );
        let table = self.table.load_full();
        for (worker, stats) in self.fleet.stats() {
            let worker = table.worker_name(worker);
            let of = |kind| Kind { worker: worker.clone(), kind };
            let happened = [
                ("connect", stats.connects),
                ("message", stats.messages),
                ("byte", stats.bytes),
                ("replay_message", stats.replay_messages),
                ("batch", stats.batches),
                ("gap", stats.gaps),
                ("replay", stats.replays),
                ("restart", stats.restarts),
                ("epoch", stats.epoch),
                ("unknown_medium", stats.unknown_media),
            ];
            for (kind, count) in happened {
                stream.get_or_create_owned(&of(kind)).inc_by(count);
            }
            let applied = [
                ("stored", stats.stored_events),
                ("removed", stats.removed_events),
                ("cleared", stats.cleared_events),
            ];
            for (kind, count) in applied {
                events.get_or_create_owned(&of(kind)).inc_by(count);
            }
            for (status, count) in stats.applied.by_status() {
                blocks.get_or_create_owned(&of(status)).inc_by(count);
            }
            for (reason, count) in stats.drops() {
                drops.get_or_create_owned(&of(reason.name())).inc_by(count);
            }
            let Regained { memory, alike, request, answer } = stats.regained;
            for (kind, count) in
                [("memory", memory), ("alike", alike), ("request", request), ("answer", answer)]
            {
                regained.get_or_create_owned(&of(kind)).inc_by(count);
            }
            if let Some(seconds) = stats.lag_s {
                lag.get_or_create_owned(&Of { worker: worker.clone() }).set(seconds);
            }
        }
    }

    fn collect_indexes(&self, r: &mut Registry) {
        let held: Gauges<Kind> = register(r, "held_blocks", "Blocks that a worker holds, by tier");
        let places: Gauges<Model> = register(r, "index_places", "Distinct blocks of prompts in the index");
        let pairs: Gauges<Model> = register(r, "index_pairs", "Blocks held, over all workers");
        let orphans: Gauges<Model> = register(r, "index_orphans", "Blocks that wait for their parent");
        let expired: Counts<Model> =
            register(r, "index_orphans_expired", "Blocks dropped because their parent did not come in time");
        let predicted: Gauges<Model> =
            register(r, "index_predicted", "Predicted blocks that no event confirmed yet");
        let bytes: Gauges<Model> = register(r, "index_bytes", "Memory of the index");
        let waiting: Gauges<Model> =
            register(r, "index_waiting", "Blocks and events that wait to be applied");
        let table = self.table.load_full();
        let mut seen = Vec::new();
        for partition in table.view.instances.iter().filter_map(|i| i.partition.as_ref()) {
            if seen.contains(&Arc::as_ptr(partition)) {
                continue;
            }
            seen.push(Arc::as_ptr(partition));
            let of = Model { model: partition.model.clone(), block_size: partition.block_size.tokens() };
            let stats = partition.index.stats();
            let figures = [
                (&places, stats.places),
                (&pairs, stats.pairs),
                (&orphans, stats.orphans),
                (&predicted, stats.predicted),
                (&bytes, stats.bytes),
                (&waiting, partition.waiting()),
            ];
            for (family, figure) in figures {
                family.get_or_create_owned(&of).set(i64::try_from(figure).unwrap_or(i64::MAX));
            }
            expired.get_or_create_owned(&of).inc_by(stats.orphans_expired);
            for row in partition.index.workers() {
                let kind = Kind { worker: table.worker_name(row.worker), kind: row.tier.name() };
                held.get_or_create_owned(&kind).inc_by(i64::try_from(row.blocks).unwrap_or(i64::MAX));
            }
        }
    }
}
