//! What a client is told when there is no engine's answer to pass on: OpenAI's error object.
//!
//! `{"error":{"message","type","param","code"}}`, as the official clients parse it. Messages say what to do; they name fields, sizes, models
//! and workers, never what was sent.

use bytes::Bytes;
use hyper::header::{CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::{Response, StatusCode};
use serde::Serialize;

/// Seconds after which a client should try again where no worker could take its request.
const RETRY_AFTER_S: u64 = 1;

/// An error for the client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientError {
    /// The response's status.
    pub status: StatusCode,
    /// What happened and what to do.
    pub message: String,
    /// The field that is to blame.
    pub param: Option<&'static str>,
    /// OpenAI's machine-readable name.
    pub code: Option<&'static str>,
    /// When to come back, in seconds; `None` = this does not pass by itself.
    pub retry_after_s: Option<u64>,
}

#[derive(Serialize)]
struct Wire<'a> {
    error: Inner<'a>,
}

#[derive(Serialize)]
struct Inner<'a> {
    message: &'a str,
    r#type: &'static str,
    param: Option<&'static str>,
    code: Option<&'static str>,
}

impl ClientError {
    /// An error without a field or a code.
    pub(crate) fn new(status: StatusCode, message: impl Into<String>) -> Self {
        let retry_after_s = (status == StatusCode::SERVICE_UNAVAILABLE).then_some(RETRY_AFTER_S);
        Self { status, message: message.into(), param: None, code: None, retry_after_s }
    }

    /// The request itself is wrong.
    pub(crate) fn bad_request(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, message)
    }

    /// Nothing can take the request now.
    pub(crate) fn unavailable(message: impl Into<String>) -> Self {
        Self { code: Some("no_worker_available"), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, message) }
    }

    /// No worker serves a model of this name. Names come from clients: they are cut and made printable.
    pub(crate) fn model_not_found<'a>(model: &str, known: impl Iterator<Item = &'a str>) -> Self {
        /// Names listed.
        const LISTED: usize = 20;
        /// Characters of the asked name that are repeated.
        const NAME_CHARS: usize = 120;
        let asked: String = model.chars().filter(|c| !c.is_control()).take(NAME_CHARS).collect();
        let mut known: Vec<&str> = known.collect();
        known.sort_unstable();
        let more = known.len().saturating_sub(LISTED);
        known.truncate(LISTED);
        let mut list = known.join("`, `");
        if more > 0 {
            list.push_str(&format!("` and {more} more `"));
        }
        Self {
            param: Some("model"),
            code: Some("model_not_found"),
            ..Self::new(
                StatusCode::NOT_FOUND,
                format!("The model `{asked}` does not exist here. Models that are served: `{list}`."),
            )
        }
    }

    /// The prompt leaves no room for an answer in the model's context. `prompt_tokens` is `None` where they were not counted.
    pub(crate) fn context_length(model_len: u64, prompt_tokens: Option<u64>) -> Self {
        let has = prompt_tokens.map_or_else(|| "more".to_owned(), |n| n.to_string());
        Self {
            param: Some("input_tokens"),
            code: Some("context_length_exceeded"),
            ..Self::bad_request(format!(
                "This model's maximum context length is {model_len} tokens, and the prompt has {has}. \
                 Shorten the prompt; at least one token must be left for the answer."
            ))
        }
    }

    /// A body that is not what its endpoint takes.
    pub(crate) fn bad_field(bad: &kvlane_prompt::BadRequest) -> Self {
        let message = bad.to_string();
        let mut letters = message.chars();
        let first: String = letters.next().map(|c| c.to_uppercase().collect()).unwrap_or_default();
        Self { param: bad.param(), ..Self::bad_request(format!("{first}{}.", letters.as_str())) }
    }

    /// The reason's name in metrics.
    pub(crate) fn reason(&self) -> &'static str {
        match (self.code, self.status) {
            (Some(code), _) => code,
            (None, StatusCode::PAYLOAD_TOO_LARGE) => "body_too_large",
            (None, StatusCode::REQUEST_TIMEOUT) => "body_timeout",
            (None, StatusCode::NOT_FOUND) => "not_found",
            (None, StatusCode::BAD_GATEWAY) => "bad_gateway",
            (None, status) if status.is_client_error() => "bad_request",
            _ => "other",
        }
    }

    /// The name of the class of error, as OpenAI and vLLM use them.
    fn kind(&self) -> &'static str {
        match self.status {
            StatusCode::NOT_FOUND => "NotFoundError",
            StatusCode::FORBIDDEN => "PermissionDeniedError",
            StatusCode::TOO_MANY_REQUESTS => "RateLimitError",
            StatusCode::SERVICE_UNAVAILABLE => "ServiceUnavailableError",
            status if status.is_client_error() => "BadRequestError",
            _ => "InternalServerError",
        }
    }

    /// The JSON object.
    pub(crate) fn json(&self) -> Bytes {
        let Self { status: _, message, param, code, retry_after_s: _ } = self;
        let wire = Wire { error: Inner { message, r#type: self.kind(), param: *param, code: *code } };
        serde_json::to_vec(&wire).expect("strings always serialize").into()
    }

    /// The last event of a stream that cannot go on. `mid_event`: the engine's last event was cut off, and a blank line
    /// must end it first.
    pub(crate) fn event(&self, mid_event: bool) -> Bytes {
        let mut out = Vec::new();
        if mid_event {
            out.extend_from_slice(b"\n\n");
        }
        out.extend_from_slice(b"data: ");
        out.extend_from_slice(&self.json());
        out.extend_from_slice(b"\n\n");
        out.into()
    }

    /// The whole response.
    pub(crate) fn response(&self) -> Response<Bytes> {
        let mut response = Response::new(self.json());
        *response.status_mut() = self.status;
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(seconds) = self.retry_after_s {
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_openai_shape() {
        let error = ClientError::model_not_found("gpt\n\"x\"", ["b", "a"].into_iter());
        let json: serde_json::Value = serde_json::from_slice(&error.json()).unwrap();
        assert_eq!(json["error"]["type"], "NotFoundError");
        assert_eq!(json["error"]["param"], "model");
        assert_eq!(json["error"]["code"], "model_not_found");
        assert_eq!(
            json["error"]["message"],
            "The model `gpt\"x\"` does not exist here. Models that are served: `a`, `b`."
        );
        assert_eq!(error.response().status(), 404);
    }

    #[test]
    fn an_event_ends_what_was_cut_off() {
        let error = ClientError::unavailable("x");
        assert!(error.event(true).starts_with(b"\n\ndata: {"));
        assert!(error.event(false).starts_with(b"data: {"));
        assert!(error.event(false).ends_with(b"}\n\n"));
        assert!(error.response().headers().contains_key("retry-after"));
    }
}
