//! The index as a service of its own: hears engines that are registered with it, and answers over HTTP who holds what.
//!
//! The reference system has such a service, and routers, gateways and schedulers that speak to it; its paths, JSON, statuses and
//! units are kept (`api/reference.rs`), so that they work unchanged. Beside them stand kvlane's own calls, under `/v1`, which say more.
//!
//! ```text
//! register ─▶ registry ─▶ a listener for each rank (crate::ingest) ─▶ the partition's lane ─▶ its index ◀─ query, overlap
//! ```
//!
//! A partition is (model, routing group): one index, one block size. A process either hears engines ([`Knowledge::Events`]) or is told
//! routing decisions ([`Knowledge::Decisions`]), never both: a decision is no fact about a cache, and mixed into one index nobody could tell
//! any more which of the two an answer rests on.

mod api;
mod grpc;
mod listener;
mod metrics;
mod partition;
mod registry;
mod replicas;

pub use api::{DOCUMENT, ROUTES};

use crate::config::Endpoint;
use crate::http_server::{self, Limits};
use crate::select::Selector;
use crate::state::{self, Image, StateDirError, keep};
use kvlane_index::BlockSize;
use kvlane_index::hash::Scheme;
use kvlane_sched::Policy;
use registry::Registry;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Between two rounds of dropping expired decisions and tidying up.
const HOUSEKEEPING: Duration = Duration::from_millis(500);

/// What an indexer knows things from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Knowledge {
    /// The engines' events; any number of such indexers may hear the same engines.
    Events,
    /// Routing decisions that its one writer records (`POST /v1/decisions`); for engines without events.
    Decisions,
}

/// An engine's publisher that is followed from the start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Registration {
    /// The caller's number of the engine.
    pub instance: u64,
    /// Its data-parallel rank.
    pub rank: u32,
    /// Its PUB socket.
    pub endpoint: Endpoint,
    /// Its ROUTER socket for replays; `None`: losses cannot be repaired.
    pub replay: Option<Endpoint>,
    /// What it serves.
    pub model: String,
    /// Separates workers of one model that must not be routed to together.
    pub group: String,
    /// Tokens in a block.
    pub block_size: BlockSize,
}

/// What an indexer is started with.
#[derive(Debug)]
pub struct IndexerConfig {
    /// Address to listen on; port 0 = any free one.
    pub listen: SocketAddr,
    /// Where knowledge comes from.
    pub knowledge: Knowledge,
    /// By whose rules blocks are hashed. [`Scheme::Reference`] lets `query_by_hash` agree with clients that hash adapters as the
    /// reference does.
    pub scheme: Scheme,
    /// Publishers to follow from the start.
    pub registrations: Vec<Registration>,
    /// Base URLs of other indexers that hear the same engines; a name may stand for several. What they know is asked for where the engines
    /// have forgotten it.
    pub peers: Vec<String>,
    /// Where what is known is kept over a restart; `None` = nowhere.
    pub state_dir: Option<PathBuf>,
    /// Time between two saves there.
    pub save_every: Duration,
    /// How workers are chosen for `/v1/select`.
    pub policy: Box<dyn Policy>,
    /// Client connections at a time; more wait to be accepted.
    pub max_connections: usize,
    /// What the calls may do.
    pub api: ApiConfig,
}

/// What the calls may do.
#[derive(Clone, Copy, Debug)]
pub struct ApiConfig {
    /// Longest request body, in bytes.
    pub max_body_bytes: usize,
    /// Whether clients may pause listeners (`/test/pause_listener`).
    pub allow_pausing: bool,
    /// Tokens in a block of partitions that decisions make, where they do not say.
    pub decisions_block_size: Option<BlockSize>,
}

impl IndexerConfig {
    /// The defaults: events, the reference's hashes, 8 MiB bodies.
    pub fn new(listen: SocketAddr) -> Self {
        Self {
            listen,
            knowledge: Knowledge::Events,
            scheme: Scheme::Reference,
            registrations: Vec::new(),
            peers: Vec::new(),
            state_dir: None,
            save_every: Duration::from_secs(30),
            policy: Box::default(),
            max_connections: 4_096,
            api: ApiConfig { max_body_bytes: 8 << 20, allow_pausing: false, decisions_block_size: None },
        }
    }
}

/// Why an indexer could not start.
#[derive(Debug, thiserror::Error)]
pub enum IndexerError {
    /// The address cannot be listened on: choose another.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
    /// A registration contradicts another one.
    #[error("worker {instance}, rank {rank}: {why}")]
    Registration {
        /// The engine.
        instance: u64,
        /// Its rank.
        rank: u32,
        /// What is wrong.
        why: String,
    },
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateDirError),
    /// The settings contradict each other; says which one to drop.
    #[error("{0}")]
    Settings(&'static str),
}

