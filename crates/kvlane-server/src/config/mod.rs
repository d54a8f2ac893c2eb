//! What the operator says, parsed once into forms that cannot be wrong.
//!
//! Nothing here reads files or the environment: the binary hands over strings, and everything behind this module
//! works on valid values.

mod endpoint;
mod peers;
mod worker_spec;

pub use endpoint::{Endpoint, EndpointError};
pub use peers::PeerError;
pub(crate) use peers::Peers;
pub(crate) use worker_spec::RANKS_MAX;
pub use worker_spec::{EventsSetting, HttpVersion, Role, WorkerSpec, WorkerSpecError};
