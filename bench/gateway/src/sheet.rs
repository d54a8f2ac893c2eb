//! Rows of a run as JSON lines, and who else used the machine.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::load::{Cell, Seen};
use crate::routers::Router;

/// Busy and idle ticks of the cores that this process may use, since the machine started.
pub struct MachineCpu {
    busy: u64,
    all: u64,
}

/// Numbers of the cores that this process may use.
fn own_cores() -> Vec<usize> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let list = status.lines().find_map(|l| l.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let range = |part: &str| {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
    };
    list.trim().split(',').filter_map(range).flatten().collect()
}

/// From `/proc/stat`.
pub fn machine_cpu() -> MachineCpu {
    let text = std::fs::read_to_string("/proc/stat").unwrap_or_default();
    let mut sum = MachineCpu { busy: 0, all: 0 };
    for core in own_cores() {
        let name = format!("cpu{core} ");
        let Some(line) = text.lines().find_map(|l| l.strip_prefix(&name)) else { continue };
        let ticks: Vec<u64> = line.split_whitespace().filter_map(|t| t.parse().ok()).take(8).collect();
        let all: u64 = ticks.iter().sum();
        let idle = ticks.get(3).copied().unwrap_or(0) + ticks.get(4).copied().unwrap_or(0);
        sum.all += all;
        sum.busy += all - idle;
    }
    sum
}

impl MachineCpu {
    /// Share of the cores that others used until `after`, if `own_ns` were ours.
    pub fn foreign_share(&self, after: &Self, own_ns: u64) -> f64 {
        const TICK_NS: f64 = 1e7;
        let all = (after.all - self.all) as f64 * TICK_NS;
        let busy = (after.busy - self.busy) as f64 * TICK_NS;
        if all == 0.0 { 0.0 } else { ((busy - own_ns as f64) / all).clamp(0.0, 1.0) }
    }
}

/// CPU time of this process and of `others`, in ns.
pub fn own_cpu_ns(others: &[u32]) -> u64 {
    others.iter().chain([&std::process::id()]).map(|pid| cpu_ns(*pid)).sum()
}

/// CPU time so far of the threads of `pid` that live, in ns; where the kernel does not keep that, of the process in ticks of 10 ms.
pub fn cpu_ns(pid: u32) -> u64 {
    let of_thread = |task: std::fs::DirEntry| {
        let text = std::fs::read_to_string(task.path().join("schedstat")).ok()?;
        text.split_whitespace().next()?.parse::<u64>().ok()
    };
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
    let fine: Vec<u64> = tasks.filter_map(of_thread).collect();
    if !fine.is_empty() {
        return fine.into_iter().sum();
    }
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // After the name in brackets: state, parent, …; the 12th and 13th are user and system time.
    let ticks = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    ticks.filter_map(|ticks| ticks.parse::<u64>().ok()).sum::<u64>() * 10_000_000
}

/// One router in one cell in one round.
pub struct Row {
    cell: String,
    router: String,
    figures: BTreeMap<&'static str, f64>,
}

fn quantile_us(sorted: &[u64], p: f64) -> f64 {
    if sorted.is_empty() {
        f64::NAN
    } else {
        sorted[((sorted.len() - 1) as f64 * p).round() as usize] as f64 / 1e3
    }
}

impl Row {
    /// What the clients saw and what the router used.
    pub fn of(cell: Cell, router: &Router, mut seen: Seen, cpu_ns: u64, foreign: f64) -> Self {
        seen.whole_ns.sort_unstable();
        seen.first_ns.sort_unstable();
        let answered = seen.whole_ns.len() as f64;
        let figures = BTreeMap::from([
            ("requests_s", answered / seen.elapsed.as_secs_f64()),
            ("p50_us", quantile_us(&seen.whole_ns, 0.5)),
            ("p99_us", quantile_us(&seen.whole_ns, 0.99)),
            ("first_p50_us", quantile_us(&seen.first_ns, 0.5)),
            ("first_p99_us", quantile_us(&seen.first_ns, 0.99)),
            ("cpu_us", cpu_ns as f64 / 1e3 / answered.max(1.0)),
            ("resident_mb", router.resident_mb()),
            ("errors", seen.errors as f64),
            ("foreign", foreign),
        ]);
        Self { cell: crate::name(&cell), router: router.kind.name(), figures }
    }
}

/// How a run was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Machine, commit, date.
    pub machine: String,
    /// Interleaved rounds.
    pub rounds: usize,
    /// Of one router, cell and round, in ms.
    pub time_ms: u64,
}

