//! What replicas ask each other: who is registered, and what one rank holds at which place of its stream.

use super::App;
use super::body::ApiError;
use crate::indexer::partition::Key;
use crate::state::Image;
use axum::Json;
use axum::body::Body;
use axum::extract::{Query, State};
use axum::http::StatusCode;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use kvlane_index::Worker;
use kvlane_index::hash::Scheme;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// One followed publisher, as a peer may register it too.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Registered {
    pub(crate) instance_id: u64,
    pub(crate) dp_rank: u32,
    pub(crate) endpoint: String,
    pub(crate) replay_endpoint: Option<String>,
    pub(crate) model_name: String,
    pub(crate) routing_group: String,
    pub(crate) block_size: u32,
}

pub(super) async fn registrations(State(app): State<Arc<App>>) -> impl IntoResponse {
    let mut list = Vec::new();
    for partition in app.registry.partitions() {
        let Key { model, group } = &partition.key;
        list.extend(partition.listeners().into_iter().map(|(worker, listener)| Registered {
            instance_id: worker.instance.0,
            dp_rank: worker.rank,
            endpoint: listener.endpoint.to_string(),
            replay_endpoint: listener.replay.as_ref().map(ToString::to_string),
            model_name: model.clone(),
            routing_group: group.clone(),
            block_size: partition.block_size.tokens(),
        }));
    }
    Json(list)
}

#[derive(Deserialize)]
pub(super) struct Which {
    endpoint: String,
    #[serde(default)]
    dp_rank: u32,
    model_name: String,
    routing_group: Option<String>,
    block_size: u32,
    scheme: String,
    /// The asking process, which may be this one: a peer's name may stand for all replicas.
    asker: Option<String>,
}

pub(super) async fn snapshot(
    State(app): State<Arc<App>>,
    which: Result<Query<Which>, axum::extract::rejection::QueryRejection>,
) -> Result<Response, ApiError> {
    let Query(which) = which.map_err(|_| {
        ApiError::bad(
            "endpoint, model_name, block_size and scheme are needed, and numbers where numbers belong",
        )
    })?;
    if which.asker.as_deref() == Some(&format!("{:016x}", app.registry.boot)) {
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let key = super::reference::key(which.model_name, which.routing_group)?;
    let partition = super::reference::partition(&app, &key)?;
    if partition.block_size.tokens() != which.block_size || partition.scheme.name() != which.scheme {
        let known = Scheme::ALL.map(Scheme::name).contains(&which.scheme.as_str());
        return Err(if known {
            ApiError::conflict(format!(
                "blocks have {} tokens and the hash scheme {} here",
                partition.block_size.tokens(),
                partition.scheme.name()
            ))
        } else {
            ApiError::bad("scheme is not kvlane or reference")
        });
    }
    let found = partition.listeners().into_iter().find(|(worker, listener)| {
        worker.rank == which.dp_rank && listener.endpoint.to_string() == which.endpoint
    });
    let (_, listener): (Worker, _) =
        found.ok_or_else(|| ApiError::not_found("this publisher is not followed here"))?;
    let image: Image = listener.image().await.ok_or_else(|| {
        ApiError::unavailable("this rank's stream is not in step here now: ask another peer, or its engine")
    })?;
    // Written out before it is sent: the rank's memory twice, for the time of one answer.
    let bytes = tokio::task::spawn_blocking(move || {
        let mut out = Vec::with_capacity(image.bytes() + 4096);
        image.write(&mut out).map(|()| out)
    });
    let bytes =
        bytes.await.ok().and_then(Result::ok).ok_or_else(|| ApiError::unavailable("the image is lost"))?;
    Ok(([(CONTENT_TYPE, "application/octet-stream")], Body::from(bytes)).into_response())
}
