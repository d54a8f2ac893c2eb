//! Sockets around the pure crates: event ingest, fleet, gateway, metrics.
