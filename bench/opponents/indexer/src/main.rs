//! The reference's standalone indexer, from its public crate, on a port of the loopback interface: what `compare.py` drives.
//!
//! Its own entry point listens on every interface; here only its router and registry are used.

use axum::serve;
use dynamo_kv_router::services::indexer::server::{AppState, create_router};
use std::sync::Arc;

/// Its default.
const THREADS: usize = 4;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let port: u16 = std::env::args().nth(1).unwrap_or_default().parse()?;
    let state = Arc::new(AppState::new(THREADS)?);
    state.registry.signal_ready();
    let listener = tokio::net::TcpListener::bind(("127.0.0.1", port)).await?;
    Ok(serve(listener, create_router(state)).await?)
}
