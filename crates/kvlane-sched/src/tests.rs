//! Behaviour at the crate's boundary, for every policy.

use crate::ledger::Booking;
use crate::policy::NAMES;
use crate::*;
use kvlane_index::{InstanceId, Worker};

fn scheduler(policy: &str) -> Scheduler {
    Scheduler::new(policy.parse().unwrap())
}

fn candidates(profile: &Profile, n: u64) -> Vec<Candidate<'_>> {
    (0..n).map(|i| Candidate::new(Worker::new(i, 0), profile)).collect()
}

fn decide(s: &Scheduler, request: &Request<'_>, candidates: &[Candidate<'_>], rng: &mut Rng) -> Decision {
    let mut decision = Decision::default();
    s.decide(request, candidates, 0.0, rng, &mut decision).unwrap();
    decision
}

#[test]
fn terms_sum_to_the_total_and_the_choice_has_the_least() {
    let profile = Profile::new(16);
    for name in NAMES {
        let mut s = scheduler(name);
        let mut rng = Rng::new(7);
        for id in 0..300 {
            let mut candidates = candidates(&profile, 5);
            for c in &mut candidates {
                c.overlap.device = rng.below(100) as u32 * 16;
                c.overlap.host = rng.below(10) as u32 * 16;
            }
            let request = Request::new(RequestId(id), 1 + rng.below(4000) as u32);
            let d = decide(&s, &request, &candidates, &mut rng);
            for row in d.rows.iter().filter(|r| r.filtered.is_none()) {
                assert_eq!(row.total, row.terms.iter().sum::<f64>(), "{name}");
                assert!(d.columns.len() <= MAX_TERMS);
                assert!(row.terms[d.columns.len()..].iter().all(|t| *t == 0.0), "{name}");
            }
            let least = d.rows.iter().map(|r| r.total).fold(f64::INFINITY, f64::min);
            assert_eq!(d.row(d.order[0]).unwrap().total, least, "{name}");
            assert_eq!(d.order.len(), if *name == "power-of-two" { 2 } else { 5 });
            s.book(&request, &d, d.order[0], 0.0).unwrap();
        }
    }
}

#[test]
fn ties_are_fair() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 4);
    for name in NAMES {
        let s = scheduler(name);
        let mut rng = Rng::new(1);
        let mut counts = [0u32; 4];
        for id in 0..4000 {
            let d = decide(&s, &Request::new(RequestId(id), 100), &candidates, &mut rng);
            counts[d.order[0].instance.0 as usize] += 1;
        }
        assert!(counts.iter().all(|c| (880..1120).contains(c)), "{name}: {counts:?}");
    }
}

#[test]
fn round_robin_visits_each_worker_once_a_round() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 7);
    let mut s = scheduler("round-robin");
    let mut rng = Rng::new(3);
    for round in 0..5 {
        let mut seen = Vec::new();
        for i in 0..7 {
            let request = Request::new(RequestId(round * 7 + i), 10);
            let d = decide(&s, &request, &candidates, &mut rng);
            s.book(&request, &d, d.order[0], 0.0).unwrap();
            seen.push(d.order[0]);
        }
        seen.sort();
        seen.dedup();
        assert_eq!(seen.len(), 7);
    }
}

#[test]
fn kv_follows_the_cache_until_the_queue_costs_more_than_the_prefill_saved() {
    let profile = Profile::new(16);
    let mut candidates = candidates(&profile, 2);
    candidates[0].overlap.device = 8000;
    let mut s = scheduler("kv");
    let mut rng = Rng::new(5);
    let mut to_holder = 0;
    for id in 0..20 {
        let request = Request::new(RequestId(id), 8192);
        let d = decide(&s, &request, &candidates, &mut rng);
        s.book(&request, &d, d.order[0], 0.0).unwrap();
        if d.order[0] != candidates[0].worker {
            break;
        }
        to_holder += 1;
    }
    assert!((5..20).contains(&to_holder), "{to_holder} requests went to the holder");
}

