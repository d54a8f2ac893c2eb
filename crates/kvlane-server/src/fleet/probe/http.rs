//! One bounded request on a connection of its own.
//!
//! Probes do not share the gateway's pool: whether a *new* connection is accepted is part of what they ask.

use bytes::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::StatusCode;
use hyper_util::rt::TokioIo;
use std::fmt;
use std::time::Duration;
use tokio::net::TcpStream;

/// The most bytes of a probe's answer; `/metrics` of a large engine has a few hundred kB.
const BODY_BYTES_MAX: usize = 8 << 20;

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum GetError {
    /// Nothing listens there, or the name or network is wrong: nobody answered at all.
    Connect(String),
    /// No answer in time.
    Timeout(Duration),
    /// Something answered that is not HTTP, or broke off, or sent too much.
    Http(String),
    /// The server says itself that it is not well.
    Sick(String),
}

impl fmt::Display for GetError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Connect(why) => write!(f, "cannot connect: {why}"),
            Self::Timeout(after) => write!(f, "no answer within {} s", after.as_secs_f32()),
            Self::Http(why) => write!(f, "no proper HTTP answer: {why}"),
            Self::Sick(why) => f.write_str(why),
        }
    }
}

/// An answer, whatever its status.
#[derive(Clone, Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) body: Bytes,
}

impl Answer {
    /// The body as JSON, if the status is 200 and it is JSON.
    pub(crate) fn json(&self) -> Option<serde_json::Value> {
        (self.status == StatusCode::OK).then(|| serde_json::from_slice(&self.body).ok()).flatten()
    }
}

/// `GET base + path`.
pub(crate) async fn get(base: &http::Uri, path: &str, limit: Duration) -> Result<Answer, GetError> {
    get_large(base, path, limit, BODY_BYTES_MAX).await
}

/// [`get`] of an answer of up to `max_bytes`.
pub(crate) async fn get_large(
    base: &http::Uri,
    path: &str,
    limit: Duration,
    max_bytes: usize,
) -> Result<Answer, GetError> {
    let request = hyper::Request::get(target(base, path));
    tokio::time::timeout(limit, exchange(base, request, Bytes::new(), max_bytes))
        .await
        .unwrap_or(Err(GetError::Timeout(limit)))
}

/// `POST base + path` with a JSON body, for data-parallel rank `rank`.
pub(crate) async fn post(
    base: &http::Uri,
    path: &str,
    body: &serde_json::Value,
    rank: u32,
    limit: Duration,
) -> Result<Answer, GetError> {
    let request = hyper::Request::post(target(base, path))
        .header(hyper::header::CONTENT_TYPE, "application/json")
        .header("x-data-parallel-rank", rank);
    let body = Bytes::from(body.to_string());
    tokio::time::timeout(limit, exchange(base, request, body, BODY_BYTES_MAX))
        .await
        .unwrap_or(Err(GetError::Timeout(limit)))
}

fn target(base: &http::Uri, path: &str) -> String {
    format!("{}{path}", base.path().trim_end_matches('/'))
}

async fn exchange(
    base: &http::Uri,
    request: http::request::Builder,
    body: Bytes,
    max_bytes: usize,
) -> Result<Answer, GetError> {
    let host = base.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let stream = TcpStream::connect((host, base.port_u16().unwrap_or(80)))
        .await
        .map_err(|e| GetError::Connect(e.to_string()))?;
    let failed = |e: hyper::Error| GetError::Http(e.to_string());
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(failed)?;
    let request = request
        .header(hyper::header::HOST, base.authority().map_or("", |a| a.as_str()))
        .header(hyper::header::USER_AGENT, "kvlane")
        .header(hyper::header::CONNECTION, "close")
        .body(Full::new(body))
        .map_err(|e| GetError::Http(e.to_string()))?;
    let exchange = async {
        let response = sender.send_request(request).await.map_err(failed)?;
        let status = response.status();
        let body = Limited::new(response.into_body(), max_bytes).collect().await.map_err(|e| {
            if e.is::<LengthLimitError>() {
                GetError::Http(format!("more than {max_bytes} bytes"))
            } else {
                GetError::Http(e.to_string())
            }
        })?;
        Ok(Answer { status, body: body.to_bytes() })
    };
    // The connection is driven here, not spawned, so that nothing outlives a probe that is given up.
    tokio::pin!(connection);
    tokio::pin!(exchange);
    // The connection first: it knows why it ended, the exchange only that it did.
    tokio::select! {
        biased;
        ended = &mut connection => {
            ended.map_err(failed)?;
            exchange.await
        }
        answer = &mut exchange => answer,
    }
}
