//! What a router's choices are worth: the same trace through kvlane and its peers to the same mock engines, over real sockets.
//!
//! `kvlane replay` drives, `kvlane mock-engine` answers (a real block cache, the times of a real engine), and each run begins with empty caches and a fresh
//! router. Prompts go as chats, because the peers' cache-aware policies read text, a letter for each token of the trace, because the mock's tokens are
//! bytes. Runs of one load stand beside each other, round after round, so what disturbs the machine disturbs all. The hit rate is the engines' own count.
//! kvlane's policy `reference` stands for Dynamo's selection service: it picks as that service's selector does (`xtask bench picks`), behind our sockets.
//!
//! All processes share one machine: where `late` is more than a few milliseconds it is too small for the load, and times say little. Slower engines
//! (`--engine-speed`) and fewer requests a second ask less of it and leave the choices as hard.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::routers::{Folder, Kind, Router};

/// Until an engine answers.
const START_MAX: Duration = Duration::from_secs(30);

/// Who is measured.
pub const ALL: [Kind; 5] = [
    Kind::KvlaneSelf("kv"),
    Kind::KvlaneSelf("reference"),
    Kind::KvlaneSelf("round-robin"),
    Kind::Smg("cache_aware"),
    Kind::Sglang("cache_aware"),
];

/// What is measured.
#[derive(clap::Args)]
pub struct Arguments {
    /// The binary to measure and to drive with.
    #[arg(long)]
    pub kvlane: PathBuf,
    /// Where peers are installed and logs are written.
    #[arg(long)]
    pub folder: PathBuf,
    /// Where every run's figures go, as JSON lines [default: bench/gateway/results/routing.jsonl].
    #[arg(long)]
    pub out: Option<PathBuf>,
    /// Only routers whose name contains one of these, by commas.
    #[arg(long, value_delimiter = ',')]
    only: Vec<String>,
    /// Interleaved rounds of each load, each with a seed of its own.
    #[arg(long, default_value_t = 3)]
    rounds: u64,
    /// Engines.
    #[arg(long, default_value_t = 4)]
    engines: usize,
    /// Cache blocks of 16 tokens in each engine.
    #[arg(long, default_value_t = 4_096)]
    blocks: u32,
    /// How many times as fast as measured the engines are.
    #[arg(long, default_value_t = 1.0)]
    engine_speed: f64,
    /// Longest prompt plus answer, in tokens.
    #[arg(long, default_value_t = 140_000)]
    max_model_len: u32,
    /// How many times as fast as recorded requests come: one load each.
    #[arg(long, value_delimiter = ',', default_value = "1,1.4")]
    speeds: Vec<f64>,
    /// Further options of `kvlane replay`: a trace, or `--generate NATURE --requests N --rate R`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    replay: Vec<String>,
}

/// Processes that end with this.
struct Engines(Vec<Child>, Vec<u16>);

