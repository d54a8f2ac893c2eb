//! The engines behind the router: found out, watched, and what each of them is known to hold.
//!
//! [`start`] spawns one task for each configured worker ([`watch`]). It learns from the base URL what the engine is
//! ([`probe`]), keeps asking whether it is alive, has its events followed ([`crate::ingest`]), and publishes every
//! change as a new [`FleetView`].

mod partitions;
pub mod probe;
mod view;
mod watch;

pub use view::{
    CachedTokens, EngineKind, Facts, FleetView, Health, Instance, Model, Partition, Publisher, Rank, Source,
    Trust,
};

use crate::config::{Endpoint, WorkerSpec};
use crate::ingest::{RankCounters, RankStats};
use crate::state::{Followed, Image, Origin, Ranks, Sources};
use arc_swap::ArcSwap;
use kvlane_index::{InstanceId, Worker};
use partitions::Partitions;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Time between two rounds of dropping expired predictions.
const EXPIRE_EVERY: Duration = Duration::from_millis(500);

/// What the fleet needs to know at its start.
#[derive(Clone, Debug)]
pub struct FleetConfig {
    /// The workers; instance `i` is `workers[i]`.
    pub workers: Vec<WorkerSpec>,
    /// Whether cache knowledge is wanted at all: without it there is no index and no subscription.
    pub cache_aware: bool,
    /// Whether another process hears the events: none is followed here, and [`Fleet::heard_elsewhere`] tells how far they are known.
    pub(crate) remote: bool,
    /// Time between two health probes of an instance.
    pub probe_interval: Duration,
    /// Time after which an unanswered probe has failed.
    pub probe_timeout: Duration,
    /// Failed probes in a row that make a healthy instance dead.
    pub failures_to_dead: u32,
    /// Where streams may go on from whose beginning an engine has forgotten.
    pub(crate) sources: Option<Sources>,
}

impl FleetConfig {
    /// The defaults: a probe every 2 s, 2 s to answer, dead after 3 failures.
    pub fn new(workers: Vec<WorkerSpec>) -> Self {
        Self {
            workers,
            cache_aware: true,
            remote: false,
            probe_interval: Duration::from_secs(2),
            probe_timeout: Duration::from_secs(2),
            failures_to_dead: 3,
            sources: None,
        }
    }
}

/// The handle to a running fleet. Cheap to clone.
#[derive(Clone)]
pub struct Fleet {
    shared: Arc<Shared>,
}

impl Fleet {
    /// The newest view. Never waits.
    pub fn snapshot(&self) -> Arc<FleetView> {
        self.shared.view.load_full()
    }

    /// Yields the version of each newly published view (the newest only, for a slow reader).
    pub fn changed(&self) -> tokio::sync::watch::Receiver<u64> {
        self.shared.changed.subscribe()
    }

    /// A request could not be sent to this instance: it is probed at once instead of at the next turn.
    pub fn report_failure(&self, instance: InstanceId) {
        if let Some(signs) = self.shared.signs(instance) {
            signs.failed.notify_one();
        }
    }

    /// A request got an answer: failed probes before it do not count (a busy engine answers health checks late).
    pub fn report_success(&self, instance: InstanceId) {
        if let Some(signs) = self.shared.signs(instance) {
            signs.answered_ms.store(crate::clock::now_ms(), Ordering::Relaxed);
        }
    }

    /// What is known of this rank's cache has turned out false: forget it and learn it anew from the engine's replay.
    pub fn distrust(&self, worker: Worker) {
        if let Some(signs) = self.shared.signs(worker.instance) {
            signs.distrusted.send_modify(|ranks| *ranks.entry(worker.rank).or_default() += 1);
        }
    }

    /// How far another process knows this rank's cache, where its events are heard there.
    pub(crate) fn heard_elsewhere(&self, worker: Worker, trust: Trust) {
        self.shared.trust(worker, trust);
    }