#[test]
fn pins_are_kept_and_rejections_say_why() {
    let profile = Profile::new(16);
    let mut candidates = candidates(&profile, 3);
    let s = scheduler("kv");
    let mut rng = Rng::new(1);
    let mut request = Request::new(RequestId(1), 10);
    request.pinned = Some(Pin::Instance(InstanceId(2)));
    let d = decide(&s, &request, &candidates, &mut rng);
    assert_eq!(d.order, [Worker::new(2, 0)]);
    assert_eq!(d.picked_because, PickedBecause::OnlyOne);
    assert_eq!(d.rows[0].filtered, Some(FilterReason::NotPinned));

    let mut d = Decision::default();
    request.pinned = Some(Pin::Rank(9));
    assert_eq!(s.decide(&request, &candidates, 0.0, &mut rng, &mut d), Err(Reject::PinnedAbsent));
    assert_eq!(s.decide(&request, &[], 0.0, &mut rng, &mut d), Err(Reject::NoWorkers));
    request.pinned = None;
    candidates.iter_mut().for_each(|c| c.draining = true);
    assert_eq!(s.decide(&request, &candidates, 0.0, &mut rng, &mut d), Err(Reject::NoneEligible));
    assert!(d.order.is_empty());
}

#[test]
fn a_cached_prompt_still_computes_its_last_block() {
    let profile = Profile::new(16);
    let mut candidates = candidates(&profile, 1);
    candidates[0].overlap.device = 32;
    let s = scheduler("kv");
    let d = decide(&s, &Request::new(RequestId(1), 32), &candidates, &mut Rng::new(1));
    assert_eq!(d.rows[0].cached_tokens, 16);
}

#[test]
fn unknown_policies_name_the_known() {
    let error = "kvv".parse::<Box<dyn Policy>>().unwrap_err();
    assert!(error.to_string().contains("least-loaded"));
    for name in NAMES {
        assert_eq!(name.parse::<Box<dyn Policy>>().unwrap().name(), *name);
    }
}

/// Any history, ends repeated and unknown ids included, leaves the ledger at zero; a duplicate books nothing.
#[test]
fn the_ledger_returns_to_zero() {
    for seed in 0..200 {
        let mut rng = Rng::new(seed);
        let mut ledger = Ledger::new();
        let mut live = Vec::new();
        for step in 0..200 {
            let id = RequestId(rng.below(40) as u64);
            match rng.below(6) {
                0 | 1 => {
                    let prompt_tokens = 1 + rng.below(500) as u32;
                    let blocks: Vec<u64> = (0..rng.below(20) as u64).collect();
                    let booking = Booking {
                        id,
                        worker: Worker::new(rng.below(3) as u64, 0),
                        prompt_tokens,
                        cached_tokens: rng.below(600) as u32,
                        prefill_ms: rng.unit() * 100.0,
                        streams: rng.below(2) == 0,
                        model: 0,
                        now_ms: 0.0,
                        blocks: &blocks,
                        block_id_tokens: 1 + rng.below(3) as u32 * 16,
                    };
                    let before: Vec<_> = (0..3).map(|w| ledger.load(Worker::new(w, 0))).collect();
                    let result = ledger.book(&booking);
                    assert_eq!(result.is_err(), live.contains(&id), "seed {seed} step {step}");
                    if result.is_err() {
                        let after: Vec<_> = (0..3).map(|w| ledger.load(Worker::new(w, 0))).collect();
                        assert_eq!(before, after);
                    } else {
                        live.push(id);
                    }
                }
                2 => drop(ledger.first_token(id, 0.0)),
                3 => ledger.output(id, rng.below(9) as u32),
                4 => ledger.forget(Worker::new(rng.below(3) as u64, 0)),
                _ => {
                    ledger.end(id, 0.0);
                    live.retain(|l| *l != id);
                }
            }
            assert_eq!(ledger.requests(), live.len(), "seed {seed}");
        }
        for id in live {
            ledger.end(id, 0.0);
            ledger.end(id, 0.0);
        }
        for (worker, load) in ledger.loads() {
            assert_eq!(
                load,
                Load { last_booking: load.last_booking, ..Load::default() },
                "seed {seed} {worker}"
            );
        }
    }
}

#[test]
fn shared_blocks_are_counted_once() {
    let mut ledger = Ledger::new();
    let worker = Worker::new(1, 0);
    let book = |ledger: &mut Ledger, id| {
        let booking = Booking {
            id: RequestId(id),
            worker,
            prompt_tokens: 40,
            cached_tokens: 0,
            prefill_ms: 1.0,
            streams: true,
            model: 0,
            now_ms: 0.0,
            blocks: &[11, 12],
            block_id_tokens: 16,
        };
        ledger.book(&booking).unwrap();
    };
    book(&mut ledger, 1);
    assert_eq!(ledger.load(worker).kv_tokens(), 40);
    book(&mut ledger, 2);
    assert_eq!(ledger.load(worker).kv_tokens(), 48);
    ledger.end(RequestId(1), 0.0);
    assert_eq!(ledger.load(worker).kv_tokens(), 40);
}

