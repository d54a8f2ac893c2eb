//! TensorRT-LLM's buffered events: fetched over HTTP, from a server that has nothing but the routes that are asked for.

#![expect(clippy::panic, reason = "a failure here fails the test that called")]

use crate::support::{Http, Running, Says, trusts, vllm};
use axum::http::StatusCode;
use axum::routing::post;
use axum::{Json, Router};
use kvlane_index::{InstanceId, Overlap, Overlaps, Worker};
use kvlane_server::doctor::{Severity, examine};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

const FIRST: Worker = Worker { instance: InstanceId(0), rank: 0 };

/// Tokens in a block.
const BLOCK: usize = 4;

fn says() -> Says {
    Says {
        models: json!({"object": "list", "data": [{"id": "m", "owned_by": "tensorrt_llm", "max_model_len": 4096}]}),
        version: json!({"version": "1.2.0"}),
        metrics: String::new(),
        sources: None,
        ..vllm("m", 4, 1e9)
    }
}

/// The ring of one engine: numbers its events and gives each away once.
#[derive(Clone, Default)]
struct Ring {
    waiting: Arc<Mutex<Vec<Value>>>,
    next: Arc<Mutex<u64>>,
}

impl Ring {
    fn say(&self, window: u64, data: &Value) {
        let mut next = self.next.lock().expect("no panic");
        self.waiting
            .lock()
            .expect("no panic")
            .push(json!({"event_id": *next, "data": data, "window_size": window}));
        *next += 1;
    }

    /// As if its oldest event had been dropped before anybody came.
    fn lose(&self) {
        *self.next.lock().expect("no panic") += 1;
    }

    fn route(&self) -> Router {
        let waiting = Arc::clone(&self.waiting);
        Router::new().route(
            "/kv_cache_events",
            post(async move || Json(std::mem::take(&mut *waiting.lock().expect("no panic")))),
        )
    }
}

fn block(hash: &Value, tokens: &[u32], level: u32) -> Value {
    let tokens: Vec<Value> = tokens
        .iter()
        .map(|id| json!({"type": "unique_token", "token_id": id, "token_extra_id": 0}))
        .collect();
    json!({"type": "stored_block", "block_hash": hash, "tokens": tokens, "cache_level": level, "priority": 35})
}

fn stored(parent: &Value, blocks: &[Value]) -> Value {
    json!({"type": "stored", "parent_hash": parent, "blocks": blocks})
}

fn created() -> Value {
    json!({"type": "created", "num_blocks_per_cache_level": [100, 50]})
}

async fn running(ring: &Ring) -> (Http, Running) {
    let http = Http::start_with(says(), 0, ring.route()).await;
    let running = Running::start(&[format!("{},block-size={BLOCK}", http.url())]);
    (http, running)
}

fn overlap(running: &Running, tokens: &[u32]) -> Option<Overlap> {
    let view = running.fleet.snapshot();
    let partition = view.instance(FIRST.instance)?.partition.clone()?;
    let mut overlaps = Overlaps::default();
    partition.index.overlap(&crate::support::hashes(tokens, partition.block_size), &mut overlaps);
    overlaps.get(FIRST).copied()
}

