//! Whether our policy `reference` decides as the reference does: the same states, the same choice.
//!
//! A comparison with "the reference's policy" is worth what its copy is worth, so the copy is held against the peer's own selector, with
//! its defaults, over random fleets. Both sides keep their own account of what is in flight: the same requests are booked, get their first
//! token and end on both. Where costs tie, either may draw; so the peer's choice must be among our best, and where we see a tie, the peer, asked
//! about two of the tied workers at a time, must take now one and now the other.

use std::collections::{HashMap, HashSet};

use anyhow::{Context, ensure};
use dynamo_kv_router::protocols::{PrefillLoadHint, RoutingConstraints, WorkerConfigLike, WorkerWithDpRank};
use dynamo_kv_router::scheduling::{OverlapSignals, ScheduleMode, SchedulingRequest, TierOverlapBlocks};
use dynamo_kv_router::sequences::{ActiveSequencesMultiWorker, NoopSequencePublisher, SequenceRequest};
use dynamo_kv_router::{DefaultWorkerSelector, WorkerSelectionInput, WorkerSelector};
use kvlane_index::{Overlap, Worker};
use kvlane_sched::policy::Reference;
use kvlane_sched::{Candidate, Decision, OverlapTokens, Profile, Request, RequestId, Rng, Scheduler};
use tokio::time::Instant;

const BLOCK: u32 = 16;
/// Decisions before a fleet is replaced by another one.
const DECISIONS_A_FLEET: usize = 50;
/// The peer's defaults.
const HOST_CREDIT: f64 = 0.75;
/// Also of external storage.
const DISK_CREDIT: f64 = 0.25;

struct Config;

impl WorkerConfigLike for Config {
    fn data_parallel_start_rank(&self) -> u32 {
        0
    }
    fn data_parallel_size(&self) -> u32 {
        1
    }
    fn max_num_batched_tokens(&self) -> Option<u64> {
        None
    }
    fn total_kv_blocks(&self) -> Option<u64> {
        None
    }
}

/// What one worker holds of a prompt, in blocks.
#[derive(Clone, Copy, Default)]
struct Held {
    device: u32,
    host: u32,
    disk: u32,
    external: u32,
}

/// The peer's side of a fleet.
struct Peer {
    selector: DefaultWorkerSelector,
    active: ActiveSequencesMultiWorker<NoopSequencePublisher>,
    configs: HashMap<u64, Config>,
    now: Instant,
}

impl Peer {
    fn new(workers: u64) -> Self {
        let ranks = (0..workers).map(|w| (w, (0, 1))).collect();
        Self {
            selector: DefaultWorkerSelector::new(None, "decode"),
            active: ActiveSequencesMultiWorker::new_without_expiry(
                NoopSequencePublisher,
                BLOCK as usize,
                ranks,
                false,
                0,
                "decode",
            ),
            configs: (0..workers).map(|w| (w, Config)).collect(),
            now: Instant::now(),
        }
    }

    fn ask(&self, tokens: u32, blocks: &[u64], held: &[Held], allowed: HashSet<u64>) -> anyhow::Result<u64> {
        let mut overlap = OverlapSignals {
            tier_overlap_blocks: TierOverlapBlocks::default(),
            effective_overlap_blocks: Default::default(),
            effective_cached_tokens: Default::default(),
        };
        for (worker, held) in held.iter().enumerate() {
            let worker = WorkerWithDpRank::new(worker as u64, 0);
            let effective = effective(held);
            if effective == 0.0 {
                continue;
            }
            overlap.tier_overlap_blocks.device.insert(worker, held.device as usize);
            overlap.tier_overlap_blocks.host_pinned.insert(worker, held.host as usize);
            overlap.tier_overlap_blocks.disk.insert(worker, (held.disk + held.external) as usize);
            overlap.effective_overlap_blocks.insert(worker, effective);
            overlap.effective_cached_tokens.insert(worker, cached_tokens(held));
        }
        let request = SchedulingRequest {
            mode: ScheduleMode::QueryOnly { request_id: None },
            token_seq: Some(blocks.to_vec()),
            isl_tokens: tokens as usize,
            lora_name: None,
            expected_output_tokens: None,
            affinity_target: None,
            pinned_worker: None,
            allowed_worker_ids: Some(allowed),
            routing_constraints: RoutingConstraints::default(),
            router_config_override: None,
            track_prefill_tokens: true,
            priority_jump: 0.0,
            strict_priority: 0,
            policy_class: None,
            session_context: None,
            overlap,
            kv_transfer_candidates: None,
            retain_kv_transfer_chain: false,
            shared_cache_hits: None,
            worker_loads: self.active.project_worker_loads(Some(blocks), self.now),
            resp_tx: None,
        };
        let input = WorkerSelectionInput::configured(&self.configs, &request, request.eligibility(), BLOCK);
        Ok(self.selector.select_worker(input).context("the peer refuses")?.worker.worker_id)
    }

