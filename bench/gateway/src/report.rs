//! Tables of BENCHMARKS.md: between `<!-- gateway -->` and `<!-- end -->`.

use std::fmt::Write;
use std::path::Path;

use anyhow::{Context, Result};

use crate::sheet::{self, Line};

fn distinct(all: impl Iterator<Item = String>) -> Vec<String> {
    let mut out = Vec::new();
    for one in all {
        if !out.contains(&one) {
            out.push(one);
        }
    }
    out
}

/// Rewrites the block from the rows in `results`.
pub fn run(results: &Path) -> Result<()> {
    let (head, lines) = sheet::read(&results.join("gateway.jsonl"))?;
    let mut block = String::new();
    for cell in distinct(lines.iter().map(|l| l.cell.clone())) {
        let rows: Vec<&Line> = lines.iter().filter(|l| l.cell == cell).collect();
        table(&mut block, &cell, &rows)?;
    }
    let mut spreads: Vec<f64> = lines
        .iter()
        .filter_map(|l| l.figures.get("cpu_us"))
        .filter(|[median, ..]| *median > 0.0)
        .map(|[median, low, high]| (high - low) / median * 50.0)
        .collect();
    spreads.sort_by(f64::total_cmp);
    let spread = spreads.get(spreads.len() / 2).copied().unwrap_or(0.0);
    let worst = spreads.last().copied().unwrap_or(0.0);
    writeln!(
        block,
        "{}. Medians of {} interleaved rounds of {} ms; half the range of the rounds' CPU time: median {spread:.0} %, worst {worst:.0} %.",
        head.machine, head.rounds, head.time_ms
    )?;
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../BENCHMARKS.md");
    let mut text = std::fs::read_to_string(&page)?;
    let open = "<!-- gateway -->";
    let start = text.find(open).context("BENCHMARKS.md has no place for the gateway")? + open.len();
    let end = start + text[start..].find("<!-- end -->").context("the place has no end")?;
    text.replace_range(start..end, &format!("\n{block}\n"));
    std::fs::write(page, text)?;
    Ok(())
}

fn table(out: &mut String, cell: &str, rows: &[&Line]) -> Result<()> {
    let of = |line: &Line, name: &str| line.figures.get(name).map_or(f64::NAN, |f| f[0]);
    let direct = rows.iter().find(|l| l.router == "direct");
    let streams = cell.contains("stream");
    let first = if streams { " first byte p50 added, ms |" } else { "" };
    writeln!(
        out,
        "**{cell}**\n\n| router | requests/s | p50 added, ms | p99 added, ms |{first} CPU s per 1,000 requests | RSS, MB | errors | others' CPU share |\n|---|---|---|---|{}---|---|---|---|",
        if streams { "---|" } else { "" }
    )?;
    for line in rows {
        let added = |name: &str| match direct {
            Some(direct) if line.router != "direct" => (of(line, name) - of(direct, name)) / 1e3,
            _ => of(line, name) / 1e3,
        };
        let first = if streams { format!(" {:.2} |", added("first_p50_us")) } else { String::new() };
        let note = if line.router == "direct" { " (itself, not added)" } else { "" };
        writeln!(
            out,
            "| {}{note} | {:.0} | {:.2} | {:.2} |{first} {:.3} | {:.0} | {:.0} | {:.2} |",
            line.router,
            of(line, "requests_s"),
            added("p50_us"),
            added("p99_us"),
            of(line, "cpu_us") / 1e3,
            of(line, "resident_mb"),
            of(line, "errors"),
            of(line, "foreign"),
        )?;
    }
    out.push('\n');
    Ok(())
}
