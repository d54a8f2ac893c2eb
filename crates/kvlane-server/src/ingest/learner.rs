//! A partition's [`Rebuild`], shared by its writer, through which all events go, and by the request path, which knows prompts and answers.
//!
//! The lock is held while events are looked at, never while the index applies them. As long as no rank is being learnt, which is nearly
//! always, the request path takes no lock at all.

use kvlane_events::rebuild::{Rebuild, Regained};
use kvlane_index::{BlockHash, Worker};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// Blocks whose lineage is remembered, for each partition: at most twice as many, of about 60 bytes each.
const LINEAGE_BLOCKS: usize = 1 << 19;

/// Shares a partition's rebuild. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Learner(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Whether any rank is being learnt; follows `rebuild`.
    learning: AtomicBool,
    rebuild: Mutex<Rebuild>,
}

impl Learner {
    pub(crate) fn new() -> Self {
        let rebuild = Mutex::new(Rebuild::new(LINEAGE_BLOCKS));
        Self(Arc::new(Shared { learning: AtomicBool::new(false), rebuild }))
    }

    /// The writer's access.
    pub(super) fn with<R>(&self, work: impl FnOnce(&mut Rebuild) -> R) -> R {
        // A panic inside leaves at worst a chain that is not regained.
        let mut rebuild = self.0.rebuild.lock().unwrap_or_else(PoisonError::into_inner);
        let result = work(&mut rebuild);
        self.0.learning.store(rebuild.is_learning(), Ordering::Relaxed);
        result
    }

    /// A prompt is on its way to `worker`.
    pub(crate) fn request(&self, worker: Worker, blocks: &Arc<[BlockHash]>) {
        if self.0.learning.load(Ordering::Relaxed) {
            self.with(|rebuild| rebuild.request(worker, blocks));
        }
    }

    /// The engine took `cached` leading blocks of a prompt from its cache, of which the index had confirmed `claimed`: what is regained
    /// if they are predicted; `None` if the rank is not being learnt or said nothing new.
    pub(crate) fn answered(&self, worker: Worker, cached: u32, claimed: u32) -> Option<Regained> {
        let learning = self.0.learning.load(Ordering::Relaxed);
        learning
            .then(|| self.with(|rebuild| rebuild.answered(worker, cached as usize, claimed as usize)))
            .flatten()
    }
}
