//! Tables and plots of BENCHMARKS.md from the sheets.
//!
//! The text of BENCHMARKS.md is written by hand; what stands between `<!-- NAME -->` and `<!-- end -->` is written here.

mod plot;
mod table;

use std::fmt::Write;
use std::path::Path;

use anyhow::Context;

use crate::record::{self, Read};
use plot::{Panel, Series};
use table::{Pivot, contenders, distinct, foot, is_ours, median, wrong};

/// Replaces every block that has a sheet in `results`.
pub fn run(results: &Path) -> anyhow::Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    let (page, plots) = (root.join("BENCHMARKS.md"), root.join("bench/plots"));
    std::fs::create_dir_all(&plots)?;
    let mut text = std::fs::read_to_string(&page).context("could not read BENCHMARKS.md")?;
    let writers: [(&str, fn(&Read, &Path) -> anyhow::Result<String>); 9] = [
        ("exact", exact),
        ("query", query),
        ("ingest", ingest),
        ("memory", memory),
        ("mixed", mixed),
        ("readers", mixed),
        ("replay", replay),
        ("removal", removal),
        ("hashing", hashing),
    ];
    for (question, write) in writers {
        let Some(sheet) = record::read(results, question)? else { continue };
        let block = write(&sheet, &plots)?;
        let (open, close) = (format!("<!-- {question} -->"), "<!-- end -->");
        let Some(from) = text.find(&open) else { continue };
        let start = from + open.len();
        let end = start + text[start..].find(close).with_context(|| format!("{open} has no {close}"))?;
        text.replace_range(start..end, &format!("\n{block}\n"));
    }
    std::fs::write(&page, text)?;
    Ok(())
}

fn exact(sheet: &Read, _: &Path) -> anyhow::Result<String> {
    let contenders = contenders(sheet);
    let mut out =
        format!("| regime | {} |\n|---|{}\n", contenders.join(" | "), "---|".repeat(contenders.len()));
    for regime in distinct(sheet.rows.iter().map(|row| row.cell["regime"].clone())) {
        write!(out, "| {regime} |")?;
        for contender in &contenders {
            let row = sheet.rows.iter().find(|r| r.cell["regime"] == regime && r.contender == *contender);
            match row.and_then(|r| r.wrong) {
                Some(w) if w.wrong == 0 => write!(out, " 0 |")?,
                Some(w) => write!(out, " {:.1} % ({} over, {} under) |", w.percent(), w.over, w.under)?,
                None => write!(out, " - |")?,
            }
        }
        out.push('\n');
    }
    let each = sheet.rows.first().and_then(|row| row.wrong).map_or(0, |w| w.answers);
    Ok(format!("{out}\n{each} answers a cell. {}", foot(sheet, &[])))
}

fn query(sheet: &Read, plots: &Path) -> anyhow::Result<String> {
    let keys = ["workers", "blocks", "hit"];
    let pivot = Pivot { keys: &keys, figure: "cpu_ns", digits: 0, lower_is_better: true };
    let mut panels = Vec::new();
    let lengths = distinct(sheet.rows.iter().map(|r| r.cell["blocks"].clone()));
    for workers in distinct(sheet.rows.iter().map(|r| r.cell["workers"].clone())) {
        let series = |name: String| {
            let at = |length: &String| {
                median(sheet, &keys, &[workers.clone(), length.clone(), "100".into()], &name, "cpu_ns")
            };
            Series { values: lengths.iter().map(at).collect(), name }
        };
        panels.push(Panel {
            title: format!("{workers} workers, full hit: CPU ns by blocks"),
            labels: lengths.clone(),
            series: contenders(sheet).into_iter().map(series).collect(),
        });
    }
    std::fs::write(plots.join("query.svg"), plot::lines(&panels, 2))?;
    let mut out = format!(
        "![CPU time of a query](bench/plots/query.svg)\n\nMean CPU ns of a query:\n\n{}\n",
        pivot.table(sheet)
    );
    for own in contenders(sheet).iter().filter(|contender| is_ours(contender)) {
        let gain = |peer: &String| {
            let (mean, behind, of) = pivot.against(sheet, peer, own, |values| values[2] != "0")?;
            Some(format!("{peer} {mean:.1} (behind in {behind} of {of})"))
        };
        let peers = contenders(sheet).into_iter().filter(|contender| !is_ours(contender));
        let gains: Vec<String> = peers.filter_map(|peer| gain(&peer)).collect();
        if !gains.is_empty() {
            writeln!(out, "- peer / {own}, geometric mean over the cells with a hit: {}.", gains.join(", "))?;
        }
    }
    let tails = Pivot { keys: &keys, figure: "p99_ns", digits: 0, lower_is_better: true };
    let few = Read {
        head: sheet.head.clone(),
        rows: sheet.rows.iter().filter(|r| r.cell["workers"] == "64").cloned().collect(),
    };
    if !few.rows.is_empty() {
        let table = tails.table(&few);
        write!(out, "\np99, elapsed ns, 64 workers (clock readings of about 20 ns included):\n\n{table}\n")?;
    }
    Ok(out + &wrong(sheet) + &foot(sheet, &["cpu_ns"]))
}

