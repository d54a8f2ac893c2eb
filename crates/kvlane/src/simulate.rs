//! `kvlane simulate`: what routing policies would do with a trace, without a GPU.
//!
//! Every (workers, speed, policy, seed) is a run of its own and deterministic; they are spread over the machine's cores and put back in order, so
//! the output does not depend on the machine.

use crate::source::{Source, parse_at, parse_positive};
use anyhow::{Context, bail};
use kvlane_sched::Policy;
use kvlane_sched::policy::NAMES;
use kvlane_sim::bounds::bounds;
use kvlane_sim::fleet::{self, FleetConfig, Incident, What};
use kvlane_sim::report::{self, Cell, Comparison, Curves};
use kvlane_sim::trace::{Start, Trace};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Arguments of `kvlane simulate`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    source: Source,

    /// Sizes of the fleet to compare.
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "8", value_parser = clap::value_parser!(u32).range(1..=4_096))]
    workers: Vec<u32>,

    /// Policies to compare; NAME@SECONDS keeps predicted placements for so long (`reference` has none by default).
    #[arg(long, visible_alias = "policy", value_name = "NAME,...", value_delimiter = ',', num_args = 0.., default_missing_value = DEFAULT_POLICIES, default_value = DEFAULT_POLICIES)]
    compare: Vec<Contender>,

    /// How many times as fast as recorded requests come; several are compared.
    #[arg(long, value_name = "X,...", value_delimiter = ',', default_value = "1", value_parser = parse_positive)]
    speed: Vec<f64>,

    /// Cache blocks of 16 tokens of each worker (default: as calibrated).
    #[arg(long, value_name = "BLOCKS", value_parser = clap::value_parser!(u32).range(64..))]
    kv_blocks: Option<u32>,

    /// How many times as fast as calibrated the engines are.
    #[arg(long, value_name = "X", default_value_t = 1.0, value_parser = parse_positive)]
    engine_speed: f64,

    /// A worker dies at a second of the run: its cache is lost, what ran there starts again elsewhere. Repeat for more.
    #[arg(long, value_name = "WORKER@SECOND", value_parser = parse_at)]
    dies: Vec<(u32, f64)>,

    /// A worker comes at a second of the run, with an empty cache; it was not there before. Repeat for more.
    #[arg(long, value_name = "WORKER@SECOND", value_parser = parse_at)]
    joins: Vec<(u32, f64)>,

    /// A worker is so many times as fast as the others (0.5: half as fast). Repeat for more.
    #[arg(long, value_name = "WORKER@X", value_parser = parse_at)]
    paced: Vec<(u32, f64)>,

    /// Runs of each cell, with seeds from --seed on.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=1_000))]
    seeds: u64,

    /// A first token within this time counts as in time.
    #[arg(long, value_name = "MS", default_value_t = 2_000.0)]
    ttft_target: f64,

    /// Write every figure as JSON to this file (`-`: to stdout, instead of the table).
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Write a page with tables and plots to this file.
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
}

const DEFAULT_POLICIES: &str = "kv,reference,sticky-session,least-loaded,round-robin";

/// How long predicted placements are kept unless said otherwise, in microseconds.
const PREDICT_US: u64 = 30_000_000;

/// A policy with its predicted placements.
#[derive(Clone, Debug)]
struct Contender {
    name: String,
    policy: &'static str,
    predict_us: u64,
}

impl std::str::FromStr for Contender {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, seconds) = text.split_once('@').map_or((text, None), |(n, s)| (n, Some(s)));
        let policy = NAMES
            .iter()
            .find(|n| **n == name)
            .ok_or_else(|| format!("no policy is called {name:?}; there are {}", NAMES.join(", ")))?;
        let predict_us = match seconds {
            Some(s) => (parse_positive(s)? * 1e6) as u64,
            None if *policy == "reference" => 0,
            None => PREDICT_US,
        };
        Ok(Self { name: text.to_owned(), policy, predict_us })
    }
}

/// Runs everything that was asked for and writes the reports.
pub(crate) fn run(args: &Args) -> anyhow::Result<()> {
    args.check_incidents()?;
    let base = args.source.load()?;
    let comparison = compare(args, &base);
    if let Some(path) = &args.html {
        write(path, &report::html(&comparison))?;
    }
    if let Some(path) = &args.json {
        write(path, &report::json(&comparison))?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        write(Path::new("-"), &report::text(&comparison))?;
    }
    Ok(())
}

impl Args {
    /// Whether what happens to workers happens to some that are there, and leaves one.
    fn check_incidents(&self) -> anyhow::Result<()> {
        let fewest = self.workers.iter().copied().min().unwrap_or(1);
        let all = || self.dies.iter().chain(&self.joins).chain(&self.paced);
        if let Some((worker, _)) = all().find(|(worker, _)| *worker >= fewest) {
            bail!("there is no worker {worker} in a fleet of {fewest}: they are counted from 0");
        }
        let untouched = |worker: &u32| !self.dies.iter().chain(&self.joins).any(|(w, _)| w == worker);
        if !(0..fewest).any(|worker| untouched(&worker)) {
            bail!("--dies and --joins must leave a worker that is there all the time");
        }
        if let Some((worker, _)) = self.paced.iter().find(|(_, pace)| *pace <= 0.0) {
            bail!("--paced {worker}@0: it must be above 0");
        }
        Ok(())
    }

