//! An index that another process keeps: what `kvlane serve --indexer` asks instead of hearing the engines itself.
//!
//! A question is the hashes of a prompt's blocks, and the answer must come within [`DEADLINE`], or the request is routed without it: an
//! indexer can make a decision worse, never late, and never an error. The first indexer that was named is asked; the next one too if it has not answered
//! after [`HEDGE_AFTER`], or has failed, and whichever answers first counts. One that keeps failing is left alone until it describes itself
//! again ([`follow`]). Predicted placements stay in this process: they are true for nobody else.
//!
//! The other way, asking always two and taking the faster answer, would double the indexers' load for the few requests that gain.

mod follow;
mod metrics;

pub(crate) use follow::follow;

use crate::grpc::v1::index_client::IndexClient;
use crate::grpc::v1::{OverlapRequest, RankOverlap};
use crate::metrics::Histogram;
use arc_swap::ArcSwap;
use futures_util::future::{Either, select};
use kvlane_index::hash::Scheme;
use kvlane_index::{BlockHash, Overlap, Overlaps, Worker};
use std::collections::HashMap;
use std::pin::pin;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::time::{sleep, timeout_at};
use tonic::transport::{Channel, Endpoint};

/// An answer after this time is of no use: a request waits for no indexer longer. A good one takes less than a millisecond.
const DEADLINE: Duration = Duration::from_millis(30);
/// A second indexer is asked when the first has not answered after this time, well above what an answer takes at the 99th percentile.
const HEDGE_AFTER: Duration = Duration::from_millis(5);
/// After so many failures in a row an indexer is not asked any more until it describes itself again.
const FAILURES_MAX: u32 = 3;
/// A connection must be made in this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection is asked so often whether it is alive, and made anew if it does not answer for as long.
const KEEPALIVE: Duration = Duration::from_secs(5);
/// Most bytes of an answer: some 100 000 ranks.
const ANSWER_BYTES_MAX: usize = 8 << 20;

/// An indexer's URL that cannot be asked.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("`{0}` is no indexer's URL: write http://HOST:PORT")]
pub struct IndexerUrlError(String);

/// The indexers that are asked.
#[derive(Debug)]
pub(crate) struct RemoteIndex {
    indexers: Vec<Indexer>,
    /// By whose rules blocks are hashed for them ([`Scheme::id`]): those of the first indexer that said so.
    scheme: AtomicU32,
    /// From the question to the first answer.
    answered: Histogram,
    /// Questions that a second indexer was asked too.
    hedged: AtomicU64,
    /// Questions that nobody answered in time: those requests were routed by load and predictions.
    unanswered: AtomicU64,
}

/// One indexer.
#[derive(Debug)]
struct Indexer {
    url: String,
    client: IndexClient<Channel>,
    /// The partitions that it described, by model.
    known: ArcSwap<HashMap<String, Known>>,
    /// Why nothing is known, for people.
    trouble: ArcSwap<String>,
    /// Questions in a row that it failed to answer.
    failures: AtomicU32,
    counts: Counts,
}

/// How questions to one indexer ended.
#[derive(Debug, Default)]
struct Counts {
    /// Its answer was the first.
    used: AtomicU64,
    /// Another indexer was faster.
    beaten: AtomicU64,
    /// No answer by the deadline.
    late: AtomicU64,
    /// It said that it cannot answer, or could not be reached.
    failed: AtomicU64,
    /// Not asked, because it failed before or does not know the model.
    skipped: AtomicU64,
}

/// A partition of an indexer.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Known {
    /// Tokens in a block.
    block_size: u32,
    /// Who its ranks (instance, rank) are here.
    workers: HashMap<(u64, u32), Worker>,
}

/// A question, and which of the indexers to ask.
struct Question<'q> {
    model: &'q str,
    block_size: u32,
    scheme: Scheme,
    blocks: &'q [BlockHash],
    by: tokio::time::Instant,
}

impl RemoteIndex {
    /// Connects nowhere yet.
    pub(crate) fn new(urls: &[String]) -> Result<Self, IndexerUrlError> {
        let indexers = urls.iter().map(|url| Indexer::new(url)).collect::<Result<_, _>>()?;
        Ok(Self {
            indexers,
            scheme: AtomicU32::new(0),
            answered: Histogram::default(),
            hedged: AtomicU64::new(0),
            unanswered: AtomicU64::new(0),
        })
    }

