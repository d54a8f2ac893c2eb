//! While every worker is saturated requests wait in the router: in order, within bounds, and only as long as somebody wants the answer.

use crate::client::{Router, bytes, header, json, router};
use crate::engine::{Act, Engine};
use crate::url;
use hyper::body::Incoming;
use hyper::{Method, Response};
use kvlane_sched::queue::QueueLimits;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// A router over `workers` whose requests may wait.
async fn waiting_room(workers: &[String], limits: QueueLimits) -> Arc<Router> {
    let router = router(workers, |config| {
        config.policy = "least-loaded".parse().unwrap();
        config.queue = Some(limits);
    });
    Arc::new(router.await)
}

/// A prompt that is prefill for minutes, so that one alone saturates a worker.
fn long(model: &str, tag: &str) -> String {
    format!(r#"{{"model":"{model}","prompt":"{tag}{}"}}"#, "x".repeat(2_000_000))
}

/// Sends without waiting for the answer.
fn send(
    router: &Arc<Router>,
    headers: &[(&'static str, &'static str)],
    body: String,
) -> JoinHandle<Response<Incoming>> {
    let (router, headers) = (Arc::clone(router), headers.to_vec());
    tokio::spawn(async move { router.send(Method::POST, "/v1/completions", &headers, body.as_bytes()).await })
}

/// Waits until so many requests wait.
async fn waits(router: &Router, count: usize) {
    let want = format!("kvlane_queue_requests {count}\n");
    for _ in 0..1000 {
        if router.metrics().await.contains(&want) {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("not {count} waiting: {}", router.metrics().await);
}

/// Waits until the engine was asked so often, and gives what it was asked last: its first letter.
async fn asked(engine: &Engine, times: usize) -> char {
    for _ in 0..1000 {
        let seen = engine.seen();
        if seen.len() >= times {
            assert_eq!(seen.len(), times);
            let body = String::from_utf8(seen[times - 1].body.to_vec()).unwrap();
            return body.split(r#""prompt":""#).nth(1).unwrap().chars().next().unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("the engine was asked {} times only", engine.seen().len());
}

async fn end(router: Arc<Router>) {
    router.quiet().await;
    Arc::into_inner(router).unwrap().end().await;
}

#[tokio::test]
async fn the_highest_class_goes_first_and_then_who_came_first() {
    let engine = Engine::start(Act::Held("{}".into())).await;
    let router = waiting_room(&[url(&engine)], QueueLimits::default()).await;
    let mut running = vec![send(&router, &[], long("m", "a"))];
    assert_eq!(asked(&engine, 1).await, 'a');
    for (at, (tag, priority)) in [("b", "0"), ("c", "-5"), ("d", "7"), ("e", "0")].into_iter().enumerate() {
        running.push(send(&router, &[("x-kvlane-priority", priority)], long("m", tag)));
        waits(&router, at + 1).await;
    }
    assert_eq!(router.in_flight().await, 1, "what waits is booked nowhere");
    for (at, tag) in ['d', 'b', 'e', 'c'].into_iter().enumerate() {
        engine.go_on();
        assert_eq!(asked(&engine, at + 2).await, tag);
    }
    engine.go_on();
    for (at, answer) in running.into_iter().enumerate() {
        let response = answer.await.unwrap();
        assert_eq!(response.status(), 200);
        let why = router
            .json(&format!("/kvlane/explain/{}", header(response.headers(), "x-kvlane-request-id")))
            .await;
        assert_eq!(why["waited_ms"].as_f64().unwrap() > 0.0, at > 0, "{why}");
        bytes(response).await;
    }
    let metrics = router.metrics().await;
    assert!(metrics.contains("kvlane_queue_seconds_count 4"), "{metrics}");
    end(router).await;
}

#[tokio::test]
async fn whoever_cannot_wait_is_told_why_and_when_to_come_back() {
    let engine = Engine::start(Act::Held("{}".into())).await;
    let limits = QueueLimits { max_requests: 2, max_wait_ms: 60_000.0, ..QueueLimits::default() };
    let router = waiting_room(&[url(&engine)], limits).await;
    let first = send(&router, &[], long("m", "a"));
    asked(&engine, 1).await;
    let refused = async |headers: &[(&'static str, &'static str)]| {
        let response = send(&router, headers, long("m", "z")).await.unwrap();
        let retry = response.headers().get("retry-after").map(|v| v.to_str().unwrap().to_owned());
        let status = response.status().as_u16();
        let error = json(response).await;
        let code = error["error"]["code"].as_str().unwrap_or_default().to_owned();
        (status, code, retry.is_some_and(|s| s.parse::<u64>().unwrap() >= 1))
    };
    assert_eq!(refused(&[("x-kvlane-deadline-ms", "60")]).await, (503, "deadline_over".into(), true));
    for wrong in ["soon", "0", "-1"] {
        assert_eq!(refused(&[("x-kvlane-deadline-ms", wrong)]).await.0, 400, "{wrong}");
    }
    assert_eq!(refused(&[("x-kvlane-priority", "101")]).await.0, 400);

    let greedy = [("x-kvlane-tenant", "greedy")];
    let second = send(&router, &greedy, long("m", "b"));
    waits(&router, 1).await;
    let third = send(&router, &greedy, long("m", "c"));
    waits(&router, 2).await;
    assert_eq!(refused(&greedy).await, (429, "queue_full".into(), true));
    // Another tenant has none waiting: the greedy one's latest gives way.
    let fourth = send(&router, &[("authorization", "Bearer k")], long("m", "d"));
    let displaced = third.await.unwrap();
    assert_eq!(displaced.status(), 429);
    assert_eq!(json(displaced).await["error"]["code"], "queue_displaced");
    for _ in 0..3 {
        engine.go_on();
    }
    for answer in [first, second, fourth] {
        assert_eq!(answer.await.unwrap().status(), 200);
    }
    let metrics = router.metrics().await;
    for reason in ["queue_full", "queue_displaced", "deadline_over"] {
        let counted = format!("kvlane_rejected_requests_total{{reason=\"{reason}\"}} 1\n");
        assert!(metrics.contains(&counted), "{reason}: {metrics}");
    }
    end(router).await;
}

#[tokio::test]
async fn nobody_waits_for_ever() {
    let engine = Engine::start(Act::Held("{}".into())).await;
    let limits = QueueLimits { max_wait_ms: 80.0, ..QueueLimits::default() };
    let router = waiting_room(&[url(&engine)], limits).await;
    let first = send(&router, &[], long("m", "a"));
    asked(&engine, 1).await;
    let refused = send(&router, &[], long("m", "b")).await.unwrap();
    assert_eq!(refused.status(), 503);
    assert_eq!(json(refused).await["error"]["code"], "queue_timeout");
    engine.go_on();
    assert_eq!(first.await.unwrap().status(), 200);
    end(router).await;
}

#[tokio::test]
async fn a_client_that_leaves_takes_its_request_out() {
    let engine = Engine::start(Act::Held("{}".into())).await;
    let router = waiting_room(&[url(&engine)], QueueLimits::default()).await;
    let first = send(&router, &[], long("m", "a"));
    asked(&engine, 1).await;
    let leaving = send(&router, &[], long("m", "b"));
    waits(&router, 1).await;
    let staying = send(&router, &[], long("m", "c"));
    waits(&router, 2).await;
    leaving.abort();
    waits(&router, 1).await;
    engine.go_on();
    assert_eq!(asked(&engine, 2).await, 'c');
    engine.go_on();
    for answer in [first, staying] {
        assert_eq!(answer.await.unwrap().status(), 200);
    }
    end(router).await;
}

#[tokio::test]
async fn a_saturated_model_holds_up_no_other() {
    let other = r#"{"data":[{"id":"other","root":"o","parent":null,"max_model_len":10}]}"#;
    let full = Engine::start(Act::Held("{}".into())).await;
    let free = Engine::start_with(Act::Json(200, "{}".into()), other).await;
    let router = waiting_room(&[url(&full), url(&free)], QueueLimits::default()).await;
    let first = send(&router, &[], long("m", "a"));
    asked(&full, 1).await;
    let second = send(&router, &[], long("m", "b"));
    waits(&router, 1).await;
    assert_eq!(send(&router, &[], r#"{"model":"other","prompt":"x"}"#.into()).await.unwrap().status(), 200);
    waits(&router, 1).await;
    full.go_on();
    full.go_on();
    for answer in [first, second] {
        assert_eq!(answer.await.unwrap().status(), 200);
    }
    end(router).await;
}

#[tokio::test]
async fn who_waits_for_a_worker_that_dies_is_told() {
    let full = Engine::start(Act::Held("{}".into())).await;
    let router = waiting_room(&[url(&full)], QueueLimits::default()).await;
    let first = send(&router, &[], long("m", "a"));
    asked(&full, 1).await;
    let second = send(&router, &[], long("m", "b"));
    waits(&router, 1).await;
    full.kill();
    for answer in [first, second] {
        assert_eq!(answer.await.unwrap().status(), 503);
    }
    end(router).await;
}
