//! The gateway over real sockets, in front of engines that do what a test tells them.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "tests, with their engine and client in modules of their own"
)]

mod admission;
mod bad_input;
mod batches;
mod client;
mod disagg;
mod ends;
mod engine;
mod h2;
mod parity;
mod shadow;
mod wishes;

use client::{bytes, header, json, router};
use engine::{Act, Engine, MODELS};
use http_body_util::BodyExt;
use hyper::Method;

pub(crate) const CHAT: &str = r#"{"model":"m","messages":[{"role":"user","content":"hi"}]}"#;

/// The engine as a worker without events.
pub(crate) fn url(engine: &Engine) -> String {
    format!("http://{},block-size=16,kv-events=none", engine.address)
}

#[tokio::test]
async fn bytes_pass_unchanged_both_ways() {
    let answer = "{ \"id\": 7,\n \"unknown\" : [1.50] }\n";
    let engine = Engine::start(Act::Json(200, answer.into())).await;
    let router = router(&[url(&engine)], |_| {}).await;
    let body =
        "{ \"messages\" :[ {\"role\":\"user\" , \"content\":\"\\u00e9\"}],\"x_new\": 1e3, \"model\":\"m\" }";
    let headers = [
        ("content-type", "application/json"),
        ("authorization", "Bearer k"),
        ("x-mine", "1"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
    ];
    let response = router.send(Method::POST, "/v1/chat/completions?a=b", &headers, body.as_bytes()).await;
    assert_eq!(response.status(), 200);
    assert_eq!(header(response.headers(), "x-kvlane-worker"), engine.address.to_string());
    let id = header(response.headers(), "x-kvlane-request-id").to_owned();
    assert_eq!(bytes(response).await, answer);
    let seen = &engine.seen()[0];
    assert_eq!(seen.body, body);
    assert_eq!(seen.path, "/v1/chat/completions?a=b");
    assert_eq!(header(&seen.headers, "host"), engine.address.to_string());
    assert_eq!(header(&seen.headers, "authorization"), "Bearer k");
    assert_eq!(header(&seen.headers, "x-mine"), "1");
    assert!(!seen.headers.contains_key("x-hop"));
    router.quiet().await;
    let why = router.json(&format!("/kvlane/explain/{id}")).await;
    assert_eq!(why["worker"], engine.address.to_string());
    assert_eq!(why["outcome"], "ok");
    assert_eq!(why["candidates"].as_array().unwrap().len(), 1);
    router.end().await;
}

#[tokio::test]
async fn a_stream_is_not_held_back() {
    let pieces = vec!["data: {\"a\":1}\n\n", "data: {\"b\":", "2}\n\ndata: [DONE]\n\n"];
    let engine = Engine::start(Act::Stream(pieces.clone())).await;
    let router = router(&[url(&engine)], |_| {}).await;
    let response = router.post("/v1/chat/completions", CHAT).await;
    assert_eq!(header(response.headers(), "content-type"), "text/event-stream; charset=utf-8");
    assert_eq!(header(response.headers(), "x-engine"), "kept");
    let mut body = response.into_body();
    for (i, piece) in pieces.iter().enumerate() {
        if i > 0 {
            engine.go_on();
        }
        let frame = body.frame().await.unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece);
    }
    engine.go_on();
    assert!(body.frame().await.is_none());
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn a_long_body_passes_whole() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&engine)], |_| {}).await;
    let body = format!(r#"{{"model":"m","prompt":"{}"}}"#, "é".repeat(1 << 20));
    assert_eq!(router.post("/v1/completions", &body).await.status(), 200);
    assert_eq!(engine.seen()[0].body, body);
    router.end().await;
}

#[tokio::test]
async fn connections_to_engines_are_used_again() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&engine)], |_| {}).await;
    assert_eq!(bytes(router.post("/v1/chat/completions", CHAT).await).await, "{}");
    let before = engine.completion_connections();
    for _ in 0..10 {
        assert_eq!(bytes(router.post("/v1/chat/completions", CHAT).await).await, "{}");
    }
    assert_eq!(engine.completion_connections(), before, "one connection after another, not ten");
    // An engine hangs up on idle connections whenever it likes, also when the next request is on its way.
    engine.act(Act::DieUnlessFresh);
    for _ in 0..5 {
        assert_eq!(router.post("/v1/chat/completions", CHAT).await.status(), 200);
    }
    router.end().await;
}

