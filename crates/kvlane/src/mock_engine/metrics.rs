//! `GET /metrics`: the names and labels that vLLM 0.32 uses, as far as a router reads them.

use super::life::Life;
use super::rank::Snapshot;
use axum::extract::State;
use axum::http::header;
use axum::response::IntoResponse;
use std::fmt::Write as _;
use std::sync::Arc;

/// A metric with one value for each rank: name, help, whether it is a counter, value.
type PerRank = (&'static str, &'static str, bool, fn(&Snapshot) -> f64);

const PER_RANK: [PerRank; 10] = [
    ("vllm:num_requests_running", "Number of requests in model execution batches.", false, |s| {
        f64::from(s.load.running)
    }),
    ("vllm:num_requests_waiting", "Number of requests waiting to be processed.", false, |s| {
        f64::from(s.load.waiting)
    }),
    ("vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", false, |s| {
        f64::from(s.load.held_blocks) / f64::from(s.load.usable_blocks.max(1))
    }),
    (
        "vllm:prefix_cache_queries_total",
        "Prefix cache queries, in terms of number of queried tokens.",
        true,
        |s| s.totals.queried_tokens as f64,
    ),
    ("vllm:prefix_cache_hits_total", "Prefix cache hits, in terms of number of cached tokens.", true, |s| {
        s.totals.hit_tokens as f64
    }),
    ("vllm:prompt_tokens_total", "Number of prefill tokens processed.", true, |s| {
        s.totals.prompt_tokens as f64
    }),
    ("vllm:prompt_tokens_cached_total", "Number of cached prompt tokens.", true, |s| {
        s.totals.hit_tokens as f64
    }),
    ("vllm:generation_tokens_total", "Number of generation tokens processed.", true, |s| {
        s.totals.output_tokens as f64
    }),
    ("vllm:num_preemptions_total", "Cumulative number of preemption from the engine.", true, |s| {
        s.totals.preemptions as f64
    }),
    ("vllm:request_success_total", "Count of successfully processed requests.", true, |s| {
        s.totals.finished as f64
    }),
];

pub(super) async fn metrics(State(life): State<Arc<Life>>) -> impl IntoResponse {
    let mut text = String::new();
    let model = &life.config.model;
    let _ = writeln!(
        text,
        "# HELP process_start_time_seconds Start time of the process since unix epoch in seconds.\n\
         # TYPE process_start_time_seconds gauge\nprocess_start_time_seconds {:.3}",
        life.started_s
    );
    let snapshots: Vec<Snapshot> = life.ranks.iter().map(super::rank::Rank::snapshot).collect();
    for (name, help, counter, value) in PER_RANK {
        let kind = if counter { "counter" } else { "gauge" };
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (rank, snapshot) in snapshots.iter().enumerate() {
            let value = value(snapshot);
            let _ = writeln!(text, "{name}{{engine=\"{rank}\",model_name=\"{model}\"}} {value}");
        }
    }
    let engine = &life.config.engine;
    let (block_size, blocks) = (engine.block_size.tokens(), engine.blocks);
    let caching = if engine.prefix_caching { "True" } else { "False" };
    let _ = writeln!(
        text,
        "# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig\n# TYPE vllm:cache_config_info gauge"
    );
    for rank in 0..life.ranks.len() {
        let _ = writeln!(
            text,
            "vllm:cache_config_info{{block_size=\"{block_size}\",cache_dtype=\"auto\",\
             enable_prefix_caching=\"{caching}\",engine=\"{rank}\",num_gpu_blocks=\"{blocks}\",\
             prefix_caching_hash_algo=\"sha256\"}} 1.0"
        );
    }
    ([(header::CONTENT_TYPE, "text/plain; version=1.0.0; charset=utf-8")], text)
}
