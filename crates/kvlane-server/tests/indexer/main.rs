//! The index as a service, over real sockets: engines in, answers out.

#![expect(clippy::unwrap_used, clippy::panic, reason = "a failure in a helper fails the test that called")]

mod bad_input;
mod client;
mod decisions;
mod document;
mod grpc;
mod remote;
mod replicas;
mod routers;
mod select;
#[path = "../fleet/support.rs"]
#[expect(dead_code, reason = "the fleet's tests use the rest of it")]
mod support;

use client::{get, post};
use kvlane_index::BlockSize;
use kvlane_index::hash::{Namespace, Scheme, prompt_hashes};
use kvlane_server::indexer::{Indexer, IndexerConfig, start};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use support::{Event, Rank, stored};
use tokio_util::sync::CancellationToken;

/// A running indexer that is stopped at the end of the test.
struct Running {
    at: SocketAddr,
    indexer: Indexer,
    shutdown: CancellationToken,
}

impl Running {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut IndexerConfig)) -> Self {
        let mut config = IndexerConfig::new("127.0.0.1:0".parse().unwrap());
        change(&mut config);
        let shutdown = CancellationToken::new();
        let indexer = start(config, shutdown.clone()).await.unwrap();
        Self { at: indexer.address(), indexer, shutdown }
    }

    async fn register(&self, instance: u64, rank: &Rank, block_size: u32) {
        let answer = post(self.at, "/register", &registration(instance, rank, block_size)).await;
        assert_eq!((answer.status, answer.json()), (201, json!({"status": "ok"})));
    }

    /// Asks until the answer to `/query` is so.
    async fn until_query(&self, tokens: &[u32], expected: Value) {
        self.until_post("/query", &json!({"token_ids": tokens, "model_name": "m"}), expected).await;
    }

    async fn until_post(&self, path: &str, body: &Value, expected: Value) {
        let mut last = Value::Null;
        for _ in 0..2000 {
            last = post(self.at, path, body).await.json();
            if last == expected {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("{path} answers {last}, not {expected}");
    }

    async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), self.indexer.ended()).await.expect("it ends");
    }
}

fn registration(instance: u64, rank: &Rank, block_size: u32) -> Value {
    json!({
        "instance_id": instance, "model_name": "m", "block_size": block_size, "dp_rank": 0,
        "endpoint": format!("tcp://127.0.0.1:{}", rank.events_port),
        "replay_endpoint": format!("tcp://127.0.0.1:{}", rank.replay_port),
    })
}

fn tokens(n: u32) -> Vec<u32> {
    (100..100 + n).collect()
}

fn hashes(tokens: &[u32], block_size: u32, adapter: Option<&str>, scheme: Scheme) -> Vec<i64> {
    let mut out = Vec::new();
    let namespace = Namespace { adapter, salt: None, scheme };
    prompt_hashes(tokens, BlockSize::new(block_size).unwrap(), &namespace, &mut out);
    out.iter().map(|h| h.0.cast_signed()).collect()
}

/// The answer where only device memory holds something, at rank 0 of each instance.
fn on_device(held: &[(u64, u32)]) -> Value {
    let mut scores = serde_json::Map::new();
    let mut instances = serde_json::Map::new();
    for (instance, n) in held {
        scores.insert(instance.to_string(), json!({"0": n}));
        let summary = json!({"longest_matched": n, "gpu": n, "dp": {"0": n}, "cpu": n, "disk": n});
        instances.insert(instance.to_string(), summary);
    }
    json!({"scores": scores, "frequencies": [], "instances": instances})
}

