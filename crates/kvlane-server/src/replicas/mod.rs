//! Load shared between routers over the same engines, so that they do not all choose the worker that each of them leaves idle.
//!
//! ```text
//! gateway: ledger ─ note ─▶ told ◀─ GET /kvlane/loads?boot&after ─ ask (every other router, one question at a time)
//! gateway: scheduler ◀─ sums ─ heard ◀─ what changed since, or all ─┘
//! ```
//!
//! Each asks every other one; an answer comes as soon as requests came or went there, or after a heartbeat. Asking is what makes joining, losing and
//! coming back the same thing: whoever asks says what it has seen, and gets what is new, or everything. Nobody keeps account of who listens. Who is
//! not heard for [`heard::EXPIRY`] has nothing in flight: a router that ends takes its connections to the engines with it.
//!
//! What is told is a few milliseconds old when it is heard; in between routers may choose alike. Knows nothing of the gateway, which notes and
//! hears ([`crate::gateway`]).

mod ask;
mod heard;
mod told;
mod wire;

use crate::state::addresses;
use ask::Asker;
use heard::{Heard, Sums, Taken};
use kvlane_index::Worker;
use kvlane_sched::{Busy, Load};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use prost::Message;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use told::Told;

/// Names of peers are resolved anew so often.
const RESOLVE_EVERY: Duration = Duration::from_secs(5);
/// Pause after a question that was not answered.
const FAILED_PAUSE: Duration = Duration::from_millis(200);
/// An address that is this process's own is asked again after this time: it may be somebody else's then.
const SELF_PAUSE: Duration = Duration::from_secs(60);
/// Who was not heard of is looked for so often.
const EXPIRE_EVERY: Duration = Duration::from_millis(100);
/// Addresses that are asked; more are left out.
const PEERS_MAX: usize = 256;

/// What this router tells others, and hears of them.
#[derive(Debug)]
pub(crate) struct Replicas {
    boot: u64,
    peers: Vec<String>,
    told: Told,
    heard: Mutex<Heard>,
    /// Rung when something was heard or forgotten.
    news: Notify,
    /// How the last question to each address ended.
    standing: Mutex<BTreeMap<SocketAddr, Standing>>,
    counts: Counts,
}

/// How it stands with one address.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Standing {
    /// It answers.
    Heard,
    /// It is this process.
    Self_,
    /// It does not answer, for this reason.
    Trouble(String),
}

/// Messages, by what became of them.
#[derive(Debug, Default)]
struct Counts {
    applied: AtomicU64,
    old: AtomicU64,
    unfounded: AtomicU64,
    /// Questions without an answer.
    failed: AtomicU64,
    /// Ranks that somebody has work at and that are not known here, when they were last added up.
    unknown_ranks: AtomicU64,
}

