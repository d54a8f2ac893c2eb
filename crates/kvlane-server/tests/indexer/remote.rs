//! A router that asks indexers instead of hearing its engine: alike while one answers, by load and predictions when none does.

use super::Running;
use super::client::{get, post};
use super::replicas::{nth, prompt};
use super::routers::Router;
use super::support::{Event, Http, Rank, Says, publishing_vllm, vllm};
use axum::Json;
use kvlane_index::hash::Scheme;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, ServeError, serve};
use serde_json::{Value, json};
use std::net::SocketAddr;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

async fn asking(engine: &str, indexers: &[SocketAddr]) -> Router {
    let urls = indexers.iter().map(|at| format!("http://{at}")).collect();
    Router::start(engine, |config| config.indexers = urls).await
}

async fn indexer_at(listen: SocketAddr) -> Running {
    Running::with(|config| config.listen = listen).await
}

/// The value of a counter in the router's metrics; `None` = not there.
async fn metric(router: &Router, line: &str) -> Option<u64> {
    let text = get(router.at, "/metrics").await.text;
    let found = text.lines().find_map(|l| l.strip_prefix(line)?.strip_prefix(' ')?.parse().ok());
    assert!(text.contains("kvlane_remote_index_questions"), "{text}");
    found
}

async fn until(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    for _ in 0..2000 {
        if holds().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("never: {what}");
}

async fn workers(router: &Router) -> Value {
    get(router.at, "/kvlane/workers").await.json()
}

#[tokio::test]
async fn a_router_registers_its_engine_at_an_indexer_and_asks_there() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    for n in 0..6 {
        rank.publish(&[nth(n)]).await;
    }
    for scheme in Scheme::ALL {
        let indexer = Running::with(|config| config.scheme = scheme).await;
        let router = asking(&http.url(), &[indexer.at]).await;
        router.until_cached(0, 8).await;
        router.until_cached(5, 8).await;
        until("it is said to be heard there", async || {
            workers(&router).await["workers"][0]["events"] == "live"
        })
        .await;
        let seen = workers(&router).await;
        assert_eq!(seen["workers"][0]["event_stream"], Value::Null, "nothing is followed here");
        assert_eq!(
            seen["indexers"],
            json!([{"url": format!("http://{}", indexer.at), "asked": true, "trouble": null}])
        );
        // A second router finds the engine registered.
        let other = asking(&http.url(), &[indexer.at]).await;
        other.until_cached(3, 8).await;
        let registered = get(indexer.at, "/workers").await.json();
        assert_eq!(registered.as_array().map(Vec::len), Some(1), "{registered}");
        other.stop().await;
        router.stop().await;
        indexer.stop().await;
    }
    let indexer = Running::start().await;
    let router = asking(&http.url(), &[indexer.at]).await;
    router.until_cached(2, 8).await;
    // A block that the engine drops is dropped there, and its engine's number may be anybody's.
    rank.publish(&[Event::Removed(vec![21])]).await;
    router.until_cached(2, 4).await;
    router.stop().await;
    indexer.stop().await;
}

#[tokio::test]
async fn requests_are_served_by_whoever_answers_and_by_load_when_nobody_does() {
    let mut rank = Rank::start("kv", 0, 0).await;
    let says = Says { sources: Some(json!({"0": rank.source()})), ..vllm("m", 4, 1e9) };
    let answer = || async { Json(json!({"id": "x", "object": "text_completion", "choices": []})) };
    let more = axum::Router::new().route("/v1/completions", axum::routing::post(answer));
    let http = Http::start_with(says, 0, more).await;
    rank.publish(&[nth(0)]).await;
    let (first, second) = (Running::start().await, Running::start().await);
    let (at, spare) = (first.at, second.at);
    let router = asking(&http.url(), &[at, spare]).await;
    let longer = [prompt(0), vec![1; 8]].concat();
    let body = json!({"model": "m", "prompt": longer, "max_tokens": 1});
    until("both are asked", async || {
        workers(&router).await["indexers"].as_array().unwrap().iter().all(|i| i["asked"] == true)
    })
    .await;
    router.until_cached(0, 8).await;

    first.stop().await;
    router.until_cached(0, 8).await;
    let used = format!("kvlane_remote_index_questions_total{{indexer=\"http://{spare}\",outcome=\"used\"}}");
    until("the second answers", async || {
        router.until_cached(0, 8).await;
        metric(&router, &used).await.unwrap_or(0) > 0
    })
    .await;

    second.stop().await;
    for _ in 0..20 {
        let served = post(router.at, "/v1/completions", &body).await;
        assert_eq!(served.status, 200, "{served:?}");
    }
    assert!(metric(&router, "kvlane_remote_index_unanswered_total").await.unwrap() >= 20);
    until("it is said", async || {
        let seen = workers(&router).await;
        seen["workers"][0]["events"] == "blind" && seen["indexers"][0]["asked"] == false
    })
    .await;

    // Back on the same address, with nothing: it is given the engine anew, and asks it for all that it said.
    let first = indexer_at(at).await;
    router.until_cached(0, 8).await;
    router.stop().await;
    first.stop().await;
}

