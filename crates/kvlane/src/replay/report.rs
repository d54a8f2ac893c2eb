//! What a replay came to: one table, and the same as JSON.

use super::drive::{Row, quantile};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Duration;

/// A driver that sends later than this (at the 99th percentile) measures itself.
const LATE: Duration = Duration::from_millis(50);

/// All figures of one replay.
#[derive(Debug, Default)]
pub(crate) struct Report {
    /// Requests of the trace.
    pub(crate) requests: usize,
    pub(crate) took: Duration,
    ttft_target: Duration,
    answered: usize,
    failed: BTreeMap<String, usize>,
    prompt_tokens: u64,
    output_tokens: u64,
    /// Prompt and cached tokens of those answers that say what was cached.
    told: (u64, u64),
    in_time: usize,
    /// Sorted.
    first: Vec<Duration>,
    whole: Vec<Duration>,
    late: Vec<Duration>,
    workers: BTreeMap<String, usize>,
}

impl Report {
    /// Of these rows.
    pub(crate) fn new(requests: usize, rows: &[Row], took: Duration, ttft_target: Duration) -> Self {
        let mut it = Self { requests, took, ttft_target, ..Self::default() };
        for row in rows {
            it.late.push(row.late);
            match &row.answer {
                Err(why) => *it.failed.entry(why.clone()).or_default() += 1,
                Ok(answer) => {
                    it.answered += 1;
                    it.prompt_tokens += answer.prompt_tokens.unwrap_or(0);
                    it.output_tokens += answer.output_tokens.unwrap_or(0);
                    if let (Some(prompt), Some(cached)) = (answer.prompt_tokens, answer.cached_tokens) {
                        it.told = (it.told.0 + prompt, it.told.1 + cached);
                    }
                    it.first.extend(answer.first_token);
                    it.in_time += usize::from(answer.first_token.is_some_and(|t| t <= ttft_target));
                    it.whole.push(row.whole);
                    if let Some(worker) = &answer.worker {
                        *it.workers.entry(worker.clone()).or_default() += 1;
                    }
                }
            }
        }
        for times in [&mut it.first, &mut it.whole, &mut it.late] {
            times.sort_unstable();
        }
        it
    }

    /// Share of prompt tokens that came from a cache, 0 to 1; `None` where no answer said so.
    pub(crate) fn hit_rate(&self) -> Option<f64> {
        (self.told.0 > 0).then(|| self.told.1 as f64 / self.told.0 as f64)
    }

    /// Requests at the busiest worker over the mean; `None` where no answer names one.
    fn imbalance(&self) -> Option<f64> {
        let most = *self.workers.values().max()?;
        let all: usize = self.workers.values().sum();
        Some(most as f64 * self.workers.len() as f64 / all as f64)
    }

    /// Whether this process could not keep up, so that its figures say little about the server.
    pub(crate) fn is_late(&self) -> bool {
        quantile(&self.late, 0.99) > LATE
    }

    /// For people.
    pub(crate) fn text(&self) -> String {
        let mut out = String::new();
        let ms = |d: Duration| format!("{:.1}", d.as_secs_f64() * 1e3);
        let mut line = |name: &str, value: &str| {
            // Writing to a string does not fail.
            let _ = writeln!(out, "{name:<28} {value}");
        };
        let failed: usize = self.failed.values().sum();
        let not_sent = self.requests - self.answered - failed;
        line("requests answered", &format!("{} of {}", self.answered, self.requests));
        for (why, count) in &self.failed {
            line("  failed", &format!("{count}: {why}"));
        }
        if not_sent > 0 {
            line("  not sent or not ended", &not_sent.to_string());
        }
        let seconds = self.took.as_secs_f64().max(1e-9);
        line("seconds", &format!("{seconds:.1}"));
        line("requests a second", &format!("{:.2}", self.answered as f64 / seconds));
        line("prompt tokens", &self.prompt_tokens.to_string());
        line("output tokens", &self.output_tokens.to_string());
        let rate = self.hit_rate().map(|rate| format!("{:.2} %", rate * 100.0));
        line("hit rate", &rate.unwrap_or_else(|| "the server does not say (cached_tokens)".to_owned()));
        let times = |sorted: &[Duration]| {
            format!(
                "p50 {:>9}   p90 {:>9}   p99 {:>9}   max {:>9}",
                ms(quantile(sorted, 0.5)),
                ms(quantile(sorted, 0.9)),
                ms(quantile(sorted, 0.99)),
                ms(sorted.last().copied().unwrap_or_default())
            )
        };
        line("time to first token, ms", &times(&self.first));
        line("whole answer, ms", &times(&self.whole));
        let share = self.in_time as f64 / self.requests.max(1) as f64 * 100.0;
        line(&format!("first token in {} ms", self.ttft_target.as_millis()), &format!("{share:.1} %"));
        if let Some(imbalance) = self.imbalance() {
            let workers = self.workers.len();
            line("busiest of the workers", &format!("{imbalance:.2} times the mean of {workers}"));
        }
        line("sent late, ms", &times(&self.late));
        if self.is_late() {
            line(
                "",
                "This machine could not keep up: the figures are too high. Lower --speed, or use more cores.",
            );
        }
        out
    }

    /// For programs.
    pub(crate) fn json(&self) -> Value {
        let times = |sorted: &[Duration]| {
            let ms = |share| quantile(sorted, share).as_secs_f64() * 1e3;
            let mean = sorted.iter().sum::<Duration>().as_secs_f64() * 1e3 / sorted.len().max(1) as f64;
            json!({ "mean": mean, "p50": ms(0.5), "p90": ms(0.9), "p99": ms(0.99), "max": ms(1.0) })
        };
        json!({
            "requests": self.requests,
            "answered": self.answered,
            "failed": self.failed,
            "seconds": self.took.as_secs_f64(),
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "hit_rate": self.hit_rate(),
            "first_token_ms": times(&self.first),
            "whole_ms": times(&self.whole),
            "late_ms": times(&self.late),
            "ttft_target_ms": self.ttft_target.as_secs_f64() * 1e3,
            "in_time": self.in_time as f64 / self.requests.max(1) as f64,
            "workers": self.workers,
            "imbalance": self.imbalance(),
        })
    }
}

/// One request as a JSON line.
pub(crate) fn row(row: &Row) -> Value {
    let ms = |d: Duration| (d.as_secs_f64() * 1e6).round() / 1e3;
    let answer = row.answer.as_ref().ok();
    json!({
        "number": row.number,
        "due_ms": ms(row.due),
        "late_ms": ms(row.late),
        "ttft_ms": answer.and_then(|a| a.first_token).map(ms),
        "whole_ms": ms(row.whole),
        "prompt_tokens": answer.and_then(|a| a.prompt_tokens),
        "cached_tokens": answer.and_then(|a| a.cached_tokens),
        "output_tokens": answer.and_then(|a| a.output_tokens),
        "worker": answer.and_then(|a| a.worker.as_deref()),
        "error": row.answer.as_ref().err(),
    })
}