fn book(s: &mut Scheduler, request: &Request<'_>, candidates: &[Candidate<'_>], rng: &mut Rng) -> Worker {
    let d = decide(s, request, candidates, rng);
    s.book(request, &d, d.order[0], 0.0).unwrap();
    d.order[0]
}

#[test]
fn sessions_stick_and_move_only_when_their_worker_is_gone() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 3);
    let mut s = scheduler("sticky-session");
    let mut rng = Rng::new(2);
    let mut request = Request::new(RequestId(0), 100);
    request.session = Some(77);
    let home = book(&mut s, &request, &candidates, &mut rng);
    for id in 1..10 {
        request.id = RequestId(id);
        assert_eq!(book(&mut s, &request, &candidates, &mut rng), home);
    }
    let left: Vec<_> = candidates.iter().copied().filter(|c| c.worker != home).collect();
    request.id = RequestId(10);
    assert_ne!(book(&mut s, &request, &left, &mut rng), home);
}

#[test]
fn consistent_hash_keeps_keys_in_place_and_bounds_a_hot_one() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 8);
    let mut s = scheduler("consistent-hash");
    let mut rng = Rng::new(2);
    let mut request = Request::new(RequestId(0), 100);
    for session in 0..50 {
        request.session = Some(session);
        let all = decide(&s, &request, &candidates, &mut rng).order[0];
        let without = decide(&s, &request, &candidates[1..], &mut rng).order[0];
        assert!(all == without || all == candidates[0].worker, "only keys of the lost worker move");
    }
    request.session = Some(7);
    for id in 0..80 {
        request.id = RequestId(id);
        book(&mut s, &request, &candidates, &mut rng);
    }
    let most = candidates.iter().map(|c| s.ledger().load(c.worker).requests()).max().unwrap();
    assert!(most <= 13, "{most} of 80 requests at one of 8 workers");
}

/// Figures worked out by hand from the formula of the reference.
#[test]
fn the_reference_counts_blocks() {
    let profile = Profile::new(16);
    let mut candidates = candidates(&profile, 2);
    candidates[0].overlap = OverlapTokens { device: 32, predicted: 0, host: 16, disk: 16, external: 16 };
    let mut s = scheduler("reference");
    let mut rng = Rng::new(2);
    let mut first = Request::new(RequestId(0), 100);
    let blocks = [1, 2, 3, 4, 5, 6];
    first.blocks = &blocks;
    first.block_id_tokens = 16;
    let d = decide(&s, &first, &candidates, &mut rng);
    // 100/16 - (2 + 0.75 + 0.25 * 2) and 6 whole blocks; without overlap all of it.
    assert_eq!(d.rows[0].terms[..2], [6.25 - 3.25, 6.0]);
    assert_eq!(d.rows[1].terms[..2], [6.25, 6.0]);
    s.book(&first, &d, candidates[0].worker, 0.0).unwrap();
    let mut second = first;
    second.id = RequestId(1);
    second.blocks = &blocks[..4];
    second.prompt_tokens = Some(64);
    let d = decide(&s, &second, &candidates, &mut rng);
    // 48 tokens (100 - 52 cached) are in prefill there, and the second's blocks are all active.
    assert_eq!(d.rows[0].terms[..2], [7.0 - 3.25, 6.0]);
    assert_eq!(d.rows[1].terms[..2], [4.0, 4.0]);
}

/// Rests of prompts behind their last whole block were added up to blocks that no engine has.
#[test]
fn the_reference_counts_whole_blocks_only() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 1);
    let mut s = scheduler("reference");
    let mut rng = Rng::new(3);
    let request = |id, blocks| Request { blocks, block_id_tokens: 16, ..Request::new(RequestId(id), 31) };
    for (id, block) in [[1], [2]].iter().enumerate() {
        let one = request(id as u64, block);
        let d = decide(&s, &one, &candidates, &mut rng);
        s.book(&one, &d, candidates[0].worker, 0.0).unwrap();
    }
    let d = decide(&s, &request(9, &[3]), &candidates, &mut rng);
    assert_eq!(d.rows[0].terms[1], 3.0);
}