#[tokio::test]
async fn other_paths_go_to_the_model_that_they_name() {
    let other = r#"{"data":[{"id":"other","root":"o","parent":null,"max_model_len":10}]}"#;
    let first = Engine::start_with(Act::Json(200, "1".into()), MODELS).await;
    let second = Engine::start_with(Act::Json(200, "2".into()), other).await;
    let router = router(&[url(&first), url(&second)], |_| {}).await;
    for path in ["/v1/embeddings", "/rerank", "/v1/score", "/tokenize"] {
        for (model, want) in [("m", "1"), ("other", "2")] {
            let body = format!(r#"{{"model":"{model}","input":"x"}}"#);
            assert_eq!(bytes(router.post(path, &body).await).await, want, "{path} {model}");
        }
    }
    // Not JSON at all, such as an upload: whoever is there.
    let upload = router.send(Method::POST, "/v1/audio/transcriptions", &[], b"--x\r\n\xff").await;
    assert_eq!(upload.status(), 200);
    let models = router.json("/v1/models").await;
    let names: Vec<&str> =
        models["data"].as_array().unwrap().iter().map(|m| m["id"].as_str().unwrap()).collect();
    assert_eq!(names, ["m", "m-lora", "other"]);
    assert_eq!(models["data"][0]["max_model_len"], 1000);
    assert_eq!(router.json("/v1/models/m%2dlora").await["parent"], "m");
    assert_eq!(router.get("/v1/models/none").await.status(), 404);
    // Which of two models is meant without a name?
    let error = json(router.post("/v1/chat/completions", r#"{"messages":[]}"#).await).await;
    assert_eq!(error["error"]["param"], "model");
    router.end().await;
}

#[tokio::test]
async fn administrative_paths_are_closed_unless_allowed() {
    let first = Engine::start(Act::Json(200, r#"{"success":true}"#.into())).await;
    let second = Engine::start(Act::Json(200, r#"{"success":true}"#.into())).await;
    let workers = [url(&first), url(&second)];
    let closed = router(&workers, |_| {}).await;
    for path in ["/reset_prefix_cache", "/sleep?level=1", "/v1/load_lora_adapter", "/%73leep", "/v1//sleep"] {
        let response = closed.post(path, "{}").await;
        assert_eq!(response.status(), 403, "{path}");
        assert_eq!(json(response).await["error"]["code"], "admin_not_allowed");
    }
    assert!(first.seen().is_empty() && second.seen().is_empty());
    closed.end().await;

    let open = router(&workers, |config| config.allow_admin = true).await;
    let told = json(open.post("/reset_prefix_cache", "").await).await;
    assert_eq!(told["results"].as_array().unwrap().len(), 2);
    assert_eq!(told["results"][0]["answer"]["success"], true);
    let name = second.address.to_string();
    let one = open.send(Method::POST, "/sleep", &[("x-kvlane-worker", &name)], b"").await;
    assert_eq!(bytes(one).await, r#"{"success":true}"#);
    assert_eq!((first.seen().len(), second.seen().len()), (1, 2));
    second.act(Act::Json(500, "{}".into()));
    assert_eq!(open.post("/sleep", "").await.status(), 502);
    open.end().await;
}

#[tokio::test]
async fn a_rank_is_pinned_by_the_header() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[format!("{},ranks=2", url(&engine))], |_| {}).await;
    for _ in 0..2 {
        router.post("/v1/chat/completions", CHAT).await;
    }
    let mut ranks: Vec<String> =
        engine.seen().iter().map(|s| header(&s.headers, "x-data-parallel-rank").to_owned()).collect();
    ranks.sort();
    assert_eq!(ranks, ["0", "1"]);
    for (rank, status) in [("1", 200), ("1", 200), ("7", 400), ("x", 400)] {
        let headers = [("x-data-parallel-rank", rank)];
        let response = router.send(Method::POST, "/v1/chat/completions", &headers, CHAT.as_bytes()).await;
        assert_eq!(response.status(), status, "{rank}");
        if status == 200 {
            assert_eq!(header(response.headers(), "x-kvlane-worker"), format!("{}/1", engine.address));
        }
    }
    router.end().await;
}

#[tokio::test]
async fn a_dry_run_changes_nothing() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&engine)], |_| {}).await;
    let why = json(router.post("/kvlane/explain?path=/v1/chat/completions", CHAT).await).await;
    assert_eq!(why["worker"], engine.address.to_string());
    assert_eq!(why["policy"], "round-robin");
    assert!(engine.seen().is_empty());
    assert_eq!(router.in_flight().await, 0);
    assert_eq!(router.get("/kvlane/explain/nonsense").await.status(), 404);
    assert_eq!(router.post("/kvlane/explain?path=/v1/embeddings", CHAT).await.status(), 400);
    router.end().await;
}

#[tokio::test]
async fn predictions_are_compared_with_what_the_engine_says() {
    let usage = r#"{"usage":{"prompt_tokens":40,"prompt_tokens_details":{"cached_tokens":0}}}"#;
    let engine = Engine::start(Act::Json(200, usage.into())).await;
    let router = router(&[url(&engine)], |config| config.policy = "kv".parse().unwrap()).await;
    let tokens: Vec<String> = (0..40).map(|t| t.to_string()).collect();
    let body = format!(r#"{{"model":"m","prompt":[{}]}}"#, tokens.join(","));
    let explained = async |usage: &str| {
        engine.act(Act::Json(200, usage.into()));
        let response = router.post("/v1/completions", &body).await;
        let path = format!("/kvlane/explain/{}", header(response.headers(), "x-kvlane-request-id"));
        bytes(response).await;
        loop {
            let why = router.json(&path).await;
            if why["cause"] != "pending" {
                return (
                    why["predicted_cached_tokens"].clone(),
                    why["actual_cached_tokens"].clone(),
                    why["cause"].clone(),
                );
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
    };
    let told = |cached: u32| usage.replace(":0}", &format!(":{cached}}}"));
    assert_eq!(explained(&told(0)).await, (0.into(), 0.into(), "exact".into()));
    // Nothing is confirmed without events, but the first request's placement is remembered: 2 of 2.5 blocks.
    assert_eq!(explained(&told(32)).await, (0.into(), 32.into(), "predicted_placement".into()));
    assert_eq!(explained(&told(32).replace("40", "41")).await.2, "tokens_differ");
    assert_eq!(explained("{}").await.2, "not-reported");
    let metrics = router.metrics().await;
    assert!(
        metrics.contains(r#"kvlane_audits_total{result="under",cause="predicted_placement"} 1"#),
        "{metrics}"
    );
    assert!(metrics.contains(r#"kvlane_audits_total{result="exact",cause="exact"} 1"#), "{metrics}");
    router.end().await;
}
