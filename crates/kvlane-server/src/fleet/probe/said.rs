//! What an engine says about itself, gathered from its answers; each part may be missing.

use super::metrics::samples;
use crate::config::Endpoint;
use crate::fleet::{CachedTokens, EngineKind, Model, Publisher, Source};
use kvlane_index::BlockSize;
use serde_json::Value;

/// The most models that one engine may list; beyond it the rest is ignored.
const MODELS_MAX: usize = 4096;

/// Everything that was understood so far.
#[derive(Clone, Debug)]
pub(super) struct Said {
    pub(super) engine: EngineKind,
    pub(super) version: Option<String>,
    pub(super) models: Vec<Model>,
    pub(super) block_size: Option<BlockSize>,
    pub(super) ranks: Option<u32>,
    pub(super) capacity_blocks: Option<u64>,
    pub(super) cached_tokens: CachedTokens,
    pub(super) started_at_ms: Option<u64>,
    pub(super) publishers: Vec<Publisher>,
    /// It was asked where it publishes and said: nowhere.
    pub(super) events_are_off: bool,
}

impl Said {
    /// From the body of `/v1/models`; `None` if that is not OpenAI's list, or is empty.
    pub(super) fn models(body: &[u8]) -> Option<Self> {
        let json: Value = serde_json::from_slice(body).ok()?;
        let list = json.get("data")?.as_array()?;
        let mut engine = EngineKind::Other;
        let mut models = Vec::new();
        for entry in list.iter().take(MODELS_MAX) {
            let id = text(entry, "id")?;
            match entry.get("owned_by").and_then(Value::as_str) {
                Some("vllm") => engine = EngineKind::Vllm,
                Some("sglang") => engine = EngineKind::Sglang,
                Some("tensorrt_llm" | "tensorrt-llm") => engine = EngineKind::TensorRtLlm,
                _ => {}
            }
            models.push(Model {
                id,
                root: text(entry, "root"),
                parent: text(entry, "parent"),
                max_model_len: entry.get("max_model_len").and_then(Value::as_u64),
            });
        }
        models.sort_by_key(|m| m.parent.is_some());
        let base_len = models.first()?.max_model_len;
        for model in &mut models {
            model.max_model_len = model.max_model_len.or(base_len);
        }
        Some(Self {
            engine,
            version: None,
            models,
            block_size: None,
            ranks: None,
            capacity_blocks: None,
            cached_tokens: CachedTokens::Unknown,
            started_at_ms: None,
            publishers: Vec::new(),
            events_are_off: false,
        })
    }

    /// The topic of the publishers that the engine named.
    pub(super) fn topic(&self) -> Option<&String> {
        self.publishers.first().and_then(|p| p.topic.as_ref())
    }

