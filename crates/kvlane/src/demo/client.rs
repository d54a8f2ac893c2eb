//! A client of an OpenAI-compatible server, as small as the demo and the tests need it.

use crate::http_client::HttpClient;
use anyhow::Context;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, Response, StatusCode};
use serde_json::Value;
use std::time::{Duration, Instant};

/// A client of one server.
#[derive(Clone)]
pub(crate) struct Client(HttpClient);

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
        Self(HttpClient::new(base))
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
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        self.0.send(method, path, headers, body).await
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