#[tokio::test]
async fn engines_that_register_are_heard_and_asked_about_in_tokens() {
    let (mut a, mut b) = (Rank::start("kv", 0, 0).await, Rank::start("kv", 0, 0).await);
    let prompt = tokens(18);
    a.publish(&[stored(1, &prompt[..16], 4)]).await;
    b.publish(&[stored(1, &prompt[..8], 4)]).await;
    let indexer = Running::start().await;
    assert_eq!(
        post(indexer.at, "/query", &json!({"token_ids": prompt, "model_name": "m"})).await.status,
        404
    );
    indexer.register(7, &a, 4).await;
    indexer.register(9, &b, 4).await;
    indexer.until_query(&prompt, on_device(&[(7, 16), (9, 8)])).await;
    b.publish(&[Event::Removed(vec![2])]).await;
    indexer.until_query(&prompt, on_device(&[(7, 16), (9, 4)])).await;
    let by_hash = json!({"block_hashes": hashes(&prompt, 4, None, Scheme::Kvlane), "model_name": "m"});
    indexer.until_post("/query_by_hash", &by_hash, on_device(&[(7, 16), (9, 4)])).await;
    indexer.until_query(&tokens(3), on_device(&[])).await;

    let workers = get(indexer.at, "/workers?model_name=m").await.json();
    assert_eq!(workers.as_array().unwrap().len(), 2);
    let endpoint = format!("tcp://127.0.0.1:{}", a.events_port);
    assert_eq!(
        workers[0],
        json!({
            "instance_id": 7, "source": "zmq", "status": "active", "model_name": "m", "routing_group": "default",
            "block_size": 4, "endpoints": {"0": endpoint}, "listeners": {"0": {"endpoint": endpoint, "status": "active"}},
        })
    );
    assert_eq!(get(indexer.at, "/workers?routing_group=other").await.json(), json!([]));

    let gone = post(indexer.at, "/unregister", &json!({"instance_id": 7, "model_name": "m"})).await;
    assert_eq!(gone.status, 200);
    indexer.until_query(&prompt, on_device(&[(9, 4)])).await;
    let gone = json!({"instance_id": 9, "model_name": "m", "routing_group": "default", "dp_rank": 0});
    assert_eq!(post(indexer.at, "/unregister", &gone).await.status, 200);
    // With its last worker a partition is gone, and may come back with another block size.
    assert_eq!(
        post(indexer.at, "/query", &json!({"token_ids": prompt, "model_name": "m"})).await.status,
        404
    );
    indexer.register(7, &a, 8).await;
    indexer.stop().await;
}

#[tokio::test]
async fn what_contradicts_a_registration_is_refused_by_name() {
    let rank = Rank::start("kv", 0, 0).await;
    let indexer = Running::start().await;
    indexer.register(7, &rank, 4).await;
    let with = |change: &dyn Fn(&mut Value)| {
        let mut body = registration(7, &rank, 4);
        change(&mut body);
        body
    };
    for (body, status, hint) in [
        (with(&|_| {}), 409, "instance 7 dp_rank 0 already registered"),
        (
            with(&|b| b["model_name"] = json!("n")),
            409,
            "already registered for model=m routing_group=default",
        ),
        (with(&|b| b["routing_group"] = json!("g")), 409, "already registered for model=m"),
        (
            with(&|b| {
                b["instance_id"] = json!(8);
                b["block_size"] = json!(8);
            }),
            409,
            "block_size mismatch for model=m routing_group=default: existing=4, requested=8",
        ),
        (with(&|b| b["block_size"] = json!(0)), 400, "block_size is 0"),
        (with(&|b| b["endpoint"] = json!("ipc:///x")), 400, "tcp://HOST:PORT"),
        (with(&|b| b["endpoint"] = json!("tcp://*:5557")), 400, "tcp://HOST:PORT"),
        (with(&|b| b["replay_endpoint"] = json!("x")), 400, "invalid replay endpoint"),
        (with(&|b| b["instance_id"] = json!(-1)), 422, "openapi"),
        (json!({"instance_id": 1}), 422, "missing field"),
    ] {
        let answer = post(indexer.at, "/register", &body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert!(answer.error().contains(hint), "{body}: {}", answer.error());
    }
    for (body, hint) in [
        (json!({"instance_id": 8, "model_name": "m"}), "instance 8 not found"),
        (json!({"instance_id": 7, "model_name": "n"}), "instance 7 is registered for model=m"),
        (
            json!({"instance_id": 7, "model_name": "m", "routing_group": "default", "dp_rank": 3}),
            "dp_rank 3 not found",
        ),
    ] {
        let answer = post(indexer.at, "/unregister", &body).await;
        assert_eq!((answer.status, answer.error().contains(hint)), (404, true), "{answer:?}");
    }
    // A routing group is a partition of its own, with a block size of its own.
    let other = with(&|b| {
        b["instance_id"] = json!(8);
        b["routing_group"] = json!("g");
        b["block_size"] = json!(8);
    });
    assert_eq!(post(indexer.at, "/register", &other).await.status, 201);
    indexer.stop().await;
}

#[tokio::test]
async fn adapters_hash_as_the_references_clients_hash_them() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let prompt = tokens(8);
    let adapted = |lora| Event::Stored {
        hashes: vec![1, 2],
        parent: None,
        tokens: prompt.clone(),
        block_size: 4,
        lora: Some(lora),
    };
    rank.publish(&[adapted("lora")]).await;
    let indexer = Running::start().await;
    indexer.register(7, &rank, 4).await;
    let with = json!({"token_ids": prompt, "model_name": "m", "lora_name": "lora"});
    indexer.until_post("/query", &with, on_device(&[(7, 8)])).await;
    indexer.until_query(&prompt, on_device(&[])).await;
    let theirs =
        json!({"block_hashes": hashes(&prompt, 4, Some("lora"), Scheme::Reference), "model_name": "m"});
    indexer.until_post("/query_by_hash", &theirs, on_device(&[(7, 8)])).await;
    let salted = json!({"block_hashes": [1], "model_name": "m", "cache_salt": "s"});
    assert_eq!(post(indexer.at, "/query_by_hash", &salted).await.status, 400);
    indexer.stop().await;
}

