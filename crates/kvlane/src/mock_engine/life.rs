//! One life of a mock engine: from a start to a restart, with its ranks, its caches and its sequence numbers.

use super::error::Refusal;
use super::faults::{Dice, Faults};
use super::publisher::{Publisher, PublisherConfig};
use super::rank::Rank;
use super::{Config, Control};
use axum::http::HeaderMap;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};
use tokio::sync::{mpsc, watch};

/// Adapters that can be loaded at once.
const ADAPTERS_MAX: usize = 64;

/// What the handlers of one life share.
pub(super) struct Life {
    pub(super) config: Arc<Config>,
    pub(super) ranks: Vec<Rank>,
    /// One for each rank; empty where events are off.
    pub(super) publishers: Vec<Publisher>,
    /// When the process claims to have started, in seconds since 1970.
    pub(super) started_s: f64,
    pub(super) faults: watch::Sender<Faults>,
    pub(super) control: mpsc::Sender<Control>,
    /// (number in this life, name).
    adapters: Mutex<Vec<(u32, String)>>,
    adapters_seen: AtomicU32,
    /// HTTP requests being answered.
    pub(super) in_flight: AtomicU64,
    responses: AtomicU64,
    deaths: Mutex<Dice>,
}

/// Counts one request as in flight until it is dropped.
pub(super) struct InFlight(Arc<Life>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Life {
    /// Starts ranks and publishers.
    pub(super) async fn start(
        config: Arc<Config>,
        faults: watch::Sender<Faults>,
        control: mpsc::Sender<Control>,
    ) -> anyhow::Result<Arc<Self>> {
        let mut publishers = Vec::new();
        let mut ranks = Vec::new();
        for rank in 0..config.ranks {
            if let Some(events) = &config.events {
                // Rank r uses port + r, as in vLLM; a free port is a free port.
                let port = |base: u16| if base == 0 { 0 } else { base.saturating_add(rank as u16) };
                let publisher = PublisherConfig {
                    address: config.listen.ip(),
                    port: port(events.port),
                    replay_port: port(events.replay_port),
                    topic: events.topic.clone(),
                    rank,
                    form: events.form,
                    block_size: config.engine.block_size,
                    buffer_steps: events.buffer_steps,
                };
                publishers.push(Publisher::start(publisher, faults.subscribe()).await?);
            }
            let batches = publishers.last().map(Publisher::batches);
            ranks.push(Rank::start(config.engine.clone(), batches, faults.subscribe()));
        }
        let seed = faults.borrow().seed;
        let life = Self {
            ranks,
            publishers,
            started_s: unix_s(),
            faults,
            control,
            adapters: Mutex::new(Vec::new()),
            adapters_seen: AtomicU32::new(0),
            in_flight: AtomicU64::new(0),
            responses: AtomicU64::new(0),
            deaths: Mutex::new(Dice::new(seed, u64::MAX)),
            config,
        };
        for name in &life.config.adapters {
            life.load_adapter(name);
        }
        Ok(Arc::new(life))
    }

    /// The rank that a request asked for, or the least busy one, weighed as vLLM does.
    pub(super) fn rank(&self, headers: &HeaderMap) -> Result<&Rank, Refusal> {
        if let Some(asked) = headers.get("x-data-parallel-rank") {
            let asked = asked.to_str().unwrap_or("?");
            let count = self.ranks.len();
            return asked.trim().parse().ok().and_then(|rank: usize| self.ranks.get(rank)).ok_or_else(|| {
                Refusal::bad(None, format!("data_parallel_rank {asked} is out of range [0, {count})."))
            });
        }
        let busy = |rank: &Rank| {
            let load = rank.snapshot().load;
            load.waiting * 4 + load.running
        };
        Ok(self.ranks.iter().min_by_key(|rank| busy(rank)).expect("an engine has at least one rank"))
    }

    /// The adapter of this name: its number and name.
    pub(super) fn adapter(&self, name: &str) -> Option<(u32, String)> {
        self.adapters.lock().expect("no holder of this lock panics").iter().find(|a| a.1 == name).cloned()
    }

    /// The names of all adapters, in the order in which they were loaded.
    pub(super) fn adapter_names(&self) -> Vec<String> {
        self.adapters.lock().expect("no holder of this lock panics").iter().map(|a| a.1.clone()).collect()
    }

    /// Adds an adapter; `false` if it is there already or there are too many.
    pub(super) fn load_adapter(&self, name: &str) -> bool {
        let mut adapters = self.adapters.lock().expect("no holder of this lock panics");
        if name == self.config.model || adapters.len() >= ADAPTERS_MAX || adapters.iter().any(|a| a.1 == name)
        {
            return false;
        }
        let number = self.adapters_seen.fetch_add(1, Ordering::Relaxed) + 1;
        adapters.push((number, name.to_owned()));
        true
    }

    /// Removes an adapter; `false` if there is none of this name.
    pub(super) fn unload_adapter(&self, name: &str) -> bool {
        let mut adapters = self.adapters.lock().expect("no holder of this lock panics");
        let before = adapters.len();
        adapters.retain(|a| a.1 != name);
        adapters.len() < before
    }

    /// `PREFIX-` and the client's `X-Request-Id`, or a number of this life.
    pub(super) fn response_id(&self, prefix: &str, headers: &HeaderMap) -> String {
        match headers.get("x-request-id").and_then(|id| id.to_str().ok()) {
            Some(id) => format!("{prefix}-{id}"),
            None => {
                let number = self.responses.fetch_add(1, Ordering::Relaxed);
                let life = (self.started_s * 1e3) as u64;
                format!("{prefix}-{:016x}", life.rotate_left(24) ^ number)
            }
        }
    }

    /// Counts a request as in flight.
    pub(super) fn count_in_flight(self: &Arc<Self>) -> InFlight {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
        InFlight(Arc::clone(self))
    }

    /// Whether the next stream breaks off.
    pub(super) fn draw_death(&self) -> bool {
        let share = self.faults.borrow().die_mid_stream;
        share > 0.0 && self.deaths.lock().expect("no holder of this lock panics").happens(share)
    }

    /// Seconds since 1970.
    pub(super) fn now_s(&self) -> u64 {
        unix_s() as u64
    }

    /// What responses name as the engine.
    pub(super) fn fingerprint(&self) -> String {
        format!("vllm-{}-mock", self.config.version)
    }
}

fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}