    /// The counters of one rank; `None` if it never had a publisher.
    pub(crate) fn counters(&self, worker: Worker) -> Option<Arc<RankCounters>> {
        self.shared.counters.lock().unwrap_or_else(PoisonError::into_inner).get(&worker).map(Arc::clone)
    }

    /// What ingest has counted, for each rank that ever had a publisher, in order.
    pub fn stats(&self) -> Vec<(Worker, RankStats)> {
        let counters = self.shared.counters.lock().unwrap_or_else(PoisonError::into_inner);
        counters.iter().map(|(worker, counters)| (*worker, counters.read())).collect()
    }

    /// Waits until every event received so far is in the index (of the partitions in use now).
    pub async fn flush(&self) {
        for instance in &self.snapshot().instances {
            if let Some(partition) = &instance.partition {
                partition.flush().await;
            }
        }
    }

    /// Whether a process of this name, as it calls itself to its peers, is this one.
    pub(crate) fn is_called(&self, name: &str) -> bool {
        self.shared.sources.as_ref().is_some_and(|sources| format!("{:016x}", sources.boot()) == name)
    }

    /// What a followed rank holds, as a replica may use it; `None`: it is not followed, or not in step now.
    pub(crate) async fn image(&self, origin: &Origin) -> Option<Image> {
        let found = self.shared.followed().values().find(|f| f.header.origin == *origin).cloned();
        found?.image().await
    }

    /// Waits until every task of the fleet has ended (after its token was cancelled).
    pub async fn stopped(&self) {
        self.shared.tasks.wait().await;
    }
}

impl Ranks for Fleet {
    async fn images(&self, out: mpsc::Sender<Image>) {
        let followed: Vec<Followed> = self.shared.followed().values().cloned().collect();
        let sources = self.shared.sources.as_ref();
        let mut saved = HashSet::new();
        for rank in followed {
            let origin = rank.header.origin.clone();
            let unclaimed = || sources.and_then(|sources| sources.unclaimed(&origin));
            if let Some(image) = rank.image().await.or_else(unclaimed)
                && out.send(image).await.is_err()
            {
                return;
            }
            saved.insert(origin);
        }
        // Of engines that are away for now.
        for image in sources.map(|sources| sources.unclaimed_but(&saved)).unwrap_or_default() {
            if out.send(image).await.is_err() {
                return;
            }
        }
    }
}

impl std::fmt::Debug for Fleet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fleet").field("view", &self.shared.view.load()).finish_non_exhaustive()
    }
}

/// Starts watching the workers, on the current tokio runtime, until `stop` is cancelled.
pub fn start(config: &FleetConfig, stop: &CancellationToken) -> Fleet {
    let now = Instant::now();
    let instances: Vec<Arc<Instance>> = config
        .workers
        .iter()
        .zip(0..)
        .map(|(spec, id)| {
            Arc::new(Instance {
                id: InstanceId(id),
                base: spec.base.clone(),
                http: spec.http,
                role: spec.role,
                labels: spec.labels.clone(),
                health: Health::Probing(None),
                since: now,
                facts: None,
                ranks: Vec::new(),
                partition: None,
            })
        })
        .collect();
    let shared = Arc::new(Shared {
        signs: instances.iter().map(|_| Arc::new(Signs::default())).collect(),
        view: ArcSwap::from_pointee(FleetView::new(1, instances)),
        writing: Mutex::new(()),
        changed: tokio::sync::watch::Sender::new(1),
        partitions: Partitions::default(),
        counters: Mutex::default(),
        claims: Mutex::default(),
        followed: Mutex::default(),
        sources: config.sources.clone(),
        tasks: TaskTracker::new(),
    });
    for (spec, id) in config.workers.iter().zip(0..) {
        let watch = watch::Watch::new(InstanceId(id), spec.clone(), config.clone(), Arc::clone(&shared));
        let stop = stop.clone();
        shared.tasks.spawn(async move { watch.run(&stop).await });
    }
    shared.tasks.spawn(expire_predictions(Arc::clone(&shared), stop.clone()));
    shared.tasks.close();
    Fleet { shared }
}

