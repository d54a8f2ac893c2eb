//! Which worker holds which KV-cache blocks.
//!
//! Engines cache the attention keys and values of prompts in blocks of some tokens. This crate keeps, for each
//! worker and storage tier, which blocks are there, from the events that the engines publish, and answers for a
//! prompt how many of its leading blocks each worker holds.
//!
//! Pure: no clock, no sockets, no logging, no threads of its own.

mod applied;
mod config;
mod event;
pub mod hash;
mod ids;
mod overlaps;
mod partition;
mod prefix;
pub mod reference;
pub mod snapshot;
mod tier;
mod tree;

pub use applied::Applied;
pub use config::{Held, IndexConfig, IndexStats};
pub use event::{BlockHash, EngineHash, Group, GroupId, GroupKind, KvEvent, StoredBlock};
pub use hash::BlockSize;
pub use ids::{InstanceId, Worker};
pub use overlaps::{Overlap, Overlaps};
pub use partition::{HashedPrompt, Index, IndexWriter, partition};
pub use reference::MAX_COPIES;
pub use tier::Tier;
