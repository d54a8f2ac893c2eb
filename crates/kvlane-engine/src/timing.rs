//! How long an engine's steps take: a model of one GPU, calibrated on a real engine.
//!
//! A step computes `new` prompt tokens in chunks (chunked prefill) and one token for each decoding request:
//!
//! ```text
//! step = linear(new) + attention * sum(chunk * (context + chunk / 2)) + paging(longest context)     if new > 0
//!      | idle                                                                                       otherwise
//!      + decode * decodes + read * sum(context of decodes)
//! ```
//!
//! `linear` (weights and activations: sub-linear while the batch is small, then linear) and `paging` (what a long cached
//! context costs however few tokens are computed over it) are interpolated between knots; the attention term is the exact
//! count of token pairs. A formula over (new, cached) alone, as the calibration's own fit has it, is off by up to 35 % where
//! few tokens are computed over long caches, and says nothing of several prompts in one step.
//!
//! The constants are fitted (least squares of relative errors) to `calibration/vllm-0.24-h200-llama-3.1-8b.json`:
//! vLLM 0.24, one H200, the shape of Llama-3.1-8B in bf16, 8,192 tokens a step. `tests/calibration.rs` shows the fit against
//! every measurement there.

/// A point of a piecewise linear curve: (tokens, milliseconds).
type Knot = (f64, f64);

/// The times of one kind of engine.
#[derive(Clone, PartialEq, Debug)]
pub struct Timing {
    /// Milliseconds for the prompt tokens of a step, all chunks together, without attention.
    linear: &'static [Knot],
    /// Milliseconds for the longest context that a chunk of the step is computed over.
    paging: &'static [Knot],
    /// Milliseconds for each pair of a computed token and a token that it attends to.
    attention: f64,
    /// Milliseconds of a step that only decodes, whatever it decodes.
    idle: f64,
    /// Milliseconds for each decoding request.
    decode: f64,
    /// Milliseconds for each token of context of each decoding request.
    read: f64,
    /// Milliseconds from a request's arrival at the engine's socket to its queue: fixed, and for each prompt token.
    front_end: (f64, f64),
    /// Milliseconds from the queue to the first step, and from the last step to the first token's way out.
    dispatch: f64,
    /// Milliseconds for each token that comes back from host memory.
    host_load: f64,
    /// How many times faster than measured; 0 = everything is instant.
    speed: f64,
}

impl Timing {
    /// Llama-3.1-8B in bf16 on one H200, as measured.
    pub const fn h200_llama_8b() -> Self {
        Self {
            linear: &[
                (1.0, 4.948),
                (128.0, 5.316),
                (256.0, 7.869),
                (512.0, 12.126),
                (1024.0, 21.071),
                (2048.0, 40.159),
                (4096.0, 84.725),
                (8192.0, 171.28),
            ],
            paging: &[
                (0.0, 0.0),
                (1024.0, 0.0),
                (2048.0, 0.124),
                (4096.0, 3.523),
                (8192.0, 3.79),
                (32768.0, 5.532),
            ],
            attention: 8.8787e-7,
            idle: 4.7892,
            decode: 0.0153,
            read: 2.846e-5,
            front_end: (4.854, 0.001_190_8),
            dispatch: 3.3712,
            // Not measured: 128 KiB a token over PCIe 5.0 x16 at 50 GB/s.
            host_load: 0.002_6,
            speed: 1.0,
        }
    }

    /// The same engine, `factor` times as fast; 0 (or anything that is no positive number) takes no time at all.
    pub fn faster(mut self, factor: f64) -> Self {
        let factor = if factor.is_finite() && factor > 0.0 { factor } else { 0.0 };
        self.speed *= factor;
        self
    }

    /// From a request's arrival to the moment when a step may take it up, in microseconds.
    pub fn front_end_us(&self, prompt_tokens: u32) -> u64 {
        self.us(self.front_end.0 + self.front_end.1 * f64::from(prompt_tokens) + self.dispatch)
    }