/// Serves one request at `worker` alone, `factor` times slower than the priors.
fn serve_alone(s: &mut Scheduler, worker: Worker, id: u64, factor: f64, now_ms: f64) -> f64 {
    let profile = Profile::new(16);
    let candidates = [Candidate::new(worker, &profile)];
    let request = Request::new(RequestId(id), 4000);
    let mut d = Decision::default();
    s.decide(&request, &candidates, now_ms, &mut Rng::new(id), &mut d).unwrap();
    s.book(&request, &d, worker, now_ms).unwrap();
    let prior = rates::Rates::default();
    let first = now_ms + prior.front_end_ms(4000) + factor * prior.prefill_ms(4000, 0);
    s.first_token(request.id, first);
    let end = first + factor * 99.0 * prior.step_ms(1, 4050);
    s.output(request.id, 99, end);
    s.end(request.id, end);
    end
}

#[test]
fn speeds_are_learnt_and_outliers_are_bounded() {
    let mut s = scheduler("kv");
    let (slow, fast, new) = (Worker::new(0, 0), Worker::new(1, 0), Worker::new(2, 0));
    let mut now = 0.0;
    for id in 0..40 {
        now = serve_alone(&mut s, slow, 2 * id, 50.0, now);
        now = serve_alone(&mut s, fast, 2 * id + 1, 0.5, now);
    }
    let close = |a: f64, b: f64| (a / b - 1.0).abs() < 0.1;
    assert!(close(s.rates(slow).prefill_factor, 50.0), "{:?}", s.rates(slow));
    assert!(close(s.rates(slow).decode_factor, 50.0), "{:?}", s.rates(slow));
    assert!(close(s.rates(fast).prefill_factor, 0.5), "{:?}", s.rates(fast));
    // An engine that hung for an hour is twice as slow at most in our eyes.
    serve_alone(&mut s, fast, 1000, 1e6, now);
    assert!(s.rates(fast).prefill_factor < 1.0);
    // Of a new one only its fleet is known: something between.
    assert!((0.5..50.0).contains(&s.rates(new).prefill_factor));
    s.forget(slow);
    assert_eq!(s.rates(slow), s.rates(new));
}

#[test]
fn answers_get_as_long_as_they_were() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 1);
    let mut s = scheduler("kv");
    let mut rng = Rng::new(1);
    for id in 0..50 {
        let mut request = Request::new(RequestId(id), 100);
        request.model = id % 2;
        book(&mut s, &request, &candidates, &mut rng);
        s.output(request.id, if id % 2 == 0 { 30 } else { 900 }, 1.0);
        s.end(request.id, 2.0);
    }
    let mut expected = |model, most| {
        let mut request = Request::new(RequestId(99), 100);
        request.model = model;
        request.max_output_tokens = most;
        decide(&s, &request, &candidates, &mut rng).output_tokens
    };
    assert_eq!(
        [expected(0, None), expected(1, None), expected(1, Some(7)), expected(2, None)],
        [30, 900, 7, 256]
    );
}

#[test]
fn an_idle_fleet_fills_its_caches_evenly() {
    // All prompts share one block that only worker 0 holds: that saves little, so it must not draw everything there.
    let profile = Profile::new(16);
    let mut candidates = candidates(&profile, 4);
    candidates[0].overlap.device = 16;
    let mut s = scheduler("kv");
    let mut rng = Rng::new(1);
    let mut counts = [0; 4];
    for id in 0..200 {
        let request = Request::new(RequestId(id), 2000);
        let now_ms = id as f64 * 10_000.0;
        let mut d = Decision::default();
        s.decide(&request, &candidates, now_ms, &mut rng, &mut d).unwrap();
        s.book(&request, &d, d.order[0], now_ms).unwrap();
        counts[d.order[0].instance.0 as usize] += 1;
        s.first_token(request.id, now_ms + 60.0);
        s.end(request.id, now_ms + 60.0);
    }
    assert!(counts.iter().all(|c| (40..70).contains(c)), "{counts:?}");
}

