//! What `/metrics` and `/kvlane/workers` show of remote indexers.

use super::{FAILURES_MAX, RemoteIndex};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;
use serde_json::{Value, json};
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Clone, PartialEq, Eq, Hash, Debug, EncodeLabelSet)]
struct Questions {
    indexer: String,
    outcome: &'static str,
}

impl RemoteIndex {
    /// Adds the figures of this moment.
    pub(crate) fn collect(&self, registry: &mut Registry) {
        let questions = Family::<Questions, Counter>::default();
        for indexer in &self.indexers {
            let counts = &indexer.counts;
            let outcomes: [(&'static str, &AtomicU64); 5] = [
                ("used", &counts.used),
                ("beaten", &counts.beaten),
                ("late", &counts.late),
                ("failed", &counts.failed),
                ("skipped", &counts.skipped),
            ];
            for (outcome, count) in outcomes {
                let of = Questions { indexer: indexer.url.clone(), outcome };
                questions.get_or_create_owned(&of).inc_by(count.load(Ordering::Relaxed));
            }
        }
        registry.register("remote_index_questions", "Questions to an indexer, by how they ended", questions);
        let count = |of: &AtomicU64| {
            let counter = Counter::<u64>::default();
            counter.inc_by(of.load(Ordering::Relaxed));
            counter
        };
        registry.register(
            "remote_index_hedged",
            "Prompts that a second indexer was asked about too",
            count(&self.hedged),
        );
        registry.register(
            "remote_index_unanswered",
            "Prompts that no indexer answered in time: routed by load and predictions",
            count(&self.unanswered),
        );
        registry.register(
            "remote_index_seconds",
            "From a question to the first answer",
            self.answered.clone(),
        );
    }

    /// Every indexer and whether it is asked.
    pub(crate) fn json(&self) -> Value {
        let row = |indexer: &super::Indexer| {
            let trouble = indexer.trouble.load();
            let suspended = indexer.failures.load(Ordering::Relaxed) >= FAILURES_MAX;
            json!({
                "url": indexer.url,
                "asked": trouble.is_empty() && !suspended,
                "trouble": if suspended && trouble.is_empty() { Some("it did not answer in time") } else { Some(trouble.as_str()).filter(|t| !t.is_empty()) },
            })
        };
        self.indexers.iter().map(row).collect()
    }
}