#[tokio::test]
async fn an_overlap_says_how_far_to_believe_it() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let prompt = tokens(12);
    rank.publish(&[stored(1, &prompt[..8], 4)]).await;
    let indexer = Running::start().await;
    indexer.register(7, &rank, 4).await;
    indexer.until_query(&prompt, on_device(&[(7, 8)])).await;
    let ask = json!({"model_name": "m", "token_ids": prompt});
    let answer = post(indexer.at, "/v1/overlap", &ask).await;
    let json = answer.json();
    assert_eq!((answer.status, &json["blocks"], &json["knowledge"]), (200, &json!(3), &json!("events")));
    let held = |n: u32| json!({"blocks": n, "tokens": n * 4});
    let rank = &json["ranks"][0];
    assert_eq!(
        (&rank["instance_id"], &rank["device"], &rank["host"]),
        (&json!(7), &held(2), &held(0)),
        "{rank}"
    );
    assert_eq!((&rank["trust"], &rank["epoch"]), (&json!("live"), &json!(0)), "{rank}");
    assert_eq!(rank["groups"], json!([{"group": 0, "rule": "full"}]));
    let own = hashes(&prompt, 4, None, Scheme::Reference);
    let by_hash = json!({"model_name": "m", "block_hashes": own, "scheme": "reference"});
    assert_eq!(post(indexer.at, "/v1/overlap", &by_hash).await.json()["ranks"][0]["device"], held(2));
    for (body, status, hint) in [
        (json!({"model_name": "m"}), 400, "either token_ids or block_hashes"),
        (json!({"model_name": "m", "token_ids": [1], "block_hashes": [1]}), 400, "either"),
        (json!({"model_name": "m", "block_hashes": [1]}), 400, "scheme is missing"),
        (
            json!({"model_name": "m", "block_hashes": [1], "scheme": "kvlane"}),
            409,
            "hashed by the scheme reference",
        ),
        (json!({"model_name": "m", "block_hashes": [1], "scheme": "md5"}), 400, "kvlane or reference"),
        (json!({"model_name": "m", "tokens": [1]}), 422, "unknown field"),
        (json!({"model_name": "x", "token_ids": [1]}), 404, "no indexer for model=x"),
    ] {
        let answer = post(indexer.at, "/v1/overlap", &body).await;
        assert_eq!(answer.status, status, "{body}: {answer:?}");
        assert!(answer.error().contains(hint), "{body}: {}", answer.error());
    }
    indexer.stop().await;
}