#[test]
fn wishes_filter_or_weigh() {
    let mut east = Profile::new(16);
    east.labels = vec!["zone=east".into(), "gpu=h200".into()];
    let mut west = Profile::new(16);
    west.labels = vec!["zone=west".into()];
    let mut candidates = [
        Candidate::new(Worker::new(0, 0), &east),
        Candidate::new(Worker::new(1, 0), &west),
        Candidate::new(Worker::new(2, 0), &west),
    ];
    let s = scheduler("kv");
    let mut rng = Rng::new(1);
    let mut request = Request::new(RequestId(1), 1000);
    let required = ["zone=west".into()];
    request.wishes.required = &required;
    let d = decide(&s, &request, &candidates, &mut rng);
    assert_eq!((d.order.len(), d.rows[0].filtered), (2, Some(FilterReason::MissingLabel)));
    let allowed = [Worker::new(2, 0)];
    request.wishes.allowed = Some(&allowed);
    let d = decide(&s, &request, &candidates, &mut rng);
    assert_eq!((d.order.as_slice(), d.rows[1].filtered), (&allowed[..], Some(FilterReason::NotAllowed)));

    // A preference is worth its milliseconds and no more: here less than the cached prefix elsewhere.
    let preferred = [("gpu=h200".into(), 5.0)];
    request.wishes = Wishes { preferred: &preferred, ..Wishes::default() };
    assert_eq!(decide(&s, &request, &candidates, &mut rng).order[0], Worker::new(0, 0));
    candidates[1].overlap.device = 992;
    assert_eq!(decide(&s, &request, &candidates, &mut rng).order[0], Worker::new(1, 0));

    request.wishes = Wishes::default();
    candidates[1].overlap.device = 0;
    candidates[0].adapter = Adapter::Absent;
    candidates[1].adapter = Adapter::Absent;
    candidates[2].adapter = Adapter::Resident;
    assert_eq!(decide(&s, &request, &candidates, &mut rng).order[0], Worker::new(2, 0));
}

/// A repeated prompt of a few blocks went to the empty worker: a prefill was reckoned with a least time, so its cached blocks saved nothing, and what it
/// would evict weighed as much as the same prefill.
#[test]
fn a_short_prompt_returns_to_the_worker_that_holds_it() {
    let profile = Profile::new(16);
    let mut candidates = candidates(&profile, 4);
    let mut s = scheduler("kv");
    let mut rng = Rng::new(1);
    for id in 0..20 {
        let request = Request::new(RequestId(id), 50);
        let now_ms = id as f64 * 1_000.0;
        let mut d = Decision::default();
        s.decide(&request, &candidates, now_ms, &mut rng, &mut d).unwrap();
        let chosen = d.order[0].instance.0 as usize;
        assert!(id == 0 || candidates[chosen].overlap.device == 48, "request {id} went to worker {chosen}");
        candidates[chosen].overlap.device = 48;
        s.book(&request, &d, d.order[0], now_ms).unwrap();
        s.output(request.id, 100, now_ms + 30.0);
        s.end(request.id, now_ms + 300.0);
    }
}

/// Half of a long prefill was forgotten as soon as short ones stood behind it: what may be done by now was told by their mean.
#[test]
fn a_queue_is_computed_from_its_head() {
    let mut ledger = Ledger::new();
    let worker = Worker::new(1, 0);
    for (id, prefill_ms) in [(1, 5_000.0), (2, 100.0), (3, 100.0)] {
        let booking = Booking {
            id: RequestId(id),
            worker,
            prompt_tokens: 10,
            cached_tokens: 0,
            prefill_ms,
            streams: true,
            model: 0,
            now_ms: 0.0,
            blocks: &[],
            block_id_tokens: 0,
        };
        ledger.book(&booking).unwrap();
    }
    assert_eq!(ledger.load(worker).queue_ms(4_000.0), 1_200.0);
    // Overdue, but not done before its first token came.
    assert_eq!(ledger.load(worker).queue_ms(60_000.0), 450.0);
    ledger.end(RequestId(2), 4_500.0);
    assert_eq!(ledger.load(worker).queue_ms(4_600.0), 500.0);
    ledger.first_token(RequestId(1), 5_000.0);
    assert_eq!(ledger.load(worker).queue_ms(5_050.0), 50.0);
    ledger.end(RequestId(3), 5_060.0);
    assert_eq!(ledger.load(worker).queue_ms(5_060.0), 0.0);
}

