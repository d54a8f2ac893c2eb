//! The index's wire format for routers and schedulers that ask at high rates: protobuf over gRPC.
//!
//! `proto/kvlane/index/v1/index.proto` is what counts; the code is made from it by `xtask/proto` and checked in. Spoken by the indexer
//! ([`crate::indexer`]) as server and by a gateway with a remote index as client.

#[expect(
    missing_docs,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "written by a compiler"
)]
#[rustfmt::skip]
pub mod v1;

/// The compiled `.proto` file, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!("descriptors.bin");
