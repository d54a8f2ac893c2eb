//! The HTTP side of a life: routes, connections that can all be cut at once, and the supervisor that starts the next life.

use super::life::Life;
use super::rank::Snapshot;
use super::{Config, Control, Restart, chat, completions, info, metrics};
use crate::mock_engine::faults::Faults;
use anyhow::Context;
use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::{get, post};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};

/// Largest body that is read.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Attempts to take a life's ports again, and the pause between two.
const BIND_TRIES: u32 = 100;
const BIND_PAUSE: Duration = Duration::from_millis(20);
/// Control commands that wait to be obeyed.
const CONTROL_QUEUE: usize = 16;

/// The life that is on now, if one is.
type CurrentLife = Arc<Mutex<Weak<Life>>>;

/// A running mock engine. Dropping it kills it.
pub(crate) struct MockEngine {
    address: SocketAddr,
    events: Vec<(String, String)>,
    life: CurrentLife,
    supervisor: JoinHandle<()>,
}

impl Drop for MockEngine {
    fn drop(&mut self) {
        self.supervisor.abort();
    }
}

impl MockEngine {
    /// Binds its sockets and serves until it is dropped.
    pub(crate) async fn start(config: Config) -> anyhow::Result<Self> {
        if let Some(directory) = &config.model_directory {
            super::tokenizer::write_model_directory(directory, config.max_model_len)
                .with_context(|| format!("cannot write the model directory {}", directory.display()))?;
        }
        let listener = TcpListener::bind(config.listen)
            .await
            .with_context(|| format!("cannot listen on {}: is the port taken?", config.listen))?;
        let address = listener.local_addr()?;
        let (control, commands) = mpsc::channel(CONTROL_QUEUE);
        let (faults, _) = watch::channel(config.faults.clone());
        let mut config = config;
        config.listen = address;
        let life = Life::start(Arc::new(config.clone()), faults.clone(), control.clone()).await?;
        let events: Vec<_> =
            life.publishers.iter().map(|p| (p.endpoint.clone(), p.replay_endpoint.clone())).collect();
        // The next life uses the ports of this one: whoever was told of them comes back to them.
        if let (Some(events), Some(first)) = (&mut config.events, life.publishers.first())
            && life.publishers.len() == 1
        {
            events.port = port_of(&first.endpoint).unwrap_or(events.port);
            events.replay_port = port_of(&first.replay_endpoint).unwrap_or(events.replay_port);
        }
        let current = CurrentLife::default();
        let next = Next { config: Arc::new(config), faults, control, current: Arc::clone(&current) };
        next.is(&life);
        let supervisor = tokio::spawn(supervise(next, listener, life, commands));
        Ok(Self { address, events, life: current, supervisor })
    }

    /// Its base URL.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The event and the replay endpoint of each rank, as of its first life.
    pub(crate) fn events(&self) -> &[(String, String)] {
        &self.events
    }

    /// What its first rank does and did in this life; nothing while it is down.
    pub(crate) fn snapshot(&self) -> Snapshot {
        let life = self.life.lock().expect("no holder of this lock panics").upgrade();
        life.map(|life| life.ranks[0].snapshot()).unwrap_or_default()
    }

    /// Until it fails, which it does only if it cannot restart.
    pub(crate) async fn ended(&mut self) {
        let _ = (&mut self.supervisor).await;
    }
}

fn port_of(endpoint: &str) -> Option<u16> {
    endpoint.rsplit(':').next()?.parse().ok()
}

/// What it takes to begin the next life.
struct Next {
    config: Arc<Config>,
    faults: watch::Sender<Faults>,
    control: mpsc::Sender<Control>,
    current: CurrentLife,
}

async fn supervise(
    next: Next,
    listener: TcpListener,
    life: Arc<Life>,
    mut commands: mpsc::Receiver<Control>,
) {
    let mut serving = Some((listener, life));
    while let Some((listener, life)) = serving.take() {
        let restart = tokio::select! {
            () = serve(listener, life) => return,
            command = commands.recv() => match command {
                Some(Control::Restart(restart)) => restart,
                None => return,
            },
        };
        // Dropping `serve` cut every connection and, with the last handler, the life: sockets, caches, requests.
        tracing::info!(down_ms = restart.down_ms, "restarting, as asked");
        tokio::time::sleep(Duration::from_millis(restart.down_ms)).await;
        serving = match next.begin().await {
            Ok(life) => Some(life),
            Err(error) => {
                tracing::error!(error = format!("{error:#}"), "cannot start again");
                None
            }
        };
    }
}

impl Next {
    fn is(&self, life: &Arc<Life>) {
        *self.current.lock().expect("no holder of this lock panics") = Arc::downgrade(life);
    }

    /// Takes the same ports again; the kernel may need a moment to give them back.
    async fn begin(&self) -> anyhow::Result<(TcpListener, Arc<Life>)> {
        let mut tried = 0;
        loop {
            let begun = async {
                let (faults, control) = (self.faults.clone(), self.control.clone());
                let life = Life::start(Arc::clone(&self.config), faults, control).await?;
                anyhow::Ok((TcpListener::bind(self.config.listen).await?, life))
            };
            match begun.await {
                Err(_) if tried < BIND_TRIES => {
                    tried += 1;
                    tokio::time::sleep(BIND_PAUSE).await;
                }
                begun => return begun.inspect(|begun| self.is(&begun.1)),
            }
        }
    }
}

async fn serve(listener: TcpListener, life: Arc<Life>) {
    let keep_alive = Duration::from_secs(life.config.keep_alive_s);
    let routes = routes(life);
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to close.
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let _ = stream.set_nodelay(true);
        let service = TowerToHyperService::new(routes.clone());
        connections.spawn(async move {
            // An engine's server closes connections that stay idle; clients have to live with it.
            let served = hyper::server::conn::http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(keep_alive)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection ended");
            }
        });
    }
}

fn routes(life: Arc<Life>) -> Router {
    let mut routes = Router::new()
        .route("/health", get(info::health))
        .route("/ping", get(info::health).post(info::health))
        .route("/version", get(info::version))
        .route("/load", get(info::load))
        .route("/metrics", get(metrics::metrics))
        .route("/v1/models", get(info::models))
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/load_lora_adapter", post(info::load_adapter))
        .route("/v1/unload_lora_adapter", post(info::unload_adapter))
        .route("/tokenize", post(info::tokenize))
        .route("/detokenize", post(info::detokenize))
        .route("/reset_prefix_cache", post(info::reset_prefix_cache))
        .route("/mock/faults", post(info::set_faults))
        .route("/mock/restart", post(info::restart));
    if life.config.events.as_ref().is_some_and(|events| events.announced) {
        routes = routes.route("/kv_event_sources", get(info::kv_event_sources));
    }
    routes.fallback(info::not_found).layer(DefaultBodyLimit::max(BODY_BYTES_MAX)).with_state(life)
}

impl Default for Restart {
    fn default() -> Self {
        Self { down_ms: 100 }
    }
}
