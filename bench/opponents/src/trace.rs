//! A recorded conversation trace as a router sees it: queries, and the events of engines with an LRU cache each.
//!
//! The trace names 512-token blocks by chained ids; each stands for 32 blocks of 16 tokens here. Requests go to the worker with the
//! longest cached prefix unless it is far above the mean load. A worker stores what it lacked (prompt in large events, then the answer
//! block by block) and removes its least recently used blocks, deepest first.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use anyhow::Context;
use kvlane_index::{BlockHash, EngineHash, StoredBlock, Worker};
use rustc_hash::FxHashMap;

use crate::contender::Event;
use crate::workload::{engine_hashes, mix, random, removed, stored};

const TRACE_BLOCK_TOKENS: usize = 512;
const BLOCK_TOKENS: usize = 16;
/// Blocks that an engine stores with one event: what a prefill step of 2,048 tokens fills.
const EVENT_BLOCKS: usize = 128;

/// What reaches the index next.
pub enum Step {
    /// A request's prompt.
    Ask(Vec<BlockHash>),
    /// An engine's event.
    Apply(Event),
}

/// Least recently used order: oldest first and, of one request, deepest first.
type Age = (u64, Reverse<usize>, EngineHash);

struct Cache {
    capacity: usize,
    ages: FxHashMap<EngineHash, Age>,
    oldest: BTreeSet<Age>,
}

impl Cache {
    fn touch(&mut self, name: EngineHash, request: u64, depth: usize) {
        let age = (request, Reverse(depth), name);
        if let Some(before) = self.ages.insert(name, age) {
            self.oldest.remove(&before);
        }
        self.oldest.insert(age);
    }

    /// Drops what is too much, but nothing of the running request.
    fn evict(&mut self, request: u64) -> Vec<EngineHash> {
        let mut gone = Vec::new();
        while self.ages.len() > self.capacity {
            let Some(&age) = self.oldest.first() else { break };
            if age.0 == request {
                break;
            }
            self.oldest.remove(&age);
            self.ages.remove(&age.2);
            gone.push(age.2);
        }
        gone
    }
}

fn read(path: &Path) -> anyhow::Result<String> {
    let bytes =
        std::fs::read(path).with_context(|| format!("could not read the trace {}", path.display()))?;
    if path.extension().is_some_and(|e| e == "gz") {
        let mut text = String::new();
        flate2::read::GzDecoder::new(&bytes[..]).read_to_string(&mut text)?;
        return Ok(text);
    }
    Ok(String::from_utf8(bytes)?)
}

/// The steps of the first `requests` requests over `workers` caches of `capacity` blocks.
pub fn steps(path: &Path, workers: usize, capacity: usize, requests: usize) -> anyhow::Result<Vec<Step>> {
    #[derive(serde::Deserialize)]
    struct Request {
        input_length: usize,
        output_length: usize,
        hash_ids: Vec<u64>,
    }
    let new = || Cache { capacity, ages: FxHashMap::default(), oldest: BTreeSet::new() };
    let mut caches: Vec<Cache> = (0..workers).map(|_| new()).collect();
    let mut load = vec![0usize; workers];
    let mut answers = 9;
    let mut steps = Vec::new();
    for (number, line) in read(path)?.lines().take(requests).enumerate() {
        let number = number as u64;
        let request: Request = serde_json::from_str(line).context("a line of the trace")?;
        let split = (TRACE_BLOCK_TOKENS / BLOCK_TOKENS) as u64;
        let parts = |id: &u64| (0..split).map(|part| BlockHash(mix(mix(*id) ^ part))).collect::<Vec<_>>();
        let mut prompt: Vec<BlockHash> = request.hash_ids.iter().flat_map(parts).collect();
        prompt.truncate((request.input_length / BLOCK_TOKENS).max(1));
        steps.push(Step::Ask(prompt.clone()));

        let prompt_blocks = prompt.len();
        let mut blocks = prompt;
        blocks.extend((0..request.output_length / BLOCK_TOKENS).map(|_| BlockHash(random(&mut answers))));
        let names = engine_hashes(&blocks);
        let mean = load.iter().sum::<usize>() / workers;
        let cached = |w: &usize| names[..prompt_blocks].partition_point(|n| caches[*w].ages.contains_key(n));
        let chosen = (0..workers)
            .filter(|w| load[*w] <= 2 * mean + 2_000)
            .max_by_key(|w| (cached(w), Reverse(load[*w])))
            .expect("the least loaded worker is below twice the mean");
        let hit = cached(&chosen);
        load[chosen] += blocks.len() - hit;

        let cache = &mut caches[chosen];
        for (depth, name) in names.iter().enumerate() {
            cache.touch(*name, number, depth);
        }
        let worker = Worker::new(chosen as u64, 0);
        let gone = cache.evict(number);
        if !gone.is_empty() {
            steps.push(Step::Apply(removed(worker, gone)));
        }
        let mut store = |range: std::ops::Range<usize>| {
            let chain = range.clone().map(|i| StoredBlock { engine: names[i], block: blocks[i] }).collect();
            let parent = range.start.checked_sub(1).map(|i| names[i]);
            steps.push(Step::Apply(stored(worker, parent, chain)));
        };
        for start in (hit..prompt_blocks).step_by(EVENT_BLOCKS) {
            store(start..(start + EVENT_BLOCKS).min(prompt_blocks));
        }
        // A decoding engine fills one block at a time.
        for i in prompt_blocks..blocks.len() {
            store(i..i + 1);
        }
    }
    Ok(steps)
}
