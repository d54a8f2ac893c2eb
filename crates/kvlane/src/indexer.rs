//! `kvlane indexer`: the index as a process of its own.

use anyhow::Context;
use kvlane_index::BlockSize;
use kvlane_index::hash::Scheme;
use kvlane_sched::Policy;
use kvlane_sched::policy::NAMES;
use kvlane_server::config::Endpoint;
use kvlane_server::indexer::{ApiConfig, IndexerConfig, Knowledge, Registration};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// Arguments of `kvlane indexer`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Address to listen on. Whoever reaches it may register engines: let it be a network that only your services reach.
    #[arg(long, value_name = "HOST:PORT", default_value = "127.0.0.1:8090")]
    listen: SocketAddr,

    /// An engine's publisher, as `INSTANCE[:RANK]=tcp://HOST:PORT[,replay=tcp://HOST:PORT]`; repeat for each. Others register over HTTP.
    #[arg(long = "worker", value_name = "ID=ENDPOINT", requires = "block_size")]
    workers: Vec<Worker>,

    /// What the workers given here serve.
    #[arg(long, value_name = "NAME", default_value = "default")]
    model: String,

    /// The routing group of the workers given here.
    #[arg(long, value_name = "NAME", default_value = "default")]
    routing_group: String,

    /// Tokens in a block: of the workers given here, or of partitions made by decisions that do not say.
    #[arg(long, value_name = "TOKENS", value_parser = block_size)]
    block_size: Option<BlockSize>,

    /// Base URL of another indexer that hears the same engines; repeat for each.
    #[arg(long = "peer", value_name = "URL")]
    peers: Vec<String>,

    /// Directory in which what is known is kept over a restart; used again only where an engine's stream proves that it goes on there.
    #[arg(long, value_name = "PATH")]
    state_dir: Option<PathBuf>,

    /// Seconds between two saves there; the last one is at the end.
    #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..))]
    save_every: u64,

    /// Instead of hearing engines, be told routing decisions by one router (POST /v1/decisions): for engines without events.
    #[arg(long, conflicts_with_all = ["workers", "peers", "state_dir"])]
    decisions: bool,

    /// By whose rules blocks are hashed: `reference` agrees with clients of the reference system also for adapters; `kvlane` is its own.
    #[arg(long, value_name = "NAME", default_value = "reference", value_parser = scheme)]
    hash_scheme: Scheme,

    /// How workers are chosen for callers of /v1/select and /v1/reservations.
    #[arg(long, value_name = "NAME", default_value = NAMES[0])]
    policy: String,

    /// Longest request body, in bytes.
    #[arg(long, value_name = "BYTES", default_value_t = 8 << 20)]
    max_body_bytes: usize,

    /// Client connections at a time; more wait.
    #[arg(long, value_name = "COUNT", default_value_t = 4_096)]
    max_connections: usize,

    /// Let clients pause and resume listeners (POST /test/pause_listener); for tests only.
    #[arg(long)]
    allow_pausing: bool,
}

/// One publisher as typed.
#[derive(Clone, Debug)]
struct Worker {
    instance: u64,
    rank: u32,
    endpoint: Endpoint,
    replay: Option<Endpoint>,
}

impl FromStr for Worker {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let form = || format!("`{text}`: write INSTANCE[:RANK]=tcp://HOST:PORT[,replay=tcp://HOST:PORT]");
        let (id, rest) = text.split_once('=').ok_or_else(form)?;
        let (instance, rank) = match id.split_once(':') {
            Some((instance, rank)) => (instance, rank.parse().map_err(|_| form())?),
            None => (id, 0),
        };
        let (endpoint, replay) = match rest.split_once(",replay=") {
            Some((endpoint, replay)) => (endpoint, Some(replay)),
            None => (rest, None),
        };
        let reachable = |text: &str| {
            let endpoint: Endpoint = text.parse().map_err(|error| format!("{error}"))?;
            if endpoint.port == 0 || endpoint.is_wildcard() { Err(form()) } else { Ok(endpoint) }
        };
        Ok(Self {
            instance: instance.parse().map_err(|_| form())?,
            rank,
            endpoint: reachable(endpoint)?,
            replay: replay.map(reachable).transpose()?,
        })
    }
}

fn block_size(text: &str) -> Result<BlockSize, String> {
    text.parse().ok().and_then(BlockSize::new).ok_or_else(|| "a number of tokens from 1".to_owned())
}

fn scheme(text: &str) -> Result<Scheme, String> {
    let names = || format!("one of {}", Scheme::ALL.map(Scheme::name).join(", "));
    Scheme::ALL.into_iter().find(|scheme| scheme.name() == text).ok_or_else(names)
}

/// Runs until SIGTERM or SIGINT.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args {
        listen,
        workers,
        model,
        routing_group,
        block_size,
        peers,
        state_dir,
        save_every,
        decisions,
        hash_scheme,
        policy,
        max_body_bytes,
        max_connections,
        allow_pausing,
    } = args;
    let policy: Box<dyn Policy> = policy.parse().context("--policy")?;
    let mut registrations = Vec::new();
    for Worker { instance, rank, endpoint, replay } in workers {
        registrations.push(Registration {
            instance,
            rank,
            endpoint,
            replay,
            model: model.clone(),
            group: routing_group.clone(),
            block_size: block_size.context("--worker needs --block-size")?,
        });
    }
    let config = IndexerConfig {
        knowledge: if decisions { Knowledge::Decisions } else { Knowledge::Events },
        scheme: hash_scheme,
        registrations,
        peers,
        state_dir,
        save_every: Duration::from_secs(save_every),
        policy,
        max_connections,
        api: ApiConfig { max_body_bytes, allow_pausing, decisions_block_size: block_size },
        ..IndexerConfig::new(listen)
    };
    let shutdown = CancellationToken::new();
    let indexer = kvlane_server::indexer::start(config, shutdown.clone()).await?;
    crate::serve::told_to_stop().await.context("cannot listen for signals")?;
    shutdown.cancel();
    tokio::select! {
        () = indexer.ended() => {}
        // Asked twice: do not wait for what still runs.
        again = crate::serve::told_to_stop() => again.context("cannot listen for signals")?,
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_read_whole_or_refused_with_its_form() {
        let worker: Worker = "7:1=tcp://h:5557,replay=tcp://h:5558".parse().unwrap();
        assert_eq!((worker.instance, worker.rank), (7, 1));
        assert_eq!(worker.endpoint, Endpoint::new("h", 5557));
        assert_eq!(worker.replay, Some(Endpoint::new("h", 5558)));
        assert_eq!("7=tcp://h:1".parse::<Worker>().unwrap().rank, 0);
        for bad in
            ["", "7", "x=tcp://h:1", "7:x=tcp://h:1", "7=h", "7=ipc:///x", "7=tcp://*:5557", "7=tcp://h:0"]
        {
            assert!(bad.parse::<Worker>().unwrap_err().contains("tcp://HOST:PORT"), "{bad}");
        }
    }
}
