//! A batch of prompts, each routed by itself.
//!
//! A batch (`prompt` as a list) goes to one worker, chosen by what its prompts have in common. With `x-kvlane-split: true` each prompt becomes a request of
//! its own instead, goes where its own prefix is, and the answers are put together as one engine would have given them: the choices in the
//! order of the prompts, the usage summed. Only whole answers can be put together, so a stream is refused.

use super::error::ClientError;
use super::forward::X_REQUEST_ID;
use super::{Gateway, Response, own};
use bytes::Bytes;
use http_body::Body;
use hyper::StatusCode;
use hyper::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::http::request::Parts;
use kvlane_prompt::{Endpoint, RequestFields};
use serde_json::Value;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::task::JoinSet;

/// Asks for it.
const X_SPLIT: &str = "x-kvlane-split";
/// Most prompts of a batch that is split: each is a request of its own.
const PROMPTS_MAX: usize = 256;
/// Longest answer to one prompt.
const ANSWER_BYTES_MAX: usize = 16 << 20;

/// Whether the client wants its batch split.
pub(super) fn wanted(headers: &HeaderMap) -> bool {
    headers.get(X_SPLIT).is_some_and(|value| !matches!(value.as_bytes(), b"" | b"0" | b"false"))
}

/// An answer to one prompt.
struct Answer {
    status: StatusCode,
    headers: HeaderMap,
    body: Bytes,
}

impl Gateway {
    /// Answers a batch by asking for each of its prompts; `None` if there is nothing to split.
    pub(super) async fn split(
        self: &Arc<Self>,
        arrived: Instant,
        head: &Parts,
        fields: &RequestFields,
    ) -> Result<Option<Response>, ClientError> {
        let bodies = fields.prompt_bodies().map_err(|bad| ClientError::bad_field(&bad))?;
        if bodies.len() < 2 {
            return Ok(None);
        }
        if fields.stream {
            return Err(ClientError::bad_request(
                "`x-kvlane-split` puts whole answers together: send it without `stream`.",
            ));
        }
        if bodies.len() > PROMPTS_MAX {
            return Err(ClientError::bad_request(format!(
                "`x-kvlane-split` takes at most {PROMPTS_MAX} prompts: send several batches."
            )));
        }
        let mut head = head.clone();
        head.headers.remove(CONTENT_LENGTH);
        head.headers.remove(X_SPLIT);
        let head = Arc::new(head);
        // Dropped early (the client left, or one failed), it ends what still runs.
        let mut running = JoinSet::new();
        for (at, body) in bodies.into_iter().enumerate() {
            let (gateway, head) = (Arc::clone(self), Arc::clone(&head));
            running.spawn(async move { (at, gateway.ask_one(arrived, &head, body).await) });
        }
        let mut answers: Vec<(usize, Answer)> = Vec::with_capacity(running.len());
        while let Some(done) = running.join_next().await {
            let (at, answer) = done.map_err(|_| broken())?;
            let answer = answer?;
            if answer.status != StatusCode::OK {
                return Ok(Some(response(answer.status, &answer.headers, answer.body)));
            }
            answers.push((at, answer));
        }
        answers.sort_by_key(|(at, _)| *at);
        let merged =
            merge(answers.iter().map(|(_, answer)| &*answer.body), u64::from(fields.n)).ok_or_else(broken)?;
        let mut headers = HeaderMap::new();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        for id in answers.iter().filter_map(|(_, answer)| answer.headers.get(&X_REQUEST_ID)) {
            headers.append(X_REQUEST_ID, id.clone());
        }
        Ok(Some(response(StatusCode::OK, &headers, merged.to_string().into())))
    }

