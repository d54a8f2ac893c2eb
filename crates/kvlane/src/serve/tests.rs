//! The router before mock engines, over real sockets.

use crate::mock_engine::MockEngine;
use crate::mock_engine::tests::config;
use crate::replay::client::Client;
use crate::replay::tests::ready;
use http_body_util::BodyExt;
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, serve};
use std::net::{Ipv4Addr, SocketAddr};
use tokio_util::sync::CancellationToken;

async fn json(client: &Client, path: &str) -> serde_json::Value {
    let answer = client.send(hyper::Method::GET, path, &[], None).await.expect("an answer");
    let body = answer.into_body().collect().await.expect("a body").to_bytes();
    serde_json::from_slice(&body).expect("JSON")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn long_prompts_are_computed_at_the_worker_set_aside_for_it() {
    let (prefill, decode) = (
        MockEngine::start(config(&[])).await.expect("it starts"),
        MockEngine::start(config(&[])).await.expect("it starts"),
    );
    let spec = |engine: &MockEngine, role: &str| -> WorkerSpec {
        format!("{},role={role}", engine.url()).parse().expect("a worker")
    };
    let workers = vec![spec(&prefill, "prefill"), spec(&decode, "decode")];
    let stop = CancellationToken::new();
    let mut config = ServeConfig::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)), FleetConfig::new(workers));
    // No reckoning of times: what is long is handed over.
    config.policy = "reference".parse().expect("a policy");
    let router = serve(config, stop.clone()).await.expect("it listens");
    let url = format!("http://{}", router.address());
    let client = ready(&url).await;
    let prompt: Vec<u32> = (0..600).map(|token| 1_000 + token).collect();
    let ask = async |prompt: &[u32], stream: bool| {
        let body = serde_json::json!({
            "model": "mock", "prompt": prompt, "max_tokens": 4, "stream": stream, "ignore_eos": true,
        });
        let answer = client.send(hyper::Method::POST, "/v1/completions", &[], Some(body.to_string().into()));
        let answer = answer.await.expect("an answer");
        assert_eq!(answer.status(), 200);
        let id = answer.headers()["x-kvlane-request-id"].to_str().expect("text").to_owned();
        let text = answer.into_body().collect().await.expect("a whole answer").to_bytes();
        (id, String::from_utf8(text.to_vec()).expect("text"))
    };
    let name = |engine: &MockEngine| engine.url().trim_start_matches("http://").to_owned();
    let (id, text) = ask(&prompt, true).await;
    assert!(text.ends_with("data: [DONE]\n\n") && text.matches("\"text\"").count() == 4, "{text}");
    let why = json(&client, &format!("/kvlane/explain/{id}")).await;
    assert_eq!(
        (&why["worker"], &why["prefill"]["worker"]),
        (&name(&decode).into(), &name(&prefill).into()),
        "{why}"
    );
    let first = why["prefill"]["id"].as_str().expect("an id");
    let why = json(&client, &format!("/kvlane/explain/{first}")).await;
    assert_eq!((&why["worker"], &why["outcome"]), (&name(&prefill).into(), &"ok".into()), "{why}");
    assert_eq!(prefill.snapshot().totals.prompt_tokens, 600);
    // Too short, and known at the decode worker already.
    for prompt in [&prompt[..100], &prompt[..]] {
        let (id, _) = ask(prompt, false).await;
        let why = json(&client, &format!("/kvlane/explain/{id}")).await;
        assert_eq!(why["prefill"]["bypassed_because"], "short", "{why}");
    }
    stop.cancel();
    router.ended().await;
}
