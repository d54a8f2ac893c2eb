//! From a request to the worker that should serve it: tokens, blocks, overlaps, decision, booking.

use super::admission::Turn;
use super::disagg::Handover;
use super::error::ClientError;
use super::inflight::{Expected, InFlight};
use super::known_blocks::KnownBlocks;
use super::prompts::{Known, Refused, Tokenized};
use super::wishes::Wanted;
use super::{Gateway, PromptBlocks, Table, Upstream, shadow};
use crate::audit::{Evidence, Prediction};
use crate::config::Role;
use crate::explain::{Course, Id, Record, Tokens};
use crate::fleet::{Facts, Instance, Partition, Trust};
use crate::remote::{RemoteIndex, merge};
use hyper::header::HeaderMap;
use kvlane_index::hash::{Namespace, Scheme};
use kvlane_index::{BlockHash, Overlap, Overlaps, Worker};
use kvlane_prompt::{Endpoint, RequestFields};
use kvlane_sched::{Adapter, Candidate, Decision, OverlapTokens, Reject, Request, RequestId};
use std::borrow::Cow;
use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant, SystemTime};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

/// Blocks that running requests share are counted by ids that stand for at least so many tokens: finer ones cost the ledger time and tell
/// it nothing.
const LEDGER_ID_TOKENS_MIN: u32 = 256;
/// A predicted placement lasts this long where events will confirm or replace it.
const PREDICTED_UNTIL_EVENT: Duration = Duration::from_secs(5);
/// A predicted placement lasts this long where nothing else is known.
const PREDICTED_WITHOUT_EVENTS: Duration = Duration::from_secs(120);

/// A request as far as routing is concerned.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    /// When its head was read.
    pub arrived: Instant,
    /// Path of the endpoint.
    pub path: &'a str,
    /// The client's headers.
    pub headers: &'a HeaderMap,
    /// What its body says.
    pub fields: Option<&'a Arc<RequestFields>>,
    /// Length of its body.
    pub body_bytes: usize,
}

/// Which part of a request is planned.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Stage {
    /// All of it, or the answer alone where the prompt was computed elsewhere: workers set aside for prefill only if there are no others.
    Whole,
    /// The prompt alone: workers set aside for prefill.
    Prefill,
}

/// What was found out about a request, enough to decide (again) and to book.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    stage: Stage,
    /// What became of the question whether to compute the prompt elsewhere.
    pub handover: Handover,
    /// Whether the prompt's blocks are fetched from where they were computed.
    handed_over: bool,
    /// Where it must or would rather go.
    wanted: Arc<Wanted>,
    /// Stands for the adapter that it needs.
    adapter: Option<u64>,
    /// How many prompts it has.
    prompts: usize,
    /// When the request's head was read.
    pub arrived: Instant,
    path: Arc<str>,
    fields: Option<Arc<RequestFields>>,
    /// What all its prompts begin with.
    prompt: Known,
    /// Tokens of its longest prompt.
    longest_prompt: u64,
    /// The fleet as it was.
    pub table: Arc<Table>,
    candidates: Vec<Offer>,
    /// The prompt's blocks, in each partition that one of the candidates lives in.
    found: Vec<PromptBlocks>,
    /// What an indexer said of them, where one is asked.
    confirmed: Vec<(Arc<Partition>, Vec<Overlap>)>,
    tokens: Tokens,
    /// Tokens of all its prompts.
    prompt_tokens: Option<u32>,
    prompt_bytes: u64,
    /// Stands for the model in what the scheduler learns.
    model: u64,
    max_output_tokens: Option<u32>,
    streams: bool,
    session: Option<u64>,
    ledger_ids: Vec<u64>,
    ledger_id_tokens: u32,
    /// Why the engine's count of cached tokens cannot be compared.
    unaudited: Option<&'static str>,
    /// Finding all this out took so long since the arrival.
    routing: Duration,
    /// Then it waited so long for a worker.
    pub waited: Duration,
    /// Which of those that wait it comes after.
    pub turn: Turn,
}

/// What is known of the prompt in each partition, in the order of [`Plan::found`].
type LookedUp = Vec<(Arc<Partition>, Overlaps)>;

/// Overlaps that a thread keeps to be filled again; more are dropped. A request needs one for each partition of its model.
const SPARE_MAX: usize = 8;