impl Drop for Engines {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

impl Engines {
    fn start(arguments: &Arguments, folder: &Folder) -> Result<Self> {
        let mut it = Self(Vec::new(), Vec::new());
        for number in 0..arguments.engines {
            let port = crate::free_port()?;
            let log = folder.log(&format!("routing-engine-{number}"))?;
            let child = Command::new(&arguments.kvlane)
                .args(["--log", "warn", "mock-engine", "--listen", &format!("127.0.0.1:{port}")])
                .args(["--blocks", &arguments.blocks.to_string()])
                .args(["--speed", &arguments.engine_speed.to_string()])
                .args(["--max-model-len", &arguments.max_model_len.to_string()])
                .arg("--model-dir")
                .arg(folder.0.join("routing-model"))
                .stdin(Stdio::null())
                .stdout(log.try_clone()?)
                .stderr(log)
                .spawn()
                .context("could not start a mock engine")?;
            it.0.push(child);
            it.1.push(port);
        }
        let began = Instant::now();
        for port in &it.1 {
            while std::net::TcpStream::connect(("127.0.0.1", *port)).is_err() {
                ensure!(
                    began.elapsed() < START_MAX,
                    "a mock engine does not listen; see {}/logs",
                    folder.0.display()
                );
                std::thread::sleep(Duration::from_millis(20));
            }
        }
        Ok(it)
    }
}

/// Measures and prints; every run's figures go to `out` as JSON lines.
pub fn run(arguments: &Arguments, folder: &Folder, out: &Path) -> Result<()> {
    folder.install()?;
    let chosen = |kind: &Kind| {
        arguments.only.is_empty() || arguments.only.iter().any(|part| kind.name().contains(part))
    };
    let kinds: Vec<Kind> = ALL.into_iter().filter(chosen).collect();
    ensure!(!kinds.is_empty(), "--only names none of {}", ALL.map(Kind::name).join(", "));
    let mut lines = Vec::new();
    for speed in &arguments.speeds {
        let mut results: Vec<Vec<Value>> = vec![Vec::new(); kinds.len()];
        for round in 0..arguments.rounds {
            for turn in 0..kinds.len() {
                let at = (round as usize + turn) % kinds.len();
                match one(kinds[at], *speed, round + 1, arguments, folder) {
                    Ok(figures) => {
                        let mut line = json!({ "router": kinds[at].name(), "speed": speed, "round": round });
                        line["figures"] = figures.clone();
                        lines.push(line.to_string());
                        results[at].push(figures);
                    }
                    Err(error) => println!("left out: {}: {error:#}", kinds[at].name()),
                }
            }
        }
        println!(
            "\n{} engines, {} times the trace's pace; medians of {} rounds (least to most)\n",
            arguments.engines, speed, arguments.rounds
        );
        println!("| router | hit rate % | TTFT p50, ms | TTFT p99, ms | in time % | failed | late p99, ms |");
        println!("|---|---|---|---|---|---|---|");
        for (kind, runs) in kinds.iter().zip(&results) {
            if runs.is_empty() {
                continue;
            }
            let cell = |of: &dyn Fn(&Value) -> f64| spread(runs.iter().map(of).collect());
            let failed =
                |v: &Value| v["requests"].as_f64().unwrap_or(0.0) - v["answered"].as_f64().unwrap_or(0.0);
            println!(
                "| {} | {} | {} | {} | {} | {} | {} |",
                kind.name(),
                cell(&|v| v["hit_rate"].as_f64().unwrap_or(0.0) * 100.0),
                cell(&|v| v["first_token_ms"]["p50"].as_f64().unwrap_or(f64::NAN)),
                cell(&|v| v["first_token_ms"]["p99"].as_f64().unwrap_or(f64::NAN)),
                cell(&|v| v["in_time"].as_f64().unwrap_or(0.0) * 100.0),
                cell(&failed),
                cell(&|v| v["late_ms"]["p99"].as_f64().unwrap_or(f64::NAN)),
            );
        }
    }
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(out, lines.join("\n") + "\n").with_context(|| format!("cannot write {}", out.display()))
}

fn one(kind: Kind, speed: f64, seed: u64, arguments: &Arguments, folder: &Folder) -> Result<Value> {
    let engines = Engines::start(arguments, folder)?;
    let router = Router::start(
        kind,
        [crate::free_port()?, crate::free_port()?],
        &engines.1,
        folder,
        &arguments.kvlane,
    )?;
    let output = Command::new(&arguments.kvlane)
        .args(["--log", "warn", "replay", &format!("http://{}", router.address)])
        .args([
            "--form",
            "letters",
            "--json",
            "-",
            "--speed",
            &speed.to_string(),
            "--seed",
            &seed.to_string(),
        ])
        .args(&arguments.replay)
        .stdin(Stdio::null())
        .output()
        .context("could not start kvlane replay")?;
    if !output.status.success() {
        bail!("kvlane replay: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    drop(router);
    drop(engines);
    serde_json::from_slice(&output.stdout).context("kvlane replay printed no JSON")
}

/// `median (least–most)`.
fn spread(mut values: Vec<f64>) -> String {
    values.sort_by(f64::total_cmp);
    let (Some(least), Some(most)) = (values.first(), values.last()) else { return String::new() };
    let median = values[values.len() / 2];
    if values.len() == 1 { format!("{median:.1}") } else { format!("{median:.1} ({least:.1}–{most:.1})") }
}