#[tokio::test]
async fn an_indexer_that_stops_answering_costs_a_decision_only_a_hedge() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    rank.publish(&[nth(0)]).await;
    let (first, second) = (Running::start().await, Running::start().await);
    // What stands between the router and the first indexer, and can be told to swallow everything.
    let between = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (front, back) = (between.local_addr().unwrap(), first.at);
    let silent = CancellationToken::new();
    let passing = tokio::spawn({
        let silent = silent.clone();
        async move {
            loop {
                let (client, _) = between.accept().await.unwrap();
                let server = tokio::net::TcpStream::connect(back).await.unwrap();
                let silent = silent.clone();
                tokio::spawn(async move {
                    let (mut from, mut to) = client.into_split();
                    let (mut answers, mut questions) = server.into_split();
                    let passed =
                        tokio::spawn(async move { tokio::io::copy(&mut from, &mut questions).await });
                    silent.run_until_cancelled(tokio::io::copy(&mut answers, &mut to)).await;
                    // Both connections stay open; nothing comes back any more.
                    let _ = passed.await;
                });
            }
        }
    });
    let router = asking(&http.url(), &[front, second.at]).await;
    until("both are asked", async || {
        workers(&router).await["indexers"].as_array().unwrap().iter().all(|i| i["asked"] == true)
    })
    .await;
    router.until_cached(0, 8).await;
    silent.cancel();
    until("a question is hedged", async || {
        // Whatever happens to the first, the answer is whole.
        router.until_cached(0, 8).await;
        metric(&router, "kvlane_remote_index_hedged_total").await.unwrap_or(0) > 0
    })
    .await;
    router.until_cached(0, 8).await;
    passing.abort();
    router.stop().await;
    first.stop().await;
    second.stop().await;
}

#[tokio::test]
async fn an_indexer_that_cannot_help_is_named_with_the_reason() {
    let (http, _rank) = publishing_vllm("m", 4).await;
    let told = Running::with(|config| config.knowledge = kvlane_server::indexer::Knowledge::Decisions).await;
    let nobody = "127.0.0.1:1".parse().unwrap();
    let router = asking(&http.url(), &[told.at, nobody]).await;
    let mut seen = Value::Null;
    until("both troubles are named", async || {
        seen = workers(&router).await["indexers"].clone();
        seen[0]["trouble"].as_str().is_some_and(|t| t.contains("--decisions"))
            && seen[1]["trouble"] == "it cannot be reached"
    })
    .await;
    router.stop().await;
    told.stop().await;

    let start = async |change: &dyn Fn(&mut ServeConfig)| {
        let fleet = FleetConfig::new(vec![http.url().parse().unwrap()]);
        let mut config = ServeConfig::new("127.0.0.1:0".parse().unwrap(), fleet);
        change(&mut config);
        serve(config, CancellationToken::new()).await.unwrap_err()
    };
    let error = start(&|config| config.indexers = vec!["https://x".to_owned()]).await;
    assert!(matches!(&error, ServeError::Indexer(_)) && error.to_string().contains("http://HOST:PORT"));
    let error = start(&|config| {
        config.indexers = vec!["http://x:1".to_owned()];
        config.state_dir = Some(std::env::temp_dir());
    })
    .await;
    assert!(matches!(&error, ServeError::Settings(why) if why.contains("--state-dir")), "{error}");
    let error = start(&|config| config.peers = vec!["x:2".to_owned()]).await;
    assert!(matches!(&error, ServeError::Peer(..)) && error.to_string().contains("http://HOST:PORT"));
}