/// A running indexer.
#[derive(Debug)]
pub struct Indexer {
    address: SocketAddr,
    running: JoinHandle<()>,
}

impl Indexer {
    /// The address that it listens on.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Waits until it has ended, after its shutdown token was cancelled.
    pub async fn ended(self) {
        if let Err(error) = self.running.await
            && error.is_panic()
        {
            std::panic::resume_unwind(error.into_panic());
        }
    }
}

/// Starts an indexer on the current tokio runtime; it ends when `shutdown` is cancelled.
pub async fn start(config: IndexerConfig, shutdown: CancellationToken) -> Result<Indexer, IndexerError> {
    if config.knowledge == Knowledge::Decisions {
        if !config.registrations.is_empty() {
            return Err(IndexerError::Settings(
                "an indexer of routing decisions follows no engines: leave the workers out, or start one that hears events",
            ));
        }
        if !config.peers.is_empty() {
            return Err(IndexerError::Settings(
                "an indexer of routing decisions has one writer and no replicas: leave the peers out",
            ));
        }
        if config.state_dir.is_some() {
            return Err(IndexerError::Settings(
                "routing decisions expire and are not kept over a restart: leave the state directory out",
            ));
        }
    }
    let listen = config.listen;
    let listener = http_server::bind(listen).map_err(|error| IndexerError::Listen(listen, error))?;
    let address = listener.local_addr().map_err(|error| IndexerError::Listen(listen, error))?;
    let (state, saved) = state::open(config.state_dir.as_deref()).await?;
    let followed: Vec<Registration> = saved
        .iter()
        .filter(|i| i.header.origin.scheme == config.scheme.id())
        .filter_map(registration)
        .collect();
    let boot = RandomState::new().hash_one(0);
    let registry = Arc::new(Registry::new(config.knowledge, config.scheme, boot, saved));
    for registration in &config.registrations {
        let (instance, rank) = (registration.instance, registration.rank);
        registry.register(registration).await.map_err(|why| IndexerError::Registration {
            instance,
            rank,
            why: why.to_string(),
        })?;
    }
    // What was registered over HTTP before a restart; what contradicts the settings now gives way.
    for registration in &followed {
        if let Err(why) = registry.register(registration).await
            && !config.registrations.contains(registration)
        {
            tracing::warn!(
                instance = registration.instance,
                rank = registration.rank,
                "not followed again: {why}"
            );
        }
    }
    for peer in &config.peers {
        registry
            .peers
            .add(peer)
            .map_err(|_| IndexerError::Settings("a peer is not a URL: write http://HOST:PORT"))?;
    }
    tracing::info!(%address, workers = config.registrations.len(), scheme = config.scheme.name(), "indexer listening");
    let limits = Limits { connections: config.max_connections, ..Limits::default() };
    let selector = Arc::new(Selector::new(config.policy, RandomState::new().hash_one(0)));
    let beside = grpc::router(Arc::clone(&registry), config.api.max_body_bytes).await;
    let router = api::router(Arc::clone(&registry), Arc::clone(&selector), config.api, beside);
    let running = tokio::spawn(async move {
        let stop = shutdown.clone();
        let keeping = state.map(|dir| {
            let (ranks, stop) = (Arc::clone(&registry), shutdown.clone());
            tokio::spawn(keep(dir, ranks, config.save_every, stop))
        });
        let (learning, unless) = (Arc::clone(&registry), shutdown.clone());
        tokio::spawn(async move {
            let adopted = unless.run_until_cancelled(replicas::adopt_registrations(&learning)).await;
            if let Some(adopted @ 1..) = adopted {
                tracing::info!(adopted, "following what peers have registered");
            }
        });
        let serving = http_server::serve(listener, router, limits, shutdown.clone());
        let housekeeping = stop.run_until_cancelled(keep_house(&registry, &selector));
        tokio::join!(serving, housekeeping);
        if let Some(keeping) = keeping
            && let Err(error) = keeping.await
        {
            tracing::warn!(%error, "the last state was not saved");
        }
        registry.stop().await;
        tracing::info!("indexer ended");
    });
    Ok(Indexer { address, running })
}

/// The registration of the rank that an image is of.
fn registration(image: &Image) -> Option<Registration> {
    let header = &image.header;
    Some(Registration {
        instance: header.instance,
        rank: header.origin.rank,
        endpoint: header.origin.endpoint.parse().ok()?,
        replay: header.replay.as_ref().map(|replay| replay.parse()).transpose().ok()?,
        model: header.origin.model.clone(),
        group: header.origin.group.clone(),
        block_size: BlockSize::new(header.origin.block_size)?,
    })
}

async fn keep_house(registry: &Registry, selector: &Selector) {
    loop {
        tokio::time::sleep(HOUSEKEEPING).await;
        registry.expire();
        selector.expire();
    }
}
