//! Keeps a picture of the indexers: what they follow, who their ranks are here, and how far they trust what they know.
//!
//! A rank is recognized by the address of its publisher. An engine that an indexer does not follow yet is registered there, so that an indexer
//! needs no list of engines; its number there is made from the address, so that all routers give it the same one.

use super::{Indexer, Known, RemoteIndex};
use crate::fleet::{Fleet, FleetView, Publisher, Trust};
use crate::grpc::v1::{
    DescribeRequest, DescribeResponse, FollowedRank, RegisterRequest, Trust as TrustMessage,
};
use kvlane_index::Worker;
use kvlane_index::hash::Scheme;
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::{sleep, timeout};
use tokio_util::sync::CancellationToken;
use tonic::{Code, Status};
use xxhash_rust::xxh3::xxh3_64;

/// Between two looks at an indexer.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// A look must be answered in this time.
const LOOK_TIMEOUT: Duration = Duration::from_secs(2);
/// Numbers of instances fit into what JSON clients keep exactly.
const INSTANCE_BITS: u32 = 53;

/// A publisher of the fleet.
struct Followed {
    worker: Worker,
    publisher: Publisher,
    /// The number of its instance at indexers.
    instance: u64,
}

/// The publishers of one model, which must be one partition at an indexer.
struct Wanted {
    block_size: u32,
    ranks: Vec<Followed>,
}

/// What an indexer says of each rank.
type Trusts = HashMap<Worker, Trust>;

/// Looks at every indexer until `stop`, and tells the fleet how far its ranks are known.
pub(crate) async fn follow(remote: Arc<RemoteIndex>, fleet: Fleet, stop: CancellationToken) {
    let mut told: Trusts = HashMap::new();
    let looking = async {
        loop {
            let view = fleet.snapshot();
            let wanted = wanted(&view);
            let looks = remote.indexers.iter().map(|indexer| look(&remote, indexer, &wanted));
            let trusts = futures_util::future::join_all(looks).await;
            for rank in wanted.values().flat_map(|w| &w.ranks) {
                // The first indexer that knows the rank is the one that is asked.
                let trust = trusts.iter().find_map(|trusts| trusts.get(&rank.worker)).cloned();
                let trust = trust.unwrap_or_else(|| Trust::Blind("no indexer knows it".to_owned()));
                if told.get(&rank.worker) != Some(&trust) || stale(&view, rank.worker, &trust) {
                    fleet.heard_elsewhere(rank.worker, trust.clone());
                    told.insert(rank.worker, trust);
                }
            }
            sleep(LOOK_EVERY).await;
        }
    };
    stop.run_until_cancelled(looking).await;
}

/// Whether the fleet says otherwise, as after an engine came back.
fn stale(view: &FleetView, worker: Worker, trust: &Trust) -> bool {
    let instance = view.instance(worker.instance);
    instance.and_then(|i| i.ranks.iter().find(|r| r.worker == worker)).is_some_and(|r| r.trust != *trust)
}

/// The publishers of all healthy instances, by base model.
fn wanted(view: &FleetView) -> BTreeMap<String, Wanted> {
    let mut wanted: BTreeMap<String, Wanted> = BTreeMap::new();
    for instance in view.instances.iter().filter(|i| i.health.is_healthy()) {
        let Some(facts) = &instance.facts else { continue };
        let block_size = facts.block_size.tokens();
        let Some(first) = facts.publishers.iter().min_by_key(|p| p.rank) else { continue };
        let number = xxh3_64(first.events.to_string().as_bytes()) >> (u64::BITS - INSTANCE_BITS);
        let of = wanted
            .entry(facts.base_model().to_owned())
            .or_insert_with(|| Wanted { block_size, ranks: Vec::new() });
        // An indexer has one block size for a model: the first instance's counts, others are routed by predictions.
        if of.block_size == block_size {
            of.ranks.extend(facts.publishers.iter().map(|publisher| Followed {
                worker: Worker { instance: instance.id, rank: publisher.rank },
                publisher: publisher.clone(),
                instance: number,
            }));
        }
    }
    wanted
}

