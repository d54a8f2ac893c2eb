//! Where a capture carries requests with their tokens and the engine's `cached_tokens`, the index answers the same.
//!
//! An engine recomputes the last token, so a prompt of n tokens can hit the whole blocks among its first n - 1 at most.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod support;

use kvlane_events::stream::{Action, Input, State};
use kvlane_events::wire::EngineKind;
use kvlane_index::hash::{Namespace, prompt_hashes};
use kvlane_index::{BlockSize, Index, IndexConfig, IndexWriter, KvEvent, Overlaps, Worker};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use support::{Follower, Line, Retained, captures, message, read};

/// One rank of the engine.
struct Rank {
    worker: Worker,
    follower: Follower,
}

/// One engine, followed over one capture or several.
struct Engine {
    block_size: BlockSize,
    writer: IndexWriter,
    index: Index,
    ranks: BTreeMap<String, Rank>,
    /// Ranks whose cache was reset without an event so far: what they answer next cannot be predicted.
    unannounced: BTreeSet<Worker>,
}

/// A request under way.
struct Open {
    request: Value,
    prompts: Vec<Vec<u32>>,
    /// For each prompt, what each rank would hit when the request came.
    predicted: Vec<BTreeMap<Worker, u64>>,
    alone: bool,
    /// Ranks that had been reset without saying so.
    unannounced: BTreeSet<Worker>,
}

#[derive(Default, Debug, PartialEq)]
struct Checked {
    requests: usize,
    hits: usize,
    after_unannounced_reset: usize,
}

impl Engine {
    /// Connects each rank right before its first live message: what is older comes from the replay.
    fn new(
        block_size: u32,
        mut retained: BTreeMap<String, Retained>,
        first_live: &BTreeMap<String, u64>,
    ) -> Self {
        let config = IndexConfig::new(BlockSize::new(block_size).unwrap());
        let block_size = config.block_size;
        let (writer, index) = kvlane_index::partition(config);
        let mut engine =
            Self { block_size, writer, index, ranks: BTreeMap::new(), unannounced: BTreeSet::new() };
        for (number, (source, &first)) in (0..).zip(first_live) {
            let worker = Worker::new(1, number);
            let mut retained = retained.remove(source).unwrap_or_default();
            retained.retain(|&seq, _| seq < first);
            let follower = Follower::new(EngineKind::Vllm, block_size.tokens(), retained);
            engine.ranks.insert(source.clone(), Rank { worker, follower });
        }
        engine.all_ranks(Input::Connected);
        engine
    }

    fn all_ranks(&mut self, input: Input<'_>) {
        for source in self.ranks.keys().cloned().collect::<Vec<_>>() {
            let Rank { worker, follower } = self.ranks.get_mut(&source).unwrap();
            let (worker, actions) = (*worker, follower.input(input));
            self.apply(worker, &actions);
        }
    }

    fn live(&mut self, source: &str, frames: &[Vec<u8>]) {
        let Rank { worker, follower } = self.ranks.get_mut(source).unwrap();
        let (worker, actions) = (*worker, follower.live(frames));
        self.apply(worker, &actions);
    }

    fn apply(&mut self, worker: Worker, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Apply(event) => {
                    if matches!(event, KvEvent::Cleared { .. }) {
                        self.unannounced.remove(&worker);
                    }
                    let _ = self.writer.apply(worker, event);
                }
                Action::Reset { .. } => {
                    let _ = self.writer.remove_worker(worker);
                }
                Action::Dropped(reason) => panic!("unexplained drop: {}", reason.name()),
                Action::RequestReplay { .. } | Action::StateChanged(_) => {}
                Action::RequestSnapshot { .. } | Action::AdoptSnapshot | Action::DropSnapshot => {
                    unreachable!()
                }
            }
        }
    }

    /// Tokens that would hit at each rank.
    fn predict(&self, tokens: &[u32], request: &Value) -> BTreeMap<Worker, u64> {
        let adapter = request["body"]["model"].as_str().filter(|&model| model != "tiny");
        let namespace =
            Namespace { adapter, salt: request["body"]["cache_salt"].as_str(), ..Namespace::default() };
        let mut hashes = Vec::new();
        prompt_hashes(&tokens[..tokens.len() - 1], self.block_size, &namespace, &mut hashes);
        let mut overlaps = Overlaps::default();
        self.index.overlap(&hashes, &mut overlaps);
        let of = |worker| overlaps.get(worker).map_or(0, |o| u64::from(o.device * self.block_size.tokens()));
        self.ranks.values().map(|rank| (rank.worker, of(rank.worker))).collect()
    }

    /// The ranks that may have answered.
    fn candidates(&self, request: &Value) -> Vec<Worker> {
        let note = request["note"].as_str().unwrap_or_default();
        let pinned = note
            .split_once("[X-data-parallel-rank: ")
            .map(|(_, r)| format!("rank{}", r.trim_end_matches(']')));
        let named = |source: &String| pinned.as_ref().is_none_or(|name| name == source);
        self.ranks.iter().filter(|(source, _)| named(source)).map(|(_, rank)| rank.worker).collect()
    }

    fn check(&mut self, open: &Open, response: &Value, checked: &mut Checked) {
        let last = response["body"].as_array().map_or(&response["body"], |chunks| chunks.last().unwrap());
        let Some(actual) = last["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64() else { return };
        let candidates = self.candidates(&open.request);
        let sum =
            |predicted: &[BTreeMap<Worker, u64>], worker| predicted.iter().map(|p| p[worker]).sum::<u64>();
        let note = &open.request["note"];
        if candidates.iter().any(|worker| open.unannounced.contains(worker)) {
            assert_eq!(actual, 0, "{note}");
            checked.after_unannounced_reset += 1;
            return;
        }
        let now: Vec<_> = open.prompts.iter().map(|tokens| self.predict(tokens, &open.request)).collect();
        let right = candidates.iter().any(|worker| {
            let before = sum(&open.predicted, worker);
            // Requests that overlap may hit what the others stored meanwhile.
            before == actual || !open.alone && (before..=sum(&now, worker)).contains(&actual)
        });
        assert!(right, "{note}: engine {actual}, index {:?}", open.predicted);
        checked.requests += 1;
        checked.hits += usize::from(actual > 0);
    }
}

