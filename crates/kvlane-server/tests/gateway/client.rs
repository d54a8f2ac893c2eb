//! A plain HTTP client for tests, and a router to talk to.

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HeaderMap;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use kvlane_server::config::WorkerSpec;
use kvlane_server::fleet::FleetConfig;
use kvlane_server::{ServeConfig, Server, TokenizerSetting, serve};
use serde_json::Value;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_util::sync::CancellationToken;

pub struct Router {
    pub address: SocketAddr,
    pub stop: CancellationToken,
    server: Server,
}

/// A router over these workers with quick probes; `change` sets what a test needs.
pub async fn router(workers: &[String], change: impl FnOnce(&mut ServeConfig)) -> Router {
    let specs: Vec<WorkerSpec> = workers.iter().map(|w| w.parse().unwrap()).collect();
    let mut fleet = FleetConfig::new(specs);
    fleet.probe_interval = Duration::from_millis(50);
    let mut config = ServeConfig::new("127.0.0.1:0".parse().unwrap(), fleet);
    config.tokenizer = TokenizerSetting::Engine;
    config.policy = "round-robin".parse().unwrap();
    change(&mut config);
    let stop = CancellationToken::new();
    let server = serve(config, stop.clone()).await.unwrap();
    let router = Router { address: server.address(), stop, server };
    let want = workers.len();
    for _ in 0..200 {
        let all = router.json("/kvlane/workers").await;
        let healthy = all["workers"].as_array().unwrap().iter().filter(|w| w["health"] == "healthy").count();
        if healthy >= want && router.get("/ready").await.status() == StatusCode::OK {
            return router;
        }
        tokio::time::sleep(Duration::from_millis(25)).await;
    }
    panic!("not ready: {}", router.json("/kvlane/workers").await);
}

impl Router {
    pub async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> Response<Incoming> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let mut request = Request::builder().method(method).uri(path).header("host", "kvlane");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        sender.send_request(request.body(Full::new(Bytes::copy_from_slice(body))).unwrap()).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Response<Incoming> {
        self.send(Method::GET, path, &[], b"").await
    }

    pub async fn json(&self, path: &str) -> Value {
        json(self.get(path).await).await
    }

    pub async fn post(&self, path: &str, body: &str) -> Response<Incoming> {
        self.send(Method::POST, path, &[("content-type", "application/json")], body.as_bytes()).await
    }

    /// Requests in the ledger, over all workers.
    pub async fn in_flight(&self) -> u64 {
        let all = self.json("/kvlane/workers").await;
        all["workers"].as_array().unwrap().iter().map(|w| w["in_flight"].as_u64().unwrap()).sum()
    }

    /// Waits until nothing is in flight.
    pub async fn quiet(&self) {
        for _ in 0..400 {
            if self.in_flight().await == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        panic!("still in flight: {}", self.json("/kvlane/workers").await);
    }

    pub async fn metrics(&self) -> String {
        String::from_utf8(bytes(self.get("/metrics").await).await.to_vec()).unwrap()
    }

    pub async fn end(self) {
        self.stop.cancel();
        self.server.ended().await;
    }
}

pub async fn bytes(response: Response<Incoming>) -> Bytes {
    response.into_body().collect().await.unwrap().to_bytes()
}

pub async fn json(response: Response<Incoming>) -> Value {
    serde_json::from_slice(&bytes(response).await).unwrap()
}

pub fn header<'a>(headers: &'a HeaderMap, name: &str) -> &'a str {
    headers.get(name).unwrap_or_else(|| panic!("no {name}")).to_str().unwrap()
}