/// Medians over the rounds, with the lowest and the highest.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Line {
    /// The cell's name.
    pub cell: String,
    /// The router's.
    pub router: String,
    /// Median, low, high by name; the name ends in the unit.
    pub figures: BTreeMap<String, [f64; 3]>,
}

/// All of a run.
pub struct Sheet {
    head: Head,
    lines: Vec<Line>,
}

fn output(program: &str, arguments: &[&str], folder: &Path) -> String {
    let output = Command::new(program).args(arguments).current_dir(folder).output();
    output.map(|o| String::from_utf8_lossy(&o.stdout).trim().to_owned()).unwrap_or_default()
}

impl Sheet {
    /// An empty one.
    pub fn begin(root: &Path, rounds: usize, time: Duration) -> Self {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = info.lines().find(|l| l.starts_with("model name")).and_then(|l| l.split_once(": "));
        let (own, all) = (own_cores().len(), info.lines().filter(|l| l.starts_with("model name")).count());
        let machine = format!(
            "{own} of {all} cores, {}; Linux {}; commit {}; {}",
            model.map_or("unknown", |(_, name)| name),
            output("uname", &["-r"], root),
            output("git", &["rev-parse", "--short", "HEAD"], root),
            output("date", &["-u", "+%Y-%m-%d %H:%M UTC"], root),
        );
        Self { head: Head { machine, rounds, time_ms: time.as_millis() as u64 }, lines: Vec::new() }
    }

    /// Interleaved rounds.
    pub fn rounds(&self) -> usize {
        self.head.rounds
    }

    /// Of one router, cell and round.
    pub fn time(&self) -> Duration {
        Duration::from_millis(self.head.time_ms)
    }

    /// One router's rounds in one cell.
    pub fn add(&mut self, rounds: Vec<Row>) {
        let Some(first) = rounds.first() else { return };
        let (cell, router) = (first.cell.clone(), first.router.clone());
        let mut figures = BTreeMap::new();
        for name in first.figures.keys() {
            let mut all: Vec<f64> = rounds.iter().map(|row| row.figures[name]).collect();
            all.retain(|v| !v.is_nan());
            all.sort_by(f64::total_cmp);
            if let (Some(low), Some(high)) = (all.first(), all.last()) {
                let median = (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0;
                figures.insert((*name).to_owned(), [median, *low, *high]);
            }
        }
        let of = |name: &str| figures.get(name).map_or(f64::NAN, |f: &[f64; 3]| f[0]);
        println!(
            "{cell:<26} {router:<26} {:>8.0} req/s  p50 {:>8.0} us  p99 {:>8.0} us  first {:>8.0} us  CPU {:>7.0} us  {:>5.0} MB  errors {}  others {:.2}",
            of("requests_s"),
            of("p50_us"),
            of("p99_us"),
            of("first_p50_us"),
            of("cpu_us"),
            of("resident_mb"),
            of("errors"),
            of("foreign")
        );
        self.lines.push(Line { cell, router, figures });
    }

    /// Writes it all.
    pub fn write(&self, path: &Path) -> Result<()> {
        std::fs::create_dir_all(path.parent().context("a file in a folder")?)?;
        let mut file = std::fs::File::create(path)?;
        writeln!(file, "{}", serde_json::to_string(&self.head)?)?;
        for line in &self.lines {
            writeln!(file, "{}", serde_json::to_string(line)?)?;
        }
        Ok(())
    }
}

/// Writes the rows of several files, which were made in the same way, as one.
pub fn join(parts: &[PathBuf], commit: Option<&str>, path: &Path) -> Result<()> {
    let mut whole: Option<Sheet> = None;
    for part in parts {
        let (head, lines) = read(part).with_context(|| part.display().to_string())?;
        let whole = whole.get_or_insert(Sheet { head: head.clone(), lines: Vec::new() });
        anyhow::ensure!(
            (head.rounds, head.time_ms) == (whole.head.rounds, whole.head.time_ms),
            "{} was made with other rounds than those before it",
            part.display()
        );
        whole.lines.extend(lines);
    }
    let mut whole = whole.context("no files")?;
    if let Some(commit) = commit {
        whole.head.machine = whole.head.machine.replace("commit ;", &format!("commit {commit};"));
    }
    whole.write(path)
}

/// Reads what [`Sheet::write`] wrote.
pub fn read(path: &Path) -> Result<(Head, Vec<Line>)> {
    let text = std::fs::read_to_string(path)?;
    let mut lines = text.lines();
    let head = serde_json::from_str(lines.next().context("an empty file")?)?;
    Ok((head, lines.map(serde_json::from_str).collect::<Result<_, _>>()?))
}
