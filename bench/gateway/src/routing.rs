//! What a router's choices are worth: the same trace through kvlane and its peers to the same mock engines, over real sockets.
//!
//! `kvlane replay` drives, `kvlane mock-engine` answers (a real block cache, the times of a real engine), and each run begins with empty caches and a fresh
//! router. Prompts go as chats, because the peers' cache-aware policies read text, a letter for each token of the trace, because the mock's tokens are
//! bytes. Runs of one load stand beside each other, round after round, so what disturbs the machine disturbs all. The hit rate is the engines' own count.
//! kvlane's policy `reference` stands for Dynamo's selection service: it picks as that service's selector does (`xtask bench picks`), behind our sockets.
//!
//! All processes share one machine: where `late` is more than a few milliseconds it is too small for the load, and times say little. Slower engines
//! (`--engine-speed`) and fewer requests a second ask less of it and leave the choices as hard.

use std::fmt::Write;
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
    let mut rows = Vec::new();
    for speed in &arguments.speeds {
        for round in 0..arguments.rounds {
            for turn in 0..kinds.len() {
                let kind = kinds[(round as usize + turn) % kinds.len()];
                match one(kind, *speed, round + 1, arguments, folder) {
                    Ok(figures) => rows.push(json!({
                        "router": kind.name(), "speed": speed, "round": round, "engines": arguments.engines,
                        "engine_speed": arguments.engine_speed, "figures": figures,
                    })),
                    Err(error) => println!("left out: {}: {error:#}", kind.name()),
                }
            }
        }
    }
    println!("{}", tables(&rows));
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    std::fs::write(out, lines).with_context(|| format!("cannot write {}", out.display()))
}

/// Prints the tables of rows that [`run`] wrote, here or elsewhere, and puts them into `page` between `<!-- routing -->` and `<!-- end -->`.
pub fn report(files: &[PathBuf], page: &Path) -> Result<()> {
    let mut rows: Vec<Value> = Vec::new();
    for file in files {
        let text =
            std::fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))?;
        for line in text.lines() {
            rows.push(
                serde_json::from_str(line).with_context(|| format!("{} is no result", file.display()))?,
            );
        }
    }
    let block = tables(&rows);
    println!("{block}");
    let mut text = std::fs::read_to_string(page)?;
    let open = "<!-- routing -->";
    let start = text.find(open).context("BENCHMARKS.md has no place for the routing")? + open.len();
    let end = start + text[start..].find("<!-- end -->").context("the place has no end")?;
    text.replace_range(start..end, &format!("\n{block}"));
    Ok(std::fs::write(page, text)?)
}

/// One table for each speed: medians over the rounds, least and most.
fn tables(rows: &[Value]) -> String {
    let mut out = String::new();
    let mut speeds: Vec<f64> = rows.iter().filter_map(|row| row["speed"].as_f64()).collect();
    speeds.sort_by(f64::total_cmp);
    speeds.dedup();
    for speed in speeds {
        let of_speed = || rows.iter().filter(|row| row["speed"].as_f64() == Some(speed));
        // Writing to a string does not fail.
        let _ = write!(
            out,
            "\n**{speed:.1} times the trace's pace**\n\n| router | hit rate % | TTFT p50, ms | p90 | p99 | in time % | failed | late p99, ms | runs |\n|---|---|---|---|---|---|---|---|---|\n"
        );
        for kind in ALL {
            let name = kind.name();
            let runs: Vec<&Value> =
                of_speed().filter(|row| row["router"] == *name).map(|row| &row["figures"]).collect();
            if runs.is_empty() {
                continue;
            }
            let cell = |of: &dyn Fn(&Value) -> f64| spread(runs.iter().map(|run| of(run)).collect());
            let number = |value: &Value| value.as_f64().unwrap_or(f64::NAN);
            let _ = writeln!(
                out,
                "| {name} | {} | {} | {} | {} | {} | {} | {} | {} |",
                cell(&|v| number(&v["hit_rate"]) * 100.0),
                cell(&|v| number(&v["first_token_ms"]["p50"])),
                cell(&|v| number(&v["first_token_ms"]["p90"])),
                cell(&|v| number(&v["first_token_ms"]["p99"])),
                cell(&|v| number(&v["in_time"]) * 100.0),
                cell(&|v| number(&v["requests"]) - number(&v["answered"])),
                cell(&|v| number(&v["late_ms"]["p99"])),
                runs.len(),
            );
        }
    }
    out
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
            "--model",
            "mock",
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
    let median = f64::midpoint(values[(values.len() - 1) / 2], values[values.len() / 2]);
    if values.len() == 1 { format!("{median:.1}") } else { format!("{median:.1} ({least:.1}–{most:.1})") }
}
