//! Which worker holds which KV-cache blocks.
//!
//! Engines cache the attention keys and values of prompts in blocks of some tokens. This crate keeps, for each
//! worker and storage tier, which blocks are there, from the events that the engines publish, and answers for a
//! prompt how many of its leading blocks each worker holds.
//!
//! Pure: no clock, no sockets, no logging, no threads of its own.
//!
//! # The parts
//!
//! * [`partition`] makes an [`IndexWriter`], which applies [`KvEvent`]s, and an [`Index`], which answers.
//! * [`hash`] turns tokens into [`BlockHash`]es, the same way for requests and for events.
//! * [`mod@reference`] is the oracle: what every answer means, in the plainest code.
//! * [`snapshot`] saves a partition and fills another one.
//!
//! # An example
//!
//! Two workers store the same prompt; one of them loses its last block, and has it in host memory.
//!
//! ```
//! use kvlane_index::hash::{Namespace, prompt_hashes};
//! use kvlane_index::*;
//!
//! let size = BlockSize::new(4).expect("4 is not 0");
//! let (mut writer, index) = partition(IndexConfig::new(size));
//!
//! let mut blocks = Vec::new();
//! prompt_hashes(&(0..12).collect::<Vec<u32>>(), size, &Namespace::default(), &mut blocks);
//! let (first, second) = (Worker::new(1, 0), Worker::new(2, 0));
//! for (worker, names) in [(first, 10..13), (second, 20..23)] {
//!     let blocks =
//!         names.zip(&blocks).map(|(engine, block)| StoredBlock { engine: EngineHash(engine), block: *block }).collect();
//!     let stored = KvEvent::Stored { tier: Tier::Device, group: Group::default(), parent: None, blocks };
//!     assert_eq!(writer.apply(worker, &stored).stored, 3);
//! }
//! let hashes = vec![EngineHash(22)];
//! let group = Group::default();
//! let _ = writer.apply(second, &KvEvent::StoredByHash { tier: Tier::Host, group, hashes: hashes.clone() });
//! let _ = writer.apply(second, &KvEvent::Removed { tier: Tier::Device, group: group.id, hashes });
//!
//! let mut overlaps = Overlaps::default();
//! index.overlap(&blocks, &mut overlaps);
//! assert_eq!(overlaps.get(first).expect("it holds all").device, 3);
//! let second = overlaps.get(second).expect("it holds some");
//! assert_eq!((second.device, second.host), (2, 1));
//! ```
//!
//! # Consistency
//!
//! There is one writer; any number of publishers feed it, each worker's events in the order of its engine. Readers take no lock and
//! write nothing that is shared. An answer contains all that was applied before the question; it was true at one moment while it was
//! worked out, or is less than that, and never more. See [`Index`].
//!
//! # Memory and time
//!
//! A block that one worker holds takes about 24 bytes; one that 64 workers hold under one engine hash, half a byte for each of
//! them. A prompt that is hashed already ([`Index::hash`]) is answered after a few looks however long it is; otherwise the cost
//! of hashing its blocks' prefixes comes on top. Clearing or removing a worker costs what that worker holds.

mod applied;
mod block_hash;
mod config;
mod dump;
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
pub use overlaps::{DepthGroup, DepthGroups, Overlap, Overlaps};
pub use partition::{HashedPrompt, Index, IndexWriter, Replacement, partition};
pub use reference::MAX_COPIES;
pub use tier::Tier;
