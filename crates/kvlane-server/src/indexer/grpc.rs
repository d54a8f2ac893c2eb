//! The index over gRPC, beside HTTP on the same port: `proto/kvlane/index/v1/index.proto`, reflection, and the standard health service.
//!
//! The answers of `POST /v1/overlap` in fewer bytes: block hashes under the number of their scheme go in, never tokens; what changes
//! slowly (endpoints, groups, reasons) is in `Describe`, what changes with every event is in `Overlap`. A stream of questions answers one
//! before it reads the next, so that whoever does not read its answers is not read either, and holds one question in memory.

use super::Knowledge;
use super::api::endpoint;
use super::partition::{Key, Partition};
use super::registry::{NAME_BYTES_MAX, Registry, RegistryError};
use crate::fleet::Trust;
use crate::grpc::DESCRIPTORS;
use crate::grpc::v1::index_server::{Index, IndexServer};
use crate::grpc::v1::{
    DescribeRequest, DescribeResponse, FollowedRank, Group as GroupMessage, OverlapRequest, OverlapResponse,
    RankOverlap, RegisterRequest, RegisterResponse, Rule, Trust as TrustMessage,
};
use crate::indexer::Registration;
use axum::Router;
use axum::extract::Request as HttpRequest;
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response as HttpResponse};
use futures_util::{Stream, StreamExt, stream};
use kvlane_index::{BlockHash, BlockSize, Group, GroupKind, Overlap, Overlaps, Worker};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;
use tonic::{Request, Response, Status, Streaming};

/// A call must be answered in this time, or its stream begun; its message must have come by then.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The routes of the three services.
pub(super) async fn router(registry: Arc<Registry>, max_message_bytes: usize) -> Router {
    let index = IndexServer::new(Service { registry })
        .max_decoding_message_size(max_message_bytes)
        .max_encoding_message_size(max_message_bytes);
    let reflection = || {
        tonic_reflection::server::Builder::configure()
            .register_encoded_file_descriptor_set(DESCRIPTORS)
            .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
    };
    let described = "the compiled file is whole";
    let (health, health_service) = tonic_health::server::health_reporter();
    health.set_serving::<IndexServer<Service>>().await;
    Router::new()
        .route_service("/kvlane.index.v1.Index/{call}", index)
        .route_service("/grpc.health.v1.Health/{call}", health_service)
        .route_service(
            "/grpc.reflection.v1.ServerReflection/{call}",
            reflection().build_v1().expect(described),
        )
        .route_service(
            // The older name of the same service, which many tools still ask for.
            "/grpc.reflection.v1alpha.ServerReflection/{call}",
            reflection().build_v1alpha().expect(described),
        )
        .layer(from_fn(in_time))
}

async fn in_time(request: HttpRequest, next: Next) -> HttpResponse {
    match tokio::time::timeout(CALL_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => {
            let late = Status::deadline_exceeded("the call's message did not come in time");
            late.into_http::<axum::body::Body>().into_response()
        }
    }
}

#[derive(Clone, Debug)]
struct Service {
    registry: Arc<Registry>,
}

fn key(model: String, group: String) -> Result<Key, Status> {
    if model.len() > NAME_BYTES_MAX || group.len() > NAME_BYTES_MAX {
        return Err(Status::invalid_argument(format!(
            "model or routing_group is longer than {NAME_BYTES_MAX} bytes"
        )));
    }
    let group = if group.is_empty() { Key::DEFAULT_GROUP.to_owned() } else { group };
    Ok(Key { model, group })
}

impl Service {
    fn answer(&self, asked: OverlapRequest, overlaps: &mut Overlaps) -> Result<OverlapResponse, Status> {
        let OverlapRequest { tag, model, routing_group, scheme, block_hashes } = asked;
        let partition = self.registry.partition(&key(model, routing_group)?).ok_or_else(|| {
            Status::not_found("no such partition: register its workers, or check model and routing_group")
        })?;
        let own = partition.scheme.id();
        if scheme != own {
            return Err(Status::failed_precondition(format!(
                "block hashes of scheme {scheme} mean nothing here: hash by scheme {own} (Describe)"
            )));
        }
        let blocks: Vec<BlockHash> = block_hashes.into_iter().map(BlockHash).collect();
        partition.index.overlap(&blocks, overlaps);
        Ok(OverlapResponse {
            tag,
            error: String::new(),
            block_size: partition.block_size.tokens(),
            ranks: ranks(&partition, overlaps),
            waiting: partition.lane.waiting(),
        })
    }
}

