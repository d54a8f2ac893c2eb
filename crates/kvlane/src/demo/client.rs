//! A client of an OpenAI-compatible server, as small as the demo and the tests need it.

use anyhow::Context;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::client::legacy::Client as Pool;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Below the time after which engines close idle connections.
const IDLE: Duration = Duration::from_secs(4);

/// A pool of connections to one server.
#[derive(Clone)]
pub(crate) struct Client {
    pool: Pool<HttpConnector, Full<Bytes>>,
    base: String,
}

/// What came back for a streamed chat.
pub(crate) struct Answer {
    pub(crate) text: String,
    /// From sending the request to the first piece of text.
    pub(crate) first_token: Duration,
    pub(crate) prompt_tokens: u64,
    /// `None` if the server did not say.
    pub(crate) cached_tokens: Option<u64>,
}

impl Client {
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

    /// Sends a request, with a JSON body if there is one.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        self.send_with(method, path, &[], body).await
    }

    /// [`Self::send`] with further headers.
    pub(crate) async fn send_with(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&Value>,
    ) -> anyhow::Result<Response<Incoming>> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base))
            .header("content-type", "application/json");
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let request =
            request.body(Full::new(body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()))))?;
        self.pool.request(request).await.with_context(|| format!("no answer to {path}"))
    }

    /// The status of a GET.
    pub(crate) async fn status(&self, path: &str) -> anyhow::Result<StatusCode> {
        Ok(self.send(Method::GET, path, None).await?.status())
    }

    /// Streams a chat and reads it to its end.
    pub(crate) async fn chat(&self, body: &Value) -> anyhow::Result<Answer> {
        let started = Instant::now();
        let response = self.send(Method::POST, "/v1/chat/completions", Some(body)).await?;
        let status = response.status();
        let mut body = response.into_body();
        let mut answer = Answer {
            text: String::new(),
            first_token: Duration::ZERO,
            prompt_tokens: 0,
            cached_tokens: None,
        };
        let mut unread = Vec::new();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the stream broke off")?;
            let Some(data) = frame.data_ref() else { continue };
            unread.extend_from_slice(data);
            if !status.is_success() {
                continue;
            }
            while let Some(end) = unread.windows(2).position(|pair| pair == b"\n\n") {
                let event: Vec<u8> = unread.drain(..end + 2).collect();
                let Some(chunk) = event.strip_prefix(b"data: ").filter(|chunk| chunk.starts_with(b"{"))
                else {
                    continue;
                };
                answer.read(&serde_json::from_slice(chunk).context("a chunk is no JSON")?, started);
            }
        }
        anyhow::ensure!(status.is_success(), "{status}: {}", String::from_utf8_lossy(&unread));
        Ok(answer)
    }
}

impl Answer {
    fn read(&mut self, chunk: &Value, started: Instant) {
        if let Some(text) = chunk["choices"][0]["delta"]["content"].as_str().filter(|text| !text.is_empty()) {
            if self.text.is_empty() {
                self.first_token = started.elapsed();
            }
            self.text.push_str(text);
        }
        if let Some(prompt_tokens) = chunk["usage"]["prompt_tokens"].as_u64() {
            self.prompt_tokens = prompt_tokens;
            self.cached_tokens = chunk["usage"]["prompt_tokens_details"]["cached_tokens"].as_u64();
        }
    }
}
