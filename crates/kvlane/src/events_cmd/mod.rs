//! `kvlane events`: look at, keep and play engines' event streams, and examine an engine.

mod check;
mod record;
mod replay;
mod tail;

use anyhow::Context;
use clap::Subcommand;
use kvlane_server::config::{Endpoint, WorkerSpec};
use kvlane_server::fleet::{EngineKind, Publisher, Source, probe};
use kvlane_server::ingest::{Tap, Tapped};
use std::time::Duration;

/// Time to find out what a URL is.
const PROBE_LIMIT: Duration = Duration::from_secs(10);

/// Time for a subscription to be there before the past is asked for.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Arguments of `kvlane events`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
An engine tells over ZeroMQ which blocks enter and leave its KV cache; kvlane routes by that. A new engine is best looked at
with `check`, which names each missing flag; a strange one is recorded, and the recording played into an index here:

  kvlane events check http://gpu1:8000
  kvlane events tail http://gpu1:8000 --from-start
  kvlane events record http://gpu1:8000 gpu1.jsonl --seconds 60
  kvlane events replay gpu1.jsonl")]
pub(crate) struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Examine one engine: what hinders routing by its cache, and the flag that mends it. Exits with 1 on a problem.
    Check(check::Args),
    /// Show events as they come.
    Tail(tail::Args),
    /// Write events to a file, one JSON line for each message. The file contains the prompts' tokens.
    Record(record::Args),
    /// Play a recorded file into an index, or out on a socket.
    Replay(replay::Args),
}

/// Runs the subcommand.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    match args.command {
        Command::Check(args) => check::run(args).await,
        Command::Tail(args) => tail::run(args).await,
        Command::Record(args) => record::run(args).await,
        Command::Replay(args) => replay::run(&args).await,
    }
}

/// Where to listen, and whose events they are.
struct Sources {
    engine: EngineKind,
    publishers: Vec<Publisher>,
}

/// `tcp://HOST:PORT` is taken as it is; anything else is a worker, which is asked.
async fn sources(source: &str) -> anyhow::Result<Sources> {
    if source.starts_with("tcp://") {
        let events: Endpoint = source.parse()?;
        let publisher = Publisher { rank: 0, events, replay: None, topic: None, source: Source::Operator };
        return Ok(Sources { engine: EngineKind::Vllm, publishers: vec![publisher] });
    }
    let spec: WorkerSpec = source.parse()?;
    let facts = probe::probe(&spec, true, PROBE_LIMIT).await?;
    anyhow::ensure!(
        !facts.drains,
        "{} gives its events away over HTTP, to one reader only, and publishes none: `kvlane events check` looks at them",
        spec.base
    );
    anyhow::ensure!(
        !facts.publishers.is_empty(),
        "{}",
        facts.notes.last().map_or("the engine publishes no events", String::as_str)
    );
    Ok(Sources { engine: facts.engine, publishers: facts.publishers })
}

/// A subscription of each publisher, with the first that was heard of it. What is published while the past is asked for waits in it.
async fn subscribe(publishers: &[Publisher]) -> Vec<(&Publisher, Tap, Option<Tapped>)> {
    let mut taps = Vec::new();
    for publisher in publishers {
        let mut tap = Tap::subscribe(&publisher.events, publisher.topic.as_deref().unwrap_or_default());
        let first = tokio::time::timeout(CONNECT_LIMIT, tap.recv()).await.unwrap_or(None);
        taps.push((publisher, tap, first));
    }
    taps
}

/// What comes next of a subscription.
async fn next(publisher: &Publisher, mut tap: Tap) -> (&Publisher, Tap, Option<Tapped>) {
    let tapped = tap.recv().await;
    (publisher, tap, tapped)
}

/// How the decoder calls an engine.
fn on_the_wire(engine: EngineKind) -> kvlane_events::wire::EngineKind {
    match engine {
        EngineKind::Vllm | EngineKind::Other => kvlane_events::wire::EngineKind::Vllm,
        EngineKind::Sglang => kvlane_events::wire::EngineKind::Sglang,
        EngineKind::TensorRtLlm => kvlane_events::wire::EngineKind::TrtLlm,
    }
}

/// Sequence number and payload, from the right, as live and replayed messages have them.
fn seq_and_payload(frames: &[bytes::Bytes]) -> Option<(u64, &[u8])> {
    let [.., seq, payload] = frames else { return None };
    Some((u64::from_be_bytes(<[u8; 8]>::try_from(&seq[..]).ok()?), payload))
}

/// Prints one line; a reader that is gone (`| head`) is an error that ends the command quietly.
fn print(line: &str) -> anyhow::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{line}").context("standard output is closed")
}
