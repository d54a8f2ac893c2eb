//! The life of one instance as the router sees it: unknown, healthy, dead, and back.
//!
//! ```text
//! Probing ──probe understood──▶ Healthy ──failures in a row──▶ Dead
//!    ▲ │                          │ ▲                            │
//!    └─┘ again                    └─┘ health, facts              └─ probed as at the start ─▶ Healthy
//! ```
//!
//! Becoming healthy attaches the instance to its partition and starts following its publishers; leaving it stops them and clears
//! what they brought, through the same lane, so nothing of the earlier life can arrive afterwards.

use super::probe::{self, GetError};
use super::{Facts, FleetConfig, Health, Partition, Publisher, Rank, Shared, Signs, Source, Trust};
use crate::clock;
use crate::config::{EventsSetting, WorkerSpec};
use crate::ingest::{Beginnings, Draining, Following, Report, Work, drain, follow};
use crate::state::{Followed, Header, IMAGE_WAIT_MS, Origin};
use kvlane_events::stream::{Limits, StreamConfig};
use kvlane_index::hash::Scheme;
use kvlane_index::{InstanceId, Worker};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;

/// Time between two probes of an instance that is not healthy; an engine that is back must be used within 2 s.
const PROBE_UNHEALTHY_EVERY: Duration = Duration::from_millis(500);
/// Time between two probes after one failed by refusal, which a busy engine does not do.
const PROBE_REFUSED_EVERY: Duration = Duration::from_millis(200);
/// Everything is learnt anew at every so-many-th health probe: adapters come and go.
const LEARN_EVERY: u32 = 5;
/// Learning asks several questions at once, of a server that may be busy.
const LEARN_TIMEOUT: Duration = Duration::from_secs(5);

/// The task of one instance.
pub(super) struct Watch {
    id: InstanceId,
    spec: WorkerSpec,
    config: FleetConfig,
    shared: Arc<Shared>,
    signs: Arc<Signs>,
    /// Rung by publishers whose connection changed.
    changed: Arc<Notify>,
}

/// What a healthy instance is attached to.
struct Attached {
    facts: Facts,
    partition: Arc<Partition>,
    publishers: JoinSet<()>,
    process_start: watch::Sender<Option<f64>>,
    relearn: Vec<(u32, u64, watch::Sender<u64>)>,
}

enum Woken {
    Turn,
    Failed,
    Changed,
}

impl Watch {
    pub(super) fn new(id: InstanceId, spec: WorkerSpec, config: FleetConfig, shared: Arc<Shared>) -> Self {
        let signs = Arc::clone(shared.signs(id).expect("one for each configured worker"));
        Self { id, spec, config, shared, signs, changed: Arc::new(Notify::new()) }
    }

    /// Watches until `stop` is cancelled.
    pub(super) async fn run(self, stop: &CancellationToken) {
        loop {
            let Some(facts) = stop.run_until_cancelled(self.learn_until_understood()).await else { return };
            let mut attached = self.attach(facts);
            let reason = stop.run_until_cancelled(self.while_healthy(&mut attached)).await;
            self.detach(attached, reason.as_deref()).await;
            if reason.is_none() {
                return;
            }
        }
    }

    fn name(&self) -> &str {
        self.spec.base.authority().map_or("", ::http::uri::Authority::as_str)
    }

    async fn learn(&self) -> Result<Facts, probe::ProbeError> {
        let limit = self.config.probe_timeout.max(LEARN_TIMEOUT);
        probe::probe(&self.spec, self.config.cache_aware, limit).await
    }

    async fn learn_until_understood(&self) -> Facts {
        loop {
            match self.learn().await {
                Ok(facts) => return facts,
                Err(error) => self.shared.update(self.id, |instance| match &mut instance.health {
                    Health::Probing(reason) if reason.as_deref() != Some(&error.to_string()) => {
                        tracing::warn!(worker = self.name(), "worker is not usable yet: {error}");
                        *reason = Some(error.to_string());
                        true
                    }
                    Health::Dead(reason) if *reason != error.to_string() => {
                        tracing::debug!(worker = self.name(), "worker is still dead: {error}");
                        *reason = error.to_string();
                        true
                    }
                    _ => false,
                }),
            }
            sleep(PROBE_UNHEALTHY_EVERY.min(self.config.probe_interval)).await;
        }
    }

