//! Where requests come from for whoever plays them: a recorded trace or made-up traffic, and how it is reshaped.

use anyhow::Context;
use kvlane_sim::trace::{self, Format, Nature, PromptMode, ReadOptions, Shape, Trace};
use std::fs::File;
use std::io::BufReader;
use std::path::PathBuf;

/// The arguments about the trace, common to `simulate` and `replay`.
#[derive(Debug, clap::Args)]
pub(crate) struct Source {
    /// Trace to read: Mooncake, Bailian or Weka JSON lines, or Azure CSV; plain or .gz. Without one, see --generate.
    trace: Option<PathBuf>,

    /// Traffic to make up where no trace is given: shared-prompts, multi-turn, hot-prefixes or no-reuse.
    #[arg(long, value_name = "NATURE", default_value = "multi-turn", conflicts_with = "trace")]
    generate: Nature,

    /// Requests to make up.
    #[arg(long, value_name = "N", default_value_t = 5_000, conflicts_with = "trace")]
    requests: u32,

    /// Requests per second to make up (before --speed).
    #[arg(long, value_name = "R", default_value_t = 20.0, conflicts_with = "trace")]
    rate: f64,

    /// Format of the trace, where its first line does not tell: mooncake, bailian, azure or weka.
    #[arg(long, value_parser = parse_format)]
    format: Option<Format>,

    /// Tokens in a block of the trace, where the format does not say (Mooncake's own files: 512).
    #[arg(long, value_name = "TOKENS", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    block_size: Option<u32>,

    /// What later rows of a session hold: the whole prompt, or only what is new (delta).
    #[arg(long, value_parser = parse_prompt_mode, default_value = "whole")]
    prompt_mode: PromptMode,

    /// Spread arrivals over this many milliseconds from their time (Mooncake's conversation trace comes in batches of 3000).
    #[arg(long, value_name = "MS", default_value_t = 0.0)]
    spread: f64,

    /// Repeat the trace so often at once, with prompts that share nothing between copies.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1_024))]
    copies: u32,

    /// Leave out requests that start before this second of the trace.
    #[arg(long, value_name = "SECONDS", default_value_t = 0.0)]
    start: f64,

    /// Leave out requests that start from this second on.
    #[arg(long, value_name = "SECONDS")]
    end: Option<f64>,

    /// Leave out prompts of more tokens.
    #[arg(long, value_name = "TOKENS")]
    max_input: Option<u32>,

    /// Longest pause inside a session, in seconds.
    #[arg(long, value_name = "SECONDS")]
    think_cap: Option<f64>,

    /// A burst: so many requests more that begin with one prefix of 8,192 tokens, within a second.
    #[arg(long, value_name = "REQUESTS@SECOND", value_parser = parse_burst)]
    burst: Option<(u32, f64)>,

    /// The (first) seed of everything that is drawn.
    #[arg(long, default_value_t = 1)]
    pub(crate) seed: u64,
}

impl Source {
    /// The trace as recorded or made up.
    pub(crate) fn load(&self) -> anyhow::Result<Trace> {
        let Some(path) = &self.trace else {
            return Ok(trace::generate(self.generate, self.requests.max(1), self.rate.max(1e-3), self.seed));
        };
        let file = File::open(path).with_context(|| format!("cannot open the trace {}", path.display()))?;
        let name = path.file_name().map_or_else(|| "trace".into(), |n| n.to_string_lossy());
        let options =
            ReadOptions { format: self.format, block_tokens: self.block_size, prompt_mode: self.prompt_mode };
        let trace = trace::read(&name, BufReader::new(file), &options)
            .with_context(|| format!("cannot use the trace {}", path.display()))?;
        tracing::info!(requests = trace.requests.len(), sessions = trace.sessions(), "read the trace");
        Ok(trace)
    }

    /// How the trace is reshaped to come `speed` times as fast.
    pub(crate) fn shape(&self, speed: f64) -> Shape {
        Shape {
            speed,
            spread_ms: self.spread.max(0.0),
            copies: self.copies,
            stagger_ms: if self.copies > 1 { 60_000.0 } else { 0.0 },
            window_ms: Some((self.start * 1000.0, self.end.map_or(f64::INFINITY, |s| s * 1000.0))),
            max_input_tokens: self.max_input,
            think_cap_ms: self.think_cap.map(|s| s * 1000.0),
            burst: self.burst.map(|(requests, second)| (requests, second * 1000.0)),
        }
    }
}

/// A number above 0.
pub(crate) fn parse_positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(x) if x.is_finite() && x > 0.0 => Ok(x),
        _ => Err("must be a number above 0".to_owned()),
    }
}

/// `NUMBER@NUMBER`.
pub(crate) fn parse_at(text: &str) -> Result<(u32, f64), String> {
    let parts = text.split_once('@').and_then(|(n, at)| Some((n.parse().ok()?, at.parse().ok()?)));
    parts
        .filter(|(_, at): &(u32, f64)| at.is_finite() && *at >= 0.0)
        .ok_or_else(|| "must be like 3@60".to_owned())
}

fn parse_burst(text: &str) -> Result<(u32, f64), String> {
    let burst = parse_at(text)?;
    if burst.0 <= 100_000 { Ok(burst) } else { Err("must be at most 100000 requests".to_owned()) }
}

fn parse_format(text: &str) -> Result<Format, String> {
    match text {
        "mooncake" => Ok(Format::Mooncake),
        "bailian" => Ok(Format::Bailian),
        "azure" => Ok(Format::Azure),
        "weka" => Ok(Format::Weka),
        _ => Err("must be mooncake, bailian, azure or weka".to_owned()),
    }
}

fn parse_prompt_mode(text: &str) -> Result<PromptMode, String> {
    match text {
        "whole" => Ok(PromptMode::Whole),
        "delta" => Ok(PromptMode::Delta),
        _ => Err("must be whole or delta".to_owned()),
    }
}
