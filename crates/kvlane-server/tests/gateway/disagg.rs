//! Prefill and decode at different workers: what each engine is asked, and what happens when the hand-over is not worth it or fails.

use crate::client::{Router, bytes, header, router};
use crate::engine::{Act, Engine, Seen};
use crate::url;
use hyper::Method;
use serde_json::{Value, json};

/// What a prefill is answered with.
const PARAMS: &str = r#"{"do_remote_prefill":true,"remote_engine_id":"e","remote_block_ids":[[1,2]],"remote_host":"h","remote_port":7}"#;

fn prefilled() -> Act {
    Act::Json(200, format!(r#"{{"choices":[],"kv_transfer_params":{PARAMS}}}"#))
}

/// Of so many tokens, none of which is shared between `first`s.
fn prompt(first: usize, tokens: usize) -> String {
    let tokens: Vec<String> = (0..tokens).map(|t| (1_000 * first + t).to_string()).collect();
    format!(r#"{{ "model":"m", "prompt":[{}],"max_completion_tokens":9,"stream":false}}"#, tokens.join(","))
}

struct Fleet {
    prefill: Engine,
    decode: Engine,
    router: Router,
}

/// One engine for each part, under a policy.
async fn fleet(policy: &str) -> Fleet {
    let (prefill, decode) =
        (Engine::start(prefilled()).await, Engine::start(Act::Json(200, "{}".into())).await);
    let workers = [format!("{},role=prefill", url(&prefill)), format!("{},role=decode", url(&decode))];
    let router = router(&workers, |config| config.policy = policy.parse().unwrap()).await;
    Fleet { prefill, decode, router }
}

impl Fleet {
    /// Asks, and gives the explanation once the request ended.
    async fn ask(&self, headers: &[(&str, &str)], body: &str) -> Value {
        let response = self.router.send(Method::POST, "/v1/completions", headers, body.as_bytes()).await;
        assert_eq!(response.status(), 200);
        let id = header(response.headers(), "x-kvlane-request-id").to_owned();
        bytes(response).await;
        self.router.quiet().await;
        self.router.json(&format!("/kvlane/explain/{id}")).await
    }

    async fn count(&self, reason: &str) -> String {
        let metrics = self.router.metrics().await;
        let start = format!("kvlane_prefill_handovers_total{{reason=\"{reason}\"}} ");
        metrics.lines().find_map(|line| line.strip_prefix(&start)).unwrap_or("0").to_owned()
    }
}

fn id_of(seen: &Seen) -> &str {
    header(&seen.headers, "x-request-id")
}

#[tokio::test]
async fn a_long_prompt_is_computed_at_one_worker_and_answered_by_another() {
    let fleet = fleet("reference").await;
    let body = prompt(1, 600);
    let why = fleet.ask(&[("authorization", "Bearer k")], &body).await;
    let (first, second) = (&fleet.prefill.seen()[0], &fleet.decode.seen()[0]);
    assert_eq!((fleet.prefill.seen().len(), fleet.decode.seen().len()), (1, 1));
    let asked: Value = serde_json::from_slice(&first.body).unwrap();
    assert_eq!(
        (&asked["max_tokens"], &asked["max_completion_tokens"], &asked["stream"]),
        (&json!(1), &json!(1), &json!(false))
    );
    assert_eq!(asked["kv_transfer_params"]["do_remote_decode"], true);
    assert_eq!(asked["prompt"].as_array().unwrap().len(), 600);
    // The client's own bytes, with the engine's answer in front.
    let sent: Value = serde_json::from_str(PARAMS).unwrap();
    let rest = std::str::from_utf8(&second.body).unwrap().strip_prefix(r#"{"kv_transfer_params":"#).unwrap();
    let (params, rest) = rest.split_once(r#", "model""#).unwrap();
    assert_eq!(serde_json::from_str::<Value>(params).unwrap(), sent);
    assert_eq!(format!(r#"{{ "model"{rest}"#), body);
    assert_eq!(id_of(first), id_of(second), "engines pair the two by it");
    assert_eq!(header(&first.headers, "authorization"), "Bearer k");
    assert_eq!(
        (&why["worker"], &why["prefill"]["worker"]),
        (&json!(fleet.decode.address.to_string()), &json!(fleet.prefill.address.to_string()))
    );
    let id = why["prefill"]["id"].as_str().unwrap();
    let why = fleet.router.json(&format!("/kvlane/explain/{id}")).await;
    assert_eq!((&why["worker"], &why["outcome"]), (&json!(fleet.prefill.address.to_string()), &json!("ok")));
    assert_eq!(fleet.count("handed_over").await, "1");
    fleet.router.end().await;
}

#[tokio::test]
async fn what_is_not_worth_it_stays_whole() {
    let fleet = fleet("reference").await;
    let long = prompt(1, 600);
    fleet.ask(&[], &long).await;
    // What the worker that decodes holds need not be computed again.
    for (body, reason) in [(&prompt(2, 250), "short"), (&long, "short")] {
        let why = fleet.ask(&[], body).await;
        assert_eq!(why["prefill"], json!({ "bypassed_because": reason }));
        assert_eq!(fleet.decode.seen().last().unwrap().body, *body.as_bytes());
    }
    // Whoever names a worker, wants several answers, or does the hand-over itself is left alone.
    let several = prompt(3, 600).replace("\"stream\"", "\"n\":2,\"stream\"");
    let own = prompt(4, 600).replace("\"stream\"", "\"kv_transfer_params\":null,\"stream\"");
    let decode = fleet.decode.address.to_string();
    for (body, worker) in [(prompt(5, 600), Some(&decode)), (several, None), (own, None)] {
        let headers: Vec<_> = worker.iter().map(|name| ("x-kvlane-worker", name.as_str())).collect();
        assert_eq!(fleet.ask(&headers, &body).await["prefill"], Value::Null);
        assert_eq!(fleet.decode.seen().last().unwrap().body, *body.as_bytes());
    }
    assert_eq!(fleet.prefill.seen().len(), 1);
    assert_eq!(fleet.count("short").await, "2");
    // A worker set aside for prefill serves whole requests of those who insist on it.
    let prefill = fleet.prefill.address.to_string();
    let why = fleet.ask(&[("x-kvlane-worker", &prefill)], &prompt(6, 600)).await;
    assert_eq!(why["worker"], prefill);
    fleet.router.end().await;
}

#[tokio::test]
async fn a_prefill_that_fails_costs_time_and_nothing_else() {
    let fleet = fleet("reference").await;
    let acts = [
        (Act::Json(500, "{}".into()), "failed"),
        (Act::Json(400, "{}".into()), "failed"),
        (Act::Die, "failed"),
        (Act::Json(200, "not JSON".into()), "failed"),
        (Act::Json(200, r#"{"kv_transfer_params":null}"#.into()), "no_kv_transfer_params"),
    ];
    for (at, (act, reason)) in acts.into_iter().enumerate() {
        fleet.prefill.act(act);
        let body = prompt(at + 1, 600);
        let why = fleet.ask(&[], &body).await;
        assert_eq!(why["prefill"], json!({ "bypassed_because": reason }));
        assert_eq!(why["worker"], fleet.decode.address.to_string());
        assert_eq!(fleet.decode.seen().last().unwrap().body, body.as_bytes(), "the client's own bytes");
    }
    assert_eq!(
        (fleet.count("failed").await, fleet.count("no_kv_transfer_params").await),
        ("4".into(), "1".into())
    );
    fleet.prefill.kill();
    for _ in 0..400 {
        let workers = fleet.router.json("/kvlane/workers").await;
        if workers["workers"].as_array().unwrap().iter().any(|w| w["health"] == "down") {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(25)).await;
    }
    let why = fleet.ask(&[], &prompt(9, 600)).await;
    assert_eq!(why["prefill"], json!({ "bypassed_because": "no_prefill_worker" }));
    fleet.router.end().await;
}

/// `kv` reckons: an idle worker computes its prompt itself, one that is writing answers would stall them.
#[tokio::test]
async fn prompts_move_where_they_would_stall_answers() {
    let fleet = fleet("kv").await;
    let why = fleet.ask(&[], &prompt(1, 900)).await;
    assert_eq!(why["prefill"], json!({ "bypassed_because": "cheaper_whole" }));
    fleet.decode.act(Act::Stream(vec!["data: {\"choices\":[{\"text\":\"a\"}]}\n\n", "data: [DONE]\n\n"]));
    let mut answers = Vec::new();
    for at in 2..10 {
        let body = prompt(at, 20).replace("\"stream\":false", "\"stream\":true");
        let mut answer = fleet.router.post("/v1/completions", &body).await.into_body();
        http_body_util::BodyExt::frame(&mut answer).await.unwrap().unwrap();
        answers.push(answer);
    }
    let long = prompt(10, 900);
    fleet.decode.act(Act::Json(200, "{}".into()));
    let response = fleet.router.post("/v1/completions", &long).await;
    let id = header(response.headers(), "x-kvlane-request-id").to_owned();
    let why = fleet.router.json(&format!("/kvlane/explain/{id}")).await;
    assert_eq!(why["prefill"]["worker"], fleet.prefill.address.to_string(), "{why}");
    answers.iter().for_each(|_| fleet.decode.go_on());
    answers.iter().for_each(|_| fleet.decode.go_on());
    drop(answers);
    fleet.router.quiet().await;
    fleet.router.end().await;
}