    /// Makes the instance healthy.
    fn attach(&self, mut facts: Facts) -> Attached {
        let partition = self.shared.partitions.get(facts.base_model(), facts.block_size);
        self.claim(&mut facts);
        let process_start = watch::Sender::new(started_at_s(&facts));
        let mut publishers = JoinSet::new();
        let mut relearn = Vec::new();
        let here = !self.config.remote;
        for publisher in facts.publishers.iter().filter(|_| here) {
            let worker = Worker { instance: self.id, rank: publisher.rank };
            let again = watch::Sender::new(0);
            // One question at a time is enough: whoever asks waits for the answer.
            let (images, asked) = mpsc::channel(1);
            let header = self.header(publisher, &facts);
            let following = Following {
                worker,
                publisher: publisher.clone(),
                config: StreamConfig {
                    engine: engine_on_the_wire(&facts),
                    block_size: facts.block_size,
                    topic: publisher.topic.as_ref().map(|t| t.clone().into_bytes()),
                    replay: publisher.replay.is_some(),
                    snapshots: false,
                    limits: Limits { snapshot_ms: IMAGE_WAIT_MS, ..Limits::default() },
                },
                scheme: Scheme::default(),
                lane: partition.lane.clone(),
                counters: self.shared.counters(worker),
                process_start: process_start.subscribe(),
                relearn: again.subscribe(),
                beginnings: self.config.sources.clone().map(|sources| {
                    let origin = header.origin.clone();
                    Beginnings { sources, origin }
                }),
                images: asked,
            };
            self.shared.followed().insert(worker, Followed { header, images });
            let seen = self.signs.distrusted.borrow().get(&publisher.rank).copied().unwrap_or(0);
            relearn.push((publisher.rank, seen, again));
            publishers
                .spawn(follow(following, Reporter(Arc::clone(&self.shared), Arc::clone(&self.changed))));
        }
        if facts.drains && here {
            let again = watch::Sender::new(0);
            let draining = Draining {
                instance: self.id,
                base: self.spec.base.clone(),
                block_size: facts.block_size,
                lane: partition.lane.clone(),
                counters: (0..facts.ranks)
                    .map(|rank| self.shared.counters(Worker { instance: self.id, rank }))
                    .collect(),
                process_start: process_start.subscribe(),
                relearn: again.subscribe(),
            };
            let distrusted = self.signs.distrusted.borrow();
            // One drain tells of all ranks: distrust of any is distrust of it.
            relearn.extend(
                (0..facts.ranks)
                    .map(|rank| (rank, distrusted.get(&rank).copied().unwrap_or(0), again.clone())),
            );
            publishers.spawn(drain(draining, Reporter(Arc::clone(&self.shared), Arc::clone(&self.changed))));
        }
        let now = Instant::now();
        tracing::info!(
            worker = self.name(),
            engine = facts.engine.name(),
            version = facts.version.as_deref().unwrap_or("unknown"),
            model = facts.base_model(),
            block_size = facts.block_size.tokens(),
            ranks = facts.ranks,
            "worker is healthy"
        );
        for note in &facts.notes {
            tracing::warn!(worker = self.name(), "{note}");
        }
        self.shared.update(self.id, |instance| {
            instance.health = Health::Healthy;
            instance.since = now;
            instance.ranks = self.ranks(&facts, now);
            instance.partition = self.config.cache_aware.then(|| Arc::clone(&partition));
            instance.facts = Some(facts.clone());
            true
        });
        Attached { facts, partition, publishers, process_start, relearn }
    }

