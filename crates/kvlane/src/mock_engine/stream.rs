//! Answers, whole or as server-sent events: what both endpoints have in common.
//!
//! For a stream, a task writes them into a bounded channel, the response's body reads it.
//!
//! When the client leaves, the body is dropped, the channel closes, and the task ends: dropping the tickets cancels the
//! requests in the engine.

use super::error::Refusal;
use super::generate::{Job, Said, Step, Usage};
use super::life::Life;
use super::openai::{Common, StreamOptions};
use super::transfer;
use axum::Json;
use axum::body::Body;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream::{BoxStream, SelectAll, StreamExt as _, unfold};
use serde_json::{Value, json};
use std::sync::Arc;
use tokio::sync::mpsc;

/// Chunks between the task and the body.
const QUEUE_CHUNKS: usize = 64;

/// What every piece of a response repeats.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
    pub(super) fingerprint: String,
}

impl Head {
    /// The head of the response to one request for `model`; its id begins with `kind`.
    pub(super) fn new(life: &Life, headers: &HeaderMap, kind: &str, model: &str) -> Self {
        Self {
            id: life.response_id(kind, headers),
            created: life.now_s(),
            model: model.to_owned(),
            fingerprint: life.fingerprint(),
        }
    }

    /// An object of this kind with these choices.
    pub(super) fn object(&self, kind: &str, choices: &[Value]) -> Value {
        json!({"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices})
    }
}

/// How one endpoint writes its answers, whole and in chunks.
pub(super) trait Answers: Send + 'static {
    /// The `object` of a whole answer.
    const WHOLE: &'static str;
    /// The `object` of a chunk.
    const CHUNK: &'static str;
    /// What all of them repeat.
    fn head(&self) -> &Head;
    /// One choice of a whole answer.
    fn choice(&self, said: &Said) -> Value;
    /// What a whole answer has beside its choices and usage.
    fn extras(&self, _: &mut Value) {}
    /// What comes before a choice's first token, if anything.
    fn opening(&self, said: &Said) -> Option<Value>;
    /// One token; `last` ends the choice.
    fn token(&self, said: &Said, index: usize, last: bool) -> Value;
    /// The usage when `cached` prompt tokens of the first choice were found and `completion` tokens generated.
    fn count(&self, cached: Option<u32>, completion: usize) -> Usage;
}

/// What the client asked to be told about usage.
#[derive(Clone, Copy)]
struct Reporting {
    /// In a chunk of its own at the end.
    at_end: bool,
    /// In every chunk.
    always: bool,
}

impl Reporting {
    /// As `stream_options` has it.
    fn of(options: Option<StreamOptions>) -> Self {
        let options = options.unwrap_or_default();
        Self {
            at_end: options.include_usage.unwrap_or(false),
            always: options.continuous_usage_stats.unwrap_or(false),
        }
    }
}

/// The response to a job that was started: whole, or as a stream if `common` asks for one.
pub(super) async fn answer<A: Answers>(
    life: Arc<Life>,
    answers: A,
    mut job: Job,
    common: Common,
) -> Result<Response, Refusal> {
    if common.stream.unwrap_or(false) {
        let reporting = Reporting::of(common.stream_options);
        let dies = life.draw_death();
        let (said, steps) = job.into_stream();
        return Ok(respond(life, answers, said, steps, reporting, dies));
    }
    let _in_flight = life.count_in_flight();
    let cached = job.finish().await?;
    let usage = answers.count(life.config.report_cached_tokens.then_some(cached), job.completion_tokens());
    let choices: Vec<Value> = job.said.iter().map(|said| answers.choice(said)).collect();
    let mut whole = answers.head().object(A::WHOLE, &choices);
    whole["service_tier"] = Value::Null;
    whole["system_fingerprint"] = json!(answers.head().fingerprint);
    whole["usage"] = json!(usage.whole());
    answers.extras(&mut whole);
    let block_tokens = life.config.engine.block_size.tokens() as usize;
    let prompt_tokens = job.prompts.first().map_or(0, Vec::len);
    let asked = common.kv_transfer_params.as_ref();
    whole["kv_transfer_params"] = transfer::answered(asked, &answers.head().id, prompt_tokens, block_tokens);
    for absent in ["ec_transfer_params", "metrics"] {
        whole[absent] = Value::Null;
    }
    Ok(Json(whole).into_response())
}

/// A streaming response; `dies` breaks it off after its first token.
fn respond(
    life: Arc<Life>,
    answers: impl Answers,
    said: Vec<Said>,
    steps: SelectAll<BoxStream<'static, Step>>,
    reporting: Reporting,
    dies: bool,
) -> Response {
    let (sender, receiver) = mpsc::channel(QUEUE_CHUNKS);
    let task = tokio::spawn(write(life, answers, said, steps, reporting, dies, sender));
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
    answers: impl Answers,
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
        let opening = (token.index == 0).then(|| answers.opening(said)).flatten();
        let chunk = answers.token(said, token.index as usize, token.last);
        for mut chunk in opening.into_iter().chain([chunk]) {
            if reporting.always {
                chunk["usage"] = answers.count(shown(first), completion).streamed();
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
        let usage = answers.count(shown(cached.unwrap_or(0)), completion).streamed();
        let _ = sender.send(Ok(event(&usage_chunk(&answers, usage)))).await;
    }
    let _ = sender.send(Ok(Bytes::from_static(b"data: [DONE]\n\n"))).await;
}

fn usage_chunk<A: Answers>(answers: &A, usage: Value) -> Value {
    let mut chunk = answers.head().object(A::CHUNK, &[]);
    chunk["usage"] = usage;
    chunk["system_fingerprint"] = json!(answers.head().fingerprint);
    chunk
}

fn event(chunk: &Value) -> Bytes {
    Bytes::from(format!("data: {chunk}\n\n"))
}