async fn until(running: &Running, what: &str, tokens: &[u32], device: u32, host: u32) {
    for _ in 0..2000 {
        let found = overlap(running, tokens).map_or((0, 0), |o| (o.device, o.host));
        if found == (device, host) {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    panic!("{what}: {:?} of {tokens:?}; {:#?}", overlap(running, tokens), running.fleet.stats());
}

#[tokio::test]
async fn events_are_fetched_and_applied() {
    let ring = Ring::default();
    ring.say(64, &created());
    ring.say(4096, &created());
    let (_http, running) = running(&ring).await;
    running.until("it is live", |view| trusts(&view.instances[0], "live")).await;
    let prompt: Vec<u32> = (1..=14).collect();

    // Three whole blocks and the beginning of a fourth; the same in the layers of a small window. Hashes are numbers or text.
    let chain = [
        block(&json!(11), &prompt[..4], 0),
        block(&json!("12"), &prompt[4..8], 0),
        block(&json!(13), &prompt[8..12], 0),
        block(&json!(14), &prompt[12..], 0),
    ];
    ring.say(4096, &stored(&Value::Null, &chain));
    ring.say(64, &stored(&Value::Null, &chain));
    until(&running, "stored", &prompt, 3, 0).await;

    // A child finds its parent, whichever way that was printed.
    let longer: Vec<u32> = (1..=16).collect();
    ring.say(4096, &stored(&json!("13"), &[block(&json!(15), &longer[12..], 0)]));
    until(&running, "chained", &longer, 4, 0).await;

    // Down to the host and back, and another priority, which is nothing.
    let moved = |hash: u32, from: u32, to: u32| {
        json!({"type": "updated", "block_hash": hash,
               "cache_level": {"type": "event_diff", "old_value": from, "new_value": to}})
    };
    ring.say(4096, &moved(15, 0, 1));
    ring.say(4096, &moved(13, 0, 1));
    until(&running, "moved to the host", &longer, 2, 2).await;
    ring.say(4096, &moved(13, 1, 0));
    ring.say(
        4096,
        &json!({"type": "updated", "block_hash": 13, "priority": {"type": "event_diff", "old_value": 35, "new_value": 1}}),
    );
    until(&running, "one moved back", &longer, 3, 1).await;

    // A removal does not say from which level; the removal of what was never whole is no removal.
    ring.say(4096, &json!({"type": "removed", "block_hashes": [14]}));
    ring.say(4096, &json!({"type": "removed", "block_hashes": [15, 13]}));
    ring.say(64, &json!({"type": "removed", "block_hashes": [11]}));
    until(&running, "removed", &longer, 2, 0).await;
    let stats = &running.fleet.stats()[0].1;
    let drops: Vec<(&str, u64)> = stats.drops().map(|(reason, count)| (reason.name(), count)).collect();
    assert_eq!(drops, [("partial_block", 1), ("ignored_group", 2)]);
    assert_eq!((stats.gaps, stats.restarts, stats.connected), (0, 0, true));
    running.stop().await;
}

#[tokio::test]
async fn a_ring_that_overflowed_is_a_fence_and_a_counted_gap() {
    let ring = Ring::default();
    ring.say(4096, &created());
    let (_http, running) = running(&ring).await;
    ring.say(4096, &stored(&Value::Null, &[block(&json!(1), &[1, 2, 3, 4], 0)]));
    until(&running, "stored", &[1, 2, 3, 4], 1, 0).await;
    ring.lose();
    ring.say(4096, &stored(&Value::Null, &[block(&json!(2), &[5, 6, 7, 8], 0)]));
    until(&running, "stored after the gap", &[5, 6, 7, 8], 1, 0).await;
    until(&running, "forgotten", &[1, 2, 3, 4], 0, 0).await;
    running.until("it says so", |view| trusts(&view.instances[0], "rebuilding")).await;
    assert_eq!(running.fleet.stats()[0].1.gaps, 1);
    running.stop().await;
}

#[tokio::test]
async fn an_engine_that_keeps_no_events_is_told_the_setting() {
    let http = Http::start(says(), 0).await;
    let running = Running::start(&[format!("{},block-size={BLOCK}", http.url())]);
    let view = running
        .until("it is blind for a reason", |view| {
            view.instances[0].ranks.first().is_some_and(|rank| {
                rank.trust.reason().is_some_and(|why| why.contains("event_buffer_max_size"))
            })
        })
        .await;
    assert!(trusts(&view.instances[0], "blind"), "{view:#?}");
    running.stop().await;
}

#[tokio::test]
async fn the_doctor_reads_a_drain_and_names_what_is_missing() {
    let ring = Ring::default();
    ring.say(4096, &created());
    let answers = || {
        Router::new().route(
            "/v1/completions",
            post(async || Json(json!({"choices": [], "usage": {"prompt_tokens": 9}}))),
        )
    };
    let with = Http::start_with(says(), 0, ring.route().merge(answers())).await;
    let report =
        examine(&format!("{},block-size={BLOCK}", with.url()).parse().expect("a worker"), true).await;
    let of = |about: &str| report.findings.iter().filter(|f| f.about == about).cloned().collect::<Vec<_>>();
    assert_eq!(of("engine")[0].text, "tensorrt-llm 1.2.0");
    assert_eq!(of("events")[0].severity, Severity::Fine, "{report:#?}");

    let refuses =
        Router::new().route("/kv_cache_events", post(async || StatusCode::NOT_FOUND)).merge(answers());
    let without = Http::start_with(says(), 0, refuses).await;
    let report = examine(&without.url().parse().expect("a worker"), true).await;
    let of = |about: &str| report.findings.iter().filter(|f| f.about == about).cloned().collect::<Vec<_>>();
    let fix = of("events")[0].fix.clone().unwrap_or_default();
    assert!(fix.contains("event_buffer_max_size") && fix.contains("enable_block_reuse"), "{report:#?}");
    let fix = of("block size")[0].fix.clone().unwrap_or_default();
    assert!(fix.contains("block-size=TOKENS"), "{report:#?}");
}
