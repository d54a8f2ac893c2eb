//! Bodies in, errors out.

use super::App;
use axum::Json;
use axum::body::Body;
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::de::DeserializeOwned;
use serde_json::json;
use std::sync::Arc;
use std::time::Duration;

/// A body that has not come whole after this long is given up.
const BODY_TIMEOUT: Duration = Duration::from_secs(30);

/// What a client is told: a status and a text that says what to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct ApiError {
    pub(super) status: StatusCode,
    pub(super) text: String,
}

impl ApiError {
    pub(super) fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    pub(super) fn bad(text: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, text)
    }

    pub(super) fn conflict(text: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, text)
    }

    pub(super) fn unavailable(text: impl Into<String>) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, text)
    }

    pub(super) fn not_found(text: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, text)
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        (self.status, Json(json!({ "error": self.text }))).into_response()
    }
}

/// A JSON body of a call, read within bounds.
///
/// Statuses as the reference's: 400 for what is no JSON, 422 for JSON of another shape, 413 for too much; and 408 for too slow.
pub(super) struct Input<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Input<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let bytes = read(request.into_body(), app.config.max_body_bytes).await?;
        serde_json::from_slice(&bytes).map(Input).map_err(|error| {
            if error.is_data() {
                ApiError::new(StatusCode::UNPROCESSABLE_ENTITY, shape(&error))
            } else {
                ApiError::bad(format!(
                    "the body is not JSON (line {}, column {}): send one JSON object",
                    error.line(),
                    error.column()
                ))
            }
        })
    }
}

/// What is wrong with a body's shape: serde's text, cut off before the values that it may repeat.
fn shape(error: &serde_json::Error) -> String {
    /// Characters kept.
    const CHARS: usize = 200;
    let text = error.to_string();
    let text: String = text.chars().filter(|c| !c.is_control()).take(CHARS).collect();
    if text.contains("missing field") || text.contains("unknown field") {
        format!("the body lacks something or has too much: {text}")
    } else {
        format!(
            "a field of the body has the wrong type (line {}, column {}): see /openapi.json",
            error.line(),
            error.column()
        )
    }
}

async fn read(body: Body, max_bytes: usize) -> Result<bytes::Bytes, ApiError> {
    match tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, max_bytes).collect()).await {
        Ok(Ok(collected)) => Ok(collected.to_bytes()),
        Ok(Err(error)) if error.is::<LengthLimitError>() => Err(ApiError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!(
                "the body is longer than {max_bytes} bytes (--max-body-bytes): send less, or hashes instead of tokens"
            ),
        )),
        Ok(Err(_)) => Err(ApiError::bad("the body broke off")),
        Err(_) => Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time")),
    }
}

pub(super) async fn no_such_path() -> ApiError {
    ApiError::not_found("no such path: see /openapi.json")
}

pub(super) async fn no_such_method() -> ApiError {
    ApiError::new(StatusCode::METHOD_NOT_ALLOWED, "this path has no such method: see /openapi.json")
}
