//! What a router costs: kvlane, its peers and nginx in front of an engine without delay.
//!
//! `gateway-bench run` installs the peers into a folder of its own, starts all routers before the same two engines, and gives each of
//! them each workload in turn, round after round: what disturbs one round disturbs all. CPU time comes from `/proc`. `direct` is
//! the engine without a router; what a router *adds* is its latency less that of `direct` in the same round.

mod engine;
mod http1;
mod load;
mod prompts;
mod report;
mod routers;
mod routing;
mod sheet;
mod soak;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use load::Cell;
use prompts::{Kind, Seeds, Words};
use routers::{Folder, Router};
use sheet::{Row, Sheet};

/// What a router costs.
#[derive(Parser)]
enum Arguments {
    /// Measure; then the report.
    Run {
        /// Few cells, few rounds.
        #[arg(long)]
        quick: bool,
        /// Interleaved rounds.
        #[arg(long, default_value_t = 5)]
        rounds: usize,
        /// Measured time of each router, cell and round, in ms; warm-up is half of it before the first round.
        #[arg(long, default_value_t = 1_000)]
        time_ms: u64,
        /// Only routers whose name contains one of these, by commas; `direct` always runs.
        #[arg(long, value_delimiter = ',')]
        only: Vec<String>,
        /// Only cells whose name contains one of these, by commas (such as `8192 growing`).
        #[arg(long, value_delimiter = ',')]
        cells: Vec<String>,
        /// The binary to measure.
        #[arg(long)]
        kvlane: PathBuf,
        /// Where peers are installed and logs are written.
        #[arg(long)]
        folder: PathBuf,
        /// The project's folder: its documents are the prompts' words, and the rows go below it. On another machine than the one that
        /// built this, it must be named.
        #[arg(long, default_value = ROOT)]
        root: PathBuf,
    },
    /// The mock engine.
    Engine {
        /// Ports, 0 for any.
        #[arg(long, value_delimiter = ',', default_value = "0,0")]
        ports: Vec<u16>,
        /// Answer `/tokenize`.
        #[arg(long)]
        tokenizes: bool,
    },
    /// Streams whose clients leave at random: does anything stay behind?
    Soak {
        /// The binary to soak.
        #[arg(long)]
        kvlane: PathBuf,
        /// Where its log is written.
        #[arg(long)]
        folder: PathBuf,
        /// Clients at a time.
        #[arg(long, default_value_t = 512)]
        clients: u64,
        /// How long.
        #[arg(long, default_value_t = 600)]
        seconds: u64,
    },
    /// One trace through kvlane and its peers to mock engines with real caches: hit rates and times to first token.
    Routing(routing::Arguments),
    /// Tables of routing in BENCHMARKS.md from rows that were measured here or elsewhere.
    RoutingReport {
        /// Files of rows.
        #[arg(required = true)]
        rows: Vec<PathBuf>,
        /// Where they go.
        #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../../BENCHMARKS.md"))]
        page: PathBuf,
    },
    /// Tables of BENCHMARKS.md from the rows.
    Report {
        /// Files of rows, if the parts of the grid were measured at once, by commas; they become one.
        #[arg(long, value_delimiter = ',')]
        join: Vec<PathBuf>,
        /// The commit that was measured, where the machine that measured did not know.
        #[arg(long)]
        commit: Option<String>,
    },
}

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");

fn main() -> Result<()> {
    match Arguments::parse() {
        Arguments::Run { quick, rounds, time_ms, only, cells, kvlane, folder, root } => {
            let chosen = |kind: &routers::Kind| {
                *kind == routers::Kind::Direct
                    || only.is_empty()
                    || only.iter().any(|part| kind.name().contains(part))
            };
            let kinds: Vec<_> = routers::ALL.into_iter().filter(chosen).collect();
            let rounds = if quick { rounds.min(2) } else { rounds };
            let grid: Vec<Cell> = grid(quick)
                .into_iter()
                .filter(|cell| cells.is_empty() || cells.iter().any(|part| name(cell).contains(part)))
                .collect();
            let time = Duration::from_millis(time_ms);
            let folder = Folder(std::path::absolute(folder)?);
            // A part of the table is for whoever asked for it.
            let part = quick || !only.is_empty() || !cells.is_empty();
            let rows = results(&root).join(if part { "quick.jsonl" } else { "gateway.jsonl" });
            measure(&kinds, &grid, Sheet::begin(&root, rounds, time), &rows, &kvlane, &folder, &root)?;
            if part { Ok(()) } else { report::run(&root, &results(&root)) }
        }
        Arguments::Engine { ports, tokenizes } => runtime()?.block_on(engine::run(&ports, tokenizes)),
        Arguments::Soak { kvlane, folder, clients, seconds } => {
            let folder = Folder(std::path::absolute(folder)?);
            std::fs::create_dir_all(folder.0.join("logs"))?;
            soak::run(&kvlane, &folder, clients, Duration::from_secs(seconds))
        }
        Arguments::Routing(arguments) => {
            let folder = Folder(std::path::absolute(&arguments.folder)?);
            let out = arguments.out.clone().unwrap_or_else(|| results(Path::new(ROOT)).join("routing.jsonl"));
            routing::run(&arguments, &folder, &out)
        }
        Arguments::Report { join, commit } => {
            let (root, results) = (Path::new(ROOT), results(Path::new(ROOT)));
            if !join.is_empty() {
                sheet::join(&join, commit.as_deref(), &results.join("gateway.jsonl"))?;
            }
            report::run(root, &results)
        }
        Arguments::RoutingReport { rows, page } => routing::report(&rows, &page),
    }
}