async fn look(remote: &RemoteIndex, indexer: &Indexer, wanted: &BTreeMap<String, Wanted>) -> Trusts {
    let mut known = HashMap::new();
    let mut trusts = Trusts::new();
    let mut trouble = String::new();
    for (model, wanted) in wanted {
        match timeout(LOOK_TIMEOUT, describe(remote, indexer, model, wanted)).await {
            Ok(Ok(described)) => {
                let ranks: HashMap<&str, &FollowedRank> =
                    described.ranks.iter().map(|rank| (rank.endpoint.as_str(), rank)).collect();
                let mut workers = HashMap::new();
                for followed in &wanted.ranks {
                    let Some(rank) = ranks.get(followed.publisher.events.to_string().as_str()) else {
                        continue;
                    };
                    workers.insert((rank.instance, rank.rank), followed.worker);
                    trusts.insert(followed.worker, trust(rank));
                }
                known.insert(model.clone(), Known { block_size: described.block_size, workers });
            }
            Ok(Err(why)) => trouble = why,
            Err(_) => "it does not answer".clone_into(&mut trouble),
        }
    }
    if **indexer.trouble.load() != trouble {
        if trouble.is_empty() {
            tracing::info!(indexer = indexer.url, "asking this indexer");
        } else {
            tracing::warn!(indexer = indexer.url, "not (all) asked of this indexer: {trouble}");
        }
        indexer.trouble.store(Arc::new(trouble.clone()));
    }
    if !known.is_empty() {
        indexer.failures.store(0, Ordering::Relaxed);
    }
    if **indexer.known.load() != known {
        indexer.known.store(Arc::new(known));
    }
    trusts
}

/// What the indexer says of a model's partition, after what it did not follow of it was registered.
async fn describe(
    remote: &RemoteIndex,
    indexer: &Indexer,
    model: &str,
    wanted: &Wanted,
) -> Result<DescribeResponse, String> {
    let mut client = indexer.client.clone();
    let ask = DescribeRequest { model: model.to_owned(), routing_group: String::new() };
    let described = client.describe(ask).await.map_err(|status| said(&status))?.into_inner();
    if !described.events {
        return Err(
            "it records routing decisions and hears no engines: start it without --decisions".to_owned()
        );
    }
    if Scheme::from_id(described.scheme).is_none() {
        return Err(format!("it hashes by the scheme {}, which is not known here", described.scheme));
    }
    let agreed = remote.scheme.compare_exchange(0, described.scheme, Ordering::Relaxed, Ordering::Relaxed);
    if agreed.is_err_and(|other| other != described.scheme) {
        return Err(
            "it hashes by another scheme than the other indexers: give all the same --hash-scheme".to_owned()
        );
    }
    if described.block_size != 0 && described.block_size != wanted.block_size {
        return Err(format!(
            "it keeps {model} in blocks of {} tokens, the engines in blocks of {}",
            described.block_size, wanted.block_size
        ));
    }
    let mut refused = None;
    let mut registered = false;
    for followed in &wanted.ranks {
        let endpoint = followed.publisher.events.to_string();
        if described.ranks.iter().any(|rank| rank.endpoint == endpoint) {
            continue;
        }
        let replay = followed.publisher.replay.as_ref().map(ToString::to_string);
        let request = RegisterRequest {
            model: model.to_owned(),
            routing_group: String::new(),
            block_size: wanted.block_size,
            instance: followed.instance,
            rank: followed.publisher.rank,
            endpoint,
            replay_endpoint: replay.unwrap_or_default(),
        };
        match client.register(request).await {
            Ok(_) => registered = true,
            // Another router was faster.
            Err(status) if status.code() == Code::AlreadyExists => registered = true,
            Err(status) => refused = Some(said(&status)),
        }
    }
    if registered {
        let ask = DescribeRequest { model: model.to_owned(), routing_group: String::new() };
        return client.describe(ask).await.map(tonic::Response::into_inner).map_err(|status| said(&status));
    }
    match refused {
        Some(why) if described.ranks.is_empty() => Err(why),
        Some(why) => {
            tracing::debug!(indexer = indexer.url, "an engine is not followed there: {why}");
            Ok(described)
        }
        None => Ok(described),
    }
}

fn said(status: &Status) -> String {
    match status.code() {
        Code::Unavailable => "it cannot be reached".to_owned(),
        Code::Unimplemented => "it is no kvlane indexer, or one of an older version".to_owned(),
        _ => status.message().to_owned(),
    }
}

fn trust(rank: &FollowedRank) -> Trust {
    let reason = || rank.trust_reason.clone();
    match rank.trust() {
        TrustMessage::Live => Trust::Live,
        TrustMessage::Replaying => Trust::Replaying,
        TrustMessage::Rebuilding => Trust::Rebuilding(reason()),
        TrustMessage::Degraded => Trust::Degraded(reason()),
        TrustMessage::Blind => Trust::Blind(format!("the indexer hears nothing: {}", reason())),
    }
}
