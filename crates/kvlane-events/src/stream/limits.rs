//! The bounds of a stream: how much it buffers, how long it waits, how often it asks.

/// Bounds of one stream, all in milliseconds of the caller's clock, batches or bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Live batches that wait while a replay runs. More are refused and asked for later.
    pub buffer_batches: usize,
    /// Bytes of those batches.
    pub buffer_bytes: usize,
    /// A replay that says nothing for this long is given up. An idle engine polls its replay socket every 100 ms.
    pub reply_idle_ms: u64,
    /// Pause before the second try of a replay; doubles with each further one.
    pub backoff_ms: u64,
    /// The longest pause between two tries.
    pub backoff_max_ms: u64,
    /// Tries without any progress before the hole is accepted.
    pub tries: u32,
    /// How long knowledge may be claimed while a hole or a broken connection keeps it from being confirmed.
    pub stale_ms: u64,
    /// Silence after which a stream with a replay endpoint asks whether it missed the last batch.
    pub quiet_ms: u64,
    /// How long live batches wait for a snapshot.
    pub snapshot_ms: u64,
    /// First pause before a whole replay, or a snapshot, is tried again after it was given up; doubles up to `again_max_ms`.
    pub again_ms: u64,
    /// The longest such pause.
    pub again_max_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            buffer_batches: 65_536,
            buffer_bytes: 64 << 20,
            reply_idle_ms: 3_000,
            backoff_ms: 100,
            backoff_max_ms: 2_000,
            tries: 5,
            stale_ms: 10_000,
            quiet_ms: 15_000,
            snapshot_ms: 2_000,
            again_ms: 30_000,
            again_max_ms: 600_000,
        }
    }
}