impl Replicas {
    /// `boot` is fresh for each life of a process; `peers` are base URLs, and a name may stand for several processes, this one among them.
    pub(crate) fn new(boot: u64, peers: Vec<String>) -> Self {
        Self {
            boot,
            peers,
            told: Told::new(boot),
            heard: Mutex::new(Heard::new(Instant::now())),
            news: Notify::new(),
            standing: Mutex::default(),
            counts: Counts::default(),
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn standing(&self) -> MutexGuard<'_, BTreeMap<SocketAddr, Standing>> {
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes all loads of this moment, and what was booked of late, for others to ask for. `name` gives the engine's name of a worker; one
    /// without is not told of.
    pub(crate) fn note(
        &self,
        loads: Vec<(Worker, Load)>,
        name: impl Fn(Worker) -> Option<String>,
        busy: Busy,
        now_ms: f64,
    ) {
        self.told.note(loads, name, busy, now_ms);
    }

    /// The answer to a question (its query), when there is something to say; `None`: it is no question. `clock` is the one on which
    /// loads are noted.
    pub(crate) async fn answer(&self, query: &str, clock: impl Fn() -> f64) -> Option<Vec<u8>> {
        let value = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('='));
        let boot = u64::from_str_radix(value("boot")?, 16).ok()?;
        let after = value("after")?.parse().ok()?;
        Some(self.told.tell(boot, after, clock).await.encode_to_vec())
    }

    /// Waits until something was heard, or forgotten.
    pub(crate) async fn news(&self) {
        self.news.notified().await;
    }

    /// Everything that others have in flight at ranks that are known here, on a clock that shows `now_ms` now.
    pub(crate) fn sums<'n>(
        &self,
        now_ms: f64,
        known: impl Iterator<Item = (Worker, &'n str)>,
    ) -> (Vec<(Worker, Load)>, Busy) {
        let (mut sums, busy): (Sums, Busy) = self.heard().sums(Instant::now(), now_ms);
        let here =
            |(worker, engine): (Worker, &str)| Some((worker, sums.get_mut(engine)?.remove(&worker.rank)?));
        let loads: Vec<(Worker, Load)> = known.filter_map(here).collect();
        let unknown: usize = sums.values().map(std::collections::HashMap::len).sum();
        self.counts.unknown_ranks.store(unknown as u64, Ordering::Relaxed);
        (loads, busy)
    }

    /// Asks all peers, until `stop`.
    pub(crate) async fn ask(self: Arc<Self>, stop: CancellationToken) {
        let asking = async {
            let mut tasks: BTreeMap<SocketAddr, AbortOnDropHandle<()>> = BTreeMap::new();
            loop {
                for peer in &self.peers {
                    for address in addresses(peer).await {
                        if tasks.len() < PEERS_MAX {
                            tasks.entry(address).or_insert_with(|| {
                                let task = tokio::spawn(Arc::clone(&self).ask_one(address));
                                AbortOnDropHandle::new(task)
                            });
                        }
                    }
                }
                tokio::time::sleep(RESOLVE_EVERY).await;
            }
        };
        let expiring = async {
            loop {
                tokio::time::sleep(EXPIRE_EVERY).await;
                if self.heard().expire(Instant::now()) {
                    self.news.notify_one();
                }
            }
        };
        stop.run_until_cancelled(async { tokio::join!(asking, expiring) }).await;
    }

    async fn ask_one(self: Arc<Self>, address: SocketAddr) {
        let mut asker = Asker::new(address);
        let mut boot = 0;
        loop {
            let known = self.heard().sequence(boot);
            let (asked, after) = known.map_or((0, 0), |sequence| (boot, sequence));
            match asker.ask(asked, after).await {
                Ok(told) if told.boot == self.boot => {
                    self.stands(address, Standing::Self_);
                    tokio::time::sleep(SELF_PAUSE).await;
                }
                Ok(told) => {
                    boot = told.boot;
                    let taken = self.heard().enter(&told, after, Instant::now());
                    let count = match taken {
                        Taken::Applied => &self.counts.applied,
                        Taken::Old => &self.counts.old,
                        Taken::Unfounded => &self.counts.unfounded,
                    };
                    count.fetch_add(1, Ordering::Relaxed);
                    self.news.notify_one();
                    self.stands(address, Standing::Heard);
                    if taken != Taken::Applied {
                        // What is known is asked for again, not at once: it may be the same.
                        tokio::time::sleep(FAILED_PAUSE).await;
                    }
                }
                Err(why) => {
                    self.counts.failed.fetch_add(1, Ordering::Relaxed);
                    self.stands(address, Standing::Trouble(why));
                    tokio::time::sleep(FAILED_PAUSE).await;
                }
            }
        }
    }

    fn stands(&self, address: SocketAddr, now: Standing) {
        let mut standing = self.standing();
        if standing.get(&address) == Some(&now) {
            return;
        }
        match &now {
            Standing::Heard => tracing::info!(%address, "hearing this router's load"),
            Standing::Self_ => {}
            Standing::Trouble(why) => tracing::info!(%address, "this router's load is not known: {why}"),
        }
        standing.insert(address, now);
    }

    /// Every address that is asked, and how it stands with it.
    pub(crate) fn json(&self) -> Value {
        let row = |(address, standing): (&SocketAddr, &Standing)| {
            let trouble = match standing {
                Standing::Trouble(why) => Some(why.as_str()),
                Standing::Heard | Standing::Self_ => None,
            };
            json!({
                "address": address.to_string(),
                "heard": *standing == Standing::Heard,
                "itself": *standing == Standing::Self_,
                "trouble": trouble,
            })
        };
        self.standing().iter().map(row).collect()
    }

    /// Adds the figures of this moment.
    pub(crate) fn collect(&self, registry: &mut Registry) {
        let Counts { applied, old, unfounded, failed, unknown_ranks } = &self.counts;
        let messages = Family::<[(&'static str, &'static str); 1], Counter>::default();
        for (outcome, count) in
            [("applied", applied), ("old", old), ("unfounded", unfounded), ("failed", failed)]
        {
            messages.get_or_create_owned(&[("outcome", outcome)]).inc_by(count.load(Ordering::Relaxed));
        }
        registry.register(
            "replica_messages",
            "Questions to other routers for their load, by what became of the answer",
            messages,
        );
        let gauge = |value: u64| {
            let gauge = Gauge::<i64>::default();
            gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
            gauge
        };
        registry.register(
            "replicas_heard",
            "Other routers whose load is known",
            gauge(self.heard().tellers() as u64),
        );
        registry.register(
            "replica_unknown_ranks",
            "Ranks that other routers have work at and that are not known here: name engines alike everywhere",
            gauge(unknown_ranks.load(Ordering::Relaxed)),
        );
    }
}