fn ingest(sheet: &Read, plots: &Path) -> anyhow::Result<String> {
    let keys = ["pairs", "kind", "per_event", "publishers"];
    let mut out = String::from("![CPU time of a block](bench/plots/ingest.svg)\n");
    let mut bars = Panel {
        title: "CPU ns a block, one publisher, about 1M pairs".into(),
        labels: vec![],
        series: vec![],
    };
    for name in contenders(sheet) {
        bars.series.push(Series { name, values: vec![] });
    }
    let cells = distinct(sheet.rows.iter().map(|row| table::cell(row, &keys)));
    for (figure, title) in [("fill", "First fill"), ("remove", "Removal"), ("steady", "Steady stores")] {
        let cpu = format!("{figure}_cpu_ns");
        let pivot = Pivot { keys: &keys, figure: &cpu, digits: 0, lower_is_better: true };
        write!(out, "\n{title}, CPU ns a block:\n\n{}", pivot.table(sheet))?;
        for cell in cells.iter().filter(|c| c[3] == "1" && c[0].len() <= 7) {
            bars.labels.push(format!("{figure} {} {}", cell[1], cell[2]));
            for series in &mut bars.series {
                series.values.push(median(sheet, &keys, cell, &series.name, &cpu));
            }
        }
    }
    for (figure, title) in [("fill", "First fill"), ("remove", "Removal"), ("steady", "Steady stores")] {
        let rate = format!("{figure}_mblocks_s");
        let pivot = Pivot { keys: &keys, figure: &rate, digits: 1, lower_is_better: false };
        let two = Read {
            head: sheet.head.clone(),
            rows: sheet.rows.iter().filter(|r| r.cell["publishers"] == "2").cloned().collect(),
        };
        write!(
            out,
            "\n{title}, two publishers, million blocks per elapsed second:\n\n{}",
            pivot.table(&two)
        )?;
    }
    std::fs::write(plots.join("ingest.svg"), plot::bars(&bars))?;
    let figures = ["fill_cpu_ns", "remove_cpu_ns", "steady_cpu_ns"];
    Ok(format!("{out}\n{}{}", wrong(sheet), foot(sheet, &figures)))
}

fn memory(sheet: &Read, plots: &Path) -> anyhow::Result<String> {
    let keys = ["kind", "pairs", "per_event"];
    let heap = Pivot { keys: &keys, figure: "heap_bytes", digits: 1, lower_is_better: true };
    let resident = Pivot { keys: &keys, figure: "resident_bytes", digits: 1, lower_is_better: true };
    let cells = distinct(sheet.rows.iter().map(|row| table::cell(row, &keys)));
    let panel = Panel {
        title: "Resident bytes per (worker, block) pair".into(),
        labels: cells
            .iter()
            .map(|c| format!("{} {}k/{}", c[0], c[1].trim_end_matches("000"), c[2]))
            .collect(),
        series: contenders(sheet)
            .into_iter()
            .map(|name| Series {
                values: cells.iter().map(|c| median(sheet, &keys, c, &name, "resident_bytes")).collect(),
                name,
            })
            .collect(),
    };
    std::fs::write(plots.join("memory.svg"), plot::bars(&panel))?;
    Ok(format!(
        "![Bytes of a pair](bench/plots/memory.svg)\n\nAllocated bytes a pair:\n\n{}\nResident bytes a pair:\n\n{}\n{}",
        heap.table(sheet),
        resident.table(sheet),
        foot(sheet, &[])
    ))
}

