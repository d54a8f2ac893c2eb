//! The router as a whole: listens, starts what it needs, and ends in order.

use crate::config::{PeerError, Peers};
use crate::fleet::{self, FleetConfig};
use crate::gateway::{Gateway, GatewayConfig, TokenizerSetting};
use crate::remote::{self, IndexerUrlError, RemoteIndex};
use crate::replicas::Replicas;
use crate::state::{self, Sources, StateDirError, keep};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use kvlane_sched::Policy;
use kvlane_sched::queue::QueueLimits;
use std::collections::hash_map::RandomState;
use std::convert::Infallible;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// A client that is connected and sends no (whole) request head for this long is hung up on. Longer than the idle time of the usual
/// clients' pools, so that they close first.
const HEAD_TIMEOUT: Duration = Duration::from_secs(75);
/// Longest request head.
const HEAD_BYTES_MAX: usize = 256 * 1024;
/// A client that acknowledges nothing for this long, while there is something for it, is given up.
const CLIENT_STALL_MAX: Duration = Duration::from_secs(120);
/// Pause after a failed `accept`: out of file descriptors is the usual reason, and it passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;

/// What the router is started with.
#[derive(Debug)]
pub struct ServeConfig {
    /// Address to listen on; port 0 = any free one.
    pub listen: SocketAddr,
    /// The workers. `cache_aware` is set from the policy.
    pub fleet: FleetConfig,
    /// How workers are chosen.
    pub policy: Box<dyn Policy>,
    /// Policies that choose for every request too, without acting: for metrics and explanations.
    pub shadows: Vec<Box<dyn Policy>>,
    /// How requests wait here while all workers are saturated; `None` = as the policy has it.
    pub queue: Option<QueueLimits>,
    /// Where tokens come from.
    pub tokenizer: TokenizerSetting,
    /// Longest request body, in bytes.
    pub max_body_bytes: u64,
    /// Client connections at a time; more wait to be accepted.
    pub max_connections: usize,
    /// Whether administrative paths of the engines are passed on.
    pub allow_admin: bool,
    /// How long running requests may take to end after the shutdown began.
    pub drain: Duration,
    /// Where what is known of the caches is kept over a restart; `None` = nowhere.
    pub state_dir: Option<PathBuf>,
    /// Time between two saves there.
    pub save_every: Duration,
    /// Base URLs of other routers over the same engines; a name may stand for several. With peers, this router gives its own images too, and shares
    /// its load with them.
    pub peers: Vec<String>,
    /// Whether load is shared with the peers. Without it, each router knows only what it sent itself.
    pub share_load: bool,
    /// Base URLs of indexers that are asked who holds what, in this order, instead of hearing the engines' events here; empty = none.
    pub indexers: Vec<String>,
}

impl ServeConfig {
    /// The defaults.
    pub fn new(listen: SocketAddr, fleet: FleetConfig) -> Self {
        Self {
            listen,
            fleet,
            policy: Box::default(),
            shadows: Vec::new(),
            queue: None,
            tokenizer: TokenizerSetting::Auto,
            max_body_bytes: 64 << 20,
            max_connections: 16_384,
            allow_admin: false,
            drain: Duration::from_secs(30),
            state_dir: None,
            save_every: Duration::from_secs(30),
            peers: Vec::new(),
            share_load: true,
            indexers: Vec::new(),
        }
    }
}