    fn book(&self, id: u64, worker: u64, tokens: u32, blocks: &[u64], cached: usize) -> anyhow::Result<()> {
        let request = SequenceRequest {
            request_id: id.to_string(),
            token_sequence: Some(blocks.to_vec()),
            track_prefill_tokens: true,
            expected_output_tokens: None,
            prefill_load_hint: Some(PrefillLoadHint {
                initial_effective_prefill_tokens: (tokens as usize).saturating_sub(cached),
                expected_prefill_duration: None,
            }),
            worker: WorkerWithDpRank::new(worker, 0),
            lora_name: None,
        };
        self.active.add_request(request, self.now).context("the peer books")
    }
}

/// Its weighted overlap: each tier adds its own credit.
fn effective(held: &Held) -> f64 {
    f64::from(held.device)
        + HOST_CREDIT * f64::from(held.host)
        + DISK_CREDIT * (f64::from(held.disk) + f64::from(held.external))
}

fn cached_tokens(held: &Held) -> usize {
    (effective(held) * f64::from(BLOCK)).round() as usize
}

/// A fleet of each side, and what is in flight.
struct Fleets {
    peer: Peer,
    ours: Scheduler,
    profile: Profile,
    workers: u64,
    in_flight: Vec<u64>,
    next: u64,
    now_ms: f64,
}

impl Fleets {
    fn new(workers: u64) -> Self {
        Self {
            peer: Peer::new(workers),
            ours: Scheduler::new(Box::new(Reference)),
            profile: Profile::new(BLOCK),
            workers,
            in_flight: Vec::new(),
            next: 0,
            now_ms: 0.0,
        }
    }

    /// A prompt of one of a few families, so that requests in flight share prefixes of all lengths.
    fn prompt(rng: &mut Rng) -> (u32, Vec<u64>) {
        let family = rng.below(4) as u64;
        let shared = rng.below(40) as u64;
        let own = rng.below(60) as u64;
        let tail = rng.below(BLOCK as usize) as u32;
        let unique = rng.below(1 << 30) as u64;
        let blocks: Vec<u64> = (0..shared)
            .map(|i| family << 32 | i)
            .chain((0..own).map(|i| (8 + unique) << 32 | shared << 16 | i))
            .collect();
        ((blocks.len() as u32 * BLOCK + tail).max(1), blocks)
    }

    fn held(&self, rng: &mut Rng, blocks: usize) -> Vec<Held> {
        let mut one = || {
            let mut left = blocks as u32;
            let mut take = |often: usize| {
                let most = if rng.below(often) == 0 { left } else { 0 };
                let taken = rng.below(most as usize + 1) as u32;
                left -= taken;
                taken
            };
            Held { device: take(2), host: take(4), disk: take(6), external: take(8) }
        };
        (0..self.workers).map(|_| one()).collect()
    }

