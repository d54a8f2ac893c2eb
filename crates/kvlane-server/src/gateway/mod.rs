//! HTTP in, HTTP out: a client's request goes to the worker that the scheduler chooses, and the answer comes back unchanged.
//!
//! Life of a request: the body is read whole within bounds ([`body`]); the few fields that matter are parsed and its tokens found
//! ([`prompts`]); the index says who holds its beginning, the scheduler decides and books ([`plan`]); the original bytes are sent, to the next
//! candidate if the first gives no byte ([`forward`]); an [`inflight::InFlight`] releases what it held, whatever ends it.

mod adapters;
mod admin;
mod admission;
mod body;
mod collect;
mod desk;
mod disagg;
mod error;
mod forward;
mod headers;
mod inflight;
mod known_blocks;
mod loads;
mod parity;
mod plan;
mod prompts;
mod routes;
mod shadow;
mod snapshot;
mod split;
mod status;
mod table;
mod traffic;
mod upstream;
mod usage;
mod wishes;

pub(crate) use disagg::Handover;
pub(crate) use plan::ledger_ids;
pub use prompts::TokenizerSetting;
pub(crate) use table::{Table, Upstream, believed};

use self::admission::Admission;
use self::body::ResponseBody;
use self::desk::Desk;
use self::error::ClientError;
use self::forward::Forwarded;
use self::known_blocks::KnownBlocks;
use self::plan::Ask;
use self::prompts::Prompts;
use self::routes::{Route, route};
use self::traffic::Traffic;
use crate::audit::{Auditor, Case, Cause, Evidence, Witness};
use crate::explain::Ring;
use crate::fleet::Fleet;
use crate::ingest::Learner;
use crate::metrics::Metrics;
use crate::remote::RemoteIndex;
use crate::replicas::Replicas;
use arc_swap::ArcSwap;
use bytes::Bytes;
use hyper::Request;
use hyper::body::Incoming;
use kvlane_index::{BlockHash, Index, Overlaps, Worker};
use kvlane_prompt::{Endpoint, RequestFields};
use kvlane_sched::queue::QueueLimits;
use kvlane_sched::shadow::Shadow;
use kvlane_sched::{Policy, Rng, Scheduler};
use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

/// A response to a client.
pub(crate) type Response = hyper::Response<ResponseBody<Forwarded>>;

/// Between two rounds of closing connections that were idle for too long.
const HOUSEKEEPING: Duration = Duration::from_secs(1);
/// Knowledge of a worker that proved false is not learnt anew more often than this.
const DISTRUST_AGAIN: Duration = Duration::from_secs(30);

/// The blocks of a prompt, and the index that knows who holds them. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct PromptBlocks {
    /// The partition.
    pub index: Index,
    /// From the root.
    pub hashes: Arc<[BlockHash]>,
    /// Tokens in each.
    pub block_size: u32,
    /// Takes note of what requests and answers say about ranks that are being learnt.
    pub learner: Learner,
}

/// How the gateway was told to behave.
#[derive(Debug)]
pub(crate) struct GatewayConfig {
    /// How workers are chosen.
    pub policy: Box<dyn Policy>,
    /// Policies that look on.
    pub shadows: Vec<Box<dyn Policy>>,
    /// How many requests wait here, and how long, while all workers are saturated; `None` = none.
    pub queue: Option<QueueLimits>,
    /// Where tokens come from.
    pub tokenizer: TokenizerSetting,
    /// Longest request body.
    pub max_body_bytes: u64,
    /// Whether administrative paths are passed on.
    pub allow_admin: bool,
    /// Whether other routers may ask for images.
    pub replicated: bool,
    /// Other routers that load is shared with; `None` = none.
    pub replicas: Option<Arc<Replicas>>,
    /// Who knows what the workers hold; `None` = the fleet's own indexes do.
    pub remote: Option<Arc<RemoteIndex>>,
    /// Seeds ids and draws.
    pub seed: u64,
}

/// Everything that requests share.
#[derive(Debug)]
pub(crate) struct Gateway {
    pub(crate) fleet: Fleet,
    /// Shared with the audit.
    table: Arc<ArcSwap<Table>>,
    desk: Desk,
    prompts: Arc<Prompts>,
    admission: Admission,
    traffic: Traffic,
    known_blocks: KnownBlocks,
    explanations: Ring,
    auditor: Auditor,
    pub(crate) metrics: Arc<Metrics>,
    /// Whether the policy reads overlaps; if not, nothing is tokenized.
    cache_aware: bool,
    max_body_bytes: u64,
    allow_admin: bool,
    replicated: bool,
    replicas: Option<Arc<Replicas>>,
    remote: Option<Arc<RemoteIndex>>,
    draining: AtomicBool,
}

