//! Which kind of treatment a path gets.
//!
//! Anything that an engine may serve is passed on, so a path of next year's engine works. What is not passed on unasked are the
//! paths that change an engine for everybody or show its inside: an open router in front of closed engines must not open them.

/// What to do with a request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Route {
    /// `POST /v1/chat/completions`: routed by prefix.
    Chat,
    /// `POST /v1/completions`: routed by prefix.
    Completions,
    /// The models of all healthy workers.
    Models,
    /// One model of the healthy workers, whose name follows.
    Model,
    /// The router lives.
    Health,
    /// The router can serve.
    Ready,
    /// Prometheus text.
    Metrics,
    /// The workers and what is known of them.
    Workers,
    /// Sends a worker nothing new, or again.
    Drain,
    /// A dry run.
    DryRun,
    /// What was decided for the request of the id that follows.
    Explain,
    /// What one rank holds, for another router.
    Snapshot,
    /// What passes, without its content.
    Traffic,
    /// What is in flight, for another router.
    Loads,
    /// Changes an engine for everybody.
    Admin,
    /// Everything else of the engines: routed by load.
    Other,
}

/// First path segments (below an optional `/v1/`) of what only an operator may do. Compared in lower case, whole or as `name/…`.
///
/// From vLLM 0.32's and SGLang 0.5's own route tables; `_`-prefixed families are matched by [`ADMIN_PREFIXES`].
const ADMIN: &[&str] = &[
    "abort_request",
    "abort_requests",
    "add_worker",
    "attach_hicache_storage",
    "clear_hicache_storage_backend",
    "close_session",
    "collective_rpc",
    "configure_logging",
    "continue_generation",
    "crash",
    "debug",
    "destroy_weights_update_group",
    "detach_hicache_storage",
    "docs",
    "dump_expert_distribution_record",
    "end_weight_update",
    "finish_weight_update",
    "flush_cache",
    "freeze_gc",
    "get_internal_state",
    "get_server_info",
    "get_weights_by_name",
    "get_world_size",
    "hicache",
    "init_weight_transfer_engine",
    "init_weights_send_group_for_remote_instance",
    "init_weights_update_group",
    "internal_state",
    "is_paused",
    "is_scaling_elastic_ep",
    "is_sleeping",
    "kv_cache_events",
    "kv_event_sources",
    "load_lora_adapter",
    "load_lora_adapter_from_tensors",
    "lora_adapters",
    "metrics",
    "open_session",
    "openapi.json",
    "pause",
    "pause_generation",
    "pin_prefix",
    "prepare_weights_update",
    "redoc",
    "release_memory_occupation",
    "remove_worker",
    "reset_encoder_cache",
    "reset_mm_cache",
    "reset_prefix_cache",
    "resume",
    "resume_memory_occupation",
    "scale_elastic_ep",
    "send_weights_to_remote_instance",
    "server_info",
    "set_internal_state",
    "set_trace_level",
    "shutdown",
    "sleep",
    "slow_down",
    "start_expert_distribution_record",
    "start_profile",
    "start_weight_update",
    "stop_expert_distribution_record",
    "stop_profile",
    "unload_lora_adapter",
    "unpin_prefix",
    "update_weight_version",
    "update_weights",
    "update_weights_from_disk",
    "update_weights_from_distributed",
    "update_weights_from_ipc",
    "update_weights_from_tensor",
    "wake_up",
    "weights_checker",
];

/// Families of administrative names.
const ADMIN_PREFIXES: &[&str] = &[
    "admin",
    "dev/",
    "flush_",
    "inference_engine",
    "init_weight",
    "load_lora",
    "profile",
    "reset_",
    "rl/",
    "start_",
    "stop_",
    "unload_lora",
    "update_weight",
];

/// The path prefix of [`Route::Explain`] before the id.
pub(crate) const EXPLAIN_PREFIX: &str = "/kvlane/explain/";

/// The path prefix of [`Route::Model`] before the name.
pub(crate) const MODEL_PREFIX: &str = "/v1/models/";