    fn befall(&self, config: &mut FleetConfig) {
        for (what, list) in [(What::Dies, &self.dies), (What::Joins, &self.joins)] {
            config.incidents.extend(list.iter().map(|(worker, second)| Incident {
                at_us: (second * 1e6) as u64,
                worker: *worker,
                what,
            }));
        }
        for (worker, pace) in &self.paced {
            config.speeds.resize(config.speeds.len().max(*worker as usize + 1), 1.0);
            config.speeds[*worker as usize] = *pace;
        }
    }
}

fn compare(args: &Args, base: &Trace) -> Comparison {
    let shape = |speed: f64| args.source.shape(speed);
    let first_seed = args.source.seed;
    let seeds: Vec<u64> = (first_seed..first_seed.saturating_add(args.seeds)).collect();
    let fleet = |workers: u32, seed: u64, predict_us: u64| {
        let mut config = FleetConfig::new(workers);
        config.seed = seed;
        config.predict_us = predict_us;
        config.engine.blocks = args.kv_blocks.unwrap_or(config.engine.blocks);
        config.engine.timing = config.engine.timing.faster(args.engine_speed);
        args.befall(&mut config);
        config
    };

    // Jobs in the order of the report; a cell's seeds follow each other.
    let mut jobs = Vec::new();
    for &workers in &args.workers {
        for &speed in &args.speed {
            for contender in &args.compare {
                for &seed in &seeds {
                    jobs.push((workers, speed, contender, seed));
                }
            }
        }
    }
    let next = AtomicUsize::new(0);
    let results = Mutex::new((0..jobs.len()).map(|_| None).collect::<Vec<_>>());
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(jobs.len().max(1));
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                while let Some((workers, speed, contender, seed)) =
                    jobs.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let trace = shape(*speed).apply(base, *seed);
                    let config = fleet(*workers, *seed, contender.predict_us);
                    let policy: Box<dyn Policy> =
                        contender.policy.parse().expect("contenders name policies that exist");
                    let outcome = fleet::run(&trace, &config, policy);
                    let lengths: Vec<u32> = trace.requests.iter().map(|r| r.input_tokens).collect();
                    let summary = outcome.summary(&lengths, args.ttft_target);
                    let curves = (*seed == first_seed).then(|| Curves::of(&trace, &outcome));
                    let place = jobs.iter().position(|j| {
                        (j.0, j.1, &j.2.name, j.3) == (*workers, *speed, &contender.name, *seed)
                    });
                    let mut results = results.lock().expect("no run panics while it holds the results");
                    results[place.expect("the job is one of the jobs")] = Some((summary, curves));
                    tracing::debug!(workers, speed, policy = contender.name, seed, "simulated");
                }
            });
        }
    });

    let mut results =
        results.into_inner().expect("no run panics while it holds the results").into_iter().flatten();
    let mut cells = Vec::new();
    for &workers in &args.workers {
        for &speed in &args.speed {
            for contender in &args.compare {
                let mut cell = Cell {
                    workers,
                    speed,
                    policy: contender.name.clone(),
                    runs: Vec::new(),
                    curves: Curves::default(),
                };
                for (summary, curves) in results.by_ref().take(seeds.len()) {
                    cell.runs.push(summary);
                    cell.curves = curves.unwrap_or(cell.curves);
                }
                cells.push(cell);
            }
        }
    }
    let shaped = shape(1.0).apply(base, first_seed);
    let pool = |workers: u32| u64::from(workers) * fleet(workers, first_seed, 0).cache_tokens();
    Comparison {
        trace: shaped.name.clone(),
        requests: shaped.requests.len(),
        input_tokens: shaped.input_tokens(),
        block_tokens: shaped.block_tokens,
        closed_loop: shaped.requests.iter().any(|r| matches!(r.start, Start::AfterMs(_))),
        ttft_target_ms: args.ttft_target,
        seeds,
        bounds: args
            .workers
            .iter()
            .map(|w| (*w, bounds(&shaped, &fleet(*w, first_seed, 0).engine, pool(*w))))
            .collect(),
        cells,
    }
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    if path == Path::new("-") {
        let mut out = std::io::stdout().lock();
        match out.write_all(text.as_bytes()) {
            // A reader such as `head` that has seen enough.
            Err(e) if e.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
            other => other.context("cannot write to stdout"),
        }
    } else {
        if path.is_dir() {
            bail!("{} is a directory: name a file", path.display());
        }
        std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
    }
}