thread_local! {
    /// A lookup for 64 workers fills some kilobytes: after a thread's first requests none of them allocates for it.
    static SPARE: RefCell<Vec<Overlaps>> = const { RefCell::new(Vec::new()) };
}

/// A worker that might serve the request.
#[derive(Clone, Debug)]
struct Offer {
    /// Place of its engine in the table.
    upstream: usize,
    worker: Worker,
    trust: f64,
    overlap: Option<Overlap>,
    /// Place of its partition in [`Plan::found`].
    found: Option<usize>,
    /// Whether events will tell what becomes of a predicted placement.
    events: bool,
}

impl Gateway {
    /// Finds out about a request. Errors are for the client.
    pub(super) async fn plan(&self, ask: &Ask<'_>) -> Result<Plan, ClientError> {
        let table = self.table.load_full();
        let wanted = Wanted::of(ask.headers, &table)?;
        let serving = of_stage(self.serving(&table, ask.fields)?, Stage::Whole, &wanted);
        let tokenized = match ask.fields {
            _ if !self.cache_aware => Tokenized::unknown("blind-policy"),
            Some(fields) if fields.endpoint() != Endpoint::Other => {
                let began = Instant::now();
                let found = self.prompts.tokens(fields, &serving, &table, ask.headers).await;
                self.metrics.tokenizing.observe(began.elapsed());
                found.map_err(|refused| match refused {
                    Refused::Bad(bad) => ClientError::bad_field(&bad),
                    Refused::TooLong => ClientError::context_length(longest(&serving, ask.fields), None),
                })?
            }
            _ => Tokenized::unknown("endpoint"),
        };
        let prompt_tokens = total(&tokenized);
        let longest_prompt = tokenized.prompts.iter().map(|p| p.tokens.len() as u64).max().unwrap_or(0);
        let serving = self.long_enough(serving, ask.fields, longest_prompt)?;
        let model = ask.fields.and_then(|f| f.model.as_deref());
        let is_adapter =
            |model: &str| serving.iter().any(|i| i.model(model).is_some_and(|m| m.parent.is_some()));
        let mut plan = Plan {
            stage: Stage::Whole,
            handover: Handover::NotOffered,
            handed_over: false,
            wanted: Arc::new(wanted),
            adapter: model.filter(|model| is_adapter(model)).map(|model| xxh3_64(model.as_bytes())),
            prompts: tokenized.prompts.len(),
            arrived: ask.arrived,
            path: ask.path.into(),
            fields: ask.fields.map(Arc::clone),
            prompt: common_prefix(&tokenized.prompts),
            longest_prompt,
            candidates: Vec::new(),
            found: Vec::new(),
            confirmed: Vec::new(),
            tokens: tokenized.from,
            prompt_tokens,
            prompt_bytes: ask.body_bytes as u64,
            model: model.map_or(0, |m| xxh3_64(m.as_bytes())),
            max_output_tokens: ask
                .fields
                .and_then(|f| f.max_tokens)
                .map(|n| u32::try_from(n).unwrap_or(u32::MAX)),
            streams: ask.fields.is_some_and(|f| f.stream),
            session: ask
                .fields
                .and_then(|f| f.session_id.as_deref().map(str::as_bytes))
                .or_else(|| session_header(ask.headers))
                .map(xxh3_64),
            ledger_ids: Vec::new(),
            ledger_id_tokens: 0,
            unaudited: match ask.fields {
                Some(fields) if fields.n > 1 => Some("several-answers"),
                _ if tokenized.prompts.len() > 1 => Some("batch"),
                _ => None,
            },
            table: Arc::clone(&table),
            routing: Duration::ZERO,
            waited: Duration::ZERO,
            turn: Turn::of(ask.headers)?,
        };
        let looked_up = plan.look_up(&serving, self);
        if let Some(remote) = &self.remote {
            plan.ask(remote, &looked_up).await;
        }
        plan.offer(&serving, looked_up);
        plan.routing = ask.arrived.elapsed();
        self.metrics.routing.observe(plan.routing);
        Ok(plan)
    }

    /// Offers the workers of now, with what they hold now: for a request that waited. What an indexer said stays as it was.
    pub(super) fn renew(&self, plan: &mut Plan) -> Result<(), ClientError> {
        let table = self.table.load_full();
        let fields = plan.fields.clone();
        let serving = of_stage(self.serving(&table, fields.as_ref())?, plan.stage, &plan.wanted);
        let serving = self.long_enough(serving, fields.as_ref(), plan.longest_prompt)?;
        plan.table = Arc::clone(&table);
        plan.candidates.clear();
        plan.found.clear();
        plan.ledger_ids.clear();
        let looked_up = plan.look_up(&serving, self);
        plan.offer(&serving, looked_up);
        Ok(())
    }

