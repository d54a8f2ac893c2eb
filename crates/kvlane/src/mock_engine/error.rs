//! Refusals in the shape in which vLLM 0.32 writes them.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use kvlane_engine::SubmitError;

/// `{"error": {"message", "type", "param", "code"}}` with its status.
#[derive(Debug)]
pub(super) struct Refusal {
    status: StatusCode,
    kind: &'static str,
    param: Option<String>,
    message: String,
}

impl Refusal {
    /// The request contradicts itself or the model.
    pub(super) fn bad(param: Option<&str>, message: impl Into<String>) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "BadRequestError",
            param: param.map(str::to_owned),
            message: message.into(),
        }
    }

    /// The body is not what the endpoint takes.
    pub(super) fn unreadable(error: &serde_json::Error) -> Self {
        Self {
            status: StatusCode::BAD_REQUEST,
            kind: "Bad Request",
            param: Some("body".to_owned()),
            message: format!("1 validation error:\n  {{'loc': 'body', 'msg': '{error}'}}"),
        }
    }

    /// No such model or adapter.
    pub(super) fn no_model(asked: &str, served: &str) -> Self {
        Self {
            status: StatusCode::NOT_FOUND,
            kind: "NotFoundError",
            param: Some("model".to_owned()),
            message: format!("The model `{asked}` does not exist. Valid aliases: {served}."),
        }
    }

    /// The engine cannot take the request; `None` = it is dying.
    pub(super) fn not_taken(error: Option<SubmitError>) -> Self {
        let (status, kind, message) = match error {
            Some(SubmitError::Full) => {
                (StatusCode::SERVICE_UNAVAILABLE, "ServiceUnavailableError", SubmitError::Full.to_string())
            }
            Some(error) => (StatusCode::BAD_REQUEST, "BadRequestError", error.to_string()),
            None => (
                StatusCode::INTERNAL_SERVER_ERROR,
                "InternalServerError",
                "EngineCore encountered an issue".to_owned(),
            ),
        };
        Self { status, kind, param: None, message }
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let Self { status, kind, param, message } = self;
        let error =
            serde_json::json!({"message": message, "type": kind, "param": param, "code": status.as_u16()});
        (status, Json(serde_json::json!({ "error": error }))).into_response()
    }
}
