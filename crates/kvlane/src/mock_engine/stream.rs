//! Answers as server-sent events: a task writes them into a bounded channel, the response's body reads it.
//!
//! When the client leaves, the body is dropped, the channel closes, and the task ends: dropping the tickets cancels the
//! requests in the engine.

use super::generate::{Said, Step, Usage};
use super::life::Life;
use super::openai::StreamOptions;
use axum::body::Body;
use axum::http::header;
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{BoxStream, SelectAll, StreamExt as _, unfold};
use serde_json::Value;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Chunks between the task and the body.
const QUEUE_CHUNKS: usize = 64;

/// How one endpoint writes its chunks.
pub(super) trait Chunks: Send + 'static {
    /// What comes before a choice's first token, if anything.
    fn opening(&self, said: &Said) -> Option<Value>;
    /// One token; `last` ends the choice.
    fn token(&self, said: &Said, index: usize, last: bool) -> Value;
    /// The chunk that carries the usage.
    fn usage(&self, usage: Value) -> Value;
    /// The usage when `cached` prompt tokens of the first choice were found and `completion` tokens generated.
    fn count(&self, cached: Option<u32>, completion: usize) -> Usage;
}

/// What the client asked to be told about usage.
#[derive(Clone, Copy)]
pub(super) struct Reporting {
    /// In a chunk of its own at the end.
    pub(super) at_end: bool,
    /// In every chunk.
    pub(super) always: bool,
}

impl Reporting {
    /// As `stream_options` has it.
    pub(super) fn of(options: Option<StreamOptions>) -> Self {
        let options = options.unwrap_or_default();
        Self {
            at_end: options.include_usage.unwrap_or(false),
            always: options.continuous_usage_stats.unwrap_or(false),
        }
    }
}

/// A streaming response; `dies` breaks it off after its first token.
pub(super) fn respond(
    life: Arc<Life>,
    chunks: impl Chunks,
    said: Vec<Said>,
    steps: SelectAll<BoxStream<'static, Step>>,
    reporting: Reporting,
    dies: bool,
) -> Response {
    let (sender, receiver) = mpsc::channel(QUEUE_CHUNKS);
    let task = tokio::spawn(write(life, chunks, said, steps, reporting, dies, sender));
    let body = unfold((receiver, AbortOnDrop(task)), |(mut receiver, task)| async move {
        let chunk: Result<Bytes, std::io::Error> = receiver.recv().await?;
        Some((chunk, (receiver, task)))
    });
    ([(header::CONTENT_TYPE, "text/event-stream; charset=utf-8")], Body::from_stream(body)).into_response()
}

struct AbortOnDrop(tokio::task::JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn write(
    life: Arc<Life>,
    chunks: impl Chunks,
    said: Vec<Said>,
    mut steps: SelectAll<BoxStream<'static, Step>>,
    reporting: Reporting,
    dies: bool,
    sender: mpsc::Sender<Result<Bytes, std::io::Error>>,
) {
    let _in_flight = life.count_in_flight();
    let shown = |cached| life.config.report_cached_tokens.then_some(cached);
    let mut cached = None;
    let mut completion = 0;
    while let Some((choice, token)) = steps.next().await {
        let Some(token) = token else {
            let _ = sender.send(Err(std::io::Error::other("the engine died"))).await;
            return;
        };
        let said = &said[choice];
        let first = *cached.get_or_insert(token.cached_tokens);
        completion += 1;
        let opening = (token.index == 0).then(|| chunks.opening(said)).flatten();
        let chunk = chunks.token(said, token.index as usize, token.last);
        for mut chunk in opening.into_iter().chain([chunk]) {
            if reporting.always {
                chunk["usage"] = chunks.count(shown(first), completion).streamed();
            }
            if sender.send(Ok(event(&chunk))).await.is_err() {
                return;
            }
        }
        if dies {
            let _ = sender.send(Err(std::io::Error::other("dies mid-stream, as asked"))).await;
            return;
        }
    }
    if reporting.at_end {
        let usage = chunks.count(shown(cached.unwrap_or(0)), completion).streamed();
        let _ = sender.send(Ok(event(&chunks.usage(usage)))).await;
    }
    let _ = sender.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await;
}

fn event(chunk: &Value) -> Bytes {
    Bytes::from(format!("data: {chunk}\n\n"))
}
