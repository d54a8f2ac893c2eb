//! What the request path needs of the fleet, made once per change and read without waiting.
//!
//! A [`FleetView`] says what is known of the engines; beside each of them lie here its connections, its counters and
//! the texts that would otherwise be formatted for every request.

use super::adapters::Adapters;
use super::upstream::Pool;
use crate::audit::Evidence;
use crate::config::Role;
use crate::fleet::{Fleet, FleetView, Instance, Trust};
use crate::ingest::RankCounters;
use crate::metrics::{Metrics, WorkerMetrics};
use hyper::header::HeaderValue;
use kvlane_index::{InstanceId, Worker};
use kvlane_sched::{EngineLimits, Profile};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

/// The fleet and its connections at one moment.
#[derive(Debug, Default)]
pub(crate) struct Table {
    /// What the fleet knows.
    pub view: Arc<FleetView>,
    /// One for each of `view.instances`, in its order.
    upstreams: Vec<Arc<Upstream>>,
    disaggregated: bool,
}

/// One engine process, as requests are sent to it.
#[derive(Debug)]
pub(crate) struct Upstream {
    /// Its number.
    pub id: InstanceId,
    /// `host:port`, for headers, logs and metrics.
    pub name: String,
    /// Path prefix of its base URL, without a trailing slash; usually empty.
    pub prefix: String,
    /// Its connections; they outlive the table.
    pub pool: Arc<Pool>,
    /// Its counters.
    pub metrics: WorkerMetrics,
    /// Whether it gets nothing new; outlives the table.
    pub draining: Arc<AtomicBool>,
    /// Which adapters are in its memory.
    pub adapters: Arc<Adapters>,
    /// What the scheduler needs of each of its workers.
    pub profile: Profile,
    /// By rank.
    pub ranks: Vec<RankFacts>,
}

/// One data-parallel rank.
#[derive(Debug)]
pub(crate) struct RankFacts {
    /// Its name in the index and the ledger.
    pub worker: Worker,
    /// Its name in headers and JSON: the instance's, with `/rank` where there are several.
    pub name: String,
    /// `name` as the value of `x-kvlane-worker`.
    pub name_header: HeaderValue,
    /// The value of `X-data-parallel-rank`; `None` where the instance has one rank only.
    pub rank_header: Option<HeaderValue>,
    /// How far its overlaps can be believed, 0 to 1.
    pub trust: f64,
    /// Whether every event since the beginning of the engine's life is known.
    pub complete: bool,
    /// What its event stream did; `None` before there was one.
    pub counters: Option<Arc<RankCounters>>,
}

impl Table {
    /// The table of the fleet's newest view; connections of instances that were in `before` are kept.
    pub(crate) fn new(fleet: &Fleet, before: &Self, metrics: &Metrics) -> Self {
        let view = fleet.snapshot();
        let upstreams = view
            .instances
            .iter()
            .filter_map(|instance| {
                let kept = match before.upstream(instance.id) {
                    Some(upstream) => Kept::of(upstream),
                    None => Kept {
                        pool: Pool::new(instance.base.authority()?, instance.http),
                        metrics: metrics.worker(instance.name()),
                        draining: Arc::default(),
                        adapters: Arc::default(),
                    },
                };
                Some(Arc::new(Upstream::new(instance, kept, fleet)))
            })
            .collect();
        let disaggregated = view.instances.iter().any(|instance| instance.role == Role::Prefill);
        Self { view, upstreams, disaggregated }
    }

    /// Whether any engine is set aside for prefill.
    pub(crate) fn is_disaggregated(&self) -> bool {
        self.disaggregated
    }

    /// The engine of this id.
    pub(crate) fn upstream(&self, id: InstanceId) -> Option<&Arc<Upstream>> {
        self.position(id).map(|at| &self.upstreams[at])
    }

    /// Its place in [`Table::upstreams`].
    pub(crate) fn position(&self, id: InstanceId) -> Option<usize> {
        self.upstreams.binary_search_by_key(&id, |u| u.id).ok()
    }

