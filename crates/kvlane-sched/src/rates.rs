//! How long work takes at a worker, in milliseconds.
//!
//! The shape of the costs is that of a transformer: prefill is linear in the tokens computed plus the pairs of tokens that attention compares;
//! a decode step is a constant plus a share for each sequence and each token of context. The priors are a fit of vLLM 0.24 on one H200 with an
//! 8B model in bf16; each worker has learnt factors on them (see `learn.rs`), since hardware and models differ by orders of magnitude in speed and
//! little in shape.
//!
//! `prefill_ms = 5.8644 + 0.0195065 u + 9.293e-7 u (k + u/2) + 3.964e-4 k` for `u` tokens computed after `k` cached ones;
//! the front end takes `4.854 + 0.0011908 (u + k)`; `step_ms = 4.7892 + 0.0153 batch + 2.846e-5 context`.

use crate::OverlapTokens;

/// Milliseconds to compute one token of a prompt, without attention.
const COMPUTE_MS: f64 = 0.019_506_5;

/// Milliseconds to read one token of context in a decode step.
const READ_MS: f64 = 2.846e-5;

/// Speed of one worker: factors on the priors (1 = as fast, 2 = takes twice as long) and fetch times.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct Rates {
    /// Factor on prefill times.
    pub prefill_factor: f64,
    /// Factor on decode steps.
    pub decode_factor: f64,
    /// Milliseconds to fetch a token from host memory.
    pub host_ms_per_token: f64,
    /// Milliseconds to fetch a token from disk.
    pub disk_ms_per_token: f64,
    /// Milliseconds to fetch a token from external storage.
    pub external_ms_per_token: f64,
}

/// The priors. Fetches are not measured: 128 KiB a token over PCIe 5 at 25 GB/s, NVMe at 6 GB/s and a 25 Gbit/s network.
impl Default for Rates {
    fn default() -> Self {
        Self {
            prefill_factor: 1.0,
            decode_factor: 1.0,
            host_ms_per_token: 0.0053,
            disk_ms_per_token: 0.022,
            external_ms_per_token: 0.042,
        }
    }
}

impl Rates {
    /// Engine time to compute `uncached` tokens after `cached` ones.
    pub fn prefill_ms(&self, uncached: u32, cached: u32) -> f64 {
        let (u, k) = (f64::from(uncached), f64::from(cached));
        let ms = 5.8644 + COMPUTE_MS * u + 9.293e-7 * u * (k + u / 2.0) + 3.964e-4 * k;
        self.prefill_factor * ms
    }

    /// The part of a prefill that grows with the tokens computed, wherever they stand.
    pub fn computing_ms(&self, tokens: u32) -> f64 {
        self.prefill_factor * COMPUTE_MS * f64::from(tokens)
    }

    /// Time of a prompt in the engine's front end, which no queue waits for.
    pub fn front_end_ms(&self, prompt: u32) -> f64 {
        4.854 + 0.001_190_8 * f64::from(prompt)
    }

    /// One decode step of `batch` sequences with `context` tokens between them.
    pub fn step_ms(&self, batch: u32, context: u64) -> f64 {
        self.decode_factor * (4.7892 + 0.0153 * f64::from(batch) + READ_MS * context as f64)
    }

    /// The part of a decode step that reads `context` tokens.
    pub fn read_ms(&self, context: f64) -> f64 {
        self.decode_factor * READ_MS * context
    }

    /// Copying a prompt's tokens from the lower tiers.
    pub fn fetch_ms(&self, overlap: &OverlapTokens) -> f64 {
        f64::from(overlap.host) * self.host_ms_per_token
            + f64::from(overlap.disk) * self.disk_ms_per_token
            + f64::from(overlap.external) * self.external_ms_per_token
    }
}
