//! However a request ends, it is told once, and nothing of it stays behind.

use crate::client::{bytes, header, json, router};
use crate::engine::{Act, Engine};
use crate::{CHAT, url};
use http_body_util::BodyExt;
use std::time::Duration;

const EVENT: &str = "data: {\"choices\":[]}\n\n";

#[tokio::test]
async fn a_worker_that_gives_no_byte_is_followed_by_the_next() {
    for act in [Act::Json(503, "{}".into()), Act::Die, Act::DieAfterHead] {
        let bad = Engine::start(act.clone()).await;
        let good = Engine::start(Act::Json(200, "{}".into())).await;
        let router = router(&[url(&bad), url(&good)], |_| {}).await;
        for _ in 0..4 {
            let response = router.post("/v1/chat/completions", CHAT).await;
            assert_eq!(response.status(), 200, "{act:?}");
            assert_eq!(header(response.headers(), "x-kvlane-worker"), good.address.to_string());
            let path = format!("/kvlane/explain/{}", header(response.headers(), "x-kvlane-request-id"));
            bytes(response).await;
            router.quiet().await;
            let why = router.json(&path).await;
            assert_eq!(why["worker"], good.address.to_string());
        }
        assert!(!bad.seen().is_empty(), "{act:?}: it was never asked");
        router.end().await;
    }
}