/// Each prompt's tokens; none where the capture does not have them.
fn prompts(request: &Value, response: &Value) -> Vec<Vec<u32>> {
    let ids = |v: &Value| -> Option<Vec<u32>> {
        v.as_array()?.iter().map(|t| t.as_u64().map(|t| t as u32)).collect()
    };
    let body = &response["body"];
    let first = body.as_array().map_or(body, |chunks| &chunks[0]);
    let prompt = &request["body"]["prompt"];
    None.or_else(|| ids(&first["prompt_token_ids"]))
        .or_else(|| ids(&first["choices"][0]["prompt_token_ids"]))
        .or_else(|| ids(prompt))
        .map(|tokens| vec![tokens])
        .or_else(|| prompt.as_array()?.iter().map(ids).collect())
        .unwrap_or_default()
}

/// Follows captures in order as one engine and compares every answer.
fn check(names: &[&str]) -> Checked {
    let named = |file: &std::path::Path| {
        names.iter().any(|n| file.file_name().unwrap().to_str().unwrap().starts_with(n))
    };
    let lines: Vec<Line> =
        captures("vllm-0.32.0").iter().filter(|f| named(f)).flat_map(|f| read(f)).collect();
    let mut retained: BTreeMap<String, Retained> = BTreeMap::new();
    let mut first_live = BTreeMap::new();
    let mut responses = VecDeque::new();
    let mut block_size = 32;
    for line in &lines {
        match line {
            Line::Meta(meta) => block_size = meta["block_size"].as_u64().unwrap_or(32) as u32,
            Line::Frames { live, source, frames } => {
                let (seq, payload) = message(frames);
                if *live {
                    first_live.entry(source.clone()).or_insert(seq);
                } else if !payload.is_empty() {
                    retained.entry(source.clone()).or_default().insert(seq, payload.to_vec());
                }
            }
            Line::Response(response) => responses.push_back(response),
            _ => {}
        }
    }
    let mut engine = Engine::new(block_size, retained, &first_live);
    let mut checked = Checked::default();
    let mut open: VecDeque<Open> = VecDeque::new();
    for line in &lines {
        match line {
            Line::Request(request) => {
                if request["path"] == "/reset_prefix_cache" {
                    engine.unannounced.extend(engine.ranks.values().map(|rank| rank.worker));
                }
                // Requests that overlap are answered in any order, but then they are equal.
                let prompts = prompts(request, responses[open.len()]);
                let predicted = prompts.iter().map(|tokens| engine.predict(tokens, request)).collect();
                let alone = open.is_empty();
                open.iter_mut().for_each(|other| other.alone = false);
                let unannounced = engine.unannounced.clone();
                open.push_back(Open { request: request.clone(), prompts, predicted, alone, unannounced });
            }
            Line::Response(response) => {
                let open = open.pop_front().expect("a response follows a request");
                responses.pop_front();
                if !open.prompts.is_empty() {
                    engine.check(&open, response, &mut checked);
                }
            }
            Line::Frames { live: true, source, frames } => engine.live(source, frames),
            Line::Note(text) if text == "engine stopped" => {
                engine.ranks.values_mut().for_each(|rank| rank.follower.retained.clear());
                engine.all_ranks(Input::Disconnected);
            }
            Line::Note(text) if text.starts_with("engine started again") => {
                engine.all_ranks(Input::Connected);
            }
            _ => {}
        }
    }
    for rank in engine.ranks.values() {
        assert_eq!(rank.follower.stream.state(), State::Live);
    }
    checked
}

#[test]
fn one_engine_with_adapters_salts_duplicates_and_a_reset() {
    let checked = check(&["01", "02", "03", "04", "05", "06", "07", "08"]);
    assert_eq!(checked, Checked { requests: 24, hits: 13, after_unannounced_reset: 1 });
}

#[test]
fn a_small_pool_with_evictions_and_duplicate_copies() {
    let checked = check(&["10", "11", "12"]);
    assert_eq!(checked, Checked { requests: 14, hits: 1, after_unannounced_reset: 1 });
}

#[test]
fn a_hybrid_model_hits_only_where_every_group_can() {
    let checked = check(&["20"]);
    assert_eq!(checked, Checked { requests: 6, hits: 4, after_unannounced_reset: 1 });
}

#[test]
fn two_ranks_of_one_engine() {
    let checked = check(&["30"]);
    assert_eq!(checked, Checked { requests: 6, hits: 2, after_unannounced_reset: 2 });
}

#[test]
fn an_engine_that_restarts() {
    let checked = check(&["40"]);
    assert_eq!(checked, Checked { requests: 4, hits: 0, after_unannounced_reset: 0 });
}
