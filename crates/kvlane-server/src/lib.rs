//! Sockets around the pure crates: event ingest, fleet, gateway, metrics.

mod audit;
pub mod clock;
pub mod config;
pub mod doctor;
mod explain;
pub mod fleet;
mod gateway;
pub mod grpc;
mod http_server;
pub mod indexer;
pub mod ingest;
mod metrics;
mod remote;
mod replicas;
mod select;
mod serve;
mod state;

pub use config::PeerError;
pub use gateway::TokenizerSetting;
pub use remote::IndexerUrlError;
pub use serve::{ServeConfig, ServeError, Server, serve};
