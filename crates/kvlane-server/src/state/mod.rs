//! Knowledge that outlives a process: kept on disk, and got from other processes.
//!
//! ```text
//! a rank's stream ─ needs a beginning ─▶ Sources: the state directory's image, else a peer's ─▶ stream proves that it goes on there
//!                                                                                            └▶ or declines: replay, rebuild
//! Keeper ─ from time to time, and at the end ─▶ every rank's image ─▶ the state directory
//! ```
//!
//! An [`Image`] says what a rank held at one place of its stream. Nothing of it reaches the index before the stream has proved that it
//! goes on exactly there, so a wrong or old image costs time and never truth.

mod ask;
mod disk;
mod image;
mod keeper;
mod sources;

pub(crate) use ask::Followed;
pub use disk::StateDirError;
pub(crate) use disk::{StateDir, open};
pub(crate) use image::{Header, Image, Origin};
pub(crate) use keeper::{Ranks, keep};
pub(crate) use sources::{From, Sources, addresses};

/// How long a stream's live batches wait for an image, in milliseconds: a peer's of a large rank takes a while to come.
pub(crate) const IMAGE_WAIT_MS: u64 = 20_000;