    /// What is said of images of a publisher's rank.
    fn header(&self, publisher: &Publisher, facts: &Facts) -> Header {
        let origin = Origin {
            endpoint: publisher.events.to_string(),
            rank: publisher.rank,
            model: facts.base_model().to_owned(),
            group: "default".to_owned(),
            block_size: facts.block_size.tokens(),
            scheme: Scheme::default().id(),
        };
        let replay = publisher.replay.as_ref().map(ToString::to_string);
        Header { origin, instance: self.id.0, replay, position: None, taken_unix_s: 0.0 }
    }

    fn ranks(&self, facts: &Facts, now: Instant) -> Vec<Rank> {
        let blind = || {
            let why = if self.config.cache_aware { facts.notes.last().map(String::as_str) } else { None };
            Trust::Blind(why.unwrap_or("its events are not wanted").to_owned())
        };
        let rank = |rank| Rank {
            worker: Worker { instance: self.id, rank },
            trust: match facts.publishers.iter().find(|p| p.rank == rank) {
                Some(_) if self.config.remote => Trust::Blind("no indexer was asked about it yet".to_owned()),
                Some(publisher) => Trust::Blind(format!("connecting to {}", publisher.events)),
                None if facts.drains && self.config.remote => {
                    Trust::Blind("its events are fetched over HTTP, which no indexer does".to_owned())
                }
                None if facts.drains => Trust::Blind("its events were not fetched yet".to_owned()),
                None => blind(),
            },
            since: now,
        };
        (0..facts.ranks).map(rank).collect()
    }

    /// Two instances must not follow one publisher: whoever merely guessed its port gives way.
    fn claim(&self, facts: &mut Facts) {
        let mut claims = self.shared.claims();
        claims.retain(|_, owner| *owner != self.id);
        let id = self.id;
        let mut taken = None;
        facts.publishers.retain(|publisher| {
            let owner = claims.get(&publisher.events);
            if owner.is_some() && publisher.source == Source::Assumed {
                taken = Some(publisher.events.clone());
                return false;
            }
            claims.insert(publisher.events.clone(), id);
            true
        });
        if let Some(endpoint) = taken {
            facts.notes.push(format!(
                "the usual {endpoint} belongs to another worker: set kv-events=tcp://HOST:PORT; until then it is served by \
                 predicted placements"
            ));
        }
    }

    /// Returns why the instance must be attached anew.
    async fn while_healthy(&self, attached: &mut Attached) -> String {
        let mut failures = 0;
        let mut turn = 0;
        let mut pause = self.config.probe_interval;
        let mut distrusted = self.signs.distrusted.subscribe();
        loop {
            let woken = tokio::select! {
                () = sleep(pause) => Woken::Turn,
                () = self.signs.failed.notified() => Woken::Failed,
                () = self.changed.notified() => Woken::Changed,
                Ok(()) = distrusted.changed() => {
                    attached.pass_on(&distrusted.borrow_and_update());
                    continue;
                }
            };
            let asked_ms = clock::now_ms();
            let answer = probe::alive(&self.spec.base, self.config.probe_timeout).await;
            if let Err(error) = answer {
                if self.signs.answered_ms.load(Ordering::Relaxed) >= asked_ms {
                    failures = 0;
                } else {
                    failures += 1;
                }
                if failures >= self.config.failures_to_dead {
                    return format!("{error} ({failures} probes in a row)");
                }
                pause = match error {
                    GetError::Connect(_) => PROBE_REFUSED_EVERY,
                    GetError::Timeout(_) | GetError::Http(_) | GetError::Sick(_) => PROBE_UNHEALTHY_EVERY,
                }
                .min(self.config.probe_interval);
                continue;
            }
            let was_away = std::mem::take(&mut failures) > 0;
            pause = self.config.probe_interval;
            turn += 1;
            if turn % LEARN_EVERY != 0 && !was_away && !matches!(woken, Woken::Changed) {
                continue;
            }
            // A probe that is not understood now is repeated at its next turn; `alive` decides about death.
            let Ok(facts) = self.learn().await else { continue };
            if let Some(reason) = self.refresh(attached, facts) {
                return reason;
            }
        }
    }

