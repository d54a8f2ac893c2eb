//! `kvlane replay`: a trace sent to a real endpoint, with the formats and the timing rules of `kvlane simulate`.
//!
//! So the same trace can be simulated, replayed against mock engines and replayed against real ones, and the three compared.

pub(crate) mod client;
mod drive;
mod prompts;
mod report;
#[cfg(test)]
pub(crate) mod tests;

use crate::source::{Source, parse_positive};
use anyhow::Context;
use client::Client;
use drive::{Drive, Row, drive};
use indicatif::{ProgressBar, ProgressStyle};
use prompts::{Form, Maker};
use report::Report;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Arguments of `kvlane replay`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Prompts are made up so that they share what the trace says they share. The hit rate is the server's own word (cached_tokens), so vLLM needs
--enable-prompt-tokens-details. Each request names its session in x-session-id.

Examples:
  kvlane replay http://router:8080 conversation.jsonl --speed 0.5 --end 300
  kvlane replay http://engine:8000 --generate multi-turn --requests 500 --rate 5
  kvlane replay http://router:8080 hour.jsonl --form chat --json result.json --rows rows.jsonl")]
pub(crate) struct Args {
    /// The endpoint: a router or an engine, such as http://127.0.0.1:8080.
    url: String,

    #[command(flatten)]
    source: Source,

    /// How many times as fast as recorded requests come.
    #[arg(long, value_name = "X", default_value = "1", value_parser = parse_positive)]
    speed: f64,

    /// Stop after the first so many requests of the trace.
    #[arg(long, value_name = "N")]
    first: Option<usize>,

    /// How prompts are sent.
    #[arg(long, value_name = "FORM", default_value = "completions")]
    form: Form,

    /// Name of the model [default: the first of /v1/models].
    #[arg(long, value_name = "NAME")]
    model: Option<String>,

    /// Token ids are drawn from 1000 up to below this.
    #[arg(long, value_name = "TOKENS", default_value_t = 30_000, value_parser = clap::value_parser!(u32).range(1_100..))]
    vocabulary: u32,

    /// Longest answer asked for.
    #[arg(long, value_name = "TOKENS", default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(1..))]
    max_output: u32,

    /// Let the model end its answers by itself, instead of asking for the recorded length (`ignore_eos`).
    #[arg(long)]
    natural_end: bool,

    /// Requests in flight at a time; what comes then is sent late, and counted so.
    #[arg(long, value_name = "N", default_value_t = 4_096, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    in_flight: u32,

    /// Seconds after which an answer is given up.
    #[arg(long, value_name = "SECONDS", default_value_t = 600, value_parser = clap::value_parser!(u64).range(1..))]
    timeout: u64,

    /// A first token within this time counts as in time.
    #[arg(long, value_name = "MS", default_value_t = 2_000, value_parser = clap::value_parser!(u64).range(1..))]
    ttft_target: u64,

    /// Write the figures as JSON to this file (`-`: to stdout, instead of the table).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write what came of each request as a JSON line to this file.
    #[arg(long, value_name = "FILE")]
    rows: Option<PathBuf>,
}

/// Sends everything and reports. Ctrl-C reports what there is.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let client = Client::new(&args.url)?;
    let mut trace = args.source.shape(args.speed).apply(&args.source.load()?, args.source.seed);
    if let Some(first) = args.first {
        trace.requests.truncate(first);
    }
    let requests = trace.requests.len();
    anyhow::ensure!(
        requests > 0,
        "no request of the trace is left: see --start, --end, --max-input and --first"
    );
    let model = match args.model {
        Some(model) => model,
        None => client.model().await.with_context(|| format!("cannot ask {} for its models", args.url))?,
    };
    let progress = ProgressBar::new(requests as u64).with_style(
        ProgressStyle::with_template("{elapsed_precise} {bar:40} {pos}/{len} requests {msg}")
            .context("a template of fixed text")?,
    );
    let maker = Maker {
        form: args.form,
        model,
        vocabulary: args.vocabulary,
        seed: args.source.seed,
        max_output: args.max_output,
        ignore_eos: !args.natural_end,
    };
    let plan = Drive {
        client,
        trace,
        maker,
        most: args.in_flight as usize,
        timeout: Duration::from_secs(args.timeout),
        progress: progress.clone(),
    };
    let rows: Arc<Mutex<Vec<Row>>> = Arc::default();
    let began = Instant::now();
    tokio::select! {
        () = drive(Arc::new(plan), Arc::clone(&rows)) => {}
        signal = crate::serve::told_to_stop() => signal.context("cannot listen for signals")?,
    }
    let took = began.elapsed();
    progress.finish_and_clear();
    let mut rows = std::mem::take(&mut *rows.lock().unwrap_or_else(PoisonError::into_inner));
    rows.sort_by_key(|row| row.number);
    let report = Report::new(requests, &rows, took, Duration::from_millis(args.ttft_target));
    if let Some(path) = &args.rows {
        let lines: String = rows.iter().map(|row| format!("{}\n", report::row(row))).collect();
        std::fs::write(path, lines).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let to_stdout = args.json.as_deref().is_some_and(|path| path.as_os_str() == "-");
    if let Some(path) = args.json.as_deref().filter(|_| !to_stdout) {
        let json = format!("{:#}\n", report.json());
        std::fs::write(path, json).with_context(|| format!("cannot write {}", path.display()))?;
    }
    let text = if to_stdout { format!("{:#}\n", report.json()) } else { report.text() };
    std::io::stdout().lock().write_all(text.as_bytes()).context("cannot write to stdout")
}
