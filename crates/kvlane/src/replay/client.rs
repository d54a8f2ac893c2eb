//! A client of an OpenAI-compatible server that times a stream's first token and reads the server's own count of cached tokens.
//!
//! A chunk is parsed until the first token was seen; after that only the one that carries the usage, so that reading costs next to nothing and the figures
//! are the server's.

use crate::http_client::HttpClient;
use anyhow::Context;
use bytes::Bytes;
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::{Method, Response};
use serde_json::Value;
use std::time::{Duration, Instant};

/// Longest error that is repeated, in characters.
const ERROR_CHARS: usize = 200;
/// Longest event of a stream.
const EVENT_BYTES_MAX: usize = 1 << 20;

/// A client of one server.
#[derive(Clone, Debug)]
pub(crate) struct Client(HttpClient);

/// What came back for one streamed request.
#[derive(Clone, Debug, Default)]
pub(crate) struct Answer {
    /// From sending to the first piece of text.
    pub(crate) first_token: Option<Duration>,
    /// `None` where the server did not say.
    pub(crate) prompt_tokens: Option<u64>,
    /// `None` where the server did not say.
    pub(crate) cached_tokens: Option<u64>,
    /// `None` where the server did not say.
    pub(crate) output_tokens: Option<u64>,
    /// Who answered, if a router says.
    pub(crate) worker: Option<String>,
}

impl Client {
    /// A client of the server at `base`, such as `http://127.0.0.1:8080`.
    pub(crate) fn new(base: &str) -> anyhow::Result<Self> {
        let base = base.trim_end_matches('/');
        let uri: hyper::Uri =
            base.parse().with_context(|| format!("{base:?} is no URL; give http://HOST:PORT"))?;
        anyhow::ensure!(
            uri.scheme_str() == Some("http") && uri.authority().is_some(),
            "{base:?} is no http URL; give http://HOST:PORT (TLS is not spoken here)"
        );
        Ok(Self(HttpClient::new(base)))
    }

    /// Sends a request and gives the head of the answer.
    pub(crate) async fn send(
        &self,
        method: Method,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<Bytes>,
    ) -> anyhow::Result<Response<Incoming>> {
        self.0.send(method, path, headers, body.unwrap_or_default()).await
    }

    /// The first model that the server lists.
    pub(crate) async fn model(&self) -> anyhow::Result<String> {
        let response = self.send(Method::GET, "/v1/models", &[], None).await?;
        let body = response.into_body().collect().await.context("/v1/models broke off")?.to_bytes();
        let models: Value = serde_json::from_slice(&body).context("/v1/models is no JSON")?;
        let name = models["data"][0]["id"].as_str();
        Ok(name.context("/v1/models lists no model; name one with --model")?.to_owned())
    }

    /// Sends a request that streams and reads the answer to its end. An error is a short reason, good for counting.
    pub(crate) async fn stream(
        &self,
        path: &str,
        headers: &[(&str, &str)],
        body: Bytes,
    ) -> Result<Answer, String> {
        let began = Instant::now();
        let sent = self.send(Method::POST, path, headers, Some(body)).await;
        let response = sent.map_err(|_| "no connection".to_owned())?;
        let status = response.status();
        let worker = response.headers().get("x-kvlane-worker");
        let mut answer = Answer {
            worker: worker.and_then(|name| name.to_str().ok()).map(str::to_owned),
            ..Answer::default()
        };
        let mut body = response.into_body();
        let mut unread: Vec<u8> = Vec::new();
        let mut done = false;
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(|_| "broke off".to_owned())?;
            let Some(data) = frame.data_ref() else { continue };
            if unread.len() + data.len() > EVENT_BYTES_MAX {
                return Err("an event of more than 1 MiB".to_owned());
            }
            unread.extend_from_slice(data);
            if !status.is_success() {
                continue;
            }
            let mut read = 0;
            while let Some(end) = unread[read..].iter().position(|byte| *byte == b'\n') {
                let line = unread[read..read + end].trim_ascii();
                read += end + 1;
                match line.strip_prefix(b"data:").map(<[u8]>::trim_ascii) {
                    Some(b"[DONE]") => done = true,
                    Some(chunk) => answer.read(chunk, began)?,
                    None => {}
                }
            }
            unread.drain(..read);
        }
        if !status.is_success() {
            return Err(refusal(status.as_u16(), &unread));
        }
        if !done {
            return Err("ended without [DONE]".to_owned());
        }
        Ok(answer)
    }
}

/// `429 queue_full`, or what else says why in few words.
fn refusal(status: u16, body: &[u8]) -> String {
    let error: Value = serde_json::from_slice(body).unwrap_or_default();
    let error = if error["error"].is_object() { &error["error"] } else { &error };
    let why = error["code"].as_str().or_else(|| error["message"].as_str()).unwrap_or_default();
    let why: String = why.chars().filter(|c| !c.is_control()).take(ERROR_CHARS).collect();
    format!("{status} {why}").trim_end().to_owned()
}

impl Answer {
    fn read(&mut self, chunk: &[u8], began: Instant) -> Result<(), String> {
        const USAGE: &[u8] = b"\"usage\"";
        let has_usage = || chunk.windows(USAGE.len()).any(|part| part == USAGE);
        if self.first_token.is_some() && !has_usage() {
            return Ok(());
        }
        let chunk: Value = serde_json::from_slice(chunk).map_err(|_| "a chunk is no JSON".to_owned())?;
        if !chunk["error"].is_null() {
            return Err("an error in the stream".to_owned());
        }
        let choice = &chunk["choices"][0];
        let said = [&choice["text"], &choice["delta"]["content"], &choice["delta"]["reasoning_content"]];
        if self.first_token.is_none() && said.iter().any(|text| text.as_str().is_some_and(|t| !t.is_empty()))
        {
            self.first_token = Some(began.elapsed());
        }
        let usage = &chunk["usage"];
        if usage.is_object() {
            self.prompt_tokens = usage["prompt_tokens"].as_u64();
            self.output_tokens = usage["completion_tokens"].as_u64();
            self.cached_tokens = usage["prompt_tokens_details"]["cached_tokens"].as_u64();
        }
        Ok(())
    }
}
