//! Tables of BENCHMARKS.md: between `<!-- gateway -->` and `<!-- end -->`.
//!
//! One table a question, with a row for each cell and a column for each router, so that a row is one comparison. First what was aimed at, and in
//! which cells it was missed.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::sheet::{self, Line};

/// Routers that route by what caches hold, ours aside.
const AWARE: [&str; 3] = ["smg cache_aware", "vllm-router cache_aware", "sglang-router cache_aware"];
const BLIND: &str = "kvlane round-robin";
const KV: &str = "kvlane kv";

fn distinct(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut out = Vec::new();
    for one in all {
        if !out.contains(&one) {
            out.push(one);
        }
    }
    out
}

/// All rows, by cell and router.
struct Rows {
    lines: Vec<Line>,
    cells: Vec<String>,
    routers: Vec<String>,
}

impl Rows {
    fn new(lines: Vec<Line>) -> Self {
        let cells = distinct(lines.iter().map(|l| l.cell.clone()));
        let routers = distinct(lines.iter().map(|l| l.router.clone()));
        Self { lines, cells, routers }
    }

    /// The median; `None` where it was not measured.
    fn get(&self, cell: &str, router: &str, figure: &str) -> Option<f64> {
        let line = self.lines.iter().find(|l| l.cell == cell && l.router == router)?;
        line.figures.get(figure).map(|[median, ..]| *median)
    }

    /// Less what the engine itself takes, in ms.
    fn added_ms(&self, cell: &str, router: &str, figure: &str) -> Option<f64> {
        Some((self.get(cell, router, figure)? - self.get(cell, "direct", figure)?) / 1e3)
    }

    /// Of the cache-aware peers, by `better`.
    fn best_peer(&self, cell: &str, figure: &str, better: fn(f64, f64) -> f64) -> Option<f64> {
        AWARE.iter().filter_map(|peer| self.get(cell, peer, figure)).reduce(better)
    }
}

/// Rewrites the block from the rows in `results`.
pub fn run(root: &Path, results: &Path) -> Result<()> {
    let (head, lines) = sheet::read(&results.join("gateway.jsonl"))?;
    let rows = Rows::new(lines);
    let mut block = String::new();
    aims(&mut block, &rows)?;
    table(&mut block, &rows, "CPU time, µs a request (the router's own)", |cell, router| {
        (router != "direct").then(|| rows.get(cell, router, "cpu_us")).flatten().map(|us| format!("{us:.0}"))
    })?;
    table(&mut block, &rows, "Requests a second", |cell, router| {
        rows.get(cell, router, "requests_s").map(|n| format!("{n:.0}"))
    })?;
    for (title, figure) in [
        ("Latency added, p50, ms (`direct`: its own)", "p50_us"),
        ("Latency added, p99, ms (`direct`: its own)", "p99_us"),
        ("First byte of a stream, added, p50, ms (`direct`: its own)", "first_p50_us"),
    ] {
        table(&mut block, &rows, title, |cell, router| {
            if figure == "first_p50_us" && !cell.contains("stream") {
                return None;
            }
            let own = || Some(rows.get(cell, router, figure)? / 1e3);
            let ms = if router == "direct" { own() } else { rows.added_ms(cell, router, figure) };
            ms.map(|ms| format!("{ms:.2}"))
        })?;
    }
    memory(&mut block, &rows)?;
    let mut spreads: Vec<f64> = rows
        .lines
        .iter()
        .filter_map(|l| l.figures.get("cpu_us"))
        .filter(|[median, ..]| *median > 0.0)
        .map(|[median, low, high]| (high - low) / median * 50.0)
        .collect();
    spreads.sort_by(f64::total_cmp);
    let spread = spreads.get(spreads.len() / 2).copied().unwrap_or(0.0);
    let worst = spreads.last().copied().unwrap_or(0.0);
    let most = |figure: &str| {
        rows.lines.iter().filter_map(|l| l.figures.get(figure)).map(|f| f[0]).fold(0.0, f64::max)
    };
    writeln!(
        block,
        "{}. Medians of {} interleaved rounds of {} ms; half the range of the rounds' CPU time: median {spread:.0} %, worst {worst:.0} %. Others used at most {:.0} % of the cores.",
        head.machine,
        head.rounds,
        head.time_ms,
        most("foreign") * 100.0
    )?;
    let page = root.join("BENCHMARKS.md");
    let mut text = std::fs::read_to_string(&page)?;
    let open = "<!-- gateway -->";
    let start = text.find(open).context("BENCHMARKS.md has no place for the gateway")? + open.len();
    let end = start + text[start..].find("<!-- end -->").context("the place has no end")?;
    text.replace_range(start..end, &format!("\n{block}\n"));
    std::fs::write(page, text)?;
    Ok(())
}

