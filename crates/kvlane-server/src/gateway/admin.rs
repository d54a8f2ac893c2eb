//! Paths that change an engine for everybody.
//!
//! They answer 403 unless the operator allowed them. Allowed, they go to the one worker that `x-kvlane-worker: HOST:PORT`
//! names, whose answer is passed on, or without it to every healthy instance, since a cache reset or an adapter that reaches one of several engines is rarely
//! what is meant; the answer then lists each engine's status, and is 502 if any of them refused.

use super::body;
use super::error::ClientError;
use super::forward::X_WORKER;
use super::headers::{end_to_end, strip_hop_by_hop};
use super::upstream::Exchange;
use super::{Gateway, Response, Upstream, own, status};
use bytes::Bytes;
use http_body::Body;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::http::request::Parts;
use hyper::{Request, StatusCode, Uri};
use serde_json::{Value, json};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Waiting for one engine: loading an adapter or falling asleep takes a while.
const TIMEOUT: Duration = Duration::from_secs(120);
/// Longest answer that is passed on.
const ANSWER_BYTES_MAX: usize = 16 << 20;

impl Gateway {
    /// `POST /kvlane/drain` with `x-kvlane-worker: HOST:PORT`: that engine finishes what it has and gets nothing new, until `DELETE` of the same, or a
    /// restart of this router.
    pub(super) fn drain_worker(&self, head: &Parts) -> Result<Response, ClientError> {
        self.only_if_admin()?;
        let table = self.table.load();
        let name = head.headers.get(&X_WORKER).map_or(&b""[..], |name| name.as_bytes());
        let named = table.upstreams().iter().find(|u| u.name.as_bytes() == name).ok_or_else(|| {
            ClientError::bad_request(
                "`x-kvlane-worker: HOST:PORT` must name the worker; see /kvlane/workers for their names.",
            )
        })?;
        let draining = head.method == hyper::Method::POST;
        named.draining.store(draining, Ordering::Relaxed);
        tracing::info!(worker = named.name, draining, "told to");
        self.admission.room_may_be();
        Ok(status::json(StatusCode::OK, &json!({ "worker": named.name, "draining": draining })))
    }

    fn only_if_admin(&self) -> Result<(), ClientError> {
        if self.allow_admin {
            return Ok(());
        }
        Err(ClientError {
            code: Some("admin_not_allowed"),
            ..ClientError::new(
                StatusCode::FORBIDDEN,
                "This path changes or shows the inside of an engine and is closed; start kvlane with --allow-admin to open it.",
            )
        })
    }

    /// A request of an administrative path.
    pub(super) async fn admin(&self, head: &Parts, body: Incoming) -> Result<Response, ClientError> {
        self.only_if_admin()?;
        let body = body::read(body, self.max_body_bytes).await?;
        let table = self.table.load_full();
        if let Some(name) = head.headers.get(&X_WORKER) {
            let named = table.upstreams().iter().find(|u| u.name.as_bytes() == name.as_bytes());
            let upstream = named.ok_or_else(|| {
                ClientError::bad_request(
                    "`x-kvlane-worker` names no worker; see /kvlane/workers for their names.",
                )
            })?;
            let (exchange, answer) = tell(upstream, head, &body).await.map_err(|error| {
                ClientError::new(StatusCode::BAD_GATEWAY, format!("{}: {error}", upstream.name))
            })?;
            let mut response = hyper::Response::new(own(answer));
            *response.status_mut() = exchange.status;
            *response.headers_mut() = exchange.headers;
            strip_hop_by_hop(response.headers_mut());
            return Ok(response);
        }
        let healthy = table.view.instances.iter().filter(|i| i.health.is_healthy());
        let asked: Vec<Arc<Upstream>> =
            healthy.filter_map(|i| table.upstream(i.id)).map(Arc::clone).collect();
        if asked.is_empty() {
            return Err(ClientError::unavailable("No worker is healthy now; try again soon."));
        }
        let mut results: Vec<Value> = Vec::with_capacity(asked.len());
        let mut all_good = true;
        for upstream in asked {
            let told = tell(&upstream, head, &body).await;
            all_good &= told.as_ref().is_ok_and(|(head, _)| head.status.is_success());
            results.push(match told {
                Ok((answer, body)) => json!({
                    "worker": upstream.name,
                    "status": answer.status.as_u16(),
                    "answer": serde_json::from_slice::<Value>(&body).ok(),
                }),
                Err(error) => json!({ "worker": upstream.name, "error": error }),
            });
        }
        let status = if all_good { StatusCode::OK } else { StatusCode::BAD_GATEWAY };
        Ok(status::json(status, &json!({ "results": results })))
    }
}

async fn tell(
    upstream: &Arc<Upstream>,
    head: &Parts,
    body: &Bytes,
) -> Result<(hyper::http::response::Parts, Bytes), String> {
    let path = head.uri.path_and_query().map_or("/", |p| p.as_str());
    let uri: Uri = format!("{}{path}", upstream.prefix).parse().map_err(|_| "the path is not valid")?;
    let mut headers = end_to_end(&head.headers);
    headers.remove(&X_WORKER);
    let request = || {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = head.method.clone();
        *request.uri_mut() = uri.clone();
        *request.headers_mut() = headers.clone();
        request
    };
    let work = async {
        let Exchange { head, body } = upstream.pool.send(request).await.map_err(|e| e.to_string())?;
        let mut answer = Vec::new();
        let mut body = pin!(body);
        while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            let Ok(data) = frame.map_err(|e| e.to_string())?.into_data() else { continue };
            if answer.len() + data.len() > ANSWER_BYTES_MAX {
                return Err("the answer is too long".to_owned());
            }
            answer.extend_from_slice(&data);
        }
        Ok((head, Bytes::from(answer)))
    };
    tokio::time::timeout(TIMEOUT, work)
        .await
        .map_err(|_| format!("no answer within {} s", TIMEOUT.as_secs()))?
}
