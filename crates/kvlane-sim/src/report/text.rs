//! The comparison for a terminal.

use super::Comparison;
use std::fmt::Write;

/// Tables of at most 100 columns, one for each size and speed.
pub fn text(c: &Comparison) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = write_text(c, &mut out);
    out
}

fn write_text(c: &Comparison, out: &mut String) -> std::fmt::Result {
    let tokens = c.input_tokens as f64 / 1e6;
    let kind = if c.closed_loop { "closed loop inside sessions" } else { "open loop" };
    writeln!(
        out,
        "{}: {} requests, {tokens:.1} M prompt tokens, {kind}, {} seed(s)",
        c.trace,
        c.requests,
        c.seeds.len()
    )?;
    let mut last = None;
    for cell in &c.cells {
        if last != Some((cell.workers, cell.speed)) {
            last = Some((cell.workers, cell.speed));
            writeln!(out)?;
            write!(out, "{} workers, speed {}", cell.workers, cell.speed)?;
            if let Some((_, b)) = c.bounds.iter().find(|(w, _)| *w == cell.workers) {
                write!(
                    out,
                    "; hit rate at most {:.1} % (one LRU of all memory {:.1} %, Belady {:.1} %)\n\
                     alone on an idle fleet with endless caches: ttft p50 {}, p90 {}, p99 {}",
                    100.0 * b.infinite,
                    100.0 * b.pooled_lru,
                    100.0 * b.pooled_belady,
                    ms(b.least_ttft_ms.p50),
                    ms(b.least_ttft_ms.p90),
                    ms(b.least_ttft_ms.p99)
                )?;
            }
            writeln!(out)?;
            writeln!(
                out,
                "{:<16} {:>6} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9} {:>8} {:>7}",
                "policy", "hit %", "ttft p50", "p90", "p99", "+/-", "e2e p50", "p99", "in time", "busiest"
            )?;
        }
        writeln!(
            out,
            "{:<16} {:>6.1} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9} {:>6.1} % {:>7.2}",
            cell.policy,
            100.0 * cell.mean(|s| s.hit_rate),
            ms(cell.mean(|s| s.ttft_ms.p50)),
            ms(cell.mean(|s| s.ttft_ms.p90)),
            ms(cell.mean(|s| s.ttft_ms.p99)),
            ms(cell.spread(|s| s.ttft_ms.p99)),
            ms(cell.mean(|s| s.e2e_ms.p50)),
            ms(cell.mean(|s| s.e2e_ms.p99)),
            100.0 * cell.mean(|s| s.goodput),
            cell.mean(|s| s.busy_max_over_mean),
        )?;
        let unanswered = cell.mean(|s| s.unanswered as f64);
        if unanswered > 0.0 {
            writeln!(out, "{:<16} {unanswered:.0} requests without an answer", "")?;
        }
    }
    writeln!(out)?;
    writeln!(
        out,
        "in time: first token within {}; busiest: time in steps of the busiest worker over the mean;",
        ms(c.ttft_target_ms)
    )?;
    writeln!(out, "+/-: half the range of p99 over the seeds")
}

/// Milliseconds, or seconds from 10 of them on.
pub(super) fn ms(value: f64) -> String {
    if value >= 10_000.0 { format!("{:.1} s", value / 1000.0) } else { format!("{value:.0} ms") }
}