/// What was aimed at, and where it was missed.
fn aims(out: &mut String, rows: &Rows) -> Result<()> {
    writeln!(out, "| aim | met | missed in (figure) |\n|---|---|---|")?;
    let mut aim = |title: &str, all: Vec<(String, f64)>, met: &dyn Fn(&str, f64) -> bool| {
        let missed: Vec<String> = all
            .iter()
            .filter(|(cell, value)| !met(cell, *value))
            .map(|(cell, value)| format!("{cell} ({value:.2})"))
            .collect();
        let met = all.len() - missed.len();
        writeln!(out, "| {title} | {met} of {} | {} |", all.len(), missed.join(", "))
    };
    let of = |wanted: &dyn Fn(&str) -> bool, value: &dyn Fn(&str) -> Option<f64>| {
        let cells = rows.cells.iter().filter(|cell| wanted(cell));
        cells.filter_map(|cell| Some((cell.clone(), value(cell)?))).collect::<Vec<_>>()
    };
    aim(
        "CPU of `kvlane round-robin` at 50 tokens at most 2 × nginx's",
        of(&|cell| cell.starts_with("50 "), &|cell| {
            Some(rows.get(cell, BLIND, "cpu_us")? / rows.get(cell, "nginx", "cpu_us")?)
        }),
        &|_, ratio| ratio <= 2.0,
    )?;
    aim(
        "CPU of `kvlane kv` at most half of the best peer's `cache_aware`",
        of(&|_| true, &|cell| {
            Some(rows.get(cell, KV, "cpu_us")? / rows.best_peer(cell, "cpu_us", f64::min)?)
        }),
        &|_, ratio| ratio <= 0.5,
    )?;
    aim(
        "requests/s of `kvlane kv` with 64 clients at least 2 × the best peer's `cache_aware`",
        of(&|cell| cell.ends_with(" 64"), &|cell| {
            Some(rows.get(cell, KV, "requests_s")? / rows.best_peer(cell, "requests_s", f64::max)?)
        }),
        &|_, ratio| ratio >= 2.0,
    )?;
    let limit_ms = |cell: &str| match cell.rsplit_once(' ') {
        Some((cell, "1")) if cell.starts_with("50 ") => Some(0.2),
        Some((cell, "1")) if cell.starts_with("8192 cold") => Some(3.0),
        Some((cell, "1")) if cell.starts_with("8192 ") => Some(0.6),
        _ => None,
    };
    aim(
        "p50 that `kvlane kv` adds for one client: at most 0.2 ms at 50 tokens, 0.6 ms at 8k tokens that are known, 3 ms cold",
        of(&|cell| limit_ms(cell).is_some(), &|cell| rows.added_ms(cell, KV, "p50_us")),
        &|cell, ms| limit_ms(cell).is_some_and(|limit| ms <= limit),
    )?;
    out.push('\n');
    Ok(())
}

fn table(
    out: &mut String,
    rows: &Rows,
    title: &str,
    value: impl Fn(&str, &str) -> Option<String>,
) -> Result<()> {
    writeln!(out, "**{title}**\n\n| cell | {} |", rows.routers.join(" | "))?;
    writeln!(out, "|---|{}", "---|".repeat(rows.routers.len()))?;
    for cell in &rows.cells {
        let values: Vec<Option<String>> = rows.routers.iter().map(|router| value(cell, router)).collect();
        if values.iter().any(Option::is_some) {
            let values: Vec<String> = values.into_iter().map(Option::unwrap_or_default).collect();
            writeln!(out, "| {cell} | {} |", values.join(" | "))?;
        }
    }
    out.push('\n');
    Ok(())
}

/// The most that each router had, and its errors.
fn memory(out: &mut String, rows: &Rows) -> Result<()> {
    writeln!(out, "| router | RSS at most, MB | errors |\n|---|---|---|")?;
    for router in rows.routers.iter().filter(|router| *router != "direct") {
        let own = || rows.lines.iter().filter(|l| l.router == *router);
        let most = |figure: &str| {
            own().filter_map(|l| l.figures.get(figure)).map(|[_, _, high]| *high).fold(0.0, f64::max)
        };
        writeln!(out, "| {router} | {:.0} | {:.0} |", most("resident_mb"), most("errors"))?;
    }
    out.push('\n');
    Ok(())
}
