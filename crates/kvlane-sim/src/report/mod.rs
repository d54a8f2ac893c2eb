//! Several policies on the same trace, side by side: as a text table, as JSON, and as one HTML file with plots.
//!
//! A [`Comparison`] holds one [`Cell`] for each number of workers, speed and policy, each over all seeds. The three writers only read it. Nothing in
//! them depends on the time or the machine, so the same seeds give the same bytes.

mod html;
mod json;
mod plot;
mod text;

pub use html::html;
pub use json::json;
pub use text::text;

use crate::bounds::Bounds;
use crate::outcome::{Outcome, Summary};
use crate::trace::Trace;

/// Points of a distribution that are kept for plots.
const POINTS: usize = 200;

/// Slices of a run that are kept for plots over time.
const SLICES: usize = 48;

/// What was compared.
#[derive(Clone, Debug)]
pub struct Comparison {
    /// Name of the trace.
    pub trace: String,
    /// Its requests.
    pub requests: usize,
    /// Its prompt tokens.
    pub input_tokens: u64,
    /// Tokens in a block.
    pub block_tokens: u32,
    /// Whether later turns wait for answers (closed loop inside sessions) or all times are fixed.
    pub closed_loop: bool,
    /// Time to first token that counts as in time.
    pub ttft_target_ms: f64,
    /// Seeds that each cell is over.
    pub seeds: Vec<u64>,
    /// Hit rates that the trace allows, by number of workers.
    pub bounds: Vec<(u32, Bounds)>,
    /// The runs.
    pub cells: Vec<Cell>,
}

/// One policy at one size and speed, over all seeds.
#[derive(Clone, Debug)]
pub struct Cell {
    /// Workers of the fleet.
    pub workers: u32,
    /// How many times as fast as recorded the requests came.
    pub speed: f64,
    /// Name of the policy.
    pub policy: String,
    /// One summary for each seed.
    pub runs: Vec<Summary>,
    /// Of the first seed: for the plots.
    pub curves: Curves,
}

/// What the plots show, of one run.
#[derive(Clone, Debug, Default)]
pub struct Curves {
    /// Time to first token at evenly spaced shares of the requests, from the least to the greatest.
    pub ttft_ms: Vec<f64>,
    /// Time to the last token, likewise.
    pub e2e_ms: Vec<f64>,
    /// By slice of the run: its middle, in seconds.
    pub slice_s: Vec<f64>,
    /// Prompt tokens that the busiest worker had to compute over the mean, by slice; 1 where there were none.
    pub busiest: Vec<f64>,
    /// Share of prompt tokens from a cache, by slice.
    pub hit_rate: Vec<f64>,
    /// Greatest time to first token of the requests that came in the slice.
    pub worst_ttft_ms: Vec<f64>,
}

impl Cell {
    /// The mean over the seeds of one figure.
    pub fn mean(&self, figure: impl Fn(&Summary) -> f64) -> f64 {
        self.runs.iter().map(figure).sum::<f64>() / self.runs.len().max(1) as f64
    }

    /// Half of the distance between the least and the greatest over the seeds.
    pub fn spread(&self, figure: impl Fn(&Summary) -> f64) -> f64 {
        let values: Vec<f64> = self.runs.iter().map(figure).collect();
        let least = values.iter().copied().fold(f64::INFINITY, f64::min);
        let greatest = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        if values.is_empty() { 0.0 } else { (greatest - least) / 2.0 }
    }
}