    /// Length of a step, in microseconds.
    pub fn step_us(&self, step: &StepLoad) -> u64 {
        let mut ms = self.decode * f64::from(step.decodes) + self.read * step.decode_context as f64;
        if step.new_tokens > 0 {
            ms += at(self.linear, f64::from(step.new_tokens))
                + self.attention * step.pairs
                + at(self.paging, f64::from(step.longest_context));
        } else {
            ms += self.idle;
        }
        self.us(ms)
    }

    /// Time to copy `tokens` back from host memory, in microseconds; other requests compute meanwhile.
    pub fn host_load_us(&self, tokens: u32) -> u64 {
        self.us(self.host_load * f64::from(tokens))
    }

    /// What the engine needs for one prompt on its own, from its queue to the first token, in microseconds.
    ///
    /// The calibration's `engine_prefill_ms`; add the rest of [`Self::front_end_us`] for the time to first token.
    pub fn prefill_alone_us(&self, prompt_tokens: u32, cached_tokens: u32, step_tokens: u32) -> u64 {
        let mut us = self.us(self.dispatch);
        let mut context = cached_tokens.min(prompt_tokens);
        while context < prompt_tokens {
            let new = step_tokens.max(1).min(prompt_tokens - context);
            let mut step = StepLoad::default();
            step.add_chunk(new, context);
            us += self.step_us(&step);
            context += new;
        }
        us
    }

    fn us(&self, ms: f64) -> u64 {
        if self.speed > 0.0 { (ms * 1_000.0 / self.speed).round() as u64 } else { 0 }
    }
}

/// What one step computes.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct StepLoad {
    new_tokens: u32,
    pairs: f64,
    longest_context: u32,
    decodes: u32,
    decode_context: u64,
}

impl StepLoad {
    /// Adds a chunk of a prompt: `new` tokens computed after `context` tokens that are already there.
    pub fn add_chunk(&mut self, new: u32, context: u32) {
        self.new_tokens += new;
        self.pairs += f64::from(new) * (f64::from(context) + f64::from(new) / 2.0);
        self.longest_context = self.longest_context.max(context);
    }

    /// Adds a decoding request with `context` tokens.
    pub fn add_decode(&mut self, context: u32) {
        self.decodes += 1;
        self.decode_context += u64::from(context);
    }

    /// Prompt tokens and decoded tokens of the step.
    pub fn tokens(&self) -> u32 {
        self.new_tokens + self.decodes
    }

    /// Whether the step computes nothing.
    pub fn is_empty(&self) -> bool {
        self.new_tokens == 0 && self.decodes == 0
    }
}

/// Piecewise linear through `knots`; held at the first before them, continued in the last's direction after them.
fn at(knots: &[Knot], x: f64) -> f64 {
    let after = knots.partition_point(|knot| knot.0 <= x).clamp(1, knots.len() - 1);
    let ((x0, y0), (x1, y1)) = (knots[after - 1], knots[after]);
    y0 + (y1 - y0) * (x.max(x0) - x0) / (x1 - x0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_that_share_a_step_cost_less_than_one_after_the_other() {
        let timing = Timing::h200_llama_8b();
        let mut shared = StepLoad::default();
        let mut alone = StepLoad::default();
        alone.add_chunk(512, 0);
        for _ in 0..16 {
            shared.add_chunk(512, 0);
        }
        assert!(timing.step_us(&shared) < 16 * timing.step_us(&alone));
    }

    #[test]
    fn speed_scales_everything_and_zero_is_instant() {
        let mut step = StepLoad::default();
        step.add_chunk(1000, 5000);
        let measured = Timing::h200_llama_8b();
        let (once, twice) = (measured.step_us(&step), measured.clone().faster(2.0).step_us(&step));
        assert!(once.abs_diff(2 * twice) <= 1);
        let instant = measured.faster(0.0);
        assert_eq!((instant.step_us(&step), instant.front_end_us(100)), (0, 0));
    }
}
