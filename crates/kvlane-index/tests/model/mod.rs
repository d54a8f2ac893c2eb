//! Generated operations, run on an index and on the oracle side by side.
//!
//! One generator for everything that holds the index against its meaning: `tests/differential.rs`, the example `soak` (the same at
//! any size), `tests/stress.rs` (beside readers) and the fuzz target `index_ops` (the choices come from its bytes). They include this
//! module by path.
//!
//! [`choice`] where choices come from; [`regime`] what kinds of operations; [`generator`] the operations; [`op`] one of them, and
//! how it is written for `kvlane index run`; [`pair`] index and oracle; [`race`] both beside readers; [`soak`] a whole run, and how a failing one is made small.

#![allow(dead_code, reason = "each user of this module needs another part of it")]

pub mod choice;
pub mod generator;
pub mod op;
pub mod pair;
pub mod race;
pub mod regime;
pub mod soak;
