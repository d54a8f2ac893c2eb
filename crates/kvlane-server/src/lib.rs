//! Sockets around the pure crates: event ingest, fleet, gateway, metrics.

pub mod config;
pub mod fleet;
