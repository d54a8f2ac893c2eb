//! The one monotonic clock that deadlines are given in.
//!
//! The pure crates take the time as an argument, in milliseconds of whatever clock the caller uses. Predictions are written by
//! the gateway and expired by the fleet, so both must mean the same clock: this one.

use std::sync::LazyLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

static START: LazyLock<Instant> = LazyLock::new(Instant::now);

/// Milliseconds since the first call in this process. Never goes back.
pub fn now_ms() -> u64 {
    u64::try_from(START.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// Seconds since the Unix epoch, to compare with what engines print. May jump.
pub fn unix_s() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64())
}