    /// By whose rules prompts must be hashed to be asked about; the indexers' default before any has said it.
    pub(crate) fn scheme(&self) -> Scheme {
        Scheme::from_id(self.scheme.load(Ordering::Relaxed)).unwrap_or(Scheme::Reference)
    }

    /// What the indexers say of a prompt's blocks, hashed by [`RemoteIndex::scheme`], sorted by worker and to be [`merge`]d with what is predicted
    /// here; `None`: nobody said anything in time.
    pub(crate) async fn overlap(
        &self,
        model: &str,
        block_size: u32,
        blocks: &[BlockHash],
    ) -> Option<Vec<Overlap>> {
        let asked = Instant::now();
        let by = tokio::time::Instant::now() + DEADLINE;
        let question = Question { model, block_size, scheme: self.scheme(), blocks, by };
        let answer = self.ask(&question).await;
        match &answer {
            Some(_) => self.answered.observe(asked.elapsed()),
            None => {
                self.unanswered.fetch_add(1, Ordering::Relaxed);
            }
        }
        answer
    }

    async fn ask(&self, question: &Question<'_>) -> Option<Vec<Overlap>> {
        let mut able = self.indexers.iter().filter(|indexer| {
            let able = indexer.can(question);
            if !able {
                indexer.counts.skipped.fetch_add(1, Ordering::Relaxed);
            }
            able
        });
        let first = able.next()?;
        let Some(second) = able.next() else { return first.ask(question, &AtomicU32::new(0)).await };
        // Whoever answers first raises it, so that the other one knows that it was beaten.
        let done = AtomicU32::new(0);
        let mut primary = pin!(first.ask(question, &done));
        let early = tokio::select! {
            biased;
            answer = &mut primary => Some(answer),
            () = sleep(HEDGE_AFTER) => None,
        };
        match early {
            Some(answer @ Some(_)) => return answer,
            Some(None) => {
                self.hedged.fetch_add(1, Ordering::Relaxed);
                return second.ask(question, &done).await;
            }
            None => {}
        }
        self.hedged.fetch_add(1, Ordering::Relaxed);
        match select(primary, pin!(second.ask(question, &done))).await {
            Either::Left((None, other)) => other.await,
            Either::Right((None, other)) => other.await,
            Either::Left((answer, _)) | Either::Right((answer, _)) => answer,
        }
    }
}

impl Indexer {
    fn new(url: &str) -> Result<Self, IndexerUrlError> {
        let bad = || IndexerUrlError(url.to_owned());
        let uri: http::Uri = url.parse().map_err(|_| bad())?;
        let whole = uri.scheme_str() == Some("http") && uri.host().is_some_and(|host| !host.is_empty());
        if !whole || !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(bad());
        }
        let channel = Endpoint::from(uri)
            .tcp_nodelay(true)
            .connect_timeout(CONNECT_TIMEOUT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true)
            .connect_lazy();
        Ok(Self {
            url: url.trim_end_matches('/').to_owned(),
            client: IndexClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX),
            known: ArcSwap::default(),
            trouble: ArcSwap::from_pointee("it was not asked yet".to_owned()),
            failures: AtomicU32::new(0),
            counts: Counts::default(),
        })
    }

    /// Whether it is worth asking.
    fn can(&self, question: &Question<'_>) -> bool {
        self.failures.load(Ordering::Relaxed) < FAILURES_MAX
            && self.known.load().get(question.model).is_some_and(|k| k.block_size == question.block_size)
    }

    /// What it says; `None` = nothing by the deadline. `done` counts those that have answered the question.
    async fn ask(&self, question: &Question<'_>, done: &AtomicU32) -> Option<Vec<Overlap>> {
        let asking = Asking { counts: &self.counts, done, counted: false };
        let request = OverlapRequest {
            tag: 0,
            model: question.model.to_owned(),
            routing_group: String::new(),
            scheme: question.scheme.id(),
            block_hashes: question.blocks.iter().map(|hash| hash.0).collect(),
        };
        let mut client = self.client.clone();
        let answer = match timeout_at(question.by, client.overlap(request)).await {
            Ok(Ok(answer)) => answer.into_inner(),
            Ok(Err(status)) => {
                tracing::debug!(indexer = self.url, code = %status.code(), "no answer: {}", status.message());
                asking.ended(&self.counts.failed);
                self.failures.fetch_add(1, Ordering::Relaxed);
                return None;
            }
            Err(_) => {
                asking.ended(&self.counts.late);
                self.failures.fetch_add(1, Ordering::Relaxed);
                return None;
            }
        };
        let known = self.known.load();
        let Some(known) = known.get(question.model).filter(|_| answer.block_size == question.block_size)
        else {
            asking.ended(&self.counts.failed);
            return None;
        };
        self.failures.store(0, Ordering::Relaxed);
        asking.ended(&self.counts.used);
        done.fetch_add(1, Ordering::Relaxed);
        let most = u32::try_from(question.blocks.len()).unwrap_or(u32::MAX);
        let here = answer.ranks.iter().filter_map(|rank| {
            known.workers.get(&(rank.instance, rank.rank)).map(|worker| overlap(*worker, rank, most))
        });
        let mut here: Vec<Overlap> = here.filter(|o| o.mixed > 0).collect();
        here.sort_unstable_by_key(|o| o.worker);
        // An engine may be registered under two names; both tell the same.
        here.dedup_by_key(|o| o.worker);
        Some(here)
    }
}

