//! What is known of every instance at one moment: an immutable picture, replaced as a whole.
//!
//! The request path reads it without locks or waiting; the fleet's tasks publish a new one whenever a fact, a health
//! state or an events state changes. Figures that move all the time (counters, lag) are not in it; see
//! [`crate::fleet::Fleet::stats`].

use crate::config::{Endpoint, HttpVersion, Role};
use crate::ingest::Lane;
use kvlane_index::{BlockSize, Index, InstanceId, Worker};
use std::collections::HashMap;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

/// The whole fleet at one moment.
#[derive(Clone, Debug, Default)]
pub struct FleetView {
    /// Rises with every published view.
    pub version: u64,
    /// Every configured instance, sorted by id, whatever its health.
    pub instances: Vec<Arc<Instance>>,
    /// Healthy instances by the model name that they serve (base models and adapters), in order of id.
    serving: HashMap<String, Vec<Arc<Instance>>>,
}

impl FleetView {
    /// A view of these instances.
    pub fn new(version: u64, mut instances: Vec<Arc<Instance>>) -> Self {
        instances.sort_by_key(|i| i.id);
        let mut serving: HashMap<String, Vec<Arc<Instance>>> = HashMap::new();
        for instance in instances.iter().filter(|i| i.health.is_healthy()) {
            for model in instance.facts.iter().flat_map(|f| &f.models) {
                let list = serving.entry(model.id.clone()).or_default();
                if list.last().is_none_or(|last| last.id != instance.id) {
                    list.push(Arc::clone(instance));
                }
            }
        }
        Self { version, instances, serving }
    }

    /// Healthy instances that serve `model` (base model or adapter); empty if none does now.
    pub fn serving(&self, model: &str) -> &[Arc<Instance>] {
        self.serving.get(model).map_or(&[], Vec::as_slice)
    }

    /// Names of all models that a healthy instance serves, in no order.
    pub fn model_names(&self) -> impl Iterator<Item = &str> {
        self.serving.keys().map(String::as_str)
    }

    /// Whether any instance, healthy or not, is known to serve `model`: tells "gone for now" from "unknown".
    pub fn knows(&self, model: &str) -> bool {
        self.instances.iter().any(|i| i.model(model).is_some())
    }

    /// The instance of this id.
    pub fn instance(&self, id: InstanceId) -> Option<&Arc<Instance>> {
        self.instances.binary_search_by_key(&id, |i| i.id).ok().map(|at| &self.instances[at])
    }
}

/// One engine process with an address.
#[derive(Clone, Debug)]
pub struct Instance {
    /// Its number for the life of this process: the position among the configured workers.
    pub id: InstanceId,
    /// Base URL without a trailing slash; requests go to `base` + `/v1/…`.
    pub base: http::Uri,
    /// How requests are sent there.
    pub http: HttpVersion,
    /// Which part of requests it is for.
    pub role: Role,
    /// What requests may ask for, `key=value`.
    pub labels: Vec<Box<str>>,
    /// Whether requests may go there.
    pub health: Health,
    /// Since when it is in this health state.
    pub since: Instant,
    /// What the last successful probe learnt; kept while dead (for display), `None` before the first success.
    pub facts: Option<Facts>,
    /// One entry for each data-parallel rank, by rank; empty before the first successful probe.
    pub ranks: Vec<Rank>,
    /// The index partition that its blocks live in; `None` while unknown or where events are switched off.
    pub partition: Option<Arc<Partition>>,
}

impl Instance {
    /// The model of this name, base or adapter.
    pub fn model(&self, name: &str) -> Option<&Model> {
        self.facts.as_ref()?.models.iter().find(|m| m.id == name)
    }

    /// `host:port` of the base URL: the worker's name in headers, logs and metrics.
    pub fn name(&self) -> &str {
        self.base.authority().map_or("", http::uri::Authority::as_str)
    }
}

/// Whether requests may go to an instance.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Health {
    /// Not reached or not understood yet; the reason of the last failed probe, `None` before the first ended.
    Probing(Option<String>),
    /// Answers.
    Healthy,
    /// Was healthy and does not answer any more; says why. Its cache knowledge is cleared; it is probed until it is back.
    Dead(String),
}

impl Health {
    /// Whether requests may go there.
    pub fn is_healthy(&self) -> bool {
        matches!(self, Self::Healthy)
    }

    /// The name used in JSON and metrics.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Probing(_) => "probing",
            Self::Healthy => "healthy",
            Self::Dead(_) => "dead",
        }
    }

    /// Why it is not healthy, where known.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Probing(reason) => reason.as_deref(),
            Self::Healthy => None,
            Self::Dead(reason) => Some(reason),
        }
    }
}

