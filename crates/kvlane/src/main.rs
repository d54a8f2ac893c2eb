//! The `kvlane` command: arguments, logging and wiring; each subcommand is a module of its own.
//!
//! This is the only crate that knows clap, the process environment and the exit code. Logs go to stderr, so that
//! stdout stays free for what a subcommand is asked for.

mod demo;
mod events_cmd;
mod http_client;
mod index_run;
mod indexer;
mod mock_engine;
mod record;
mod replay;
mod serve;
mod simulate;
mod source;

use std::io::IsTerminal;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

/// Routes LLM requests to the engine that already holds their prefix.
#[derive(Debug, Parser)]
#[command(name = "kvlane", version, arg_required_else_help = true)]
struct Cli {
    /// What to log, as `level` or `target=level,...` (error, warn, info, debug, trace) [default: info; demo: error].
    #[arg(long, global = true, env = "KVLANE_LOG", value_name = "FILTER")]
    log: Option<String>,

    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Route requests over engines: speaks OpenAI to clients, reads the engines' cache events.
    Serve(serve::Args),
    /// Keep the index as a service for others: hears engines, answers over HTTP who holds what.
    Indexer(indexer::Args),
    /// See it work without a GPU: four mock engines and the router in one process, then a comparison.
    Demo(demo::Args),
    /// Run one engine that only pretends: vLLM's HTTP and cache events, a real block cache, measured times.
    MockEngine(Box<mock_engine::Args>),
    /// Write down live traffic, as hashes and lengths only, for `kvlane simulate` and `kvlane replay`.
    Record(record::Args),
    /// Send a trace to a real endpoint as it was recorded, and report first tokens, hit rate and balance.
    Replay(Box<replay::Args>),
    /// Compare routing policies on a request trace: no GPU, no sockets, one seed gives one result.
    #[command(visible_alias = "sim")]
    Simulate(Box<simulate::Args>),
    /// Look at, keep and play engines' event streams; examine an engine (`kvlane events check URL`).
    Events(events_cmd::Args),
    /// Work with an index by itself, without engines.
    Index(index_run::Args),
}

fn main() -> anyhow::Result<()> {
    let cli = Cli::parse();
    // The demo's engines and router live and end by the dozen: only what breaks is worth a line there.
    let level = if matches!(cli.command, Command::Demo(_)) { "error" } else { "info" };
    let log = cli.log.as_deref().unwrap_or(level);
    let filter = EnvFilter::try_new(log)
        .map_err(|error| anyhow::anyhow!("--log {log:?} is no filter ({error}); try `--log debug`"))?;
    // Colours are for people; a log file gets none.
    let colours = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colours).init();

    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        match cli.command {
            Command::Serve(args) => serve::run(args).await,
            Command::Indexer(args) => indexer::run(args).await,
            Command::Demo(args) => demo::run(args).await,
            Command::MockEngine(args) => mock_engine::run(*args).await,
            Command::Record(args) => record::run(args).await,
            Command::Replay(args) => replay::run(*args).await,
            Command::Simulate(args) => simulate::run(&args),
            Command::Events(args) => events_cmd::run(args).await,
            Command::Index(args) => index_run::run(args),
        }
    })
}
