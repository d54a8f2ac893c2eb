//! What one event did to the index, as counts.
//!
//! The server turns these into metrics by kind and status; nothing that the index leaves out goes uncounted. Unit of
//! every field: blocks (engine hashes), one for each mention in an event.

use std::ops::AddAssign;

/// The effect of one [`KvEvent`](crate::KvEvent) or removal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[must_use = "what an event did is counted by kind and status"]
pub struct Applied {
    /// Newly held in that tier and group.
    pub stored: u32,
    /// Held already: one more copy counted (at most [`MAX_COPIES`](crate::MAX_COPIES)).
    pub copies: u32,
    /// Held already, with all countable copies: not counted, so that a later removal can only under-count.
    pub duplicates: u32,
    /// Of the blocks above, those whose place in a prompt is not known yet (their parent is not held): kept, but in no
    /// overlap.
    pub orphaned: u32,
    /// Orphans of earlier events that found their place through this one.
    pub linked: u32,
    /// Engine hashes that were held at another place in this rank: what they held there was forgotten first.
    pub rebound: u32,
    /// One copy taken.
    pub removed: u32,
    /// Named in a removal but not held there: ignored.
    pub unknown: u32,
    /// Engine hashes dropped by a clear or by the removal of a worker.
    pub cleared: u32,
    /// Not taken in, because a bound was reached.
    pub refused: u32,
    /// Shed to stay inside the memory budget.
    pub shed: u32,
}

impl AddAssign for Applied {
    fn add_assign(&mut self, other: Self) {
        let Self {
            stored,
            copies,
            duplicates,
            orphaned,
            linked,
            rebound,
            removed,
            unknown,
            cleared,
            refused,
            shed,
        } = other;
        self.stored += stored;
        self.copies += copies;
        self.duplicates += duplicates;
        self.orphaned += orphaned;
        self.linked += linked;
        self.rebound += rebound;
        self.removed += removed;
        self.unknown += unknown;
        self.cleared += cleared;
        self.refused += refused;
        self.shed += shed;
    }
}
