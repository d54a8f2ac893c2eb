//! The router itself over a restart, and beside another router: the same images, proved by the same streams.

use super::client::{get, post};
use super::replicas::{Scratch, nth, prompt};
use super::support::publishing_vllm;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, Server, serve};
use serde_json::json;
use std::net::SocketAddr;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// A running router.
pub struct Router {
    pub at: SocketAddr,
    server: Server,
    shutdown: CancellationToken,
}

impl Router {
    pub async fn start(engine: &str, change: impl FnOnce(&mut ServeConfig)) -> Self {
        let mut fleet = FleetConfig::new(vec![engine.parse().unwrap()]);
        fleet.probe_interval = Duration::from_millis(100);
        let mut config = ServeConfig::new("127.0.0.1:0".parse().unwrap(), fleet);
        change(&mut config);
        let shutdown = CancellationToken::new();
        let server = serve(config, shutdown.clone()).await.unwrap();
        Self { at: server.address(), server, shutdown }
    }

    /// Waits until a prompt that begins with the `n`-th one is predicted to have so many tokens cached.
    pub async fn until_cached(&self, n: u32, tokens: u64) {
        let longer = [prompt(n), vec![1; 8]].concat();
        let body = json!({"model": "m", "prompt": longer, "max_tokens": 1});
        let mut last = String::new();
        for _ in 0..2000 {
            let answer = post(self.at, "/kvlane/explain?path=/v1/completions", &body).await;
            if answer.status == 200 && answer.json()["predicted_cached_tokens"] == json!(tokens) {
                return;
            }
            last = answer.text;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("never {tokens} tokens of prompt {n}: {last}");
    }

    pub async fn stop(self) {
        self.shutdown.cancel();
        tokio::time::timeout(Duration::from_secs(20), self.server.ended()).await.expect("it ends");
    }
}

#[tokio::test]
async fn a_restarted_router_knows_what_the_engine_has_forgotten() {
    let scratch = Scratch::new("router");
    let (http, mut rank) = publishing_vllm("m", 4).await;
    for n in 0..6 {
        rank.publish(&[nth(n)]).await;
    }
    let keep = |config: &mut ServeConfig| config.state_dir = Some(scratch.path());
    let router = Router::start(&http.url(), keep).await;
    router.until_cached(0, 8).await;
    assert_eq!(get(router.at, "/kvlane/snapshot").await.status, 404, "nobody was named who may ask");
    router.stop().await;
    rank.publish(&[nth(6)]).await;
    rank.retain_last(2);
    let router = Router::start(&http.url(), keep).await;
    router.until_cached(6, 8).await;
    router.until_cached(0, 8).await;
    router.stop().await;
}

#[tokio::test]
async fn a_new_router_goes_on_where_its_peer_is() {
    let (http, mut rank) = publishing_vllm("m", 4).await;
    for n in 0..6 {
        rank.publish(&[nth(n)]).await;
    }
    let nobody = vec!["http://127.0.0.1:1".to_owned()];
    let old = Router::start(&http.url(), |config| config.peers = nobody).await;
    old.until_cached(5, 8).await;
    rank.retain_last(1);
    let peer = vec![format!("http://{}", old.at)];
    let new = Router::start(&http.url(), |config| config.peers = peer).await;
    new.until_cached(0, 8).await;
    assert_eq!(get(old.at, "/kvlane/snapshot?x").await.status, 400);
    old.stop().await;
    new.stop().await;
}
