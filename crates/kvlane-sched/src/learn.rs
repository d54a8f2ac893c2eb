//! How fast each worker is and how long answers get, from what the router sees anyway: first tokens, and ends of answers.
//!
//! A sample is a ratio, observed over expected; factors move by a share of its logarithm, so twice too fast and twice too slow weigh the same. The first
//! samples count fully and later ones less (a mean, then an exponential one). A worker that is new starts at the fleet's factors. Samples that say
//! little are damped: short prefills are mostly overhead, and behind a queue it is the queue that is measured.
//!
//! Bounds: a factor stays within [`SLOWEST`] and its inverse, and one sample moves it by [`STEP`] at most once there are a few, so a paused engine or a
//! client that reads slowly cannot spoil it for long.

use crate::hash::Map;
use crate::rates::Rates;
use kvlane_index::Worker;

/// Greatest factor; its inverse is the least.
const SLOWEST: f64 = 1000.0;

/// Most that one sample may differ from the factor.
const STEP: f64 = 4.0;

/// Samples that are believed fully, however far off.
const FIRST: f64 = 3.0;

/// Weight of a sample once there are many: a worker's mean covers about its last 16.
const GAIN: f64 = 1.0 / 16.0;

/// Prior prefill time, in milliseconds, at which a sample counts fully; shorter ones count in proportion.
const TELLING_PREFILL_MS: f64 = 30.0;

/// Output tokens from which an answer measures decode steps.
const TELLING_OUTPUT_TOKENS: u32 = 8;

/// Models whose answer lengths are kept; more are not learnt.
const MAX_MODELS: usize = 4096;

/// A mean of logarithms.
#[derive(Clone, Copy, Debug)]
struct Factor {
    log: f64,
    /// `exp(log)`, since it is asked for at every decision.
    value: f64,
    weight: f64,
}

impl Default for Factor {
    fn default() -> Self {
        Self { log: 0.0, value: 1.0, weight: 0.0 }
    }
}

impl Factor {
    fn learn(&mut self, value: f64, weight: f64) {
        if !value.is_finite() || value <= 0.0 || weight <= 0.0 {
            return;
        }
        let step = if self.weight < FIRST { SLOWEST.ln() } else { STEP.ln() };
        let off = (value.ln() - self.log).clamp(-step, step);
        self.weight += weight;
        let gain = (weight / self.weight).max(GAIN * weight).min(1.0);
        self.log = (self.log + gain * off).clamp(-SLOWEST.ln(), SLOWEST.ln());
        self.value = self.log.exp();
    }
}

/// A mean that becomes exponential.
#[derive(Clone, Copy, Debug, Default)]
struct Length {
    mean: f64,
    samples: f64,
}

impl Length {
    /// Weight of a sample once there are many.
    const GAIN: f64 = 1.0 / 256.0;

    fn learn(&mut self, tokens: u32) {
        self.samples += 1.0;
        self.mean += (f64::from(tokens) - self.mean) * (1.0 / self.samples).max(Self::GAIN);
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Speed {
    prefill: Factor,
    decode: Factor,
}

/// A first token that came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Prefilled {
    pub(crate) worker: Worker,
    /// From booking to first token.
    pub(crate) waited_ms: f64,
    pub(crate) prompt_tokens: u32,
    pub(crate) cached_tokens: u32,
    /// Prefill that it had to wait for when it was booked, by the priors.
    pub(crate) prior_queue_ms: f64,
}

/// An answer that ended.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Answered {
    pub(crate) worker: Worker,
    pub(crate) model: u64,
    pub(crate) output_tokens: u32,
    /// From first token to end.
    pub(crate) decoded_ms: f64,
    /// A decode step at the load of its first token and at that of its end, averaged, by the priors.
    pub(crate) prior_step_ms: f64,
}

/// Learnt speeds and lengths.
#[derive(Debug, Default)]
pub(crate) struct Learnt {
    fleet: Speed,
    workers: Map<Worker, Speed>,
    outputs: Map<u64, Length>,
}

impl Learnt {
    /// The rates of `worker`; those of the fleet where nothing is known of it.
    pub(crate) fn rates(&self, worker: Worker) -> Rates {
        let own = self.workers.get(&worker).copied().unwrap_or_default();
        let pick = |own: Factor, fleet: Factor| if own.weight > 0.0 { own.value } else { fleet.value };
        Rates {
            prefill_factor: pick(own.prefill, self.fleet.prefill),
            decode_factor: pick(own.decode, self.fleet.decode),
            ..Rates::default()
        }
    }

    /// Output tokens to expect of a model; `None` before the first answer.
    pub(crate) fn output_tokens(&self, model: u64) -> Option<u32> {
        self.outputs.get(&model).map(|f| f.mean.round() as u32)
    }

    pub(crate) fn prefilled(&mut self, sample: &Prefilled) {
        let prior = Rates::default();
        let prior_ms = prior.prefill_ms(sample.prompt_tokens - sample.cached_tokens, sample.cached_tokens);
        let own_ms = sample.waited_ms - prior.front_end_ms(sample.prompt_tokens);
        if own_ms <= 0.0 {
            return;
        }
        // Behind a long queue it is mostly others that are measured, and how they share steps.
        let expected_ms = prior_ms + sample.prior_queue_ms;
        let weight = (prior_ms / TELLING_PREFILL_MS).min(1.0) * prior_ms / expected_ms;
        let ratio = own_ms / expected_ms;
        let start = self.fleet.prefill;
        let own = &mut self.workers.entry(sample.worker).or_default().prefill;
        if own.weight == 0.0 && start.weight > 0.0 {
            *own = Factor { weight: 0.0, ..start };
        }
        own.learn(ratio, weight);
        self.fleet.prefill.learn(ratio, weight);
    }

    pub(crate) fn answered(&mut self, sample: &Answered) {
        if let Some(length) = self.length(sample.model) {
            length.learn(sample.output_tokens);
        }
        if sample.output_tokens < TELLING_OUTPUT_TOKENS {
            return;
        }
        let ratio = sample.decoded_ms / f64::from(sample.output_tokens - 1) / sample.prior_step_ms;
        self.workers.entry(sample.worker).or_default().decode.learn(ratio, 1.0);
        self.fleet.decode.learn(ratio, 1.0);
    }

    fn length(&mut self, model: u64) -> Option<&mut Length> {
        if self.outputs.len() >= MAX_MODELS && !self.outputs.contains_key(&model) {
            return None;
        }
        Some(self.outputs.entry(model).or_default())
    }

    /// The worker is gone.
    pub(crate) fn forget(&mut self, worker: Worker) {
        self.workers.remove(&worker);
    }
}