    /// One request on both sides. Gives the difference, if there is one.
    fn step(&mut self, rng: &mut Rng) -> anyhow::Result<Option<String>> {
        self.now_ms += rng.below(50) as f64;
        let (tokens, blocks) = Self::prompt(rng);
        let held = self.held(rng, blocks.len());

        let candidates: Vec<Candidate<'_>> = (0..self.workers)
            .map(|w| {
                let worker = Worker::new(w, 0);
                let h = held[w as usize];
                let overlap = Overlap {
                    worker,
                    device: h.device,
                    predicted: h.device,
                    host: h.host,
                    disk: h.disk,
                    external: h.external,
                    mixed: h.device,
                };
                Candidate {
                    overlap: OverlapTokens::from_blocks(&overlap, BLOCK),
                    ..Candidate::new(worker, &self.profile)
                }
            })
            .collect();
        self.next += 1;
        let request =
            Request { blocks: &blocks, block_id_tokens: BLOCK, ..Request::new(RequestId(self.next), tokens) };
        let mut decision = Decision::default();
        self.ours
            .decide(&request, &candidates, self.now_ms, rng, &mut decision)
            .map_err(|reject| anyhow::anyhow!("ours refuses: {reject:?}"))?;
        let chosen = decision.order[0].instance.0;
        let least = decision.rows.iter().map(|r| r.total).fold(f64::INFINITY, f64::min);
        let best: Vec<u64> =
            decision.rows.iter().filter(|r| r.total == least).map(|r| r.worker.instance.0).collect();

        let first = self.peer.ask(tokens, &blocks, &held, (0..self.workers).collect())?;
        let mut difference = None;
        if !best.contains(&first) {
            difference = Some(format!("the peer takes {first}, ours are {best:?}"));
        }
        if let [_, rest @ ..] = &best[..] {
            for other in rest {
                let pair = [best[0], *other];
                let mut seen = HashSet::new();
                for _ in 0..64 {
                    seen.insert(self.peer.ask(tokens, &blocks, &held, pair.into_iter().collect())?);
                    if seen.len() == 2 {
                        break;
                    }
                }
                if seen.len() < 2 {
                    difference = Some(format!("ours tie {pair:?}, the peer always takes {seen:?}"));
                }
            }
        }

        // Both book it at the same worker, with what each takes for cached.
        self.ours
            .book(&request, &decision, Worker::new(chosen, 0), self.now_ms)
            .map_err(|error| anyhow::anyhow!("ours books: {error}"))?;
        self.peer.book(self.next, chosen, tokens, &blocks, cached_tokens(&held[chosen as usize]))?;
        self.in_flight.push(self.next);
        while self.in_flight.len() > rng.below(8 * self.workers as usize + 1) {
            let id = self.in_flight.swap_remove(rng.below(self.in_flight.len()));
            self.ours.end(RequestId(id), self.now_ms);
            self.peer.active.free(&id.to_string(), self.peer.now).context("the peer frees")?;
        }
        for id in &self.in_flight {
            if rng.below(4) == 0 {
                self.ours.first_token(RequestId(*id), self.now_ms);
                let at = self.peer.now;
                self.peer.active.mark_prefill_completed(&id.to_string(), at).context("the peer marks")?;
            }
        }
        Ok(difference)
    }
}

fn main() -> anyhow::Result<()> {
    let decisions: usize =
        std::env::args().nth(1).map_or(Ok(100_000), |n| n.parse()).context("how many decisions?")?;
    let fleets = decisions.div_ceil(DECISIONS_A_FLEET);
    for seed in 0..fleets as u64 {
        let mut rng = Rng::new(seed);
        let mut both = Fleets::new(1 + rng.below(16) as u64);
        for step in 0..DECISIONS_A_FLEET {
            let difference = both.step(&mut rng)?;
            ensure!(difference.is_none(), "seed {seed}, step {step}: {}", difference.unwrap_or_default());
        }
    }
    println!("{} decisions of {fleets} fleets: every choice is the peer's", fleets * DECISIONS_A_FLEET);
    Ok(())
}
