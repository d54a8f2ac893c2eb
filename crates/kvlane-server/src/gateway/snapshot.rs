//! `GET /kvlane/snapshot`: what one rank holds and up to where of its stream, for other routers over the same engines.
//!
//! Only where peers are configured: block hashes tell a client nothing about prompts, but nothing that it needs either.

use super::body::ResponseBody;
use super::error::ClientError;
use super::{Gateway, Response};
use crate::state::Origin;
use hyper::StatusCode;
use kvlane_index::hash::Scheme;
use serde::Deserialize;

#[derive(Deserialize)]
struct Which {
    endpoint: String,
    #[serde(default)]
    dp_rank: u32,
    model_name: String,
    routing_group: String,
    block_size: u32,
    scheme: String,
    asker: Option<String>,
}

impl Gateway {
    /// The image of the rank that `query` names.
    pub(super) async fn snapshot(&self, query: &str) -> Result<Response, ClientError> {
        if !self.replicated {
            return Err(ClientError::new(StatusCode::NOT_FOUND, "This router has no peers (--peer)."));
        }
        let Which { endpoint, dp_rank, model_name, routing_group, block_size, scheme, asker } =
            serde_urlencoded::from_str(query).map_err(|_| {
                ClientError::bad_request(
                    "endpoint, model_name, routing_group, block_size and scheme are needed.",
                )
            })?;
        if asker.is_some_and(|asker| self.fleet.is_called(&asker)) {
            let mut own = Response::new(ResponseBody::own("".into()));
            *own.status_mut() = StatusCode::NO_CONTENT;
            return Ok(own);
        }
        let scheme = Scheme::ALL.into_iter().find(|s| s.name() == scheme);
        let scheme =
            scheme.ok_or_else(|| ClientError::bad_request("scheme is not kvlane or reference."))?.id();
        let origin =
            Origin { endpoint, rank: dp_rank, model: model_name, group: routing_group, block_size, scheme };
        let image = self.fleet.image(&origin).await.ok_or_else(|| {
            ClientError::new(
                StatusCode::NOT_FOUND,
                "This publisher is not followed here, or not in step now.",
            )
        })?;
        let bytes = tokio::task::spawn_blocking(move || {
            let mut out = Vec::with_capacity(image.bytes() + 4096);
            image.write(&mut out).map(|()| out)
        });
        let bytes = bytes.await.ok().and_then(Result::ok);
        let bytes = bytes.ok_or_else(|| ClientError::unavailable("The image is lost; try again."))?;
        Ok(Response::new(ResponseBody::own(bytes.into())))
    }
}