impl Curves {
    /// From a run of `trace`.
    pub fn of(trace: &Trace, outcome: &Outcome) -> Self {
        let span =
            |at: Option<u64>, from: u64| (at.unwrap_or(outcome.end_us).max(from) - from) as f64 / 1000.0;
        let mut ttft: Vec<f64> =
            outcome.served.iter().map(|s| span(s.first_token_us, s.arrived_us)).collect();
        let mut e2e: Vec<f64> = outcome.served.iter().map(|s| span(s.ended_us, s.arrived_us)).collect();
        let last_us = outcome.served.iter().map(|s| s.arrived_us).max().unwrap_or(0) + 1;
        let workers = outcome.workers.len().max(1);
        let mut computed = vec![vec![0u64; workers]; SLICES];
        let mut prompt = vec![0u64; SLICES];
        let mut hit = vec![0u64; SLICES];
        let mut worst = vec![0.0_f64; SLICES];
        for (s, r) in outcome.served.iter().zip(&trace.requests) {
            let slice = (s.arrived_us as usize * SLICES) / last_us as usize;
            computed[slice][s.worker as usize] +=
                u64::from(r.input_tokens - s.cached_tokens.min(r.input_tokens));
            prompt[slice] += u64::from(r.input_tokens);
            hit[slice] += u64::from(s.cached_tokens);
            worst[slice] = worst[slice].max(span(s.first_token_us, s.arrived_us));
        }
        let busiest = |c: &Vec<u64>| {
            let sum: u64 = c.iter().sum();
            let most = c.iter().copied().max().unwrap_or(0);
            if sum == 0 { 1.0 } else { most as f64 * workers as f64 / sum as f64 }
        };
        Self {
            ttft_ms: thin(&mut ttft),
            e2e_ms: thin(&mut e2e),
            slice_s: (0..SLICES).map(|i| (i as f64 + 0.5) * last_us as f64 / SLICES as f64 / 1e6).collect(),
            busiest: computed.iter().map(busiest).collect(),
            hit_rate: hit.iter().zip(&prompt).map(|(h, p)| *h as f64 / (*p).max(1) as f64).collect(),
            worst_ttft_ms: worst,
        }
    }
}

/// Evenly spaced quantiles.
fn thin(values: &mut [f64]) -> Vec<f64> {
    values.sort_unstable_by(f64::total_cmp);
    if values.is_empty() {
        return Vec::new();
    }
    (0..POINTS).map(|i| values[i * (values.len() - 1) / (POINTS - 1)]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fleet::{FleetConfig, run};
    use crate::trace::{Nature, generate};

    fn comparison() -> Comparison {
        let trace = generate(Nature::MultiTurn, 200, 10.0, 1);
        let config = FleetConfig::new(2);
        let cells = ["kv", "round-robin"].map(|policy| {
            let outcome = run(&trace, &config, policy.parse().unwrap());
            let lengths: Vec<u32> = trace.requests.iter().map(|r| r.input_tokens).collect();
            Cell {
                workers: 2,
                speed: 1.0,
                policy: policy.to_owned(),
                runs: vec![outcome.summary(&lengths, 500.0)],
                curves: Curves::of(&trace, &outcome),
            }
        });
        Comparison {
            trace: "a <trace>".to_owned(),
            requests: trace.requests.len(),
            input_tokens: trace.input_tokens(),
            block_tokens: trace.block_tokens,
            closed_loop: true,
            ttft_target_ms: 500.0,
            seeds: vec![1],
            bounds: vec![(2, crate::bounds::bounds(&trace, &config.engine, 2 * config.cache_tokens()))],
            cells: cells.into(),
        }
    }

    #[test]
    fn the_three_forms_hold_the_same_figures() {
        let c = comparison();
        let hit = format!("{:.1}", 100.0 * c.cells[0].runs[0].hit_rate);
        let (text, json, html) = (text(&c), json(&c), html(&c));
        assert!(text.contains(&hit) && html.contains(&hit));
        assert!(text.lines().all(|l| l.chars().count() <= 100), "{text}");
        let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(parsed["cells"][0]["runs"][0]["hit_rate"].as_f64().unwrap(), c.cells[0].runs[0].hit_rate);
        assert!(html.contains("a &lt;trace&gt;") && !html.contains("a <trace>"));
        assert!(
            !html.contains("http://")
                || html.matches("http://www.w3.org/2000/svg").count() == html.matches("http://").count()
        );
    }

    #[test]
    fn same_seed_same_bytes() {
        let (a, b) = (comparison(), comparison());
        assert_eq!((text(&a), json(&a), html(&a)), (text(&b), json(&b), html(&b)));
    }
}