/// What a probe learnt about an engine.
#[derive(Clone, PartialEq, Debug)]
pub struct Facts {
    /// Which engine.
    pub engine: EngineKind,
    /// Its version as it prints it; `None` where it does not.
    pub version: Option<String>,
    /// What it serves: base models first.
    pub models: Vec<Model>,
    /// Tokens in a block.
    pub block_size: BlockSize,
    /// Who said so.
    pub block_size_source: Source,
    /// Count of data-parallel ranks, at least 1.
    pub ranks: u32,
    /// Blocks in the device tier of each rank; `None` where the engine does not say.
    pub capacity_blocks: Option<u64>,
    /// Whether responses carry `cached_tokens`.
    pub cached_tokens: CachedTokens,
    /// Unix time at which the engine process started, in milliseconds; changes when it is restarted.
    pub started_at_ms: Option<u64>,
    /// Event publishers, one for each rank; empty for a worker without events.
    pub publishers: Vec<Publisher>,
    /// Events of all ranks are fetched over HTTP instead (TensorRT-LLM's buffered path).
    pub drains: bool,
    /// Why there are no publishers, or why a part of the above is a guess; each names the `--worker` part that settles it.
    pub notes: Vec<String>,
}

impl Facts {
    /// The base model that names the index partition (the first one listed).
    pub fn base_model(&self) -> &str {
        self.models.iter().find(|m| m.parent.is_none()).map_or("", |m| m.id.as_str())
    }
}

/// A name that requests may carry in `model`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Model {
    /// The name.
    pub id: String,
    /// Directory or hub name of the weights, as the engine prints it.
    pub root: Option<String>,
    /// For a LoRA adapter the base model's name; `None` = a base model. An adapter's name enters every block hash.
    pub parent: Option<String>,
    /// Longest prompt + output in tokens.
    pub max_model_len: Option<u64>,
}

/// Where one rank publishes its events.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Publisher {
    /// The data-parallel rank.
    pub rank: u32,
    /// PUB socket, reachable from here.
    pub events: Endpoint,
    /// ROUTER socket for replays; `None`: losses cannot be repaired.
    pub replay: Option<Endpoint>,
    /// Topic, compared whole; `None` = any.
    pub topic: Option<String>,
    /// Who said so.
    pub source: Source,
}

/// Who a fact comes from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Source {
    /// The `--worker` argument.
    Operator,
    /// The engine itself.
    Engine,
    /// Nobody: the engine's usual default.
    Assumed,
}

/// Which engine answers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum EngineKind {
    /// vLLM.
    Vllm,
    /// SGLang.
    Sglang,
    /// TensorRT-LLM (`trtllm-serve`).
    TensorRtLlm,
    /// Something else that speaks OpenAI's API.
    Other,
}

impl EngineKind {
    /// The name used in JSON and metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Sglang => "sglang",
            Self::TensorRtLlm => "tensorrt-llm",
            Self::Other => "other",
        }
    }
}

/// Whether the engine reports `usage.prompt_tokens_details.cached_tokens`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CachedTokens {
    /// It does.
    Reported,
    /// It does not: requests there are unaudited.
    NotReported,
    /// Not known before the first response.
    Unknown,
}

/// One data-parallel rank: the schedulable unit.
#[derive(Clone, PartialEq, Debug)]
pub struct Rank {
    /// Its name in the index and the ledger.
    pub worker: Worker,
    /// How far its cache knowledge can be trusted.
    pub trust: Trust,
    /// Since when.
    pub since: Instant,
}

/// How far the cache knowledge of one rank can be trusted.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Trust {
    /// No events: only predicted placements. Says why.
    Blind(String),
    /// Subscribed, and asking for what was published before.
    Replaying,
    /// Every event since the beginning of the engine's life or since a clear was applied.
    Live,
    /// In order now, but what was published before a hole is unknown: nothing false, something missing.
    Rebuilding(String),
    /// Events do not come in as they should. Says why.
    Degraded(String),
}

impl Trust {
    /// The name used in JSON and metrics.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Blind(_) => "blind",
            Self::Replaying => "replaying",
            Self::Live => "live",
            Self::Rebuilding(_) => "rebuilding",
            Self::Degraded(_) => "degraded",
        }
    }

    /// Why, where there is more to say than the name.
    pub fn reason(&self) -> Option<&str> {
        match self {
            Self::Blind(why) | Self::Rebuilding(why) | Self::Degraded(why) => Some(why),
            Self::Replaying | Self::Live => None,
        }
    }
}

impl fmt::Display for Trust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        self.reason().map_or(Ok(()), |why| write!(f, " ({why})"))
    }
}

/// One index: all workers of one model family with one block size.
///
/// Adapters share the partition of their base model, because the adapter enters the block hash.
#[derive(Debug)]
pub struct Partition {
    /// The base model's name.
    pub model: String,
    /// Tokens in a block.
    pub block_size: BlockSize,
    /// Who holds what. Deadlines of predictions are in milliseconds of [`crate::clock::now_ms`].
    pub index: Index,
    pub(crate) lane: Lane,
}

impl Partition {
    /// Blocks and events that were decoded and wait to be applied.
    pub fn waiting(&self) -> u64 {
        self.lane.waiting()
    }

    /// Waits until every event decoded so far is in the index.
    pub async fn flush(&self) {
        self.lane.flush().await;
    }
}