/// The first byte of an answer that does not stream comes with its last: taken for a first token, it made every worker that answers such requests look many
/// times slower than it is, and kept their prefill in its queue until they ended.
#[test]
fn answers_that_come_whole_teach_nothing_and_leave_the_queue_in_time() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 1);
    let mut s = scheduler("kv");
    let mut rng = Rng::new(1);
    let worker = candidates[0].worker;
    let mut request = Request::new(RequestId(0), 4_000);
    request.streams = false;
    for id in 0..5 {
        request.id = RequestId(id);
        book(&mut s, &request, &candidates, &mut rng);
    }
    let each_ms = s.ledger().load(worker).head_prefill_ms;
    // The event of one shows what is done of all.
    s.end(RequestId(4), 2.5 * each_ms);
    let load = s.ledger().load(worker);
    assert_eq!((load.prefill_requests, load.decode_requests), (2, 2));
    assert!((load.queue_ms(2.5 * each_ms) - 1.5 * each_ms).abs() < 1e-6);
    for id in 0..4 {
        s.first_token(RequestId(id), 20_000.0);
        s.end(RequestId(id), 20_000.0);
    }
    assert_eq!(s.ledger().load(worker).requests(), 0);
    assert_eq!(s.rates(worker), rates::Rates::default());
}

#[test]
fn what_others_have_in_flight_counts_as_ones_own() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 2);
    let busy = Load { prefill_requests: 3, prefill_tokens: 3000, prefill_ms: 900.0, ..Load::default() };
    for name in ["kv", "least-loaded", "power-of-two"] {
        let (mut s, mut rng) = (scheduler(name), Rng::new(1));
        s.hear([(candidates[0].worker, busy)], Busy::default());
        for id in 0..20 {
            let d = decide(&s, &Request::new(RequestId(id), 100), &candidates, &mut rng);
            assert_eq!(d.worker(), Some(candidates[1].worker), "{name}");
            assert_eq!(d.row(candidates[0].worker).unwrap().load, busy, "{name}");
        }
        assert_eq!((s.ledger().requests(), s.elsewhere(candidates[0].worker)), (0, busy));
        // What is said next replaces it.
        s.hear([(candidates[1].worker, busy)], Busy::default());
        let d = decide(&s, &Request::new(RequestId(99), 100), &candidates, &mut rng);
        assert_eq!(d.worker(), Some(candidates[0].worker), "{name}");
        s.hear([(candidates[0].worker, busy), (candidates[1].worker, busy)], Busy::default());
        assert!(!s.has_room(&Request::new(RequestId(100), 100), &candidates, 0.0), "{name}");
        s.hear([], Busy::default());
        assert!(s.has_room(&Request::new(RequestId(100), 100), &candidates, 0.0), "{name}");
    }
}

#[test]
fn loads_add_up_and_the_prefill_that_began_first_is_the_one_computed_now() {
    let of = |requests, since_ms| Load {
        prefill_requests: requests,
        prefill_ms: 100.0 * f64::from(requests),
        head_prefill_ms: 100.0,
        prefill_since_ms: since_ms,
        ..Load::default()
    };
    for sum in [of(1, 40.0).and(&of(2, 0.0)), of(2, 0.0).and(&of(1, 40.0))] {
        assert_eq!((sum.prefill_requests, sum.queue_ms(50.0)), (3, 250.0));
    }
    // Who has nothing in prefill says nothing about what is computed now.
    assert_eq!(of(0, 0.0).and(&of(1, 40.0)).queue_ms(50.0), 90.0);
    assert_eq!(of(1, 40.0).and(&of(0, 0.0)).queue_ms(50.0), 90.0);
}

#[test]
fn a_fleet_that_others_keep_busy_is_busy() {
    let profile = Profile::new(16);
    let candidates = candidates(&profile, 1);
    let delayed = |s: &Scheduler| {
        let d = decide(s, &Request::new(RequestId(7), 1000), &candidates, &mut Rng::new(1));
        d.rows[0].terms[d.columns.iter().position(|c| *c == "delay_others").unwrap()]
    };
    let mut s = scheduler("kv");
    assert_eq!(delayed(&s), 0.0);
    s.hear([], Busy { prefill_ms: 15_000.0, bookings: 10.0, at_ms: 0.0 });
    let alone = delayed(&s);
    assert!(alone > 0.0);
    assert_eq!(s.busy(0.0), Busy::default(), "what others booked is not told on as one's own");
}
