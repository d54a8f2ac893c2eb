//! Sockets around the pure crates: event ingest, fleet, gateway, metrics.

pub mod clock;
pub mod config;
pub mod fleet;
pub mod ingest;