#[tokio::test]
async fn a_dead_worker_is_followed_by_the_next_and_both_dead_is_503() {
    let first = Engine::start(Act::Json(200, "{}".into())).await;
    let second = Engine::start(Act::Json(200, "{}".into())).await;
    let router = router(&[url(&first), url(&second)], |config| {
        // The gateway finds out by itself.
        config.fleet.probe_interval = Duration::from_secs(600);
    })
    .await;
    first.kill();
    for _ in 0..4 {
        assert_eq!(router.post("/v1/chat/completions", CHAT).await.status(), 200);
    }
    second.kill();
    let response = router.post("/v1/chat/completions", CHAT).await;
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn a_last_5xx_is_the_engines_own() {
    let first = Engine::start(Act::Json(500, r#"{"why":"me"}"#.into())).await;
    let router = router(&[url(&first)], |_| {}).await;
    let response = router.post("/v1/chat/completions", CHAT).await;
    assert_eq!(response.status(), 500);
    assert_eq!(json(response).await["why"], "me");
    // A refusal is an answer: nobody else is asked.
    let second = Engine::start(Act::Json(400, "{}".into())).await;
    let two = router_of_two(&second).await;
    assert_eq!(two.post("/v1/chat/completions", CHAT).await.status(), 400);
    assert_eq!(second.seen().len(), 1);
    router.end().await;
    two.end().await;
}

async fn router_of_two(engine: &Engine) -> crate::client::Router {
    // The same engine under two names.
    let twin = url(engine).replace("127.0.0.1", "localhost");
    router(&[url(engine), twin], |_| {}).await
}

#[tokio::test]
async fn a_break_in_a_stream_is_an_event_and_an_end() {
    for (piece, mid_event) in [(EVENT, false), ("data: {\"cut", true)] {
        let engine = Engine::start(Act::StreamThenDie(vec![piece])).await;
        let router = router(&[url(&engine)], |_| {}).await;
        let response = router.post("/v1/chat/completions", CHAT).await;
        assert_eq!(response.status(), 200);
        engine.go_on();
        let text = String::from_utf8(bytes(response).await.to_vec()).unwrap();
        let rest = text.strip_prefix(piece).unwrap();
        let rest = if mid_event { rest.strip_prefix("\n\n").unwrap() } else { rest };
        let event = rest.strip_prefix("data: ").unwrap().strip_suffix("\n\n").unwrap();
        let error: serde_json::Value = serde_json::from_str(event).unwrap();
        assert_eq!(error["error"]["type"], "InternalServerError");
        router.quiet().await;
        assert!(router.metrics().await.contains(r#"outcome="broken"} 1"#));
        router.end().await;
    }
}

#[tokio::test]
async fn a_client_that_leaves_ends_the_engines_request() {
    // Before the answer began, and in the middle of it.
    for act in [Act::Hang, Act::Stream(vec![EVENT, EVENT])] {
        let engine = Engine::start(act.clone()).await;
        let router = router(&[url(&engine)], |_| {}).await;
        let mut left = 0;
        for _ in 0..3 {
            let asking = router.post("/v1/chat/completions", CHAT);
            match act {
                Act::Hang => {
                    let waited = tokio::time::timeout(Duration::from_millis(100), asking).await;
                    assert!(waited.is_err());
                }
                _ => {
                    let mut body = asking.await.into_body();
                    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), EVENT);
                    assert_eq!(router.in_flight().await, 1);
                }
            }
            left += 1;
            let noticed = tokio::time::timeout(Duration::from_secs(1), engine.was_left(left)).await;
            assert!(noticed.is_ok(), "{act:?}: the engine still works for nobody");
        }
        router.quiet().await;
        let metrics = router.metrics().await;
        assert!(metrics.contains(r#"outcome="client_gone"} 3"#), "{metrics}");
        router.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_is_left_of_many_clients_at_once() {
    let engines =
        [Engine::start(Act::Json(200, "{}".into())).await, Engine::start(Act::Json(200, "{}".into())).await];
    let router = router(&engines.each_ref().map(url), |_| {}).await;
    let router = std::sync::Arc::new(router);
    let clients: Vec<_> = (0..32)
        .map(|i| {
            let router = std::sync::Arc::clone(&router);
            tokio::spawn(async move {
                let mut ids = Vec::new();
                for j in 0..8 {
                    let response = router.post("/v1/chat/completions", CHAT).await;
                    assert_eq!(response.status(), 200);
                    ids.push(header(response.headers(), "x-kvlane-request-id").to_owned());
                    // Some read the answer, some do not.
                    if (i + j) % 3 > 0 {
                        bytes(response).await;
                    }
                }
                ids
            })
        })
        .collect();
    let mut ids = Vec::new();
    for client in clients {
        ids.extend(client.await.unwrap());
    }
    ids.sort();
    ids.dedup();
    assert_eq!(ids.len(), 32 * 8);
    assert_eq!(engines.iter().map(|e| e.seen().len()).sum::<usize>(), 32 * 8, "each was sent once");
    router.quiet().await;
    assert!(router.metrics().await.contains("kvlane_requests_in_flight 0"));
    std::sync::Arc::into_inner(router).unwrap().end().await;
}

#[tokio::test]
async fn a_shutdown_lets_running_requests_end() {
    let engine = Engine::start(Act::Stream(vec![EVENT, EVENT])).await;
    let router = router(&[url(&engine)], |_| {}).await;
    let mut body = router.post("/v1/chat/completions", CHAT).await.into_body();
    body.frame().await.unwrap().unwrap();
    router.stop.cancel();
    // Whoever comes now is told.
    loop {
        let ready = router.get("/ready").await;
        if ready.status() == 503 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let late = router.post("/v1/chat/completions", CHAT).await;
    assert_eq!(late.status(), 503);
    assert!(late.headers().contains_key("retry-after"));
    engine.go_on();
    engine.go_on();
    assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), EVENT);
    assert!(body.frame().await.is_none());
    tokio::time::timeout(Duration::from_secs(10), router.end())
        .await
        .expect("it ends when the last request did");
}

#[tokio::test]
async fn a_shutdown_does_not_wait_for_ever() {
    let engine = Engine::start(Act::Hang).await;
    let router = router(&[url(&engine)], |config| config.drain = Duration::from_millis(200)).await;
    let address = router.address;
    let asking = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut stream = tokio::net::TcpStream::connect(address).await.unwrap();
        let request = format!(
            "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {}\r\n\r\n{CHAT}",
            CHAT.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await
    });
    while engine.seen().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    tokio::time::timeout(Duration::from_secs(10), router.end()).await.expect("the drain has an end");
    let _ = asking.await.unwrap();
    engine.was_left(1).await;
}

/// `KVLANE_SOAK_S=600 cargo test -p kvlane-server --test gateway -- soak` runs it for ten minutes; a second is enough to see that it works.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn soak_of_streams_whose_clients_leave_at_random() {
    let seconds = std::env::var("KVLANE_SOAK_S").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let clients = if seconds > 1 { 512 } else { 64 };
    let engines = [Engine::start(Act::Steady(40)).await, Engine::start(Act::Steady(40)).await];
    let router = std::sync::Arc::new(router(&engines.each_ref().map(url), |_| {}).await);
    let until = std::time::Instant::now() + Duration::from_secs(seconds);
    let running: Vec<_> = (0..clients)
        .map(|seed| {
            let router = std::sync::Arc::clone(&router);
            tokio::spawn(async move {
                let mut draw = seed as u64 + 1;
                let mut asked = 0;
                while std::time::Instant::now() < until {
                    // A small generator of its own: the order of tasks is not repeatable anyway.
                    draw = draw.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    let pieces = (draw >> 33) % 60;
                    let mut body = router.post("/v1/chat/completions", CHAT).await.into_body();
                    for _ in 0..pieces {
                        if body.frame().await.is_none() {
                            break;
                        }
                    }
                    asked += 1;
                }
                asked
            })
        })
        .collect();
    tokio::time::sleep(Duration::from_secs(seconds) / 4).await;
    let early = rss_kib();
    let mut asked = 0;
    for client in running {
        asked += client.await.unwrap();
    }
    let gone = std::time::Instant::now();
    while engines.iter().any(|e| e.running() > 0) {
        assert!(gone.elapsed() < Duration::from_secs(1), "an engine still works for a client that left");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    router.quiet().await;
    println!("{asked} streams in {seconds} s; RSS {early} KiB after a quarter, {} KiB at the end", rss_kib());
    std::sync::Arc::into_inner(router).unwrap().end().await;
}

/// Resident memory of this process; 0 where the system does not say.
fn rss_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|kib| kib.split_whitespace().next()?.parse().ok()).unwrap_or(0)
}
