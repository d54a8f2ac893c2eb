//! The model beside every measurement of the calibration: `cargo test -p kvlane-engine --test calibration -- --nocapture`.
//!
//! Each measured situation is played on a whole [`Engine`], not on the formula. The bounds are what the fit reaches, rounded up;
//! they fail when a change makes it worse.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "helpers of tests, outside of test functions")]

use kvlane_engine::{Engine, EngineConfig, Request, RequestId, StepOutput, Timing};
use kvlane_index::BlockHash;
use serde_json::Value;
use std::collections::HashMap;

const CALIBRATION: &str = include_str!("../calibration/vllm-0.24-h200-llama-3.1-8b.json");

/// Errors of one kind of measurement.
struct Fit {
    name: &'static str,
    errors: Vec<f64>,
}

impl Fit {
    fn new(name: &'static str) -> Self {
        println!("\n{name:<62} {:>9} {:>9} {:>7}", "measured", "model", "error");
        Self { name, errors: Vec::new() }
    }

    fn add(&mut self, what: &str, measured: f64, model: f64) {
        let error = model / measured - 1.0;
        println!("  {what:<60} {measured:>9.2} {model:>9.2} {:>6.1}%", error * 100.0);
        self.errors.push(error);
    }

    /// Mean and largest error, as shares.
    fn within(self, mean: f64, largest: f64) {
        let count = self.errors.len() as f64;
        let (sum, worst) = self.errors.iter().fold((0.0, 0.0f64), |(s, w), e| (s + e.abs(), w.max(e.abs())));
        println!("  {} points, mean {:.1} %, largest {:.1} %", count, sum / count * 100.0, worst * 100.0);
        assert!(sum / count <= mean, "{}: mean error {:.3}", self.name, sum / count);
        assert!(worst <= largest, "{}: largest error {worst:.3}", self.name);
    }
}

/// An engine and what came out of it.
struct Bench {
    engine: Engine,
    now: u64,
    next: u64,
    /// For each request: when it was submitted, and when each of its tokens came.
    times: HashMap<RequestId, (u64, Vec<u64>)>,
}

impl Bench {
    fn new() -> Self {
        let engine = Engine::new(EngineConfig::h200_llama_8b());
        Self { engine, now: 0, next: 0, times: HashMap::new() }
    }

    /// A prompt whose blocks are those of `content`, beginning at block 0.
    fn submit(&mut self, content: u64, prompt_tokens: u32, output_tokens: u32) -> RequestId {
        let id = RequestId(self.next);
        self.next += 1;
        let blocks = (0..prompt_tokens / 16).map(|i| BlockHash(content << 32 | u64::from(i))).collect();
        let request = Request { id, prompt_tokens, output_tokens, blocks, content: None };
        self.engine.submit(self.now, request).unwrap();
        self.times.insert(id, (self.now, Vec::new()));
        id
    }

    /// Runs until `until` says so or nothing is left to do.
    fn run(&mut self, mut until: impl FnMut(&Self) -> bool) {
        let mut out = StepOutput::default();
        while !until(self) {
            let Some(at) = self.engine.next_step_at() else { return };
            self.now = self.now.max(at);
            self.engine.step(self.now, &mut out);
            for token in &out.tokens {
                self.times.get_mut(&token.request).unwrap().1.push(out.at_us);
            }
        }
    }

    fn run_to_end(&mut self) {
        self.run(|_| false);
    }

    fn ttft_ms(&self, id: RequestId) -> f64 {
        let (submitted, tokens) = &self.times[&id];
        (tokens[0] - submitted) as f64 / 1e3
    }
}

fn points<'a>(all: &'a Value, key: &str) -> &'a Vec<Value> {
    all[key].as_array().unwrap()
}

fn int(value: &Value) -> u32 {
    value.as_u64().unwrap() as u32
}

#[test]
fn prefill_of_one_prompt() {
    let all: Value = serde_json::from_str(CALIBRATION).unwrap();
    let timing = Timing::h200_llama_8b();
    let mut engine_ms = Fit::new("prefill, one at a time: engine_prefill_ms");
    for point in points(&all, "prefill_concurrency_1") {
        let (prompt, cached) = (int(&point["prompt_tokens"]), int(&point["cached_tokens"]));
        let model = timing.prefill_alone_us(prompt, cached, 8_192) as f64 / 1e3;
        let what = format!("{prompt} tokens, {cached} cached");
        engine_ms.add(&what, point["engine_prefill_ms"].as_f64().unwrap(), model);
    }
    engine_ms.within(0.035, 0.10);

    let mut ttft_ms = Fit::new("prefill, one at a time: ttft_ms");
    for point in points(&all, "prefill_concurrency_1") {
        let (prompt, cached) = (int(&point["prompt_tokens"]), int(&point["cached_tokens"]));
        let mut bench = Bench::new();
        if cached > 0 {
            bench.submit(1, cached, 1);
            bench.run_to_end();
        }
        let id = bench.submit(1, prompt, 1);
        bench.run_to_end();
        let what = format!("{prompt} tokens, {cached} cached");
        ttft_ms.add(&what, point["ttft_ms"].as_f64().unwrap(), bench.ttft_ms(id));
    }
    ttft_ms.within(0.04, 0.11);
}