    /// Takes over what was learnt while healthy; says why that is not possible.
    fn refresh(&self, attached: &mut Attached, mut facts: Facts) -> Option<String> {
        let restarted = facts.started_at_ms != attached.facts.started_at_ms;
        let differs = |what: &str| Some(format!("the engine was restarted with another {what}"));
        if facts.base_model() != attached.facts.base_model() {
            return differs("model");
        }
        if facts.block_size != attached.facts.block_size {
            return differs("block size");
        }
        if facts.ranks != attached.facts.ranks {
            return differs("number of ranks");
        }
        if self.spec.kv_events == EventsSetting::Probe && !same_sockets(&facts, &attached.facts) {
            return differs("event endpoint");
        }
        if restarted && attached.facts.publishers.is_empty() && !facts.drains && self.config.cache_aware {
            for rank in 0..facts.ranks {
                attached.partition.index.forget_predictions(Worker { instance: self.id, rank });
            }
        }
        facts.publishers.clone_from(&attached.facts.publishers);
        facts.notes.clone_from(&attached.facts.notes);
        facts.drains = attached.facts.drains;
        attached.process_start.send_replace(started_at_s(&facts));
        if facts != attached.facts {
            attached.facts = facts.clone();
            self.shared.update(self.id, |instance| {
                instance.facts = Some(facts);
                true
            });
        }
        None
    }

    /// Makes the instance dead (`reason`), or just lets go of it (`None`: the router stops).
    async fn detach(&self, attached: Attached, reason: Option<&str>) {
        let Attached { facts, partition, mut publishers, .. } = attached;
        if let Some(reason) = reason {
            tracing::warn!(worker = self.name(), "worker is dead, what it held is forgotten: {reason}");
            self.shared.update(self.id, |instance| {
                instance.health = Health::Dead(reason.to_owned());
                instance.since = Instant::now();
                for rank in &mut instance.ranks {
                    rank.trust = Trust::Blind("the engine does not answer".to_owned());
                    rank.since = Instant::now();
                }
                true
            });
        }
        publishers.shutdown().await;
        self.shared.followed().retain(|worker, _| worker.instance != self.id);
        self.shared.claims().retain(|_, owner| *owner != self.id);
        for rank in 0..facts.ranks {
            let worker = Worker { instance: self.id, rank };
            self.shared.counters(worker).update(|stats| stats.connected = false);
            // Bounded, because at the router's end nobody may take work out any more.
            let _ = timeout(Duration::from_secs(5), partition.lane.send(Work::Remove(worker))).await;
        }
    }
}

impl Attached {
    fn pass_on(&mut self, distrusted: &std::collections::HashMap<u32, u64>) {
        for (rank, seen, again) in &mut self.relearn {
            let count = distrusted.get(rank).copied().unwrap_or(0);
            if count > *seen {
                *seen = count;
                again.send_replace(count);
            }
        }
    }
}

fn same_sockets(a: &Facts, b: &Facts) -> bool {
    let sockets = |facts: &Facts| -> Vec<Publisher> {
        facts.publishers.iter().filter(|p| p.source == Source::Engine).cloned().collect()
    };
    sockets(a) == sockets(b)
}

fn started_at_s(facts: &Facts) -> Option<f64> {
    #[expect(clippy::cast_precision_loss, reason = "milliseconds since 1970 fit in 53 bits")]
    facts.started_at_ms.map(|ms| ms as f64 / 1e3)
}

fn engine_on_the_wire(facts: &Facts) -> kvlane_events::wire::EngineKind {
    use super::EngineKind;
    use kvlane_events::wire::EngineKind as Wire;
    match facts.engine {
        EngineKind::Vllm | EngineKind::Other => Wire::Vllm,
        EngineKind::Sglang => Wire::Sglang,
        EngineKind::TensorRtLlm => Wire::TrtLlm,
    }
}

/// Passes on what a publisher's task says.
struct Reporter(Arc<Shared>, Arc<Notify>);

impl Report for Reporter {
    fn trust(&self, worker: Worker, trust: Trust) {
        self.0.trust(worker, trust);
    }

    fn connection_changed(&self) {
        self.1.notify_one();
    }
}