    /// The plan for a part of a request; `None` where nobody does it.
    pub(super) fn staged(&self, plan: &Plan, stage: Stage) -> Option<Plan> {
        let mut staged = plan.clone();
        staged.stage = stage;
        if stage == Stage::Prefill {
            staged.streams = false;
            staged.max_output_tokens = Some(1);
            // Answers of one token teach nothing of the model's.
            staged.model = !staged.model;
        }
        self.renew(&mut staged).ok()?;
        (!staged.candidates.is_empty()).then_some(staged)
    }

    /// The healthy instances that may serve the request.
    fn serving<'t>(
        &self,
        table: &'t Table,
        fields: Option<&Arc<RequestFields>>,
    ) -> Result<Cow<'t, [Arc<Instance>]>, ClientError> {
        let view = &table.view;
        let healthy = || view.instances.iter().filter(|i| i.health.is_healthy());
        let none_healthy =
            || ClientError::unavailable("No worker is healthy now; try again soon, or see /kvlane/workers.");
        let Some(fields) = fields else {
            let any: Vec<Arc<Instance>> = healthy().map(Arc::clone).collect();
            return if any.is_empty() { Err(none_healthy()) } else { Ok(any.into()) };
        };
        match fields.model.as_deref() {
            Some(model) => {
                let serving = view.serving(model);
                if !serving.is_empty() {
                    Ok(serving.into())
                } else if view.knows(model) {
                    Err(ClientError::unavailable(
                        "No worker that serves this model is healthy now; try again soon.",
                    ))
                } else if healthy().next().is_none() {
                    Err(none_healthy())
                } else {
                    Err(ClientError::model_not_found(model, view.model_names()))
                }
            }
            None => {
                let mut models = healthy().filter_map(|i| i.facts.as_ref()).map(Facts::base_model);
                let Some(first) = models.next() else { return Err(none_healthy()) };
                if fields.endpoint() != Endpoint::Other && models.any(|model| model != first) {
                    return Err(ClientError {
                        param: Some("model"),
                        ..ClientError::bad_request(
                            "`model` is needed: several models are served here, see /v1/models.",
                        )
                    });
                }
                Ok(healthy().map(Arc::clone).collect::<Vec<_>>().into())
            }
        }
    }

    /// Those of `serving` whose context takes the longest prompt of the request and one token of an answer.
    fn long_enough<'t>(
        &self,
        serving: Cow<'t, [Arc<Instance>]>,
        fields: Option<&Arc<RequestFields>>,
        longest_prompt: u64,
    ) -> Result<Cow<'t, [Arc<Instance>]>, ClientError> {
        let room = |instance: &Instance| {
            context(instance, fields).is_none_or(|len| {
                // Scoring a prompt (`max_tokens: 0`) needs no room for an answer.
                let answer = u64::from(fields.and_then(|f| f.max_tokens) != Some(0));
                longest_prompt + answer <= len
            })
        };
        if serving.iter().all(|i| room(i)) {
            return Ok(serving);
        }
        let len = longest(&serving, fields);
        let left: Vec<Arc<Instance>> = serving.iter().filter(|i| room(i)).map(Arc::clone).collect();
        if left.is_empty() {
            Err(ClientError::context_length(len, Some(longest_prompt)))
        } else {
            Ok(left.into())
        }
    }

    /// Decides without booking anything: the dry run.
    pub(super) fn decide(&self, plan: &Plan, id: RequestId) -> (Decision, Result<(), Reject>) {
        let mut decision = Decision::default();
        let request = plan.request(id);
        let candidates = plan.candidates();
        let result = self.desk.with(|books, now_ms| {
            books.scheduler.decide(&request, &candidates, now_ms, &mut books.rng, &mut decision)
        });
        (decision, result)
    }

    /// Decides and books under one lock, so that the next request sees what this one reserved. `None` if `wait_for_room` and every worker
    /// that may serve the request is saturated; nothing was booked then.
    pub(super) fn book(
        self: &Arc<Self>,
        plan: &Plan,
        id: Id,
        wait_for_room: bool,
    ) -> Result<Option<InFlight>, ClientError> {
        let request = plan.request(RequestId(id.sequence));
        let candidates = plan.candidates();
        let mut decision = Decision::default();
        let mut shadows = Vec::new();
        let decided = self.desk.with(|books, now_ms| {
            // Who cannot be served at all is told so at once.
            if wait_for_room
                && !books.scheduler.has_room(&request, &candidates, now_ms)
                && books.scheduler.serves(&request, &candidates)
            {
                return Ok(None);
            }
            books.scheduler.decide(&request, &candidates, now_ms, &mut books.rng, &mut decision)?;
            let worker = decision.worker().expect("a decision without an error names a worker");
            books
                .scheduler
                .book(&request, &decision, worker, now_ms)
                .expect("ids count up and are never in flight twice");
            shadows = shadow::look(books, &request, &candidates, &decision, now_ms);
            Ok(Some(worker))
        });
        self.desk.stirred.notify_one();
        let worker = match decided {
            Ok(Some(worker)) => worker,
            Ok(None) => return Ok(None),
            Err(Reject::PinnedAbsent) => {
                return Err(ClientError::bad_request(
                    "`X-data-parallel-rank` or `x-kvlane-worker` names a worker that does not serve this model now; see /kvlane/workers.",
                ));
            }
            Err(Reject::NoWorkers | Reject::NoneEligible) => {
                return Err(ClientError::unavailable("No worker can take this request now; try again soon."));
            }
        };
        let record = Arc::new(Record {
            id,
            at: SystemTime::now(),
            path: Arc::clone(&plan.path),
            model: plan.fields.as_ref().and_then(|f| f.model.clone()),
            stream: plan.streams,
            tokens: plan.tokens,
            routing_ms: plan.routing.as_secs_f64() * 1e3,
            waited_ms: plan.waited.as_secs_f64() * 1e3,
            decision,
            shadows,
            handover: plan.handover.clone(),
            table: Arc::clone(&plan.table),
            course: Mutex::new(Course::default()),
            audit: OnceLock::new(),
        });
        shadow::count(&record, &self.metrics);
        self.explanations.keep(Arc::clone(&record));
        let offer = plan.get(worker).expect("the chosen worker is one of the candidates");
        predict(plan, offer);
        let expected = plan.expected(offer);
        let upstream = Arc::clone(plan.upstream(offer));
        Ok(Some(InFlight::new(Arc::clone(self), record, plan.arrived, upstream, worker, expected)))
    }

    /// Books the request at another worker of the same decision.
    pub(super) fn rebook(&self, plan: &Plan, inflight: &mut InFlight, worker: Worker) {
        let id = RequestId(inflight.record.id.sequence);
        let Some(offer) = plan.get(worker) else { return };
        self.desk.with(|books, now_ms| {
            books.scheduler.end(id, now_ms);
            books
                .scheduler
                .book(&plan.request(id), &inflight.record.decision, worker, now_ms)
                .expect("it was just ended, and ids are never in flight twice");
        });
        self.desk.stirred.notify_one();
        predict(plan, offer);
        inflight.moved(Arc::clone(plan.upstream(offer)), worker, plan.expected(offer));
    }
}

