//! `kvlane serve`: the router as a process.

#[cfg(test)]
mod tests;

use anyhow::Context;
use kvlane_sched::Policy;
use kvlane_sched::policy::NAMES;
use kvlane_sched::queue::{Order, QueueLimits};
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, TokenizerSetting};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Arguments of `kvlane serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Base URL of an engine, such as http://10.0.0.1:8000; repeat for each one. What the engine does not say of itself can follow:
    /// URL,kv-events=tcp://HOST:PORT,replay=tcp://HOST:PORT,topic=TEXT,block-size=TOKENS,ranks=COUNT,http=2; so can
    /// role=prefill (computes prompts for the others; needs a KV connector) and label=KEY=VALUE, which requests ask for by x-kvlane-require.
    #[arg(long = "worker", value_name = "URL", required = true)]
    workers: Vec<WorkerSpec>,

    /// Address to listen on.
    #[arg(long, value_name = "HOST:PORT", default_value = "0.0.0.0:8080")]
    listen: SocketAddr,

    /// How workers are chosen: kv, round-robin, random, least-loaded, power-of-two, consistent-hash, sticky-session or reference. All but kv and
    /// reference are blind to the caches and need neither tokenizer nor events.
    #[arg(long, value_name = "NAME", default_value = NAMES[0])]
    policy: String,

    /// Policies that choose for every request too, without acting: what each would have done is in /metrics (kvlane_policy_*) and in the explanation of
    /// each request. Their loads are imagined, the caches are as the acting policy makes them.
    #[arg(long, value_name = "NAME,...", value_delimiter = ',')]
    shadow: Vec<String>,

    /// Requests that may wait here while every worker that could take them is saturated; 0 = none, the engines queue. Headers: x-kvlane-priority
    /// (-100 to 100, greater is sooner), x-kvlane-deadline-ms, x-kvlane-tenant (else the API key; tenants get equal work). Default: 4096 for
    /// kv, 0 for the others.
    #[arg(long, value_name = "COUNT")]
    queue: Option<usize>,

    /// Seconds that a request may wait here before it is refused with 503.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..))]
    queue_wait: u64,

    /// Order of one tenant's waiting requests of a class: least-work (the shortest uncached prompt, and waiting counts) or arrival.
    #[arg(long, value_name = "ORDER", default_value = "least-work")]
    queue_order: QueueOrder,

    /// Model directory or tokenizer.json to tokenize with, or `engine` to ask the engines. Without it: the directory that the engine
    /// loaded the model from, if it is on this host too, else the engine.
    #[arg(long, value_name = "PATH")]
    tokenizer: Option<PathBuf>,

    /// Longest request body, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 64 << 20)]
    max_body_bytes: u64,

    /// Client connections at a time; more wait.
    #[arg(long, value_name = "COUNT", default_value_t = 16_384)]
    max_connections: usize,

    /// Pass administrative paths on (cache reset, sleep, adapters, profiling): to the worker that the header x-kvlane-worker names, else to
    /// all healthy ones.
    #[arg(long)]
    allow_admin: bool,

    /// Directory in which what is known of the caches is kept over a restart; used again only where an engine's stream proves that it goes on
    /// there.
    #[arg(long, value_name = "PATH")]
    state_dir: Option<PathBuf>,

    /// Seconds between two saves there; the last one is at the end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    save_every: u64,

    /// Base URL of another kvlane router over the same engines; repeat for each. What an engine has forgotten is asked from it, and it may ask
    /// here (GET /kvlane/snapshot); each also learns what the others have in flight (GET /kvlane/loads). A name may stand for several.
    #[arg(long = "peer", value_name = "URL")]
    peers: Vec<String>,

    /// Do not share load with the peers: each router then knows only what it sent itself.
    #[arg(long, requires = "peers")]
    no_load_sharing: bool,

    /// Base URL of a `kvlane indexer` that is asked who holds what, instead of hearing the engines here; a second one, after a comma, is asked
    /// where the first is slow or fails. Without any answer requests are routed by load.
    #[arg(long = "indexer", value_name = "URL", value_delimiter = ',', conflicts_with = "state_dir")]
    indexers: Vec<String>,

    /// Seconds that running requests get to end after SIGTERM.
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    drain: u64,
}

/// Which of a tenant's waiting requests comes first.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum QueueOrder {
    /// The one with the least left to compute.
    LeastWork,
    /// The one that came first.
    Arrival,
}

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args {
        workers,
        listen,
        policy,
        shadow,
        queue,
        queue_wait,
        queue_order,
        tokenizer,
        max_body_bytes,
        max_connections,
        allow_admin,
        drain,
        state_dir,
        save_every,
        peers,
        no_load_sharing,
        indexers,
    } = args;
    let policy: Box<dyn Policy> = policy.parse().context("--policy")?;
    let mut shadows: Vec<Box<dyn Policy>> = Vec::new();
    for name in &shadow {
        anyhow::ensure!(*name != policy.name(), "--shadow {name}: this policy acts already; name others");
        anyhow::ensure!(!shadows.iter().any(|s| s.name() == name), "--shadow {name}: named twice");
        shadows.push(name.parse().context("--shadow")?);
    }
    let by_default = if policy.holds_back() { QueueLimits::default().max_requests } else { 0 };
    let queue = QueueLimits {
        max_requests: queue.unwrap_or(by_default),
        max_wait_ms: queue_wait as f64 * 1e3,
        order: match queue_order {
            QueueOrder::LeastWork => Order::LeastWork,
            QueueOrder::Arrival => Order::Arrival,
        },
    };
    let tokenizer = match tokenizer {
        None => TokenizerSetting::Auto,
        Some(path) if path.as_os_str() == "engine" => TokenizerSetting::Engine,
        Some(path) => {
            anyhow::ensure!(
                path.exists(),
                "--tokenizer {}: there is no such file or directory; give a model directory, a tokenizer.json, or `engine`",
                path.display()
            );
            TokenizerSetting::Path(path)
        }
    };
    let config = ServeConfig {
        policy,
        shadows,
        queue: Some(queue),
        tokenizer,
        max_body_bytes,
        max_connections,
        allow_admin,
        drain: Duration::from_secs(drain),
        state_dir,
        save_every: Duration::from_secs(save_every),
        peers,
        share_load: !no_load_sharing,
        indexers,
        ..ServeConfig::new(listen, FleetConfig::new(workers))
    };
    let shutdown = CancellationToken::new();
    let server = kvlane_server::serve(config, shutdown.clone()).await?;
    told_to_stop().await.context("cannot listen for signals")?;
    shutdown.cancel();
    tokio::select! {
        () = server.ended() => {}
        // Asked twice: do not wait for what still runs.
        again = told_to_stop() => again.context("cannot listen for signals")?,
    }
    Ok(())
}

/// Waits for SIGTERM or SIGINT.
pub(crate) async fn told_to_stop() -> std::io::Result<()> {
    #[cfg(unix)]
    {
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted,
        }
    }
    #[cfg(not(unix))]
    tokio::signal::ctrl_c().await
}
