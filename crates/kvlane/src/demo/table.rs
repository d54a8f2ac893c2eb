//! The demo's last words: one line for each measure, both policies side by side, 80 columns at most.

use super::play::Outcome;
use std::fmt::Write as _;
use std::time::Duration;

/// A measure of a run; smaller is better, except for shares.
struct Line {
    name: &'static str,
    baseline: String,
    kv: String,
    /// How much better `kv` is; above 1 = better.
    better: f64,
}

/// The comparison as text.
pub(super) fn table(baseline: &Outcome, kv: &Outcome) -> String {
    let lines = lines(baseline, kv);
    let mut text = String::new();
    let _ = writeln!(text, "{:<37}{:>14}{:>12}{:>14}", "", "round-robin", "kv", "kv is better");
    let _ = writeln!(text, "{}", "─".repeat(77));
    for Line { name, baseline, kv, better } in &lines {
        let verdict = if *better > 1.0 { format!("{better:.1} x") } else { "no".to_owned() };
        let _ = writeln!(text, "{name:<37}{baseline:>14}{kv:>12}{verdict:>14}");
    }
    text
}

fn lines(baseline: &Outcome, kv: &Outcome) -> Vec<Line> {
    let share = |outcome: &Outcome| outcome.cached_tokens as f64 / outcome.prompt_tokens.max(1) as f64;
    let smaller = |name, of: fn(&Outcome) -> f64, show: fn(f64) -> String| {
        let (baseline, kv) = (of(baseline), of(kv));
        Line { name, baseline: show(baseline), kv: show(kv), better: baseline / kv }
    };
    let percent = |share: f64| format!("{:.1} %", share * 100.0);
    vec![
        Line {
            name: "prompt tokens found in a cache",
            baseline: percent(share(baseline)),
            kv: percent(share(kv)),
            better: share(kv) / share(baseline),
        },
        smaller("time to first token, median", |o| quantile(o, 0.5), |ms| format!("{ms:.0} ms")),
        smaller("time to first token, 99th percentile", |o| quantile(o, 0.99), |ms| format!("{ms:.0} ms")),
        smaller("requests in the busiest engine / mean", |o| o.imbalance, |ratio| format!("{ratio:.2}")),
        smaller(
            "computing in the busiest engine",
            |o| o.busy.iter().max().map_or(0.0, Duration::as_secs_f64),
            |s| format!("{s:.1} s"),
        ),
        smaller("time for all of it", |o| o.took.as_secs_f64(), |s| format!("{s:.1} s")),
    ]
}

/// Milliseconds to the first token that this share of the requests waits at most.
fn quantile(outcome: &Outcome, share: f64) -> f64 {
    let times = &outcome.first_tokens;
    let rank = ((times.len() as f64 * share).ceil() as usize).clamp(1, times.len().max(1));
    times.get(rank - 1).map_or(0.0, |time| time.as_secs_f64() * 1e3)
}