/// Every rank that is followed or holds something, in order.
fn ranks(partition: &Partition, overlaps: &Overlaps) -> Vec<RankOverlap> {
    let none = |worker| Overlap { worker, device: 0, predicted: 0, host: 0, disk: 0, external: 0, mixed: 0 };
    let message = |overlap: &Overlap, trust: TrustMessage, epoch: u64| RankOverlap {
        instance: overlap.worker.instance.0,
        rank: overlap.worker.rank,
        device: overlap.device,
        predicted: overlap.predicted,
        host: overlap.host,
        disk: overlap.disk,
        external: overlap.external,
        mixed: overlap.mixed,
        trust: trust.into(),
        epoch,
    };
    let listeners = partition.listeners();
    let mut out = Vec::with_capacity(listeners.len().max(overlaps.ranks.len()));
    for (worker, listener) in &listeners {
        let overlap = overlaps.get(*worker).copied().unwrap_or_else(|| none(*worker));
        let epoch = listener.counters.look(|stats| stats.epoch);
        out.push(message(&overlap, trust(&listener.trust()), epoch));
    }
    let followed = |worker: Worker| listeners.binary_search_by_key(&worker, |(w, _)| *w).is_ok();
    let others = overlaps.ranks.iter().filter(|overlap| !followed(overlap.worker));
    out.extend(others.map(|overlap| message(overlap, TrustMessage::Blind, 0)));
    out.sort_unstable_by_key(|rank| (rank.instance, rank.rank));
    out
}

fn trust(trust: &Trust) -> TrustMessage {
    match trust {
        Trust::Blind(_) => TrustMessage::Blind,
        Trust::Replaying => TrustMessage::Replaying,
        Trust::Live => TrustMessage::Live,
        Trust::Rebuilding(_) => TrustMessage::Rebuilding,
        Trust::Degraded(_) => TrustMessage::Degraded,
    }
}

fn group(group: &Group) -> GroupMessage {
    let (rule, window_tokens) = match group.kind {
        GroupKind::Full => (Rule::Full, None),
        GroupKind::Sliding { window_tokens } => (Rule::Sliding, Some(window_tokens)),
        GroupKind::Recurrent => (Rule::Recurrent, None),
    };
    GroupMessage { group: group.id.0.into(), rule: rule.into(), window_tokens }
}

/// Every rank that is followed.
fn followed(partition: &Partition) -> Vec<FollowedRank> {
    let rules = partition.rules();
    let describe = |(worker, listener): (Worker, Arc<super::listener::Listener>)| {
        let state = listener.trust();
        FollowedRank {
            instance: worker.instance.0,
            rank: worker.rank,
            endpoint: listener.endpoint.to_string(),
            trust: trust(&state).into(),
            trust_reason: state.reason().unwrap_or_default().to_owned(),
            groups: rules.get(&worker).into_iter().flatten().map(group).collect(),
            lag_seconds: listener.counters.look(|stats| stats.lag_s),
        }
    };
    partition.listeners().into_iter().map(describe).collect()
}

type Answers = Pin<Box<dyn Stream<Item = Result<OverlapResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Index for Service {
    async fn describe(
        &self,
        request: Request<DescribeRequest>,
    ) -> Result<Response<DescribeResponse>, Status> {
        let DescribeRequest { model, routing_group } = request.into_inner();
        let partition = self.registry.partition(&key(model, routing_group)?);
        Ok(Response::new(DescribeResponse {
            block_size: partition.as_ref().map_or(0, |p| p.block_size.tokens()),
            scheme: self.registry.scheme.id(),
            events: self.registry.knowledge == Knowledge::Events,
            ranks: partition.as_deref().map(followed).unwrap_or_default(),
        }))
    }

    async fn overlap(&self, request: Request<OverlapRequest>) -> Result<Response<OverlapResponse>, Status> {
        self.answer(request.into_inner(), &mut Overlaps::default()).map(Response::new)
    }

    type OverlapStreamStream = Answers;

    async fn overlap_stream(
        &self,
        request: Request<Streaming<OverlapRequest>>,
    ) -> Result<Response<Answers>, Status> {
        let start = (request.into_inner(), self.clone(), Overlaps::default());
        let answers = stream::unfold(start, |(mut questions, service, mut overlaps)| async {
            let answer = questions.next().await?.map(|asked| {
                let tag = asked.tag;
                service.answer(asked, &mut overlaps).unwrap_or_else(|status| OverlapResponse {
                    tag,
                    error: status.message().to_owned(),
                    ..OverlapResponse::default()
                })
            });
            Some((answer, (questions, service, overlaps)))
        });
        Ok(Response::new(answers.boxed()))
    }

    async fn register(
        &self,
        request: Request<RegisterRequest>,
    ) -> Result<Response<RegisterResponse>, Status> {
        let asked = request.into_inner();
        let Key { model, group } = key(asked.model, asked.routing_group)?;
        let reachable = |text: &str| endpoint(text).map_err(Status::invalid_argument);
        let replay = Some(asked.replay_endpoint).filter(|text| !text.is_empty());
        let registration = Registration {
            instance: asked.instance,
            rank: asked.rank,
            endpoint: reachable(&asked.endpoint)?,
            replay: replay.as_deref().map(reachable).transpose()?,
            model,
            group,
            block_size: BlockSize::new(asked.block_size)
                .ok_or_else(|| Status::invalid_argument("block_size is 0: give the tokens in a block"))?,
        };
        match self.registry.register(&registration).await {
            Ok(()) => Ok(Response::new(RegisterResponse {})),
            Err(error @ RegistryError::Twice(..)) => Err(Status::already_exists(error.to_string())),
            Err(error @ (RegistryError::TooManyPartitions | RegistryError::TooManyListeners)) => {
                Err(Status::resource_exhausted(error.to_string()))
            }
            Err(error) => Err(Status::failed_precondition(error.to_string())),
        }
    }
}