impl Gateway {
    /// A gateway over `fleet`, with its background tasks, which end with `stop`.
    pub(crate) fn start(fleet: Fleet, config: GatewayConfig, stop: &CancellationToken) -> Arc<Self> {
        let metrics = Arc::new(Metrics::new());
        let GatewayConfig {
            policy,
            shadows,
            queue,
            tokenizer,
            max_body_bytes,
            allow_admin,
            replicated,
            replicas,
            remote,
            seed,
        } = config;
        let prompts = Arc::new(Prompts::new(tokenizer));
        let table = Arc::new(ArcSwap::from_pointee(Table::new(&fleet, &Table::default(), &metrics)));
        let witness = FleetWitness {
            fleet: fleet.clone(),
            table: Arc::clone(&table),
            prompts: Arc::clone(&prompts),
            distrusted: HashMap::new(),
        };
        let (auditor, settling) = Auditor::new(Arc::clone(&metrics), witness);
        tokio::spawn(settling);
        let gateway = Arc::new(Self {
            fleet,
            table,
            cache_aware: policy.needs_cache_knowledge() || shadows.iter().any(|s| s.needs_cache_knowledge()),
            desk: Desk::new(
                Scheduler::new(policy),
                shadows.into_iter().map(Shadow::new).collect(),
                Rng::new(seed),
            ),
            admission: Admission::new(queue),
            // Apart from the random choices, which a patient client can watch.
            traffic: Traffic::new(xxhash_rust::xxh3::xxh3_64(&seed.to_le_bytes())),
            prompts,
            known_blocks: KnownBlocks::new(),
            explanations: Ring::new((seed >> 32) as u32 ^ seed as u32),
            auditor,
            metrics,
            max_body_bytes,
            allow_admin,
            replicated,
            replicas,
            remote,
            draining: AtomicBool::new(false),
        });
        let (following, keeping) = (Arc::clone(&gateway), Arc::clone(&gateway));
        tokio::spawn(stop.child_token().run_until_cancelled_owned(Arc::clone(&gateway).let_out()));
        tokio::spawn(
            stop.child_token().run_until_cancelled_owned(async move { following.follow_fleet().await }),
        );
        tokio::spawn(stop.child_token().run_until_cancelled_owned(async move { keeping.keep_house().await }));
        if let Some(replicas) = &gateway.replicas {
            tokio::spawn(Arc::clone(replicas).ask(stop.clone()));
            let (telling, told) = (Arc::clone(&gateway), Arc::clone(replicas));
            tokio::spawn(
                stop.child_token().run_until_cancelled_owned(async move { telling.tell_loads(&told).await }),
            );
            let (hearing, heard) = (Arc::clone(&gateway), Arc::clone(replicas));
            tokio::spawn(
                stop.child_token().run_until_cancelled_owned(async move { hearing.hear_loads(&heard).await }),
            );
        }
        gateway
    }

