//! Garbage, huge bodies and slow clients, on every call of the document.

use super::Running;
use super::client::{call, get, post};
use kvlane_server::indexer::ROUTES;
use serde_json::json;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Every call that reads a body.
fn paths_with_bodies() -> Vec<String> {
    let without = ["/reopen_logs", "/v1/reservations/{id}/prefill_complete", "/v1/reservations/{id}/renew"];
    let paths = ROUTES.iter().filter(|(method, path)| *method == "post" && !without.contains(path));
    paths.map(|(_, path)| path.replace("{id}", "1")).collect()
}

#[tokio::test]
async fn garbage_is_refused_and_nothing_breaks() {
    let indexer = Running::with(|config| config.api.allow_pausing = true).await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let huge_number = "{\"token_ids\":[99999999999],\"model_name\":\"m\"}";
    for path in paths_with_bodies() {
        for body in ["", "{", "null", "[]", "\"x\"", "\u{0}", "{\"model_name\":1}", &deep, huge_number] {
            let answer = call(indexer.at, "POST", &path, body.as_bytes()).await;
            assert!([400, 422].contains(&answer.status), "{path} {body:.20}: {answer:?}");
            assert!(!answer.error().is_empty());
            assert!(!answer.text.contains("99999999999"), "what was sent is not repeated: {answer:?}");
        }
        let answer = call(indexer.at, "POST", &path, &[0xff, 0xfe, 0x00]).await;
        assert_eq!(answer.status, 400, "{path}");
    }
    for (path, status) in [("/nothing", 404), ("/query", 405), ("/v1/overlap", 405)] {
        assert_eq!(get(indexer.at, path).await.status, status, "{path}");
    }
    assert_eq!(post(indexer.at, "/health", &json!({})).await.status, 405);
    assert_eq!(get(indexer.at, "/health").await.status, 200);
    indexer.stop().await;
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused() {
    let indexer = Running::with(|config| {
        config.api.allow_pausing = true;
        config.api.max_body_bytes = 10_000;
    })
    .await;
    for path in paths_with_bodies() {
        let answer = call(indexer.at, "POST", &path, &[b' '; 20_000]).await;
        assert_eq!(answer.status, 413, "{path}");
        assert!(answer.error().contains("10000 bytes"), "{answer:?}");
    }
    indexer.stop().await;
}

#[tokio::test]
async fn slow_clients_hold_up_nobody_and_are_hung_up_on_at_the_end() {
    let indexer = Running::with(|config| config.max_connections = 8).await;
    let mut slow = Vec::new();
    for _ in 0..7 {
        let mut stream = TcpStream::connect(indexer.at).await.unwrap();
        stream.write_all(b"POST /query HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{").await.unwrap();
        slow.push(stream);
    }
    assert_eq!(get(indexer.at, "/health").await.status, 200);
    indexer.stop().await;
    for mut stream in slow {
        let mut rest = Vec::new();
        let ended = tokio::time::timeout(Duration::from_secs(5), stream.read_to_end(&mut rest)).await;
        assert!(ended.is_ok(), "the connection is closed");
    }
}
