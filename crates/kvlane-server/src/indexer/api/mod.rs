//! The service's HTTP calls: the reference's under their own names, kvlane's under `/v1`.
//!
//! Every body is read whole within a bound of bytes and of time ([`body`]); every error is `{"error": text}`, where the text says what
//! to do and repeats nothing that was sent but names and numbers.

mod body;
mod decisions;
mod dump;
mod overlap;
mod reference;
mod select;
mod snapshot;

pub(super) use reference::endpoint;
pub(crate) use snapshot::Registered;

use super::metrics::{Metrics, measure};
use super::registry::Registry;
use super::{ApiConfig, Knowledge};
use crate::select::Selector;
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::middleware::from_fn_with_state;
use axum::response::IntoResponse;
use axum::routing::{delete, get, post};
use std::hash::{BuildHasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The OpenAPI document that is served at `/openapi.json`.
pub const DOCUMENT: &str = include_str!("openapi.json");

/// Every call: method and path, as in the document.
pub const ROUTES: &[(&str, &str)] = &[
    ("post", "/register"),
    ("post", "/unregister"),
    ("get", "/workers"),
    ("post", "/query"),
    ("post", "/query_by_hash"),
    ("get", "/dump"),
    ("post", "/register_peer"),
    ("post", "/deregister_peer"),
    ("get", "/peers"),
    ("get", "/health"),
    ("get", "/metrics"),
    ("post", "/reopen_logs"),
    ("post", "/test/pause_listener"),
    ("post", "/test/resume_listener"),
    ("post", "/v1/overlap"),
    ("post", "/v1/decisions"),
    ("post", "/v1/select"),
    ("post", "/v1/reservations"),
    ("delete", "/v1/reservations/{id}"),
    ("post", "/v1/reservations/{id}/prefill_complete"),
    ("post", "/v1/reservations/{id}/output"),
    ("post", "/v1/reservations/{id}/renew"),
    ("get", "/v1/loads"),
    ("get", "/v1/registrations"),
    ("get", "/kvlane/snapshot"),
    ("get", "/openapi.json"),
];

/// What all handlers share.
#[derive(Debug)]
struct App {
    registry: Arc<Registry>,
    selector: Arc<Selector>,
    metrics: Metrics,
    config: ApiConfig,
    /// Tells this process's names of reservations from others'.
    boot: u64,
    next_id: AtomicU64,
}

/// The service's routes; `beside` are those of other protocols, measured alike.
pub(super) fn router(
    registry: Arc<Registry>,
    selector: Arc<Selector>,
    config: ApiConfig,
    beside: Router,
) -> Router {
    let app = Arc::new(App {
        registry,
        selector,
        metrics: Metrics::new(),
        config,
        boot: RandomState::new().hash_one(0),
        next_id: AtomicU64::new(0),
    });
    let mut router = Router::new()
        .route("/register", post(reference::register))
        .route("/unregister", post(reference::unregister))
        .route("/workers", get(reference::workers))
        .route("/query", post(reference::query))
        .route("/query_by_hash", post(reference::query_by_hash))
        .route("/dump", get(dump::dump))
        .route("/register_peer", post(reference::register_peer))
        .route("/deregister_peer", post(reference::deregister_peer))
        .route("/peers", get(reference::peers))
        .route("/health", get(reference::health))
        .route("/metrics", get(reference::metrics))
        .route("/reopen_logs", post(reference::reopen_logs))
        .route("/v1/overlap", post(overlap::overlap))
        .route("/v1/decisions", post(decisions::record))
        .route("/v1/select", post(select::select))
        .route("/v1/reservations", post(select::reserve))
        .route("/v1/reservations/{id}", delete(select::free))
        .route("/v1/reservations/{id}/prefill_complete", post(select::prefill_complete))
        .route("/v1/reservations/{id}/output", post(select::output))
        .route("/v1/reservations/{id}/renew", post(select::renew))
        .route("/v1/loads", get(select::loads))
        .route("/v1/registrations", get(snapshot::registrations))
        .route("/kvlane/snapshot", get(snapshot::snapshot))
        .route("/openapi.json", get(document));
    if config.allow_pausing {
        router = router
            .route("/test/pause_listener", post(reference::pause))
            .route("/test/resume_listener", post(reference::resume));
    }
    router
        .fallback(body::no_such_path)
        .method_not_allowed_fallback(body::no_such_method)
        .with_state(Arc::clone(&app))
        .merge(beside)
        .layer(from_fn_with_state(app, measure_all))
}

async fn measure_all(
    axum::extract::State(app): axum::extract::State<Arc<App>>,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> axum::response::Response {
    measure(&app.metrics, request, next).await
}

async fn document() -> impl IntoResponse {
    ([(CONTENT_TYPE, "application/json")], DOCUMENT)
}

impl App {
    fn new_reservation_id(&self) -> String {
        format!("{:016x}-{}", self.boot, self.next_id.fetch_add(1, Ordering::Relaxed))
    }

    fn is_told(&self) -> bool {
        self.registry.knowledge == Knowledge::Decisions
    }
}