    async fn ask_one(
        self: &Arc<Self>,
        arrived: Instant,
        head: &Parts,
        body: Bytes,
    ) -> Result<Answer, ClientError> {
        let fields = RequestFields::parse(Endpoint::Completions, body.clone())
            .map_err(|bad| ClientError::bad_field(&bad))?;
        let response = self.route(arrived, head, Some(&Arc::new(fields)), &body).await?;
        let (head, body) = response.into_parts();
        let mut body = pin!(body);
        let mut whole = Vec::new();
        while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            let Ok(data) = frame.map_err(|_| broken())?.into_data() else { continue };
            if whole.len() + data.len() > ANSWER_BYTES_MAX {
                return Err(ClientError::new(
                    StatusCode::BAD_GATEWAY,
                    format!(
                        "The answer to a prompt is longer than {ANSWER_BYTES_MAX} bytes; send it without `x-kvlane-split`."
                    ),
                ));
            }
            whole.extend_from_slice(&data);
        }
        Ok(Answer { status: head.status, headers: head.headers, body: whole.into() })
    }
}

fn broken() -> ClientError {
    ClientError::new(
        StatusCode::BAD_GATEWAY,
        "A worker's answer to one of the prompts broke off or could not be read; send it without `x-kvlane-split`.",
    )
}

fn response(status: StatusCode, headers: &HeaderMap, body: Bytes) -> Response {
    let mut response = hyper::Response::new(own(body));
    *response.status_mut() = status;
    *response.headers_mut() = headers.clone();
    response.headers_mut().remove(CONTENT_LENGTH);
    response
}

/// One answer of many; `None` if one of them is no completion. Each prompt has `n` choices.
fn merge<'a>(answers: impl Iterator<Item = &'a [u8]>, n: u64) -> Option<Value> {
    let mut merged: Option<Value> = None;
    for (at, body) in (0..).zip(answers) {
        let mut answer: Value = serde_json::from_slice(body).ok()?;
        for choice in answer.get_mut("choices")?.as_array_mut()? {
            let index = choice.get("index").and_then(Value::as_u64).unwrap_or(0);
            choice["index"] = Value::from(at * n + index);
        }
        match &mut merged {
            None => merged = Some(answer),
            Some(merged) => {
                let more = answer["choices"].as_array_mut().map(std::mem::take)?;
                merged["choices"].as_array_mut()?.extend(more);
                add(&mut merged["usage"], &answer["usage"]);
            }
        }
    }
    merged
}

/// Adds the numbers of `more` to those of `sum`, at any depth.
fn add(sum: &mut Value, more: &Value) {
    match (sum, more) {
        (Value::Object(sum), Value::Object(more)) => {
            for (name, value) in more {
                match sum.get_mut(name) {
                    Some(known) => add(known, value),
                    None => drop(sum.insert(name.clone(), value.clone())),
                }
            }
        }
        (sum @ Value::Null, more) => *sum = more.clone(),
        (sum, more) => {
            if let (Some(a), Some(b)) = (sum.as_u64(), more.as_u64()) {
                *sum = Value::from(a.saturating_add(b));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn answers_become_one() {
        let answer = |text: &str, cached: Option<u64>| {
            let details = cached.map(|n| json!({ "cached_tokens": n }));
            json!({"id": text, "choices": [{"index": 0, "text": text}, {"index": 1, "text": "x"}],
                   "usage": {"prompt_tokens": 3, "total_tokens": 5, "prompt_tokens_details": details}})
            .to_string()
        };
        let answers = [answer("a", None), answer("b", Some(16)), answer("c", Some(16))];
        let merged = merge(answers.iter().map(String::as_bytes), 2).unwrap();
        let indexes: Vec<u64> =
            merged["choices"].as_array().unwrap().iter().map(|c| c["index"].as_u64().unwrap()).collect();
        assert_eq!(indexes, [0, 1, 2, 3, 4, 5]);
        assert_eq!(merged["choices"][4]["text"], "c");
        assert_eq!(merged["id"], "a");
        assert_eq!(
            merged["usage"],
            json!({"prompt_tokens": 9, "total_tokens": 15, "prompt_tokens_details": {"cached_tokens": 32}})
        );
        assert!(merge([&b"{}"[..]].into_iter(), 1).is_none());
        assert!(merge([&b"nonsense"[..]].into_iter(), 1).is_none());
    }
}
