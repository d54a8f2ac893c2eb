//! Engine bytes to KV-cache events: wire decoders and the stream state machine.
//!
//! Two halves, both free of sockets and clocks:
//!
//! * [`wire`] turns one payload into a [`wire::Batch`]: what the engine said, in any of its versions' encodings;
//!   [`resolve`] turns that into the index's [`kvlane_index::KvEvent`]s, hashing tokens with the router's own block hash.
//! * [`stream`] follows one publisher (a worker's rank): frames, connection changes and time go in; events in order,
//!   replay requests, fences and state changes come out.
//!
//! TensorRT-LLM's buffered events are polled over HTTP instead; [`drain`] is the machine for them.
//!
//! [`rebuild`] stands before the index and regains what a fence made unknown.
//!
//! Whoever owns the sockets feeds a [`stream::Stream`] and does what it says; nothing here waits.

pub mod drain;
mod msgpack;
pub mod rebuild;
pub mod resolve;
pub mod stream;
pub mod wire;