/// Counts a question once, also one that nobody waits for any more.
struct Asking<'a> {
    counts: &'a Counts,
    done: &'a AtomicU32,
    counted: bool,
}

impl Asking<'_> {
    fn ended(mut self, count: &AtomicU64) {
        count.fetch_add(1, Ordering::Relaxed);
        self.counted = true;
    }
}

impl Drop for Asking<'_> {
    fn drop(&mut self) {
        if !self.counted && self.done.load(Ordering::Relaxed) > 0 {
            self.counts.beaten.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// A rank's message, held to what an overlap of `most` blocks can be: the other side may be of any version.
fn overlap(worker: Worker, rank: &RankOverlap, most: u32) -> Overlap {
    let device = rank.device.min(most);
    let host = rank.host.min(most - device);
    let disk = rank.disk.min(most - device - host);
    let external = rank.external.min(most - device - host - disk);
    let tiers = device + host + disk + external;
    // What an indexer was told by others of where requests went is not known to be true here.
    Overlap { worker, device, predicted: device, host, disk, external, mixed: rank.mixed.clamp(tiers, most) }
}

/// Adds confirmed overlaps to those that were predicted here; both sorted by worker.
pub(crate) fn merge(confirmed: &[Overlap], overlaps: &mut Overlaps) {
    for overlap in confirmed {
        match overlaps.ranks.binary_search_by_key(&overlap.worker, |o| o.worker) {
            Ok(at) => {
                let predicted = overlaps.ranks[at].predicted.max(overlap.predicted);
                overlaps.ranks[at] = Overlap { predicted, ..*overlap };
            }
            Err(at) => overlaps.ranks.insert(at, *overlap),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_urls_that_can_be_asked_are_taken() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _inside = runtime.enter();
        for good in ["http://h:1", "http://127.0.0.1:8090/", "http://[::1]:8090"] {
            assert!(RemoteIndex::new(&[good.to_owned()]).is_ok(), "{good}");
        }
        for bad in ["", "h:1", "https://h:1", "http://", "http://h:1/path", "http://h:1/?q", "tcp://h:1"] {
            let error = RemoteIndex::new(&[bad.to_owned()]).unwrap_err();
            assert!(error.to_string().contains("http://HOST:PORT"), "{bad}");
        }
    }

    #[test]
    fn what_no_index_can_say_is_cut_to_what_one_can() {
        let worker = Worker::new(1, 0);
        let rank = RankOverlap {
            device: 9,
            host: u32::MAX,
            disk: 3,
            external: 3,
            mixed: 0,
            predicted: 77,
            ..RankOverlap::default()
        };
        let cut = overlap(worker, &rank, 10);
        assert_eq!(
            cut,
            Overlap { worker, device: 9, predicted: 9, host: 1, disk: 0, external: 0, mixed: 10 }
        );
    }

    #[test]
    fn what_is_predicted_here_outlasts_what_is_confirmed_there() {
        let at = |n| Worker::new(n, 0);
        let of = |n, device, predicted| Overlap {
            worker: at(n),
            device,
            predicted,
            host: 0,
            disk: 0,
            external: 0,
            mixed: device,
        };
        let mut overlaps = Overlaps { ranks: vec![of(2, 0, 5), of(4, 0, 1)] };
        merge(&[of(1, 3, 3), of(2, 2, 2), of(4, 6, 6)], &mut overlaps);
        assert_eq!(overlaps.ranks, [of(1, 3, 3), of(2, 2, 5), of(4, 6, 6)]);
    }
}