    /// From `/metrics`.
    pub(super) fn metrics(&mut self, text: &str) {
        let mut last_rank = None;
        for sample in samples(text) {
            if self.engine == EngineKind::Other {
                if sample.name.starts_with("vllm:") {
                    self.engine = EngineKind::Vllm;
                } else if sample.name.starts_with("sglang:") {
                    self.engine = EngineKind::Sglang;
                }
            }
            match sample.name {
                "process_start_time_seconds" if sample.value > 0.0 && sample.value < 1e12 => {
                    #[expect(
                        clippy::cast_possible_truncation,
                        clippy::cast_sign_loss,
                        reason = "in range by the guard"
                    )]
                    let ms = (sample.value * 1e3) as u64;
                    self.started_at_ms = Some(ms);
                }
                "vllm:cache_config_info" => {
                    let number = |name| sample.label(name).and_then(|v| v.parse::<u64>().ok());
                    // Blocks are hashed, and published, in units of `hash_block_size` where that differs.
                    let size = number("hash_block_size").or_else(|| number("block_size"));
                    let size = size.and_then(|n| u32::try_from(n).ok()).and_then(BlockSize::new);
                    self.block_size = self.block_size.or(size);
                    // One block is reserved by the engine for padding.
                    let blocks = number("num_gpu_blocks").map(|n| n.saturating_sub(1));
                    self.capacity_blocks = self.capacity_blocks.or(blocks);
                    last_rank = last_rank.max(rank_label(sample.label("engine")));
                }
                "vllm:num_requests_running" => last_rank = last_rank.max(rank_label(sample.label("engine"))),
                _ => {}
            }
        }
        if let Some(last) = last_rank {
            self.ranks = Some(last.saturating_add(1));
        }
    }

    /// From `/version`.
    pub(super) fn version(&mut self, json: &Value) {
        self.version = text(json, "version");
    }

    /// From vLLM's `/kv_event_sources`: `{"RANK": {endpoint, replay_endpoint, topic, …}}`, ports already by rank.
    pub(super) fn vllm_sources(&mut self, json: &Value) {
        let Some(sources) = json.as_object() else { return };
        for (rank, source) in sources {
            let Ok(rank) = rank.parse() else { continue };
            if source.get("publisher").and_then(Value::as_str) == Some("null") {
                continue;
            }
            let Some(events) = endpoint(source, "endpoint") else { continue };
            self.publishers.push(Publisher {
                rank,
                events,
                replay: endpoint(source, "replay_endpoint"),
                topic: text(source, "topic").filter(|topic| !topic.is_empty()),
                source: Source::Engine,
            });
        }
        self.publishers.sort_by_key(|p| p.rank);
        self.events_are_off = self.publishers.is_empty();
        if let Some(last) = self.publishers.last() {
            self.ranks = self.ranks.max(Some(last.rank.saturating_add(1)));
        }
    }

    /// From SGLang's `/server_info`.
    pub(super) fn sglang_info(&mut self, json: &Value) {
        let number = |object: &Value, name: &str| object.get(name).and_then(Value::as_u64);
        let small = |n: u64| u32::try_from(n).ok();
        self.version = text(json, "version").or(self.version.take());
        self.ranks = number(json, "dp_size").and_then(small);
        self.block_size = number(json, "page_size").and_then(small).and_then(BlockSize::new);
        self.cached_tokens = match json.get("enable_cache_report").and_then(Value::as_bool) {
            Some(true) => CachedTokens::Reported,
            Some(false) => CachedTokens::NotReported,
            None => CachedTokens::Unknown,
        };
        let pool = json.pointer("/internal_states/0").unwrap_or(json);
        let tokens = number(pool, "max_total_num_tokens").or_else(|| number(json, "max_total_num_tokens"));
        if let Some(events) = json.get("kv_events").filter(|v| v.is_object()) {
            let size = number(events, "block_size").and_then(small).and_then(BlockSize::new);
            self.block_size = size.or(self.block_size);
            self.ranks = number(events, "dp_size").and_then(small).or(self.ranks);
            let port = |name| number(events, name).and_then(|n| u16::try_from(n).ok());
            let host = text(events, "endpoint_host").unwrap_or_else(|| "*".to_owned());
            let base = port("endpoint_port_base").map(|p| Endpoint::new(host.clone(), p));
            let replay = port("replay_endpoint_port_base").map(|p| Endpoint::new(host, p));
            let topic = text(events, "topic").filter(|t| !t.is_empty());
            for rank in 0..self.ranks.unwrap_or(1).min(crate::config::RANKS_MAX) {
                let Some(events) = base.as_ref().and_then(|b| b.rank(rank).ok()) else { break };
                self.publishers.push(Publisher {
                    rank,
                    events,
                    replay: replay.as_ref().and_then(|r| r.rank(rank).ok()),
                    topic: topic.clone(),
                    source: Source::Engine,
                });
            }
        } else if json.get("kv_events").is_some() {
            self.events_are_off = true;
        }
        let size = self.block_size.map(BlockSize::tokens);
        self.capacity_blocks = tokens.zip(size).map(|(tokens, size)| tokens / u64::from(size));
    }
}

fn text(object: &Value, name: &str) -> Option<String> {
    object.get(name).and_then(Value::as_str).map(str::to_owned)
}

fn endpoint(object: &Value, name: &str) -> Option<Endpoint> {
    object.get(name).and_then(Value::as_str)?.parse().ok().filter(|e: &Endpoint| e.port != 0)
}

fn rank_label(label: Option<&str>) -> Option<u32> {
    label.and_then(|l| l.parse().ok()).filter(|rank| *rank < crate::config::RANKS_MAX)
}