    /// From now on new requests are refused and `/ready` says so.
    pub(crate) fn drain(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Remakes the table whenever the fleet changes, and finds new models' tokenizers.
    async fn follow_fleet(&self) {
        let mut changed = self.fleet.changed();
        loop {
            changed.mark_unchanged();
            let table = Arc::new(Table::new(&self.fleet, &self.table.load(), &self.metrics));
            self.table.store(Arc::clone(&table));
            if self.cache_aware {
                self.prompts.learn(&table).await;
            }
            if changed.changed().await.is_err() {
                return;
            }
        }
    }

    async fn keep_house(&self) {
        loop {
            tokio::time::sleep(HOUSEKEEPING).await;
            let table = self.table.load_full();
            table.upstreams().iter().for_each(|upstream| upstream.pool.sweep());
        }
    }

    /// Answers one request. Never fails: errors are responses.
    pub(crate) async fn handle(self: Arc<Self>, request: Request<Incoming>) -> Response {
        let arrived = Instant::now();
        let (head, body) = request.into_parts();
        let path = head.uri.path();
        let route = route(&head.method, path);
        let answered = match route {
            Route::Chat => self.serve(arrived, &head, body, Some(Endpoint::Chat)).await,
            Route::Completions => self.serve(arrived, &head, body, Some(Endpoint::Completions)).await,
            Route::Other => self.serve(arrived, &head, body, None).await,
            Route::Admin => self.admin(&head, body).await,
            Route::Drain => self.drain_worker(&head),
            Route::DryRun => self.dry_run(arrived, &head, body).await,
            Route::Models => Ok(self.models()),
            Route::Model => self.model(path),
            Route::Health => Ok(status::text("ok\n")),
            Route::Ready => Ok(self.ready()),
            Route::Metrics => Ok(self.metrics_text()),
            Route::Workers => Ok(self.workers()),
            Route::Explain => self.explanation(path),
            Route::Traffic => self.record(head.uri.query().unwrap_or_default()),
            Route::Snapshot => self.snapshot(head.uri.query().unwrap_or_default()).await,
            Route::Loads => self.loads(head.uri.query().unwrap_or_default()).await,
        };
        answered.unwrap_or_else(|error| {
            self.metrics.rejected(error.reason());
            tracing::debug!(path, status = error.status.as_u16(), reason = error.reason(), "rejected");
            error.response().map(ResponseBody::own)
        })
    }

    /// A request for an engine.
    async fn serve(
        self: &Arc<Self>,
        arrived: Instant,
        head: &hyper::http::request::Parts,
        body: Incoming,
        endpoint: Option<Endpoint>,
    ) -> Result<Response, ClientError> {
        if self.is_draining() {
            return Err(ClientError::unavailable("This router is shutting down; try again."));
        }
        let body = body::read(body, self.max_body_bytes).await?;
        let fields = match endpoint {
            Some(endpoint) => {
                let parsed = RequestFields::parse(endpoint, body.clone());
                Some(Arc::new(parsed.map_err(|bad| ClientError::bad_field(&bad))?))
            }
            // Whatever it is, it is the engine's business; only a model's name helps to find the right one.
            None => RequestFields::parse(Endpoint::Other, body.clone()).ok().map(Arc::new),
        };
        if let Some(fields) = fields.as_ref().filter(|fields| fields.endpoint() == Endpoint::Completions)
            && split::wanted(&head.headers)
            && let Some(answered) = self.split(arrived, head, fields).await?
        {
            return Ok(answered);
        }
        self.route(arrived, head, fields.as_ref(), &body).await
    }

    /// Finds a worker for a request and passes it on.
    async fn route(
        self: &Arc<Self>,
        arrived: Instant,
        head: &hyper::http::request::Parts,
        fields: Option<&Arc<RequestFields>>,
        body: &Bytes,
    ) -> Result<Response, ClientError> {
        let path = head.uri.path();
        let ask = Ask { arrived, path, headers: &head.headers, fields, body_bytes: body.len() };
        let mut plan = self.plan(&ask).await?;
        let handed = self.prefill_elsewhere(&mut plan, &ask, head, body).await;
        let (plan, inflight) = self.admit(plan).await?;
        let (head, body) = handed.as_ref().map_or((head, body), |handed| (&handed.head, &handed.body));
        Ok(self.forward(&plan, inflight, head, body).await)
    }
}

/// Asks the fleet on behalf of the audit, and tells it what the audit found.
#[derive(Debug)]
struct FleetWitness {
    fleet: Fleet,
    table: Arc<ArcSwap<Table>>,
    prompts: Arc<Prompts>,
    /// When each worker's knowledge was last given up.
    distrusted: HashMap<Worker, Instant>,
}

impl Witness for FleetWitness {
    fn evidence(&self, worker: Worker) -> Evidence {
        self.table.load().evidence(worker)
    }

    fn found(&mut self, case: &Case, cause: Cause) {
        match cause {
            Cause::TokensDiffer | Cause::BlocksDiffer => {
                let view = self.fleet.snapshot();
                let facts = view.instance(case.worker.instance).and_then(|i| i.facts.as_ref());
                self.prompts.suspect(facts.map_or("", |f| f.base_model()));
            }
            // The index promised what the engine does not have, and no event explains it.
            Cause::Mismatch if case.prediction.cached_tokens > case.actual => {
                let last = self.distrusted.get(&case.worker);
                if last.is_none_or(|last| last.elapsed() > DISTRUST_AGAIN) {
                    tracing::warn!(worker = %case.worker, "the engine has less than its events say: learning its cache anew");
                    self.distrusted.insert(case.worker, Instant::now());
                    self.fleet.distrust(case.worker);
                }
            }
            _ => {}
        }
    }

    fn confirmed_tokens(&self, case: &Case) -> u32 {
        let Some(blocks) = &case.blocks else { return 0 };
        let mut overlaps = Overlaps::default();
        blocks.index.overlap(&blocks.hashes, &mut overlaps);
        let device = overlaps.get(case.worker).map_or(0, |o| o.device);
        device.saturating_mul(blocks.block_size)
    }
}

/// A body that is written here.
fn own(bytes: impl Into<Bytes>) -> ResponseBody<Forwarded> {
    ResponseBody::own(bytes.into())
}
