//! What a run measured: one record per request and per worker, and the figures that reports are made of.

/// One request's course, times in simulated microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Served {
    /// When it reached the router.
    pub arrived_us: u64,
    /// When it was sent to its worker: later than it came where it waited at the router.
    pub sent_us: u64,
    /// When its first token reached the client; `None` = never.
    pub first_token_us: Option<u64>,
    /// When its last token did.
    pub ended_us: Option<u64>,
    /// Where it ran.
    pub worker: u32,
    /// Prompt tokens that the engine found in its cache.
    pub cached_tokens: u32,
    /// What the router reckoned with.
    pub expected_cached_tokens: u32,
    /// The engine refused it (it can never fit).
    pub refused: bool,
}

/// One worker's sums over the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct WorkerTotals {
    /// Time in steps.
    pub busy_us: u64,
    /// Prompt tokens computed.
    pub computed_tokens: u64,
    /// Prompt tokens from the cache.
    pub hit_tokens: u64,
    /// Requests finished.
    pub requests: u64,
    /// Running requests that lost their blocks.
    pub preemptions: u64,
}

/// A run.
#[derive(Clone, PartialEq, Debug)]
pub struct Outcome {
    /// Under which policy.
    pub policy: &'static str,
    /// When the last answer ended.
    pub end_us: u64,
    /// By the number of the request in the trace.
    pub served: Vec<Served>,
    /// By the number of the worker.
    pub workers: Vec<WorkerTotals>,
}

/// Figures of one run.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Summary {
    /// Requests in the trace.
    pub requests: usize,
    /// Requests without a last token: refused, or still waiting when the run was stopped.
    pub unanswered: usize,
    /// Share of prompt tokens that came from a cache.
    pub hit_rate: f64,
    /// Time to first token.
    pub ttft_ms: Quantiles,
    /// Time to the last token.
    pub e2e_ms: Quantiles,
    /// Busiest worker's time in steps over the mean.
    pub busy_max_over_mean: f64,
    /// Most prompt tokens computed by a worker over the mean.
    pub computed_max_over_mean: f64,
    /// Mean share of the run that workers were busy.
    pub utilisation: f64,
    /// Share of all requests whose first token came within the target.
    pub goodput: f64,
    /// Running requests that lost their blocks, all workers.
    pub preemptions: u64,
    /// Prompt tokens that the router expected from a cache and the engine computed, over all prompt tokens.
    pub overpredicted: f64,
}

/// Points of a distribution.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Quantiles {
    /// The mean.
    pub mean: f64,
    /// The median.
    pub p50: f64,
    /// 90 %.
    pub p90: f64,
    /// 99 %.
    pub p99: f64,
    /// The greatest.
    pub max: f64,
}

impl Quantiles {
    /// Of `values`, which are sorted by this. All zero if there are none.
    pub fn of(values: &mut [f64]) -> Self {
        values.sort_unstable_by(f64::total_cmp);
        let Some(last) = values.last() else { return Self::default() };
        let at = |q: f64| values[((values.len() - 1) as f64 * q).round() as usize];
        Self {
            mean: values.iter().sum::<f64>() / values.len() as f64,
            p50: at(0.5),
            p90: at(0.9),
            p99: at(0.99),
            max: *last,
        }
    }
}

impl Outcome {
    /// The figures; `prompt_tokens` of request i is `lengths[i]`. Requests that never got a first token count at the time that they waited, so
    /// that a policy cannot win by starving some.
    pub fn summary(&self, lengths: &[u32], ttft_target_ms: f64) -> Summary {
        let end = |s: &Served, at: Option<u64>| {
            (at.unwrap_or(self.end_us).max(s.arrived_us) - s.arrived_us) as f64 / 1000.0
        };
        let came: Vec<&Served> = self.served.iter().filter(|s| !s.refused).collect();
        let mut ttft: Vec<f64> = came.iter().map(|s| end(s, s.first_token_us)).collect();
        let mut e2e: Vec<f64> = came.iter().map(|s| end(s, s.ended_us)).collect();
        let prompt: u64 = lengths.iter().map(|l| u64::from(*l)).sum();
        let hit: u64 = self.served.iter().map(|s| u64::from(s.cached_tokens)).sum();
        let over: u64 = self
            .served
            .iter()
            .map(|s| u64::from(s.expected_cached_tokens.saturating_sub(s.cached_tokens)))
            .sum();
        let share = |part: u64| part as f64 / prompt.max(1) as f64;
        let in_time = ttft.iter().filter(|t| **t <= ttft_target_ms).count();
        let busy: Vec<f64> = self.workers.iter().map(|w| w.busy_us as f64).collect();
        let computed: Vec<f64> = self.workers.iter().map(|w| w.computed_tokens as f64).collect();
        Summary {
            requests: self.served.len(),
            unanswered: self.served.iter().filter(|s| s.ended_us.is_none()).count(),
            hit_rate: share(hit),
            ttft_ms: Quantiles::of(&mut ttft),
            e2e_ms: Quantiles::of(&mut e2e),
            busy_max_over_mean: max_over_mean(&busy),
            computed_max_over_mean: max_over_mean(&computed),
            utilisation: busy.iter().sum::<f64>() / (self.end_us.max(1) as f64 * busy.len().max(1) as f64),
            goodput: in_time as f64 / self.served.len().max(1) as f64,
            preemptions: self.workers.iter().map(|w| w.preemptions).sum(),
            overpredicted: share(over),
        }
    }
}

fn max_over_mean(values: &[f64]) -> f64 {
    let sum: f64 = values.iter().sum();
    let max = values.iter().copied().fold(0.0, f64::max);
    if sum > 0.0 { max * values.len() as f64 / sum } else { 1.0 }
}
