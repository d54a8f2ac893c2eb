//! Requests with several prompts, several answers, or no prompt: routed as one, split when told, by load where there is nothing else.

use crate::client::{Router, bytes, header, json, router};
use crate::engine::{Act, Engine};
use crate::{CHAT, url};
use hyper::Method;

fn ids(tokens: std::ops::Range<u32>) -> String {
    let ids: Vec<String> = tokens.map(|t| t.to_string()).collect();
    format!("[{}]", ids.join(","))
}

async fn explained(router: &Router, path: &str, body: &str) -> serde_json::Value {
    let response = router.post(path, body).await;
    let id = header(response.headers(), "x-kvlane-request-id").to_owned();
    bytes(response).await;
    router.quiet().await;
    loop {
        let why = router.json(&format!("/kvlane/explain/{id}")).await;
        if why["cause"] != "pending" {
            return why;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn a_batch_goes_where_its_common_beginning_is() {
    let usage = r#"{"usage":{"prompt_tokens":80,"prompt_tokens_details":{"cached_tokens":0}}}"#;
    let first = Engine::start(Act::Json(200, usage.into())).await;
    let second = Engine::start(Act::Json(200, usage.into())).await;
    let router = router(&[url(&first), url(&second)], |config| config.policy = "kv".parse().unwrap()).await;
    let (path, a, b) = ("/v1/completions", ids(0..64), ids(0..40));
    let one = explained(&router, path, &format!(r#"{{"model":"m","prompt":{a}}}"#)).await;
    let batch = explained(&router, path, &format!(r#"{{"model":"m","prompt":[{a},{b}]}}"#)).await;
    assert_eq!((&batch["prompt_tokens"], &batch["cause"]), (&104.into(), &"batch".into()));
    // 2 whole blocks of 40 common tokens, where the first request's placement is remembered.
    let rows = batch["candidates"].as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        assert_eq!(row["cached_tokens"], if row["worker"] == one["worker"] { 32 } else { 0 }, "{batch}");
    }
    router.end().await;
}

#[tokio::test]
async fn a_split_batch_is_answered_as_one() {
    let answer =
        r#"{"id":"x","choices":[{"index":0,"text":"t"}],"usage":{"prompt_tokens":3,"completion_tokens":1}}"#;
    let engines = [
        Engine::start(Act::Json(200, answer.into())).await,
        Engine::start(Act::Json(200, answer.into())).await,
    ];
    let router = router(&engines.each_ref().map(url), |_| {}).await;
    let split = [("content-type", "application/json"), ("x-kvlane-split", "true")];
    let body = r#"{"model":"m","prompt":["a","b",[1,2]],"max_tokens":1}"#;
    let response = router.send(Method::POST, "/v1/completions", &split, body.as_bytes()).await;
    assert_eq!(response.status(), 200);
    assert_eq!(response.headers().get_all("x-kvlane-request-id").iter().count(), 3);
    let merged = json(response).await;
    assert_eq!(merged["choices"].as_array().unwrap().len(), 3);
    assert_eq!((&merged["choices"][2]["index"], &merged["usage"]["prompt_tokens"]), (&2.into(), &9.into()));
    let mut seen: Vec<String> = engines
        .iter()
        .flat_map(Engine::seen)
        .map(|s| {
            assert!(!s.headers.contains_key("x-kvlane-split"));
            String::from_utf8(s.body.to_vec()).unwrap()
        })
        .collect();
    seen.sort();
    assert_eq!(
        seen,
        [
            r#"{"model":"m","prompt":"a","max_tokens":1}"#,
            r#"{"model":"m","prompt":"b","max_tokens":1}"#,
            r#"{"model":"m","prompt":[1,2],"max_tokens":1}"#
        ]
    );
    // One prompt is no batch; a stream cannot be put together; an engine's refusal is passed on.
    let one = br#"{"model":"m","prompt":"a"}"#;
    assert_eq!(bytes(router.send(Method::POST, "/v1/completions", &split, one).await).await, answer);
    let stream = br#"{"model":"m","prompt":["a","b"],"stream":true}"#;
    assert_eq!(router.send(Method::POST, "/v1/completions", &split, stream).await.status(), 400);
    engines.iter().for_each(|engine| engine.act(Act::Json(422, r#"{"why":"no"}"#.into())));
    let refused = router.send(Method::POST, "/v1/completions", &split, body.as_bytes()).await;
    assert_eq!((refused.status().as_u16(), json(refused).await["why"].clone()), (422, "no".into()));
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn what_has_no_prompt_to_route_by_says_so() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&engine)], |config| config.policy = "kv".parse().unwrap()).await;
    for path in ["/v1/embeddings", "/v1/score", "/rerank", "/v1/rerank", "/pooling", "/classify"] {
        let why = explained(&router, path, r#"{"model":"m","input":"x","documents":["y"]}"#).await;
        assert_eq!(
            (&why["tokens_from"], &why["tokens_unknown_because"]),
            (&"unknown".into(), &"endpoint".into()),
            "{path}"
        );
    }
    let media = CHAT.replace(r#""hi""#, r#"[{"type":"image_url","image_url":{"url":"http://x/y.png"}}]"#);
    engine.tokenize(std::sync::Arc::new(|_| vec![1, 2, 3]));
    let why = explained(&router, "/v1/chat/completions", &media).await;
    assert_eq!(why["tokens_unknown_because"], "media", "{why}");
    router.end().await;
}

#[tokio::test]
async fn several_answers_and_echoes_are_told_apart() {
    let usage = |cached: u32| {
        format!(r#"{{"usage":{{"prompt_tokens":64,"prompt_tokens_details":{{"cached_tokens":{cached}}}}}}}"#)
    };
    let engine = Engine::start(Act::Json(200, usage(0))).await;
    let router = router(&[url(&engine)], |config| config.policy = "kv".parse().unwrap()).await;
    let prompt = ids(0..64);
    let ask = async |rest: &str| {
        explained(&router, "/v1/completions", &format!(r#"{{"model":"m","prompt":{prompt}{rest}}}"#)).await
    };
    assert_eq!(ask("").await["cause"], "exact");
    assert_eq!(ask(r#","n":2"#).await["cause"], "several-answers");
    // An engine that is asked for the prompt's probabilities computes all of it, whatever it holds.
    for rest in [r#","echo":true,"logprobs":1"#, r#","prompt_logprobs":0"#] {
        let why = ask(rest).await;
        assert_eq!(why["candidates"][0]["cached_tokens"], 0, "{rest}: {why}");
        assert_eq!((&why["predicted_cached_tokens"], &why["cause"]), (&0.into(), &"exact".into()), "{rest}");
    }
    engine.act(Act::Json(200, usage(48)));
    let why = ask(r#","echo":true"#).await;
    assert_eq!(why["cause"], "predicted_placement", "an echo alone reads the cache: {why}");
    router.end().await;
}
