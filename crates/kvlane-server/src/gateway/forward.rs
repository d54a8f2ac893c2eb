//! A request on its way to an engine, and the answer on its way back.
//!
//! Nothing is given to the client before the first byte of an answer's *body* is here: until then the next candidate of the same decision can
//! still take the request, also when an engine dies in the middle of a long prefill. From then on bytes pass through as
//! they come, and a break is told to the client: in a stream by an error event, else by ending the connection, as it would
//! have without a router.

use super::body::ResponseBody;
use super::error::ClientError;
use super::headers::{end_to_end, strip_hop_by_hop};
use super::inflight::InFlight;
use super::plan::Plan;
use super::upstream::{EngineBody, Exchange};
use super::usage::UsageScanner;
use super::{Gateway, Response};
use crate::metrics::Outcome;
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use http_body_util::Full;
use hyper::header::{CONTENT_ENCODING, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use hyper::http::request::Parts;
use hyper::{Request, StatusCode};
use kvlane_index::Worker;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::time::Sleep;

/// Workers that are asked for one request: more do not help against a request that kills engines.
const ATTEMPTS_MAX: usize = 3;
/// An engine that sends nothing for this long is given up: long enough for a long prompt behind a long queue.
const ENGINE_SILENCE_MAX: Duration = Duration::from_secs(30 * 60);

/// Names the worker that answered.
pub(crate) const X_WORKER: HeaderName = HeaderName::from_static("x-kvlane-worker");
/// Names the request, for `/kvlane/explain/{id}`.
pub(crate) const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-kvlane-request-id");
/// Pins a rank of an engine.
const X_RANK: HeaderName = HeaderName::from_static("x-data-parallel-rank");

/// An attempt that gave no byte.
struct Failed {
    error: String,
    /// What the client is told if nobody else can be asked.
    client: ClientError,
    /// The engine may be dead.
    unreachable: bool,
}

impl Gateway {
    /// Sends a booked request to its worker, or to the next ones of its decision, and passes the answer on.
    pub(super) async fn forward(
        self: &Arc<Self>,
        plan: &Plan,
        mut inflight: InFlight,
        head: &Parts,
        body: &Bytes,
    ) -> Response {
        let order: Vec<Worker> = inflight.record.decision.order.iter().copied().take(ATTEMPTS_MAX).collect();
        let mut headers = end_to_end(&head.headers);
        for (tried, worker) in order.iter().enumerate() {
            if tried > 0 {
                self.rebook(plan, &mut inflight, *worker);
            }
            let last = tried + 1 == order.len();
            let rank = inflight.upstream().rank(worker.rank).and_then(|rank| rank.rank_header.clone());
            if let Some(rank) = rank {
                headers.insert(X_RANK, rank);
            }
            let request = || outgoing(head, &headers, &inflight.upstream().prefix, body);
            match attempt(&inflight, request).await {
                Ok((exchange, first)) => {
                    if exchange.head.status.is_server_error() && !last {
                        inflight.attempt_failed(format!("status {}", exchange.head.status.as_u16()));
                        continue;
                    }
                    self.fleet.report_success(inflight.upstream().id);
                    return answer(inflight, exchange, first);
                }
                Err(Failed { error, client, unreachable }) => {
                    inflight.attempt_failed(error);
                    if unreachable {
                        self.fleet.report_failure(inflight.upstream().id);
                    }
                    if last {
                        inflight.set_status(client.status);
                        inflight.failed(Outcome::ServerError);
                        let mut response = client.response().map(ResponseBody::own);
                        name(&inflight, response.headers_mut());
                        return response;
                    }
                }
            }
        }
        // A decision names at least one worker, so the loop has returned.
        ClientError::unavailable("No worker can take this request now; try again soon.")
            .response()
            .map(ResponseBody::own)
    }
}

/// The request for one engine. The body is shared, not copied.
fn outgoing(head: &Parts, headers: &HeaderMap, prefix: &str, body: &Bytes) -> Request<Full<Bytes>> {
    let mut request = Request::new(Full::new(body.clone()));
    *request.method_mut() = head.method.clone();
    let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
    *request.uri_mut() = match (prefix, head.uri.authority()) {
        ("", None) => head.uri.clone(),
        _ => format!("{prefix}{path}").parse().expect("a valid path after a valid path is one"),
    };
    *request.headers_mut() = headers.clone();
    request
}

/// The head of an engine's answer and the first piece of its body.
async fn attempt(
    inflight: &InFlight,
    request: impl Fn() -> Request<Full<Bytes>>,
) -> Result<(Exchange, Option<Frame<Bytes>>), Failed> {
    let began = Instant::now();
    let pool = &inflight.upstream().pool;
    let silent = |_| Failed {
        error: "silent for too long".into(),
        client: ClientError::new(StatusCode::GATEWAY_TIMEOUT, "The worker did not answer in time."),
        unreachable: false,
    };
    let mut exchange = tokio::time::timeout(ENGINE_SILENCE_MAX, pool.send(request))
        .await
        .map_err(silent)?
        .map_err(|error| Failed {
            error: error.to_string(),
            client: ClientError::unavailable(
                "The worker for this request cannot be reached; try again soon.",
            ),
            unreachable: true,
        })?;
    let left = ENGINE_SILENCE_MAX.saturating_sub(began.elapsed());
    let first = poll_fn(|cx| Pin::new(&mut exchange.body).poll_frame(cx));
    let first =
        tokio::time::timeout(left, first).await.map_err(silent)?.transpose().map_err(|error| Failed {
            error: format!("broke off before the first byte: {error}"),
            client: ClientError::new(
                StatusCode::BAD_GATEWAY,
                "The worker broke off before its answer began.",
            ),
            unreachable: true,
        })?;
    Ok((exchange, first))
}

fn name(inflight: &InFlight, headers: &mut HeaderMap) {
    let id = HeaderValue::from_str(&inflight.record.id.to_string()).expect("hexadecimal digits and a dash");
    headers.insert(X_REQUEST_ID, id);
    if let Some(rank) = inflight.upstream().rank(inflight.worker().rank) {
        headers.insert(X_WORKER, rank.name_header.clone());
    }
}

/// The engine's answer for the client.
fn answer(mut inflight: InFlight, exchange: Exchange, first: Option<Frame<Bytes>>) -> Response {
    let Exchange { mut head, body } = exchange;
    strip_hop_by_hop(&mut head.headers);
    let media_type = head.headers.get(CONTENT_TYPE).map_or(&b""[..], HeaderValue::as_bytes);
    let event_stream = media_type.starts_with(b"text/event-stream");
    let readable = event_stream || media_type.starts_with(b"application/json");
    let encoded = head.headers.contains_key(CONTENT_ENCODING);
    inflight.set_status(head.status);
    if first.is_some() {
        inflight.first_byte();
    }
    name(&inflight, &mut head.headers);
    let forwarded = Forwarded {
        engine: Some(body),
        first,
        scanner: (readable && !encoded && head.status.is_success()).then(|| UsageScanner::new(event_stream)),
        event_stream,
        at_event_end: true,
        done: false,
        last_word: None,
        heard: Instant::now(),
        alarm: None,
        inflight,
    };
    let mut response = hyper::Response::new(ResponseBody::Forwarded(Box::new(forwarded)));
    *response.status_mut() = head.status;
    *response.headers_mut() = head.headers;
    response
}

/// An engine's body as it passes by. Dropped early (the client is gone), it closes the engine's connection.
#[derive(Debug)]
pub(crate) struct Forwarded {
    /// `None` once it ended or broke off.
    engine: Option<EngineBody>,
    /// What was read before the answer was begun.
    first: Option<Frame<Bytes>>,
    scanner: Option<UsageScanner>,
    event_stream: bool,
    /// The bytes so far end with a blank line.
    at_event_end: bool,
    /// The stream's last event has passed: whoever leaves now has everything.
    done: bool,
    /// An error event that the client is still to get.
    last_word: Option<Bytes>,
    /// When the engine last sent something.
    heard: Instant,
    /// Wakes this body when the engine has been silent for too long. Made when it is first waited for, and only moved on when it rings.
    alarm: Option<Pin<Box<Sleep>>>,
    inflight: InFlight,
}

impl Forwarded {
    /// Looks at a piece without changing it.
    fn pass(&mut self, frame: &Frame<Bytes>) {
        let Some(data) = frame.data_ref() else { return };
        if let Some(scanner) = &mut self.scanner {
            scanner.feed(data);
        }
        if self.event_stream {
            self.inflight.piece();
            // A cut between the two line ends is taken for the middle of an event: one more blank line harms nobody.
            self.at_event_end = data.ends_with(b"\n\n") || data.ends_with(b"\r\n\r\n");
            self.done = data.trim_ascii_end().ends_with(b"data: [DONE]");
        }
    }

    fn complete(&mut self) {
        if self.engine.take().is_some() {
            let usage = self.scanner.as_ref().map(UsageScanner::usage).unwrap_or_default();
            self.inflight.complete(usage);
        }
    }

    /// The engine broke off: a stream gets an error event and ends in order.
    fn broke_off(&mut self, why: &str) -> bool {
        self.engine = None;
        self.inflight.attempt_failed(why.to_owned());
        self.inflight.failed(Outcome::Broken);
        if self.event_stream {
            let error =
                ClientError::new(StatusCode::BAD_GATEWAY, "The worker broke off; the answer is incomplete.");
            self.last_word = Some(error.event(!self.at_event_end));
        }
        self.event_stream
    }

    fn is_silent(&mut self, cx: &mut Context<'_>) -> bool {
        let alarm = self.alarm.get_or_insert_with(|| Box::pin(tokio::time::sleep(ENGINE_SILENCE_MAX)));
        while alarm.as_mut().poll(cx).is_ready() {
            let left = ENGINE_SILENCE_MAX.saturating_sub(self.heard.elapsed());
            if left.is_zero() {
                return true;
            }
            alarm.as_mut().reset(tokio::time::Instant::now() + left);
        }
        false
    }
}

impl Body for Forwarded {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let this = self.get_mut();
        if let Some(word) = this.last_word.take() {
            return Poll::Ready(Some(Ok(Frame::data(word))));
        }
        if let Some(frame) = this.first.take() {
            this.pass(&frame);
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(engine) = &mut this.engine else { return Poll::Ready(None) };
        match Pin::new(engine).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                this.heard = Instant::now();
                this.pass(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => {
                if this.broke_off(&format!("broke off: {error}")) {
                    return Poll::Ready(this.last_word.take().map(|word| Ok(Frame::data(word))));
                }
                Poll::Ready(Some(Err(error)))
            }
            Poll::Ready(None) => {
                this.complete();
                Poll::Ready(None)
            }
            Poll::Pending => {
                if this.is_silent(cx) {
                    this.broke_off("silent for too long");
                    return Poll::Ready(this.last_word.take().map(|word| Ok(Frame::data(word))));
                }
                Poll::Pending
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.first.is_none()
            && self.last_word.is_none()
            && self.engine.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        // The engine's own `content-length`, where there is one, is among the headers.
        SizeHint::default()
    }
}

impl Drop for Forwarded {
    fn drop(&mut self) {
        // Whoever serves a body of known length does not ask for the end after its last byte, and many clients close a stream at
        // `[DONE]`, before the end of its last chunk.
        let whole = self.done || self.engine.as_ref().is_some_and(Body::is_end_stream);
        if self.first.is_none() && whole {
            if let Some(engine) = &mut self.engine {
                // The end of the last chunk is usually here too, and then the connection can be used again.
                let _ = Pin::new(engine).poll_frame(&mut Context::from_waker(Waker::noop()));
            }
            self.complete();
        }
    }
}
