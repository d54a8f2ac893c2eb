//! `kvlane mock-engine`: one engine's outside (vLLM's HTTP, cache events over ZMQ) around the model of its inside
//! (`kvlane-engine`).
//!
//! It exists so that a router can be tried, tested and measured where no GPU is: the cache is real (block by block, as
//! vLLM evicts), the times are those measured on a real engine, only the text is made up.

use std::net::SocketAddr;

/// Arguments of `kvlane mock-engine`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen for HTTP; port 0 takes a free one and prints it.
    #[arg(long, default_value = "127.0.0.1:8000", value_name = "ADDR")]
    listen: SocketAddr,

    /// Name of the served model.
    #[arg(long, default_value = "mock", value_name = "NAME")]
    model: String,

    /// Tokens in a cache block.
    #[arg(long, default_value_t = 16, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    block_size: u32,

    /// Blocks in the cache of each data-parallel rank.
    #[arg(long, default_value_t = 8192, value_name = "BLOCKS", value_parser = clap::value_parser!(u32).range(2..))]
    blocks: u32,

    /// Data-parallel ranks: each has a cache, an event publisher and a replay socket of its own.
    #[arg(long, default_value_t = 1, value_name = "RANKS", value_parser = clap::value_parser!(u32).range(1..=64))]
    ranks: u32,

    /// Requests that a rank computes at once; more wait.
    #[arg(long, default_value_t = 256, value_name = "REQUESTS", value_parser = clap::value_parser!(u32).range(1..))]
    max_running: u32,

    /// Longest prompt plus answer.
    #[arg(long, default_value_t = 40_960, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..))]
    max_model_len: u32,

    /// How much faster than the measured engine (an H200 with an 8B model): 2 halves every time, 0 takes no time at all.
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR")]
    speed: f64,
}

/// Runs until it is told to stop.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args { listen, .. } = args;
    anyhow::bail!("cannot listen on {listen}: the mock engine has no sockets yet")
}