/// The route of a request. `path` is as it stands in the request line, without the query.
pub(crate) fn route(method: &hyper::Method, path: &str) -> Route {
    let (get, post) = (method == hyper::Method::GET, method == hyper::Method::POST);
    match path {
        "/v1/chat/completions" if post => Route::Chat,
        "/v1/completions" if post => Route::Completions,
        "/v1/models" if get => Route::Models,
        "/health" | "/ping" if get => Route::Health,
        "/ready" if get => Route::Ready,
        "/metrics" if get => Route::Metrics,
        "/kvlane/workers" if get => Route::Workers,
        "/kvlane/snapshot" if get => Route::Snapshot,
        "/kvlane/traffic" if get => Route::Traffic,
        "/kvlane/loads" if get => Route::Loads,
        "/kvlane/explain" if post => Route::DryRun,
        "/kvlane/drain" if post || method == hyper::Method::DELETE => Route::Drain,
        _ if get && path.starts_with(EXPLAIN_PREFIX) => Route::Explain,
        _ if get && path.starts_with(MODEL_PREFIX) => Route::Model,
        _ if is_admin(path) => Route::Admin,
        _ => Route::Other,
    }
}

/// Whether any reading of `path` by an engine's web framework could be an administrative one.
fn is_admin(path: &str) -> bool {
    // Escapes, doubled slashes and dots are how a path check is walked around; no engine has a path that needs them.
    let plain = path.bytes().all(|b| b.is_ascii_alphanumeric() || b"/_-.:".contains(&b));
    if !plain || path.contains("//") || path.split('/').any(|s| s == "." || s == "..") {
        return true;
    }
    let lower = path.to_ascii_lowercase();
    let mut rest = lower.trim_start_matches('/');
    // Below any prefix under which frameworks mount the same routes again.
    while let Some(below) = rest.strip_prefix("v1/").or_else(|| rest.strip_prefix("api/")) {
        rest = below;
    }
    let first = rest.split('/').next().unwrap_or_default();
    ADMIN.contains(&first) || ADMIN_PREFIXES.iter().any(|p| rest.starts_with(p))
}

#[cfg(test)]
mod tests {
    use super::*;
    use hyper::Method;

    #[test]
    fn paths_get_their_routes() {
        let cases = [
            (Method::POST, "/v1/chat/completions", Route::Chat),
            (Method::POST, "/v1/completions", Route::Completions),
            (Method::GET, "/v1/completions", Route::Other),
            (Method::GET, "/v1/models", Route::Models),
            (Method::GET, "/metrics", Route::Metrics),
            (Method::POST, "/kvlane/explain", Route::DryRun),
            (Method::GET, "/kvlane/explain/abc", Route::Explain),
            (Method::DELETE, "/kvlane/drain", Route::Drain),
            (Method::GET, "/kvlane/traffic", Route::Traffic),
            (Method::GET, "/kvlane/snapshot", Route::Snapshot),
            (Method::POST, "/v1/embeddings", Route::Other),
            (Method::POST, "/tokenize", Route::Other),
            (Method::POST, "/rerank", Route::Other),
            (Method::POST, "/v1/responses/abc/cancel", Route::Other),
            (Method::GET, "/version", Route::Other),
            (Method::GET, "/v1/models/org/name%20x", Route::Model),
        ];
        for (method, path, want) in cases {
            assert_eq!(route(&method, path), want, "{method} {path}");
        }
    }

    #[test]
    fn administrative_paths_cannot_be_disguised() {
        let cases = [
            "/reset_prefix_cache",
            "/RESET_PREFIX_CACHE",
            "/sleep",
            "/sleep/",
            "//sleep",
            "/v1/../sleep",
            "/%73leep",
            "/wake_up",
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/start_profile",
            "/stop_profile",
            "/pause",
            "/resume",
            "/collective_rpc",
            "/server_info",
            "/flush_cache",
            "/update_weights_from_disk",
            "/scale_elastic_ep",
            "/v1/v1/sleep",
            "/./sleep",
            "/sleep;x",
        ];
        for path in cases {
            assert_eq!(route(&Method::POST, path), Route::Admin, "{path}");
        }
    }
}
