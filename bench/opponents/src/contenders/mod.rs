//! The indexes that are compared, each through its public API alone.

pub mod dynamo;
pub mod kvlane;
pub mod smg;