fn results(root: &Path) -> PathBuf {
    root.join("bench/gateway/results")
}

fn runtime() -> Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

/// A cell's name: `8192 growing stream 64`.
fn name(cell: &Cell) -> String {
    let answer = if cell.streams { "stream" } else { "whole" };
    format!("{} {} {answer} {}", cell.tokens, cell.kind.name(), cell.clients)
}

fn grid(quick: bool) -> Vec<Cell> {
    let mut cells = Vec::new();
    let mut add = |tokens, kind, streams, clients: &[usize]| {
        cells.extend(clients.iter().map(|&clients| Cell { tokens, kind, streams, clients }));
    };
    if quick {
        add(50, Kind::Cold, false, &[1, 64]);
        add(8_192, Kind::Growing, true, &[1, 64]);
        return cells;
    }
    for kind in [Kind::Cold, Kind::Growing, Kind::Hot] {
        for streams in [false, true] {
            add(50, kind, streams, &[1, 64, 512]);
            add(8_192, kind, streams, &[1, 64, 512]);
            // 512 bodies of 600 kB at a time would measure the machine's memory.
            add(100_000, kind, streams, &[1, 64]);
        }
    }
    cells
}

/// A port that was free a moment ago, for programs that cannot be told to take any.
fn free_port() -> Result<u16> {
    Ok(std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?.port())
}

/// Mock engines in a process of their own.
struct Engines {
    child: Child,
    ports: Vec<u16>,
}

impl Engines {
    fn start(tokenizes: bool) -> Result<Self> {
        use std::io::{BufRead, BufReader};
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("engine");
        if tokenizes {
            command.arg("--tokenizes");
        }
        let mut child = command.stdout(Stdio::piped()).spawn()?;
        let mut ports = Vec::new();
        for line in BufReader::new(child.stdout.take().context("piped above")?).lines() {
            match line?.as_str() {
                "ready" => return Ok(Self { child, ports }),
                port => ports.push(port.parse()?),
            }
        }
        anyhow::bail!("the mock engine ended before it was ready")
    }
}

impl Drop for Engines {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn measure(
    kinds: &[routers::Kind],
    grid: &[Cell],
    mut sheet: Sheet,
    rows_file: &Path,
    kvlane: &Path,
    folder: &Folder,
    root: &Path,
) -> Result<()> {
    folder.install()?;
    let words = Words::read(root);
    let (plain, tokenizing) = (Engines::start(false)?, Engines::start(true)?);
    let (rounds, time) = (sheet.rounds(), sheet.time());
    let mut routers = Vec::new();
    for kind in kinds {
        let engines = if kind.asks_tokenize() { &tokenizing } else { &plain };
        match Router::start(*kind, [free_port()?, free_port()?], &engines.ports, folder, kvlane) {
            Ok(router) => routers.push(router),
            Err(error) => println!("left out: {error:#}"),
        }
    }
    let runtime = runtime()?;
    let mut fresh = 0;
    for (number, cell) in grid.iter().enumerate() {
        let mut rows: Vec<Vec<Row>> = routers.iter().map(|_| Vec::new()).collect();
        for round in 0..rounds {
            for turn in 0..routers.len() {
                let at = (round + turn) % routers.len();
                let router = &routers[at];
                let known = (number * routers.len() + at) as u64 + 1_000_000_000;
                let mut load = |time| {
                    fresh += 1;
                    runtime.block_on(load::run(router.address, *cell, &words, Seeds { known, fresh }, time))
                };
                if round == 0 {
                    load(time / 2);
                }
                let (cpu, machine) = (router.cpu_ns(), sheet::machine_cpu());
                let own = sheet::own_cpu_ns(&[plain.child.id(), tokenizing.child.id()]);
                let seen = load(time);
                let cpu = router.cpu_ns().saturating_sub(cpu);
                let own = sheet::own_cpu_ns(&[plain.child.id(), tokenizing.child.id()]) - own + cpu;
                let foreign = machine.foreign_share(&sheet::machine_cpu(), own);
                rows[at].push(Row::of(*cell, router, seen, cpu, foreign));
            }
        }
        for row in rows {
            sheet.add(row);
        }
        // Whatever ends the run, what was measured until then stays.
        sheet.write(rows_file)?;
    }
    Ok(())
}