/// Notes where the prompt's blocks will be, for the requests that come before the events.
fn predict(plan: &Plan, offer: &Offer) {
    let Some(blocks) = plan.blocks(offer) else { return };
    let ttl = if offer.events { PREDICTED_UNTIL_EVENT } else { PREDICTED_WITHOUT_EVENTS };
    let until_ms = crate::clock::now_ms() + ttl.as_millis() as u64;
    blocks.index.predict(offer.worker, &blocks.hashes, until_ms);
    blocks.learner.request(offer.worker, &blocks.hashes);
}

impl Plan {
    /// Finds the prompt's blocks in every partition that one of `serving` lives in, and what is known of them here.
    fn look_up(&mut self, serving: &[Arc<Instance>], gateway: &Gateway) -> LookedUp {
        let (fields, prompt) = (self.fields.clone(), self.prompt.clone());
        let scheme = gateway.remote.as_ref().map_or_else(Scheme::default, |remote| remote.scheme());
        let mut looked_up = LookedUp::new();
        for instance in serving {
            let Some(partition) = instance.partition.as_ref().filter(|_| !prompt.tokens.is_empty()) else {
                continue;
            };
            if looked_up.iter().any(|(known, _)| Arc::ptr_eq(known, partition)) {
                continue;
            }
            let (fields, known) = (fields.as_ref(), &gateway.known_blocks);
            let Some(blocks) = prompt_blocks(partition, instance, fields, &prompt, scheme, known) else {
                continue;
            };
            let mut overlaps = SPARE.with_borrow_mut(Vec::pop).unwrap_or_default();
            blocks.index.overlap(&blocks.hashes, &mut overlaps);
            if self.ledger_ids.is_empty() {
                self.ledger_id_tokens = ledger_ids(&blocks.hashes, blocks.block_size, &mut self.ledger_ids);
            }
            self.found.push(blocks);
            looked_up.push((Arc::clone(partition), overlaps));
        }
        looked_up
    }