    /// Every engine, whatever its health.
    pub(crate) fn upstreams(&self) -> &[Arc<Upstream>] {
        &self.upstreams
    }

    /// What a worker's event stream has done so far.
    pub(crate) fn evidence(&self, worker: Worker) -> Evidence {
        let rank = self.upstream(worker.instance).and_then(|u| u.rank(worker.rank));
        rank.map_or_else(Evidence::default, RankFacts::evidence)
    }

    /// The name of a worker in headers and JSON; its number where it is not known.
    pub(crate) fn worker_name(&self, worker: Worker) -> String {
        self.upstream(worker.instance)
            .and_then(|u| u.rank(worker.rank))
            .map_or_else(|| worker.to_string(), |rank| rank.name.clone())
    }
}

/// What an engine keeps from one table to the next.
struct Kept {
    pool: Arc<Pool>,
    metrics: WorkerMetrics,
    draining: Arc<AtomicBool>,
    adapters: Arc<Adapters>,
}

impl Kept {
    fn of(upstream: &Upstream) -> Self {
        Self {
            pool: Arc::clone(&upstream.pool),
            metrics: upstream.metrics.clone(),
            draining: Arc::clone(&upstream.draining),
            adapters: Arc::clone(&upstream.adapters),
        }
    }
}

impl Upstream {
    fn new(instance: &Instance, Kept { pool, metrics, draining, adapters }: Kept, fleet: &Fleet) -> Self {
        let name = instance.name().to_owned();
        let several = instance.ranks.len() > 1;
        let ranks = instance
            .ranks
            .iter()
            .map(|rank| {
                let number = rank.worker.rank;
                let name = if several { format!("{name}/{number}") } else { name.clone() };
                let counters = fleet.counters(rank.worker);
                RankFacts {
                    worker: rank.worker,
                    name_header: HeaderValue::from_str(&name)
                        .expect("an authority has no bytes that a header may not have"),
                    name,
                    rank_header: several.then(|| HeaderValue::from(number)),
                    trust: believed(&rank.trust),
                    // What another process hears proves nothing about what happened here in the meantime.
                    complete: rank.trust == Trust::Live && counters.is_some(),
                    counters,
                }
            })
            .collect();
        let facts = instance.facts.as_ref();
        let mut profile = Profile::new(facts.map_or(1, |f| f.block_size.tokens()));
        profile.limits = EngineLimits {
            kv_blocks: facts.and_then(|f| f.capacity_blocks).and_then(|b| u32::try_from(b).ok()),
            ..EngineLimits::default()
        };
        profile.labels.clone_from(&instance.labels);
        let prefix = instance.base.path().trim_end_matches('/').to_owned();
        Self { id: instance.id, name, prefix, pool, metrics, draining, adapters, profile, ranks }
    }

    /// The facts of one rank.
    pub(crate) fn rank(&self, rank: u32) -> Option<&RankFacts> {
        self.ranks.get(rank as usize).filter(|facts| facts.worker.rank == rank)
    }
}

impl RankFacts {
    /// What its event stream has done so far.
    pub(crate) fn evidence(&self) -> Evidence {
        let Self { complete, counters, .. } = self;
        let none = Evidence { complete: *complete, ..Evidence::default() };
        counters.as_ref().map_or(none, |counters| {
            counters.look(|stats| Evidence {
                epoch: stats.epoch,
                cleared: stats.cleared_events,
                removed_events: stats.removed_events,
                complete: *complete,
            })
        })
    }
}

/// Nothing in the index is false while a hole is being filled, only missing; so only a stream that is known to be out of step
/// is believed less.
pub(crate) fn believed(trust: &Trust) -> f64 {
    match trust {
        Trust::Live | Trust::Blind(_) | Trust::Replaying | Trust::Rebuilding(_) => 1.0,
        Trust::Degraded(_) => 0.5,
    }
}
