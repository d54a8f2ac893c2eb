//! Engines that speak HTTP/2: the same answers over a few shared connections.

use crate::client::{bytes, header, router};
use crate::engine::{Act, Engine};
use crate::{CHAT, url};
use http_body_util::BodyExt;
use hyper::Version;
use std::time::Duration;

const EVENT: &str = "data: {\"choices\":[]}\n\n";

fn h2(engine: &Engine) -> String {
    format!("{},http=2", url(engine))
}

#[tokio::test]
async fn requests_share_a_connection_and_pass_unchanged() {
    let engine = Engine::start(Act::Json(200, r#"{"a":1}"#.into())).await;
    let router = router(&[h2(&engine)], |_| {}).await;
    let first = router.post("/v1/chat/completions?a=b", CHAT).await;
    assert_eq!(header(first.headers(), "x-kvlane-worker"), engine.address.to_string());
    assert_eq!(bytes(first).await, r#"{"a":1}"#);
    let many = (0..32).map(|_| async { bytes(router.post("/v1/chat/completions", CHAT).await).await });
    for answer in futures_util::future::join_all(many).await {
        assert_eq!(answer, r#"{"a":1}"#);
    }
    let seen = engine.seen();
    assert_eq!(seen[0].path, "/v1/chat/completions?a=b");
    assert!(seen.iter().all(|s| s.version == Version::HTTP_2 && s.body == CHAT));
    assert_eq!(engine.completion_connections(), 1, "33 requests on one connection");
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn a_stream_is_not_held_back() {
    let pieces = vec![EVENT, "data: {\"b\":", "2}\n\ndata: [DONE]\n\n"];
    let engine = Engine::start(Act::Stream(pieces.clone())).await;
    let router = router(&[h2(&engine)], |_| {}).await;
    let mut body = router.post("/v1/chat/completions", CHAT).await.into_body();
    for (i, piece) in pieces.iter().enumerate() {
        if i > 0 {
            engine.go_on();
        }
        assert_eq!(body.frame().await.unwrap().unwrap().into_data().unwrap(), piece);
    }
    engine.go_on();
    assert!(body.frame().await.is_none());
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn a_client_that_leaves_ends_its_stream_and_no_other() {
    let engine = Engine::start(Act::Stream(vec![EVENT, EVENT])).await;
    let router = router(&[h2(&engine)], |_| {}).await;
    let mut stays = router.post("/v1/chat/completions", CHAT).await.into_body();
    stays.frame().await.unwrap().unwrap();
    for left in 1..4 {
        let mut leaves = router.post("/v1/chat/completions", CHAT).await.into_body();
        leaves.frame().await.unwrap().unwrap();
        drop(leaves);
        let noticed = tokio::time::timeout(Duration::from_secs(1), engine.was_left(left)).await;
        assert!(noticed.is_ok(), "the engine still works for nobody");
    }
    engine.go_on();
    engine.go_on();
    assert_eq!(stays.frame().await.unwrap().unwrap().into_data().unwrap(), EVENT);
    assert!(stays.frame().await.is_none());
    router.quiet().await;
    router.end().await;
}

#[tokio::test]
async fn a_worker_that_gives_no_byte_is_followed_by_the_next() {
    for act in [Act::Die, Act::DieAfterHead, Act::Json(503, "{}".into())] {
        let bad = Engine::start(act.clone()).await;
        let good = Engine::start(Act::Json(200, "{}".into())).await;
        let router = router(&[h2(&bad), h2(&good)], |_| {}).await;
        for _ in 0..4 {
            let response = router.post("/v1/chat/completions", CHAT).await;
            assert_eq!(response.status(), 200, "{act:?}");
            assert_eq!(header(response.headers(), "x-kvlane-worker"), good.address.to_string());
        }
        assert!(!bad.seen().is_empty(), "{act:?}: it was never asked");
        bad.kill();
        assert_eq!(router.post("/v1/chat/completions", CHAT).await.status(), 200);
        router.quiet().await;
        router.end().await;
    }
}