    /// Asks indexers who holds the blocks of [`Plan::found`].
    async fn ask(&mut self, remote: &RemoteIndex, looked_up: &LookedUp) {
        for ((partition, _), blocks) in looked_up.iter().zip(&self.found) {
            match remote.overlap(&partition.model, blocks.block_size, &blocks.hashes).await {
                Some(confirmed) => self.confirmed.push((Arc::clone(partition), confirmed)),
                None => self.unaudited = self.unaudited.or(Some("no-indexer-answered")),
            }
        }
    }

    /// Offers every rank of `serving`, with what it holds of the prompt.
    fn offer(&mut self, serving: &[Arc<Instance>], mut looked_up: LookedUp) {
        let table = Arc::clone(&self.table);
        let skips_cache = self.fields.as_ref().is_some_and(|f| f.skips_cache);
        for (partition, overlaps) in &mut looked_up {
            let confirmed = self.confirmed.iter().find(|(asked, _)| Arc::ptr_eq(asked, partition));
            confirmed.iter().for_each(|(_, confirmed)| merge(confirmed, overlaps));
        }
        for instance in serving {
            let Some(upstream) = table.position(instance.id) else { continue };
            let found = instance
                .partition
                .as_ref()
                .and_then(|partition| looked_up.iter().position(|(known, _)| Arc::ptr_eq(known, partition)));
            for (rank, facts) in instance.ranks.iter().zip(&table.upstreams()[upstream].ranks) {
                self.candidates.push(Offer {
                    upstream,
                    worker: rank.worker,
                    trust: facts.trust,
                    overlap: found
                        .filter(|_| !skips_cache)
                        .and_then(|at| looked_up[at].1.get(rank.worker).copied()),
                    found,
                    events: !matches!(rank.trust, Trust::Blind(_)),
                });
            }
        }
        SPARE.with_borrow_mut(|spare| {
            let room = SPARE_MAX.saturating_sub(spare.len());
            spare.extend(looked_up.into_iter().map(|(_, overlaps)| overlaps).take(room));
        });
    }

    fn upstream(&self, offer: &Offer) -> &Arc<Upstream> {
        &self.table.upstreams()[offer.upstream]
    }

    fn blocks(&self, offer: &Offer) -> Option<&PromptBlocks> {
        offer.found.map(|at| &self.found[at])
    }

    fn get(&self, worker: Worker) -> Option<&Offer> {
        self.candidates.iter().find(|c| c.worker == worker)
    }