fn mixed(sheet: &Read, _: &Path) -> anyhow::Result<String> {
    let keys = ["per_event", "readers"];
    let mut out = String::new();
    for (figure, title, digits, lower) in [
        ("ingest_mblocks_s", "Events, million blocks per elapsed second", 1, false),
        ("ingest_cpu_ns", "Events, CPU ns a block beside readers", 0, true),
        ("queries_s", "Queries per elapsed second", 0, false),
        ("queries_cpu_s", "Queries per CPU second of the readers", 0, false),
        ("quiet_p99_ns", "Query p99 without a writer, ns", 0, true),
        ("p50_ns", "Query p50 beside the writer, ns", 0, true),
        ("p99_ns", "Query p99 beside the writer, ns", 0, true),
    ] {
        let pivot = Pivot { keys: &keys, figure, digits, lower_is_better: lower };
        write!(out, "{title}:\n\n{}\n", pivot.table(sheet))?;
    }
    Ok(out + &wrong(sheet) + &foot(sheet, &["ingest_cpu_ns", "queries_cpu_s", "p99_ns"]))
}

fn replay(sheet: &Read, plots: &Path) -> anyhow::Result<String> {
    let columns = [
        ("cpu_s", "CPU s, all", 2),
        ("mblocks_s", "M blocks/s", 1),
        ("event_cpu_ns", "event CPU ns/block", 0),
        ("query_cpu_ns", "query CPU ns", 0),
        ("p50_ns", "query p50", 0),
        ("p99_ns", "query p99", 0),
        ("live_wrong_percent", "answers behind, % (at full speed)", 1),
    ];
    let mut out = String::from("![CPU time of the replay](bench/plots/replay.svg)\n\n|  |");
    columns.iter().for_each(|(_, title, _)| out += &format!(" {title} |"));
    writeln!(out, "\n|---|{}", "---|".repeat(columns.len()))?;
    for row in &sheet.rows {
        write!(out, "| {} |", row.contender)?;
        for (figure, _, digits) in columns {
            write!(out, " {:.digits$} |", row.figures[figure].median)?;
        }
        out.push('\n');
    }
    let panel = Panel {
        title: "CPU ns: a block of an event, a query".into(),
        labels: vec!["event block".into(), "query".into()],
        series: sheet
            .rows
            .iter()
            .map(|row| Series {
                name: row.contender.clone(),
                values: ["event_cpu_ns", "query_cpu_ns"].map(|f| Some(row.figures[f].median)).to_vec(),
            })
            .collect(),
    };
    std::fs::write(plots.join("replay.svg"), plot::bars(&panel))?;
    let cell = &sheet.rows.first().context("an empty sheet")?.cell;
    let sizes = format!(
        "{} requests, {} events, {} event blocks, {} query blocks. ",
        cell["requests"], cell["events"], cell["event_blocks"], cell["query_blocks"]
    );
    Ok(format!("{out}\n{sizes}{}{}", wrong(sheet), foot(sheet, &["cpu_s", "event_cpu_ns", "query_cpu_ns"])))
}

fn removal(sheet: &Read, _: &Path) -> anyhow::Result<String> {
    let pivot = Pivot { keys: &["kind", "pairs"], figure: "pair_cpu_ns", digits: 1, lower_is_better: true };
    Ok(format!(
        "CPU ns a pair of the removed worker:\n\n{}\n{}{}",
        pivot.table(sheet),
        wrong(sheet),
        foot(sheet, &["pair_cpu_ns"])
    ))
}

fn hashing(sheet: &Read, _: &Path) -> anyhow::Result<String> {
    let of = |figure| Pivot { keys: &["tokens"], figure, digits: 1, lower_is_better: true }.table(sheet);
    Ok(format!(
        "Block hashes of a prompt, CPU µs:\n\n{}\nThe same and the query, CPU µs:\n\n{}\n{}",
        of("hash_cpu_us"),
        of("ask_cpu_us"),
        foot(sheet, &["hash_cpu_us", "ask_cpu_us"])
    ))
}
