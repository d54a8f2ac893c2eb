//! Which worker a session used last.
//!
//! Two generations of a bounded map: a session that is used moves to the young one; when that is full, the old one is dropped. So the table
//! holds the latest [`GENERATION`] sessions at least and twice that at most, without timers.

use crate::hash::Map;
use kvlane_index::Worker;

/// Sessions in one generation: 100 bytes each, 13 MB for both.
const GENERATION: usize = 1 << 16;

/// Session to worker.
#[derive(Debug, Default)]
pub(crate) struct Sessions {
    young: Map<u64, Worker>,
    old: Map<u64, Worker>,
}

impl Sessions {
    /// Where the session was last, if it is remembered.
    pub(crate) fn get(&self, session: u64) -> Option<Worker> {
        self.young.get(&session).or_else(|| self.old.get(&session)).copied()
    }

    /// The session went to `worker`.
    pub(crate) fn put(&mut self, session: u64, worker: Worker) {
        if self.young.len() >= GENERATION && !self.young.contains_key(&session) {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(session, worker);
    }

    /// The worker is gone.
    pub(crate) fn forget(&mut self, worker: Worker) {
        self.young.retain(|_, w| *w != worker);
        self.old.retain(|_, w| *w != worker);
    }
}