    /// What the scheduler is to know of the request.
    pub(super) fn request(&self, id: RequestId) -> Request<'_> {
        Request {
            id,
            model: self.model,
            prompt_tokens: self.prompt_tokens,
            prompt_bytes: self.prompt_bytes,
            expected_output_tokens: None,
            max_output_tokens: self.max_output_tokens,
            streams: self.streams || self.stage == Stage::Prefill,
            pinned: self.wanted.pinned,
            wishes: self.wanted.wishes(),
            priority: self.turn.priority,
            session: self.session,
            blocks: &self.ledger_ids,
            block_id_tokens: self.ledger_id_tokens,
        }
    }

    /// The workers that the scheduler is to choose from.
    pub(super) fn candidates(&self) -> Vec<Candidate<'_>> {
        self.candidates
            .iter()
            .map(|offer| Candidate {
                overlap: self.overlap(offer),
                trust: if self.handed_over { 1.0 } else { offer.trust },
                adapter: match self.adapter {
                    None => Adapter::NotNeeded,
                    Some(adapter)
                        if self.upstream(offer).adapters.is_resident(offer.worker.rank, adapter) =>
                    {
                        Adapter::Resident
                    }
                    Some(_) => Adapter::Absent,
                },
                draining: self.upstream(offer).draining.load(Ordering::Relaxed),
                ..Candidate::new(offer.worker, &self.upstream(offer).profile)
            })
            .collect()
    }

    /// What the worker of `offer` need not compute.
    fn overlap(&self, offer: &Offer) -> OverlapTokens {
        let mut held = offer.overlap.as_ref().map_or_else(OverlapTokens::default, |overlap| {
            OverlapTokens::from_blocks(overlap, self.upstream(offer).profile.block_size_tokens)
        });
        if self.handed_over {
            // The rest is fetched from where it was computed, by networks that are about as fast as host memory.
            held.host += self.prompt_tokens.unwrap_or(0).saturating_sub(held.total());
        }
        held
    }

    /// From now on the prompt's blocks are fetched from where they were computed.
    pub(super) fn fetches_prompt(&mut self) {
        self.handed_over = true;
        // What an engine calls cached is not what its index said then.
        self.unaudited = Some("handed-over");
    }

    /// Whether its prompt can be computed elsewhere: one that is known, of a request that does not insist on a worker.
    pub(super) fn can_be_handed_over(&self) -> bool {
        self.prompts == 1 && self.prompt_tokens.is_some() && self.wanted.pinned.is_none()
    }

    /// Prompt tokens that the worker that holds most of it does not hold.
    pub(super) fn least_uncached(&self) -> u32 {
        let tokens = self.prompt_tokens.unwrap_or(0);
        let uncached = |offer| tokens.saturating_sub(self.overlap(offer).total());
        self.candidates.iter().map(uncached).min().unwrap_or(tokens)
    }

    /// What the index promises of the worker of `offer`; `None` where it knows nothing of the prompt.
    fn prediction(&self, offer: &Offer) -> Option<Prediction> {
        self.prompt_tokens.filter(|_| offer.found.is_some()).map(|prompt_tokens| {
            let overlap = offer.overlap.as_ref();
            let device = overlap.map_or(0, |o| o.device);
            let tiered = overlap.map_or(0, |o| o.mixed.max(o.device + o.host + o.disk + o.external));
            let predicted = overlap.map_or(0, |o| o.predicted);
            Prediction::new(
                prompt_tokens,
                self.upstream(offer).profile.block_size_tokens,
                device,
                predicted,
                tiered,
            )
        })
    }

    /// What to expect of the worker of `offer`.
    fn expected(&self, offer: &Offer) -> Expected {
        let prediction = self.prediction(offer);
        Expected {
            prediction,
            unaudited: self.unaudited,
            is_prefill: self.stage == Stage::Prefill,
            adapter: self.adapter,
            evidence: if prediction.is_some() {
                self.table.evidence(offer.worker)
            } else {
                Evidence::default()
            },
            blocks: self.blocks(offer).cloned(),
        }
    }

    /// The prediction for `worker`, for a dry run.
    pub(super) fn predicted_tokens(&self, worker: Worker) -> Option<u32> {
        Some(self.prediction(self.get(worker)?)?.cached_tokens)
    }

    /// Equal for requests that may go to the same workers: none of them passes another.
    pub(super) fn lane(&self) -> u64 {
        self.model ^ self.wanted.lane()
    }

    /// Whether it may wait in the router: what no engine computes a prompt for passes at once.
    pub(super) fn may_wait(&self) -> bool {
        self.fields.is_some()
    }

    /// A hash of the tokens that the request is routed by: what two ways to find them can be compared by. `None` = not known.
    pub(super) fn tokens_hash(&self) -> Option<u64> {
        let mut hash = Xxh3::new();
        self.prompt.tokens.iter().for_each(|token| hash.update(&token.to_le_bytes()));
        (!self.prompt.tokens.is_empty()).then(|| hash.digest())
    }

    /// Where the tokens came from.
    pub(super) fn tokens(&self) -> Tokens {
        self.tokens
    }
}

/// Those of `serving` that do a part of a request.
fn of_stage<'s>(
    serving: Cow<'s, [Arc<Instance>]>,
    stage: Stage,
    wanted: &Wanted,
) -> Cow<'s, [Arc<Instance>]> {
    let prefills = |instance: &Arc<Instance>| instance.role == Role::Prefill;
    match stage {
        // Whoever names a worker knows what it is for.
        Stage::Whole if wanted.names_workers() => serving,
        Stage::Whole if !serving.iter().any(prefills) || serving.iter().all(prefills) => serving,
        Stage::Whole => serving.iter().filter(|i| !prefills(i)).map(Arc::clone).collect(),
        Stage::Prefill => serving.iter().filter(|i| prefills(i)).map(Arc::clone).collect(),
    }
}

