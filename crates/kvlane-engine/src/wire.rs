//! Cache events as the engines write them (placeholder header).
