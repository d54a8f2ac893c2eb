//! Connections to one server, kept and used again: what the clients of `demo`, `record` and `replay` have in common.

use anyhow::Context;
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use std::time::Duration;

/// Below the time after which engines close idle connections.
const IDLE: Duration = Duration::from_secs(4);

/// A pool of connections to one server.
#[derive(Clone, Debug)]
pub(crate) struct HttpClient {
    pool: Pool<HttpConnector, Full<Bytes>>,
    base: String,
}

impl HttpClient {
    /// A client of the server at `base`, such as `http://127.0.0.1:8080`.
    pub(crate) fn new(base: impl Into<String>) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_nodelay(true);
        let pool = Pool::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE)
            .build(connector);
        Self { pool, base: base.into() }
    }

    /// Sends a request, with a JSON body if it is not empty, and gives the head of the answer.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request = request.body(Full::new(body))?;
        self.pool.request(request).await.with_context(|| format!("no answer from {}{path}", self.base))
    }
}