fn total(tokenized: &Tokenized) -> Option<u32> {
    if tokenized.prompts.is_empty() {
        return None;
    }
    let sum: u64 = tokenized.prompts.iter().map(|p| p.tokens.len() as u64).sum();
    Some(u32::try_from(sum).unwrap_or(u32::MAX))
}

/// A batch is routed as one, by what its prompts have in common.
fn common_prefix(prompts: &[Known]) -> Known {
    let Some((first, rest)) = prompts.split_first() else { return Known::default() };
    let common = rest.iter().fold(first.tokens.len(), |common, prompt| {
        first.tokens.iter().zip(prompt.tokens.iter()).take(common).take_while(|(a, b)| a == b).count()
    });
    if common == first.tokens.len() { first.clone() } else { first.tokens[..common].to_vec().into() }
}

/// The context length of the model asked for; `None` = not known.
fn context(instance: &Instance, fields: Option<&Arc<RequestFields>>) -> Option<u64> {
    let facts = instance.facts.as_ref()?;
    let name = fields.and_then(|f| f.model.as_deref()).unwrap_or_else(|| facts.base_model());
    let model = instance.model(name)?;
    // An adapter is listed without a length of its own.
    model.max_model_len.or_else(|| instance.model(model.parent.as_deref()?)?.max_model_len)
}

fn longest(serving: &[Arc<Instance>], fields: Option<&Arc<RequestFields>>) -> u64 {
    serving.iter().filter_map(|i| context(i, fields)).max().unwrap_or(0)
}

/// The session that a client names in a header. In this order: the plain ones, then Dynamo's and that which load generators send for each conversation.
fn session_header(headers: &HeaderMap) -> Option<&[u8]> {
    const NAMES: [&str; 4] =
        ["x-session-id", "x-session-affinity", "x-dynamo-session-id", "x-correlation-id"];
    NAMES
        .iter()
        .filter_map(|name| headers.get(*name))
        .map(hyper::header::HeaderValue::as_bytes)
        .find(|v| !v.is_empty())
}

/// The blocks of a prompt as the engines of `partition` cut them.
fn prompt_blocks(
    partition: &Partition,
    instance: &Instance,
    fields: Option<&Arc<RequestFields>>,
    prompt: &Known,
    scheme: Scheme,
    known_blocks: &KnownBlocks,
) -> Option<PromptBlocks> {
    let fields = fields?;
    let adapter =
        fields.model.as_deref().filter(|name| instance.model(name).is_some_and(|m| m.parent.is_some()));
    let namespace = Namespace { adapter, salt: fields.cache_salt.as_deref(), scheme };
    let Known { tokens, prefixes, known_tokens } = prompt;
    let hashes = known_blocks.hashes(tokens, prefixes, *known_tokens, partition.block_size, &namespace);
    Some(PromptBlocks {
        index: partition.index.clone(),
        hashes,
        block_size: partition.block_size.tokens(),
        learner: partition.lane.learner.clone(),
    })
}

/// Chained ids of the prompt's prefixes, one for every few blocks; returns the tokens that each stands for.
pub(crate) fn ledger_ids(hashes: &[BlockHash], block_size: u32, out: &mut Vec<u64>) -> u32 {
    let stride = LEDGER_ID_TOKENS_MIN.div_ceil(block_size);
    let mut chain = 0u64;
    for group in hashes.chunks_exact(stride as usize) {
        for hash in group {
            chain = (chain.rotate_left(23) ^ hash.0).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        }
        out.push(chain);
    }
    stride.saturating_mul(block_size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_header_that_names_a_session_counts() {
        let mut headers = HeaderMap::new();
        assert_eq!(session_header(&headers), None);
        headers.insert("x-correlation-id", "c".parse().expect("a header"));
        headers.insert("x-session-affinity", "".parse().expect("a header"));
        assert_eq!(session_header(&headers), Some(&b"c"[..]));
        headers.insert("X-Session-ID", "s".parse().expect("a header"));
        assert_eq!(session_header(&headers), Some(&b"s"[..]));
    }
}
