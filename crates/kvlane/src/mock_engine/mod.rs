//! `kvlane mock-engine`: one engine's outside (vLLM's HTTP, cache events over ZMQ) around the model of its inside
//! (`kvlane-engine`).
//!
//! It exists so that a router can be tried, tested and measured where no GPU is: the cache is real (block by block, as
//! vLLM evicts), the times are those measured on a real engine, only the text is made up.
//!
//! ```text
//! server ── a life: routes, connections ── chat, completions ── generate ── rank ── kvlane_engine::Engine
//!    └─ the next life after a restart                                        └─ publisher ── PUB, ROUTER
//! ```

mod answer;
mod chat;
mod completions;
mod error;
mod faults;
mod generate;
mod info;
mod life;
mod metrics;
mod openai;
mod publisher;
mod rank;
mod server;
mod stream;
#[cfg(test)]
pub(crate) mod tests;
mod tokenizer;
mod transfer;

pub(crate) use faults::Faults;
pub(crate) use server::MockEngine;

use anyhow::Context;
use kvlane_engine::wire::Form;
use kvlane_engine::{EngineConfig, Timing};
use kvlane_index::BlockSize;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Arguments of `kvlane mock-engine`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
While it runs, POST /mock/faults with a JSON object (drop, duplicate, reorder, delay_ms, die_mid_stream, slow, seed)
replaces the faults, and POST /mock/restart with {\"down_ms\": 500} kills it and starts it again on the same ports, with
an empty cache and sequence numbers from 0.

Example: a small cache, every tenth event lost
  kvlane mock-engine --listen 127.0.0.1:8001 --blocks 512 --fault-drop 0.1")]
pub(crate) struct Args {
    /// Where to listen for HTTP; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDR")]
    listen: SocketAddr,

    /// Name of the served model.
    #[arg(long, default_value = "mock", value_name = "NAME")]
    model: String,

    /// Name of a LoRA adapter to serve as a model of its own; repeat for more.
    #[arg(long = "lora", value_name = "NAME")]
    adapters: Vec<String>,

    /// Writes a model directory (tokenizer.json, chat template) there and names it as the model's root, so that a router can
    /// tokenize by itself.
    #[arg(long, value_name = "DIR")]
    model_dir: Option<PathBuf>,

    /// Longest prompt plus answer.
    #[arg(long, default_value_t = 40_960, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_model_len: u32,

    /// Tokens in a cache block.
    #[arg(long, default_value_t = 16, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    block_size: u32,

    /// Blocks in the cache of each data-parallel rank; one of them is a placeholder, as in vLLM.
    #[arg(long, default_value_t = 8_192, value_name = "BLOCKS", value_parser = clap::value_parser!(u32).range(2..))]
    blocks: u32,

    /// Blocks of host memory beside each rank's cache, to which blocks are offloaded; 0 = none.
    #[arg(long, default_value_t = 0, value_name = "BLOCKS")]
    host_blocks: u32,

    /// Data-parallel ranks: each has a cache, an event publisher and a replay socket of its own.
    #[arg(long, default_value_t = 1, value_name = "RANKS", value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,

    /// Requests that a rank computes at once; more wait.
    #[arg(long, default_value_t = 256, value_name = "REQUESTS", value_parser = clap::value_parser!(u32).range(1..))]
    max_running: u32,

    /// Tokens that a rank computes in one step.
    #[arg(long, default_value_t = 8_192, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    step_tokens: u32,

    /// How much faster than the engine that was measured (an 8B model on an H200): 2 halves every time, 0 takes none.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    speed: f64,

    /// Publishes no cache events.
    #[arg(long)]
    no_events: bool,

    /// Port of the event socket of rank 0; rank r uses the r-th after it. 0 takes free ones.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    events_port: u16,

    /// Port of the replay socket of rank 0; rank r uses the r-th after it. 0 takes free ones.
    #[arg(long, default_value_t = 0, value_name = "PORT")]
    replay_port: u16,

    /// Topic of the events.
    #[arg(long, default_value = "", value_name = "TOPIC")]
    topic: String,

    /// Batches of events kept for replay.
    #[arg(long, default_value_t = 10_000, value_name = "BATCHES")]
    buffer_steps: usize,

    /// How events are written.
    #[arg(long, default_value = "vllm-map", value_name = "FORM")]
    event_form: EventForm,

    /// Hides /kv_event_sources, as engines before vLLM 0.28 have none.
    #[arg(long)]
    no_event_sources: bool,

    /// Hides `cached_tokens` from responses, as vLLM does without --enable-prompt-tokens-details.
    #[arg(long)]
    no_cached_tokens: bool,

    /// Caches no prefixes.
    #[arg(long)]
    no_prefix_caching: bool,

    /// Closes connections that are idle for this long, as the engines' server does.
    #[arg(long, default_value_t = 5, value_name = "SECONDS")]
    keep_alive: u64,

    /// Version that it claims to be.
    #[arg(long, default_value = "0.32.0", value_name = "VERSION")]
    engine_version: String,

    #[command(flatten)]
    faults: Faults,
}

/// How events are written.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum EventForm {
    /// vLLM 0.24 and newer.
    VllmMap,
    /// vLLM 0.23.
    VllmArray,
    /// SGLang 0.5.20 and newer.
    SglangMap,
}