#[test]
fn prompts_at_once() {
    let all: Value = serde_json::from_str(CALIBRATION).unwrap();
    let mut rate = Fit::new("prompts at once: tokens_per_s");
    for point in points(&all, "prefill_at_once") {
        let (prompt, count) = (int(&point["prompt_tokens"]), int(&point["at_once"]));
        let mut bench = Bench::new();
        let ids: Vec<_> = (0..count).map(|i| bench.submit(u64::from(i), prompt, 1)).collect();
        bench.run_to_end();
        let last_ms = ids.iter().map(|id| bench.ttft_ms(*id)).fold(0.0, f64::max);
        let model = f64::from(prompt * count) / last_ms * 1e3;
        rate.add(&format!("{count} prompts of {prompt}"), point["tokens_per_s"].as_f64().unwrap(), model);
    }
    rate.within(0.105, 0.13);
}

#[test]
fn decoding() {
    let all: Value = serde_json::from_str(CALIBRATION).unwrap();
    let mut itl = Fit::new("decoding: itl_ms");
    for point in points(&all, "decode") {
        let (context, batch) = (int(&point["context_tokens"]), int(&point["batch"]));
        let prompt = context / 1_024 * 1_024;
        let output = 2 * (context - prompt);
        let mut bench = Bench::new();
        // Warm prefixes, so that the batch starts as one.
        for i in 0..batch {
            bench.submit(u64::from(i), prompt - 1, 1);
        }
        bench.run_to_end();
        let ids: Vec<_> = (0..batch).map(|i| bench.submit(u64::from(i), prompt, output)).collect();
        bench.run_to_end();
        let mean = |id: &RequestId| {
            let tokens = &bench.times[id].1;
            (tokens[tokens.len() - 1] - tokens[0]) as f64 / 1e3 / (tokens.len() - 1) as f64
        };
        let model = ids.iter().map(mean).sum::<f64>() / f64::from(batch);
        let what = format!("batch {batch}, context {context}");
        itl.add(&what, point["itl_ms"].as_f64().unwrap(), model);
    }
    itl.within(0.02, 0.05);
}

#[test]
fn a_prompt_among_decodes() {
    let all: Value = serde_json::from_str(CALIBRATION).unwrap();
    let mut ttft = Fit::new("a prompt among decodes: ttft_ms");
    let mut stalls = Vec::new();
    for point in points(&all, "prompt_during_decodes_medians") {
        let (decodes, prompt) = (int(&point["decodes_running"]), int(&point["prompt_tokens"]));
        let cached = int(&point["cached_tokens"]);
        let mut bench = Bench::new();
        if cached > 0 {
            bench.submit(1 << 20, cached, 1);
            bench.run_to_end();
        }
        let running: Vec<_> = (0..decodes).map(|i| bench.submit(u64::from(i), 1_024, 400)).collect();
        bench.run(|bench| running.iter().all(|id| bench.times[id].1.len() > 20));
        let id = bench.submit(1 << 20, prompt, 1);
        bench.run(|bench| !bench.times[&id].1.is_empty());
        let what = format!("{prompt} tokens ({cached} cached) into {decodes} decodes");
        ttft.add(&what, point["ttft_ms"].as_f64().unwrap(), bench.ttft_ms(id));
        let gaps = |id: &RequestId| {
            let tokens = &bench.times[id].1;
            tokens.windows(2).skip(20).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
        };
        let stall = running.iter().map(gaps).max().unwrap_or(0) as f64 / 1e3;
        stalls.push((what, point["itl_max_ms"].as_f64().unwrap(), stall));
    }
    ttft.within(0.04, 0.10);
    let mut itl = Fit::new("a prompt among decodes: itl_max_ms");
    for (what, measured, model) in stalls {
        itl.add(&what, measured, model);
    }
    itl.within(0.14, 0.32);
}