async fn expire_predictions(shared: Arc<Shared>, stop: CancellationToken) {
    let mut ticks = tokio::time::interval(EXPIRE_EVERY);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    while stop.run_until_cancelled(ticks.tick()).await.is_some() {
        let view = shared.view.load_full();
        let mut done: Vec<*const Partition> = Vec::new();
        for partition in view.instances.iter().filter_map(|i| i.partition.as_ref()) {
            if !done.contains(&Arc::as_ptr(partition)) {
                done.push(Arc::as_ptr(partition));
                partition.index.expire(crate::clock::now_ms());
            }
        }
    }
}

/// What the gateway noticed about an instance, for its watching task.
#[derive(Debug)]
struct Signs {
    failed: Notify,
    /// When a request was last answered ([`crate::clock::now_ms`]).
    answered_ms: AtomicU64,
    /// How often each rank's knowledge was found false.
    distrusted: tokio::sync::watch::Sender<HashMap<u32, u64>>,
}

impl Default for Signs {
    fn default() -> Self {
        Self {
            failed: Notify::new(),
            answered_ms: AtomicU64::new(0),
            distrusted: tokio::sync::watch::Sender::new(HashMap::new()),
        }
    }
}

struct Shared {
    view: ArcSwap<FleetView>,
    /// Held while a new view is made from the last one.
    writing: Mutex<()>,
    changed: tokio::sync::watch::Sender<u64>,
    signs: Vec<Arc<Signs>>,
    partitions: Partitions,
    counters: Mutex<BTreeMap<Worker, Arc<RankCounters>>>,
    /// Which instance follows which publisher: two must not share one.
    claims: Mutex<HashMap<Endpoint, InstanceId>>,
    /// The ranks whose streams are followed now.
    followed: Mutex<BTreeMap<Worker, Followed>>,
    sources: Option<Sources>,
    tasks: TaskTracker,
}

impl Shared {
    fn signs(&self, instance: InstanceId) -> Option<&Arc<Signs>> {
        self.signs.get(usize::try_from(instance.0).ok()?)
    }

    fn counters(&self, worker: Worker) -> Arc<RankCounters> {
        let mut counters = self.counters.lock().unwrap_or_else(PoisonError::into_inner);
        Arc::clone(counters.entry(worker).or_default())
    }

    fn followed(&self) -> MutexGuard<'_, BTreeMap<Worker, Followed>> {
        self.followed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn claims(&self) -> MutexGuard<'_, HashMap<Endpoint, InstanceId>> {
        self.claims.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a view in which one instance is changed; nothing, if `change` leaves it as it is (`false`).
    fn update(&self, instance: InstanceId, change: impl FnOnce(&mut Instance) -> bool) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let view = self.view.load_full();
        let mut instances = view.instances.clone();
        let Some(slot) = instances.iter_mut().find(|i| i.id == instance) else { return };
        let mut changed = Instance::clone(slot);
        if !change(&mut changed) {
            return;
        }
        *slot = Arc::new(changed);
        let version = view.version + 1;
        self.view.store(Arc::new(FleetView::new(version, instances)));
        self.changed.send_replace(version);
    }

    /// Notes how far a rank can be trusted.
    fn trust(&self, worker: Worker, trust: Trust) {
        self.update(worker.instance, |instance| {
            let name = instance.name().to_owned();
            let Some(rank) = instance.ranks.iter_mut().find(|r| r.worker == worker) else { return false };
            if rank.trust == trust {
                return false;
            }
            let (was, number) = (&rank.trust, worker.rank);
            if matches!(trust, Trust::Degraded(_)) {
                tracing::warn!(worker = name, rank = number, %was, "cache knowledge is now {trust}");
            } else {
                tracing::info!(worker = name, rank = number, %was, "cache knowledge is now {trust}");
            }
            (rank.trust, rank.since) = (trust, Instant::now());
            true
        });
    }
}
