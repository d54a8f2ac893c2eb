//! `GET /dump`: everything that is held, as the reference's events, so that one of its own indexers can start from it.
//!
//! Written rank by rank while it is sent, so that a dump of any size takes little memory; a client that reads too slowly is given up by
//! the connection's own limits. Only groups of full attention are in it (the reference knows no others), and no predictions.
//! kvlane's own replicas use the snapshot instead, which has all groups, and where the stream goes on.

use super::App;
use crate::indexer::partition::Partition;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use kvlane_index::{GroupKind, KvEvent, Tier, Worker};
use serde::Serialize;
use std::convert::Infallible;
use std::io::Write as _;
use std::sync::Arc;
use tokio::sync::mpsc;

/// Bytes gathered before they are sent.
const CHUNK_BYTES: usize = 256 << 10;
/// Chunks that may wait for the client.
const CHUNKS_WAITING: usize = 4;

#[derive(Serialize)]
struct RouterEvent {
    worker_id: u64,
    storage_tier: &'static str,
    residency_domain: &'static str,
    event: Event,
}

#[derive(Serialize)]
struct Event {
    event_id: u64,
    data: Data,
    dp_rank: u32,
}

#[derive(Serialize)]
#[serde(rename_all = "snake_case")]
enum Data {
    Stored { parent_hash: Option<u64>, start_position: Option<u32>, blocks: Vec<Block> },
    Removed { block_hashes: Vec<u64> },
}

#[derive(Serialize)]
struct Block {
    block_hash: u64,
    tokens_hash: u64,
    mm_extra_info: Option<()>,
}

pub(super) async fn dump(State(app): State<Arc<App>>) -> impl IntoResponse {
    let (sender, mut receiver) = mpsc::channel::<Bytes>(CHUNKS_WAITING);
    let partitions = app.registry.partitions();
    // Reading a large rank out takes milliseconds in which a task would hold up others.
    tokio::task::spawn_blocking(move || write(&partitions, &sender));
    let chunks = futures_util::stream::poll_fn(move |context| {
        receiver.poll_recv(context).map(|chunk| chunk.map(Ok::<_, Infallible>))
    });
    ([(CONTENT_TYPE, "application/json")], Body::from_stream(chunks))
}

/// Sends the document; ends early when nobody reads it any more.
fn write(partitions: &[Arc<Partition>], sender: &mpsc::Sender<Bytes>) -> Option<()> {
    let mut out = Vec::with_capacity(CHUNK_BYTES * 2);
    out.push(b'{');
    for (i, partition) in partitions.iter().enumerate() {
        if i > 0 {
            out.push(b',');
        }
        let key = format!("{}:{}", partition.key.model, partition.key.group);
        serde_json::to_writer(&mut out, &key).ok()?;
        write!(out, ":{{\"block_size\":{},\"events\":[", partition.block_size.tokens()).ok()?;
        let mut workers: Vec<Worker> = partition.index.workers().iter().map(|held| held.worker).collect();
        workers.dedup();
        let mut id = 0;
        for worker in workers {
            for event in partition.index.dump(worker) {
                let Some(event) = as_reference(worker, &event, id) else { continue };
                if id > 0 {
                    out.push(b',');
                }
                id += 1;
                serde_json::to_writer(&mut out, &event).ok()?;
                if out.len() >= CHUNK_BYTES {
                    sender.blocking_send(std::mem::take(&mut out).into()).ok()?;
                }
            }
        }
        out.extend_from_slice(b"]}");
    }
    out.push(b'}');
    sender.blocking_send(out.into()).ok()
}

fn as_reference(worker: Worker, event: &KvEvent, event_id: u64) -> Option<RouterEvent> {
    let (tier, data) = match event {
        KvEvent::Stored { tier, group, parent, blocks } if group.kind == GroupKind::Full => {
            let block = |b: &kvlane_index::StoredBlock| Block {
                block_hash: b.engine.0,
                tokens_hash: b.block.0,
                mm_extra_info: None,
            };
            let blocks = blocks.iter().map(block).collect();
            (tier, Data::Stored { parent_hash: parent.map(|p| p.0), start_position: None, blocks })
        }
        KvEvent::Removed { tier, hashes, .. } => {
            (tier, Data::Removed { block_hashes: hashes.iter().map(|h| h.0).collect() })
        }
        KvEvent::Stored { .. } | KvEvent::StoredByHash { .. } | KvEvent::Cleared { .. } => return None,
    };
    Some(RouterEvent {
        worker_id: worker.instance.0,
        storage_tier: match tier {
            Tier::Device => "device",
            Tier::Host => "host_pinned",
            Tier::Disk => "disk",
            Tier::External => "external",
        },
        residency_domain: "worker",
        event: Event { event_id, data, dp_rank: worker.rank },
    })
}
