//! Each kind of bad input gets an error in OpenAI's shape that says what to do, and stops no other request.

use crate::client::{bytes, json, router};
use crate::engine::{Act, Engine};
use crate::{CHAT, url};
use hyper::Method;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

#[tokio::test]
async fn each_gets_an_error_that_says_what_to_do() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&engine)], |config| {
        config.policy = "kv".parse().unwrap();
        config.max_body_bytes = 100_000;
    })
    .await;
    let (chat, completions) = ("/v1/chat/completions", "/v1/completions");
    let long: Vec<String> = (0..1000).map(|t| t.to_string()).collect();
    let long = format!(r#"{{"model":"m","prompt":[{}]}}"#, long.join(","));
    let huge = format!(r#"{{"model":"m","prompt":"{}"}}"#, "x".repeat(200_000));
    let cases: &[(&str, &[u8], u16, &str)] = &[
        (chat, b"", 400, "body"),
        (chat, b"{", 400, "body"),
        (chat, b"[]", 400, "JSON object"),
        (chat, b"\xff\xfe", 400, "UTF-8"),
        (chat, br#"{"model":"m"}"#, 400, "messages"),
        (chat, br#"{"model":7,"messages":[]}"#, 400, "model"),
        (completions, br#"{"model":"m"}"#, 400, "prompt"),
        (completions, br#"{"model":"m","prompt":[1,-2]}"#, 400, "prompt"),
        (chat, br#"{"model":"none","messages":[]}"#, 404, "`m`"),
        (completions, long.as_bytes(), 400, "maximum context length is 1000 tokens"),
        (completions, huge.as_bytes(), 413, "larger than 100000 bytes"),
    ];
    for (path, body, status, says) in cases {
        let headers = [("content-type", "application/json")];
        let response = router.send(Method::POST, path, &headers, body).await;
        assert_eq!(response.status(), *status, "{path} {says}");
        let error = json(response).await["error"].clone();
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(says), "{message} does not say {says}");
        assert!(error["type"].is_string() && error.get("param").is_some() && error.get("code").is_some());
    }
    let unknown = json(router.post(chat, r#"{"model":"none","messages":[]}"#).await).await;
    assert_eq!(unknown["error"]["code"], "model_not_found");
    assert!(engine.seen().iter().all(|s| s.path == "/tokenize"), "none of these is for the engine");
    assert_eq!(bytes(router.post(chat, CHAT).await).await, "{}");
    assert_eq!(router.in_flight().await, 0);
    router.end().await;
}

#[tokio::test]
async fn deep_nesting_and_odd_bytes_are_survived() {
    let engine = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&engine)], |_| {}).await;
    let deep = format!("{{\"messages\":{}", "[".repeat(100_000));
    assert_eq!(router.post("/v1/chat/completions", &deep).await.status(), 400);
    // Not HTTP; a head without an end; a body shorter than announced; hang-ups.
    for bytes in [
        &b"\x16\x03\x01\x02\x00"[..],
        b"GET / HTTP/1.1\r\nx: ",
        b"POST /v1/completions HTTP/1.1\r\ncontent-length: 9\r\n\r\n{",
    ] {
        let mut stream = tokio::net::TcpStream::connect(router.address).await.unwrap();
        stream.write_all(bytes).await.unwrap();
        stream.shutdown().await.unwrap();
        let mut answer = Vec::new();
        let reading = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(Duration::from_secs(5), reading).await.expect("it hangs up");
    }
    assert_eq!(router.post("/v1/chat/completions", CHAT).await.status(), 200);
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn a_worker_that_is_no_engine_takes_nothing_and_says_why() {
    let engine = Engine::start_with(Act::Json(200, "{}".into()), "<html>").await;
    let spec = url(&engine);
    let mut fleet = kvlane_server::fleet::FleetConfig::new(vec![spec.parse().unwrap()]);
    fleet.probe_interval = Duration::from_millis(20);
    let stop = tokio_util::sync::CancellationToken::new();
    let config = kvlane_server::ServeConfig::new("127.0.0.1:0".parse().unwrap(), fleet);
    let server = kvlane_server::serve(config, stop.clone()).await.unwrap();
    let ask = async |path: &str| {
        let mut stream = tokio::net::TcpStream::connect(server.address()).await.unwrap();
        let request = format!("{path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n");
        let request = match path.starts_with("POST") {
            true => format!("{request}content-length: {}\r\n\r\n{CHAT}", CHAT.len()),
            false => format!("{request}\r\n"),
        };
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    while !ask("GET /kvlane/workers").await.contains("not an engine") {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert!(ask("GET /ready").await.starts_with("HTTP/1.1 503"));
    assert!(ask("GET /health").await.starts_with("HTTP/1.1 200"));
    let refused = ask("POST /v1/chat/completions").await;
    assert!(refused.starts_with("HTTP/1.1 503"), "{refused}");
    assert!(refused.contains("retry-after: 1") && refused.contains("No worker is healthy"), "{refused}");
    stop.cancel();
    server.ended().await;
}