/// What a mock engine is.
#[derive(Clone, Debug)]
pub(crate) struct Config {
    pub(crate) listen: SocketAddr,
    pub(crate) model: String,
    pub(crate) adapters: Vec<String>,
    pub(crate) model_directory: Option<PathBuf>,
    pub(crate) max_model_len: u32,
    pub(crate) ranks: u32,
    pub(crate) engine: EngineConfig,
    /// `None` = no events.
    pub(crate) events: Option<EventsConfig>,
    pub(crate) report_cached_tokens: bool,
    pub(crate) keep_alive_s: u64,
    pub(crate) version: String,
    pub(crate) faults: Faults,
}

/// How a mock engine publishes its events.
#[derive(Clone, Debug)]
pub(crate) struct EventsConfig {
    /// Of rank 0; 0 = free ones.
    pub(crate) port: u16,
    /// Of rank 0; 0 = free ones.
    pub(crate) replay_port: u16,
    pub(crate) topic: String,
    pub(crate) buffer_steps: usize,
    pub(crate) form: Form,
    /// Whether `/kv_event_sources` says so.
    pub(crate) announced: bool,
}

impl Config {
    fn block_size(&self) -> u32 {
        self.engine.block_size.tokens()
    }
}

impl From<Args> for Config {
    fn from(args: Args) -> Self {
        let form = match args.event_form {
            EventForm::VllmMap => Form::VllmMap,
            EventForm::VllmArray => Form::VLLM_0_23,
            EventForm::SglangMap => Form::SglangMap,
        };
        let events = (!args.no_events && !args.no_prefix_caching).then_some(EventsConfig {
            port: args.events_port,
            replay_port: args.replay_port,
            topic: args.topic,
            buffer_steps: args.buffer_steps.max(1),
            form,
            announced: !args.no_event_sources,
        });
        let engine = EngineConfig {
            block_size: BlockSize::new(args.block_size).expect("the argument's range begins at 1"),
            blocks: args.blocks,
            // One of the pool's blocks is a placeholder.
            host_blocks: args.host_blocks.saturating_add(1),
            max_running: args.max_running,
            step_tokens: args.step_tokens,
            prefix_caching: !args.no_prefix_caching,
            timing: Timing::h200_llama_8b().faster(args.speed),
            ..EngineConfig::h200_llama_8b()
        };
        Self {
            listen: args.listen,
            model: args.model,
            adapters: args.adapters,
            model_directory: args.model_dir,
            max_model_len: args.max_model_len,
            ranks: args.ranks,
            engine,
            events,
            report_cached_tokens: !args.no_cached_tokens,
            keep_alive_s: args.keep_alive,
            version: args.engine_version,
            faults: args.faults,
        }
    }
}

/// What the mock can be told while it runs.
#[derive(Clone, Copy, Debug)]
enum Control {
    Restart(Restart),
}

/// Body of `POST /mock/restart`.
#[derive(Clone, Copy, Debug, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Restart {
    /// Milliseconds between the two lives.
    down_ms: u64,
}

/// Runs until it is told to stop.
#[expect(clippy::print_stdout, reason = "whoever starts a mock on free ports reads them from its stdout")]
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let mut engine = MockEngine::start(Config::from(args)).await?;
    let events: Vec<_> = engine
        .events()
        .iter()
        .map(|(events, replay)| serde_json::json!({"kv-events": events, "replay": replay}))
        .collect();
    println!("{}", serde_json::json!({"url": engine.url(), "ranks": events}));
    tracing::info!(url = engine.url(), "mock engine ready");
    tokio::select! {
        stopped = tokio::signal::ctrl_c() => stopped.context("cannot wait for Ctrl-C"),
        () = terminated() => Ok(()),
        () = engine.ended() => anyhow::bail!("the mock engine could not start again"),
    }
}

/// SIGTERM.
async fn terminated() {
    match tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()) {
        Ok(mut signal) => {
            signal.recv().await;
        }
        Err(_) => std::future::pending().await,
    }
}
