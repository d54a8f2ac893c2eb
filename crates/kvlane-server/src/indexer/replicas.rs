//! What a new replica learns from its peers before it knows anything: who is registered.
//!
//! What the registered ranks hold is asked rank by rank, each by its own stream when it begins ([`crate::state::Sources`]).

use super::Registration;
use super::api::Registered;
use super::registry::Registry;
use crate::fleet::probe::get;
use kvlane_index::BlockSize;
use std::time::Duration;

/// A peer must list its registrations in this time.
const TIMEOUT: Duration = Duration::from_secs(10);

/// Registers what the peers have registered and this process has not; returns how many that were. What a peer says that contradicts
/// what is registered here is left out.
pub(super) async fn adopt_registrations(registry: &Registry) -> usize {
    let mut adopted = 0;
    for peer in registry.peers.all() {
        let Ok(base) = peer.parse::<http::Uri>() else { continue };
        let answer = match get(&base, "/v1/registrations", TIMEOUT).await {
            Ok(answer) => answer,
            Err(error) => {
                tracing::info!(peer, "this peer does not answer: {error}");
                continue;
            }
        };
        let listed = answer.json().and_then(|json| serde_json::from_value::<Vec<Registered>>(json).ok());
        let Some(listed) = listed else {
            tracing::warn!(
                peer,
                status = answer.status.as_u16(),
                "this peer lists no registrations: is it a kvlane indexer?"
            );
            continue;
        };
        for registered in listed {
            let Some(registration) = registration(registered) else { continue };
            adopted += usize::from(registry.register(&registration).await.is_ok());
        }
    }
    adopted
}

fn registration(registered: Registered) -> Option<Registration> {
    let Registered { instance_id, dp_rank, endpoint, replay_endpoint, model_name, routing_group, block_size } =
        registered;
    Some(Registration {
        instance: instance_id,
        rank: dp_rank,
        endpoint: endpoint.parse().ok()?,
        replay: replay_endpoint.map(|replay| replay.parse()).transpose().ok()?,
        model: model_name,
        group: routing_group,
        block_size: BlockSize::new(block_size)?,
    })
}