#[tokio::test]
async fn a_paused_listener_catches_up_when_it_is_resumed() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let prompt = tokens(8);
    let indexer = Running::with(|config| config.api.allow_pausing = true).await;
    indexer.register(7, &rank, 4).await;
    rank.publish(&[stored(1, &prompt[..4], 4)]).await;
    indexer.until_query(&prompt, on_device(&[(7, 4)])).await;
    let which = json!({"instance_id": 7});
    assert_eq!(post(indexer.at, "/test/resume_listener", &which).await.status, 409);
    assert_eq!(post(indexer.at, "/test/pause_listener", &which).await.status, 200);
    assert_eq!(post(indexer.at, "/test/pause_listener", &which).await.status, 409);
    assert_eq!(get(indexer.at, "/workers").await.json()[0]["status"], "paused");
    rank.publish(&[Event::Removed(vec![1]), stored(5, &prompt, 4)]).await;
    assert_eq!(post(indexer.at, "/test/resume_listener", &which).await.status, 200);
    indexer.until_query(&prompt, on_device(&[(7, 8)])).await;
    let nobody = json!({"instance_id": 3});
    assert_eq!(post(indexer.at, "/test/pause_listener", &nobody).await.status, 404);
    indexer.stop().await;
}

#[tokio::test]
async fn a_dump_is_what_the_references_own_indexer_starts_from() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let prompt = tokens(8);
    rank.publish(&[stored(1, &prompt, 4)]).await;
    let indexer = Running::start().await;
    assert_eq!(get(indexer.at, "/dump").await.json(), json!({}));
    indexer.register(7, &rank, 4).await;
    indexer.until_query(&prompt, on_device(&[(7, 8)])).await;
    let own: Vec<u64> = hashes(&prompt, 4, None, Scheme::Kvlane).iter().map(|h| h.cast_unsigned()).collect();
    let block =
        |engine: u64, hash: u64| json!({"block_hash": engine, "tokens_hash": hash, "mm_extra_info": null});
    assert_eq!(
        get(indexer.at, "/dump").await.json(),
        json!({"m:default": {"block_size": 4, "events": [{
            "worker_id": 7, "storage_tier": "device", "residency_domain": "worker", "event": {
                "event_id": 0, "dp_rank": 0,
                "data": {"stored": {
                    "parent_hash": null, "start_position": null, "blocks": [block(1, own[0]), block(2, own[1])],
                }},
            },
        }]}})
    );
    indexer.stop().await;
}

#[tokio::test]
async fn peers_are_kept_and_metrics_counted() {
    let indexer = Running::start().await;
    let peer = json!({"url": "http://127.0.0.1:1"});
    assert_eq!(post(indexer.at, "/deregister_peer", &peer).await.status, 404);
    assert_eq!(post(indexer.at, "/register_peer", &peer).await.status, 201);
    assert_eq!(get(indexer.at, "/peers").await.json(), json!(["http://127.0.0.1:1"]));
    assert_eq!(post(indexer.at, "/deregister_peer", &peer).await.status, 200);
    assert_eq!(post(indexer.at, "/register_peer", &json!({"url": "x"})).await.status, 400);
    assert_eq!(post(indexer.at, "/reopen_logs", &json!({})).await.status, 200);
    assert_eq!(get(indexer.at, "/health").await.status, 200);
    let text = get(indexer.at, "/metrics").await.text;
    for line in [
        "dynamo_kvindexer_requests_total{endpoint=\"/register_peer\",method=\"POST\"} 2",
        "dynamo_kvindexer_errors_total{endpoint=\"/deregister_peer\",status_class=\"4xx\"} 1",
        "dynamo_kvindexer_request_duration_seconds_count{endpoint=\"/peers\"} 1",
        "dynamo_kvindexer_models 0",
        "dynamo_kvindexer_listeners{status=\"failed\"} 0",
    ] {
        assert!(text.contains(line), "{line} is not in\n{text}");
    }
    indexer.stop().await;
}
