//! The comparison for a browser: one file that needs nothing else.

use super::plot::{Line, Plot, colour, svg};
use super::text::ms;
use super::{Cell, Comparison};
use std::fmt::Write;

const STYLE: &str = "\
:root{color-scheme:light dark;--fg:#1b1b1b;--bg:#fff;--dim:#666;--grid:#e4e4e4;--best:#e6f4ea}\
@media(prefers-color-scheme:dark){:root{--fg:#e8e8e8;--bg:#161616;--dim:#9a9a9a;--grid:#333;--best:#173522}}\
body{font:15px/1.45 system-ui,sans-serif;color:var(--fg);background:var(--bg);max-width:1120px;margin:2em auto;padding:0 1em}\
h1{font-size:1.4em}h2{font-size:1.15em;margin-top:2em}p{color:var(--dim)}\
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}\
th,td{padding:.3em .6em;text-align:right;border-bottom:1px solid var(--grid)}th:first-child,td:first-child{text-align:left}\
td.best{background:var(--best)}i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.5em}\
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(420px,1fr));gap:1em;margin-top:1em}\
svg{width:100%;height:auto}svg text{fill:var(--fg);font:12px system-ui,sans-serif}svg .title{font-weight:600}\
svg .tick{fill:var(--dim);font-size:11px}.grid{stroke:var(--grid)}.line{fill:none;stroke-width:2}.bound{fill:none;stroke-width:1;stroke-dasharray:4 3}";

/// A whole page.
pub fn html(c: &Comparison) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_html(c, &mut out);
    out
}

fn write_html(c: &Comparison, out: &mut String) -> std::fmt::Result {
    let title = escaped(&c.trace);
    writeln!(
        out,
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\"><title>{title}: policies compared</title>"
    )?;
    writeln!(out, "<meta name=\"viewport\" content=\"width=device-width\"><style>{STYLE}</style>")?;
    writeln!(out, "<h1>{title}: policies compared</h1>")?;
    writeln!(
        out,
        "<p>{} requests, {:.1} M prompt tokens in blocks of {}, {}; {} seed(s). Simulated.</p>",
        c.requests,
        c.input_tokens as f64 / 1e6,
        c.block_tokens,
        if c.closed_loop { "closed loop inside sessions" } else { "open loop" },
        c.seeds.len()
    )?;
    let mut rest = c.cells.as_slice();
    while let Some(first) = rest.first() {
        let same = rest.iter().take_while(|x| (x.workers, x.speed) == (first.workers, first.speed)).count();
        section(c, &rest[..same], out)?;
        rest = &rest[same..];
    }
    writeln!(
        out,
        "<p>In time: first token within {}. Busiest: time in steps of the busiest worker over the mean. Plots show the first seed. \
         Shaded: best of the column.</p></html>",
        ms(c.ttft_target_ms)
    )
}

/// A column: its head, how to show it, the figure, and whether less is better.
type Column = (&'static str, fn(f64) -> String, fn(&Cell) -> f64, bool);

const COLUMNS: &[Column] = &[
    ("hit rate", percent, |c| c.mean(|s| s.hit_rate), false),
    ("TTFT p50", ms, |c| c.mean(|s| s.ttft_ms.p50), true),
    ("TTFT p90", ms, |c| c.mean(|s| s.ttft_ms.p90), true),
    ("TTFT p99", ms, |c| c.mean(|s| s.ttft_ms.p99), true),
    ("end to end p50", ms, |c| c.mean(|s| s.e2e_ms.p50), true),
    ("end to end p99", ms, |c| c.mean(|s| s.e2e_ms.p99), true),
    ("in time", percent, |c| c.mean(|s| s.goodput), false),
    ("busiest", ratio, |c| c.mean(|s| s.busy_max_over_mean), true),
    ("unanswered", count, |c| c.mean(|s| s.unanswered as f64), true),
];

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

fn ratio(value: f64) -> String {
    format!("{value:.2}")
}

fn count(value: f64) -> String {
    format!("{value:.0}")
}

fn section(c: &Comparison, cells: &[Cell], out: &mut String) -> std::fmt::Result {
    let first = &cells[0];
    writeln!(out, "<h2>{} workers, speed {}</h2><table><tr><th>policy", first.workers, first.speed)?;
    for (head, ..) in COLUMNS {
        write!(out, "<th>{head}")?;
    }
    for (n, cell) in cells.iter().enumerate() {
        write!(out, "<tr><td><i style=\"background:{}\"></i>{}", colour(n), escaped(&cell.policy))?;
        for (_, show, figure, less) in COLUMNS {
            let value = figure(cell);
            let best =
                cells.iter().map(figure).all(|other| if *less { value <= other } else { value >= other });
            write!(out, "<td{}>{}", if best { " class=\"best\"" } else { "" }, show(value))?;
        }
        writeln!(out)?;
    }
    writeln!(out, "</table>")?;
    let bounds = c.bounds.iter().find(|(w, _)| *w == first.workers).map(|(_, b)| *b);
    if let Some(b) = bounds {
        writeln!(
            out,
            "<p>Hit rate at most {} with endless memory, {} with one LRU cache of all workers' memory, {} if that knew the future. \
             Time to first token, alone on an idle fleet with endless memory: p50 {}, p99 {}.</p>",
            percent(b.infinite),
            percent(b.pooled_lru),
            percent(b.pooled_belady),
            ms(b.least_ttft_ms.p50),
            ms(b.least_ttft_ms.p99)
        )?;
    }
    let names: Vec<String> = cells.iter().map(|x| escaped(&x.policy)).collect();
    let lines = |points: &dyn Fn(&Cell) -> Vec<(f64, f64)>| -> Vec<Line<'_>> {
        cells.iter().zip(&names).map(|(x, name)| Line { name, points: points(x), bound: false }).collect()
    };
    let distribution = |values: &[f64]| -> Vec<(f64, f64)> {
        let last = values.len().saturating_sub(1).max(1) as f64;
        values.iter().enumerate().map(|(i, v)| (*v, i as f64 / last)).collect()
    };
    let over_time =
        |x: &Cell, values: &[f64]| x.curves.slice_s.iter().copied().zip(values.iter().copied()).collect();
    let mut hit_lines = lines(&|x| over_time(x, &x.curves.hit_rate));
    if let Some(b) = bounds {
        let ends = [first.curves.slice_s.first(), first.curves.slice_s.last()];
        let points = ends.into_iter().flatten().map(|s| (*s, b.pooled_lru)).collect();
        hit_lines.push(Line { name: "one LRU of all memory", points, bound: true });
    }
    writeln!(out, "<div class=\"plots\">")?;
    for (title, x, y, log_x, lines) in [
        ("Time to first token", "ms", "share of requests", true, lines(&|x| distribution(&x.curves.ttft_ms))),
        ("Time to last token", "ms", "share of requests", true, lines(&|x| distribution(&x.curves.e2e_ms))),
        ("Hit rate over time", "s", "share of prompt tokens", false, hit_lines),
        (
            "Busiest worker over the mean",
            "s",
            "computed tokens",
            false,
            lines(&|x| over_time(x, &x.curves.busiest)),
        ),
        ("Worst time to first token", "s", "ms", false, lines(&|x| over_time(x, &x.curves.worst_ttft_ms))),
    ] {
        write!(out, "{}", svg(&Plot { title, x, y, log_x, lines }))?;
    }
    writeln!(out, "</div>")
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}