/// Why the router could not start.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The address cannot be listened on: choose another.
    #[error("cannot listen on {0}: {1}")]
    Listen(SocketAddr, io::Error),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(#[from] StateDirError),
    /// A peer cannot be asked; why.
    #[error("--peer {0}: {1}")]
    Peer(String, PeerError),
    /// An indexer cannot be asked.
    #[error(transparent)]
    Indexer(#[from] IndexerUrlError),
    /// The settings contradict each other; says which one to drop.
    #[error("{0}")]
    Settings(&'static str),
}

/// A running router.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    running: JoinHandle<()>,
}

impl Server {
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

/// Starts a router on the current tokio runtime. It ends when `shutdown` is cancelled: `/ready` turns 503, new requests are refused, running
/// ones get [`ServeConfig::drain`] to end, then everything stops.
pub async fn serve(config: ServeConfig, shutdown: CancellationToken) -> Result<Server, ServeError> {
    let ServeConfig {
        listen,
        fleet: mut fleet_config,
        policy,
        shadows,
        queue,
        tokenizer,
        max_body_bytes,
        max_connections,
        allow_admin,
        drain,
        state_dir,
        save_every,
        peers: named_peers,
        share_load,
        indexers,
    } = config;
    if !indexers.is_empty() && state_dir.is_some() {
        return Err(ServeError::Settings(
            "a router that asks an indexer keeps nothing itself: leave --state-dir out, and give it to the indexer",
        ));
    }
    let peers = Peers::default();
    for peer in &named_peers {
        peers.add(peer).map_err(|error| ServeError::Peer(peer.clone(), error))?;
    }
    let listener = bind(listen).map_err(|error| ServeError::Listen(listen, error))?;
    let address = listener.local_addr().map_err(|error| ServeError::Listen(listen, error))?;

    // The fleet and the gateway outlive the shutdown's beginning: running requests need them.
    let stop = CancellationToken::new();
    fleet_config.cache_aware =
        policy.needs_cache_knowledge() || shadows.iter().any(|shadow| shadow.needs_cache_knowledge());
    let remote = if indexers.is_empty() || !fleet_config.cache_aware {
        None
    } else {
        Some(Arc::new(RemoteIndex::new(&indexers)?))
    };
    fleet_config.remote = remote.is_some();
    let (state, saved) = state::open(state_dir.as_deref()).await?;
    let replicated = !named_peers.is_empty();
    let replicas = (replicated && share_load).then(|| Arc::new(Replicas::new(seed(), peers.all())));
    if (state.is_some() || replicated) && remote.is_none() {
        fleet_config.sources = Some(Sources::new(saved, seed(), move || peers.all()));
    }
    let fleet = fleet::start(&fleet_config, &stop);
    if let Some(remote) = &remote {
        tokio::spawn(remote::follow(Arc::clone(remote), fleet.clone(), stop.clone()));
    }
    // Saved for the last time before the streams end.
    let save = CancellationToken::new();
    let keeping = state.map(|dir| tokio::spawn(keep(dir, fleet.clone(), save_every, save.clone())));
    let queue =
        queue.or_else(|| policy.holds_back().then(QueueLimits::default)).filter(|q| q.max_requests > 0);
    let gateway_config = GatewayConfig {
        policy,
        shadows,
        queue,
        tokenizer,
        max_body_bytes,
        allow_admin,
        replicated,
        replicas,
        remote,
        seed: seed(),
    };
    let gateway = Gateway::start(fleet.clone(), gateway_config, &stop);
    tracing::info!(%address, workers = fleet_config.workers.len(), "listening");

    let running = tokio::spawn(async move {
        let connections = TaskTracker::new();
        let closing = CancellationToken::new();
        let cut = CancellationToken::new();
        let accepting = tokio::spawn(accept(
            listener,
            Arc::clone(&gateway),
            max_connections,
            connections.clone(),
            closing.clone(),
            cut.clone(),
        ));
        shutdown.cancelled().await;
        tracing::info!(drain_s = drain.as_secs(), "shutting down");
        gateway.drain();
        closing.cancel();
        connections.close();
        if tokio::time::timeout(drain, connections.wait()).await.is_err() {
            tracing::warn!(connections = connections.len(), "cutting off what did not end in time");
        }
        // Accepting goes on during the drain, so that whoever asks is told instead of refused.
        accepting.abort();
        cut.cancel();
        connections.wait().await;
        save.cancel();
        if let Some(keeping) = keeping
            && let Err(error) = keeping.await
        {
            tracing::warn!(%error, "the last state was not saved");
        }
        stop.cancel();
        fleet.stopped().await;
        tracing::info!("ended");
    });
    Ok(Server { address, running })
}

/// Fresh for each process; `RandomState` is seeded by the operating system.
fn seed() -> u64 {
    RandomState::new().build_hasher().finish()
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

async fn accept(
    listener: TcpListener,
    gateway: Arc<Gateway>,
    max_connections: usize,
    connections: TaskTracker,
    closing: CancellationToken,
    cut: CancellationToken,
) {
    let room = Arc::new(Semaphore::new(max_connections));
    loop {
        let place = Arc::clone(&room).acquire_owned().await.expect("this semaphore is never closed");
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if let Err(error) = prepare(&stream) {
            tracing::debug!(%error, "a connection ended before it began");
            continue;
        }
        let gateway = Arc::clone(&gateway);
        let late = closing.is_cancelled();
        let closing = closing.clone();
        let serving = cut.clone().run_until_cancelled_owned(async move {
            gateway.metrics.connections.inc();
            let counted = Counted(Arc::clone(&gateway));
            connection(stream, gateway, closing).await;
            drop((counted, place));
        });
        // The drain waits for what came before it only; who comes later gets one answer.
        if late { drop(tokio::spawn(serving)) } else { drop(connections.spawn(serving)) }
    }
}

/// Keeps the count of connections, whatever ends one.
struct Counted(Arc<Gateway>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

fn prepare(stream: &TcpStream) -> io::Result<()> {
    // Without it the second small write of a stream waits for the client's delayed acknowledgement: 40 ms.
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(CLIENT_STALL_MAX))?;
    Ok(())
}

async fn connection(stream: TcpStream, gateway: Arc<Gateway>, closing: CancellationToken) {
    let service = service_fn(move |request| {
        let gateway = Arc::clone(&gateway);
        async move { Ok::<_, Infallible>(gateway.handle(request).await) }
    });
    let late = closing.is_cancelled();
    let mut serving = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_TIMEOUT)
            .max_buf_size(HEAD_BYTES_MAX)
            .keep_alive(!late)
            .serve_connection(TokioIo::new(stream), service)
    );
    let ended = if late {
        serving.await
    } else {
        tokio::select! {
            ended = &mut serving => ended,
            () = closing.cancelled() => {
                serving.as_mut().graceful_shutdown();
                serving.await
            }
        }
    };
    if let Err(error) = ended {
        // Clients hang up all the time; what they had running was told by its own guard.
        tracing::debug!(%error, "a connection ended early");
    }
}
