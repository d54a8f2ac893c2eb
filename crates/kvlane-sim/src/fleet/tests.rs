//! Whole runs on small generated traces.

use super::*;
use crate::trace::{Nature, generate};
use kvlane_sched::policy::NAMES;

fn small(nature: Nature, policy: &str, seed: u64) -> Outcome {
    let trace = generate(nature, 400, 12.0, 1);
    let mut config = FleetConfig::new(4);
    config.engine.blocks = 8_000;
    config.seed = seed;
    run(&trace, &config, policy.parse().unwrap())
}

#[test]
fn one_seed_is_one_run_and_everybody_is_answered() {
    for policy in NAMES {
        let a = small(Nature::MultiTurn, policy, 3);
        assert_eq!(a, small(Nature::MultiTurn, policy, 3), "{policy}");
        assert!(a.served.iter().all(|s| s.ended_us.is_some()), "{policy}");
        assert_eq!(a.workers.iter().map(|w| w.requests).sum::<u64>(), 402);
    }
    assert_ne!(small(Nature::MultiTurn, "random", 3), small(Nature::MultiTurn, "random", 4));
}

#[test]
fn the_router_knows_what_the_engines_hold() {
    let outcome = small(Nature::MultiTurn, "kv", 1);
    let lengths = vec![0; outcome.served.len()];
    let close = outcome.served.iter().filter(|s| s.expected_cached_tokens == s.cached_tokens).count();
    assert!(close * 100 > outcome.served.len() * 95, "{close} of {}", outcome.served.len());
    assert!(outcome.summary(&lengths, 1000.0).hit_rate >= 0.0);
}

#[test]
fn without_reuse_nothing_is_hit() {
    for policy in NAMES {
        let outcome = small(Nature::NoReuse, policy, 1);
        assert!(outcome.served.iter().all(|s| s.cached_tokens == 0));
    }
}

/// Twice what the fleet can do for a minute: whoever waits at the router has work that is done before younger and shorter requests for as long as
/// it waited, so nobody waits longer than the backlog takes, and the router holds back at all.
#[test]
fn nobody_starves_while_every_worker_is_saturated() {
    let trace = generate(Nature::NoReuse, 1_500, 40.0, 1);
    let config = FleetConfig::new(2);
    let outcome = run(&trace, &config, "kv".parse().unwrap());
    let wait_ms = |s: &Served| (s.sent_us - s.arrived_us) as f64 / 1000.0;
    assert!(outcome.served.iter().all(|s| s.ended_us.is_some()));
    let longest = outcome.served.iter().map(wait_ms).fold(0.0, f64::max);
    let last_ms = outcome.served.iter().map(|s| s.arrived_us).max().unwrap() as f64 / 1000.0;
    let backlog_ms = outcome.end_us as f64 / 1000.0 - last_ms;
    let longest_prompt = trace.requests.iter().map(|r| r.input_tokens).max().unwrap();
    let slack_ms = 2.0 * Rates::default().prefill_ms(longest_prompt, 0);
    assert!(longest > 5_000.0, "{longest}");
    assert!(longest < backlog_ms + slack_ms, "{longest} ms of a backlog of {backlog_ms}");
}

/// A fleet of four under `kv`, with everything that `change` makes of it, at 60 % of what it can do for two minutes.
fn steady(change: impl Fn(&mut FleetConfig)) -> (Trace, Outcome) {
    let trace = generate(Nature::MultiTurn, 3_400, 33.0, 1);
    let mut config = FleetConfig::new(4);
    change(&mut config);
    let outcome = run(&trace, &config, "kv".parse().unwrap());
    assert!(outcome.served.iter().all(|s| s.ended_us.is_some()), "everybody is answered");
    (trace, outcome)
}

/// Mean time to first token of those that came in these seconds.
fn mean_ttft_ms(outcome: &Outcome, seconds: std::ops::Range<u64>) -> f64 {
    let came = outcome.served.iter().filter(|s| seconds.contains(&(s.arrived_us / 1_000_000)));
    let times: Vec<f64> = came.map(|s| (s.first_token_us.unwrap() - s.arrived_us) as f64 / 1000.0).collect();
    assert!(!times.is_empty());
    times.iter().sum::<f64>() / times.len() as f64
}

/// Requests at each worker of those that came from this second on, over the mean.
fn shares(outcome: &Outcome, from_s: u64) -> Vec<f64> {
    let mut counts = vec![0.0; outcome.workers.len()];
    for s in outcome.served.iter().filter(|s| s.arrived_us >= from_s * 1_000_000) {
        counts[s.worker as usize] += 1.0;
    }
    let mean = counts.iter().sum::<f64>() / counts.len() as f64;
    counts.iter().map(|count| count / mean).collect()
}

#[test]
fn a_death_costs_a_while_and_no_request() {
    let dies = Incident { at_us: 40_000_000, worker: 2, what: What::Dies };
    let (_, outcome) = steady(|config| config.incidents.push(dies));
    let late = outcome.served.iter().filter(|s| s.sent_us > dies.at_us);
    assert!(late.clone().count() > 500 && late.clone().all(|s| s.worker != dies.worker));
    // Three do the work of four, and it does not run away: long after, first tokens come as they did before, within reason.
    let (before, after) = (mean_ttft_ms(&outcome, 20..40), mean_ttft_ms(&outcome, 70..100));
    assert!(after < 3.0 * before, "{before} ms, then {after} ms");
}

#[test]
fn a_new_worker_with_an_empty_cache_gets_its_share() {
    let joins = Incident { at_us: 40_000_000, worker: 3, what: What::Joins };
    let (_, outcome) = steady(|config| config.incidents.push(joins));
    assert!(outcome.served.iter().all(|s| s.worker != joins.worker || s.sent_us >= joins.at_us));
    let shares = shares(&outcome, 70);
    assert!((0.5..1.5).contains(&shares[3]), "{shares:?}");
    // It is not flooded on its first seconds either.
    let (before, then) = (mean_ttft_ms(&outcome, 20..40), mean_ttft_ms(&outcome, 40..50));
    assert!(then < 2.0 * before, "{before} ms, then {then} ms");
}

#[test]
fn a_worker_at_half_speed_gets_less() {
    let (_, even) = steady(|_| {});
    let (_, outcome) = steady(|config| config.speeds = vec![0.5]);
    let shares = shares(&outcome, 20);
    assert!(shares[0] < 0.85 && shares[1..].iter().all(|share| *share > 0.9), "{shares:?}");
    let (usual, then) = (mean_ttft_ms(&even, 20..100), mean_ttft_ms(&outcome, 20..100));
    assert!(then < 2.0 * usual, "{usual} ms, {then} ms with one at half speed");
}

/// A burst of one prefix: its holder alone would take many seconds, so the prefix is copied to others.
#[test]
fn a_burst_of_one_prefix_is_spread() {
    let shape = crate::trace::Shape { burst: Some((300, 40_000.0)), ..Default::default() };
    let plain = generate(Nature::MultiTurn, 3_400, 33.0, 1);
    let trace = shape.apply(&plain, 1);
    assert_eq!(trace.requests.len(), plain.requests.len() + 300);
    let outcome = run(&trace, &FleetConfig::new(4), "kv".parse().unwrap());
    assert!(outcome.served.iter().all(|s| s.ended_us.is_some()));
    let burst = trace.requests.iter().zip(&outcome.served).filter(|(r, _)| r.session >= plain.sessions());
    let mut at = vec![0; 4];
    burst.clone().for_each(|(_, s)| at[s.worker as usize] += 1);
    assert!(at.iter().all(|requests| *requests > 10), "{at:?}");
    let (before, after) = (mean_ttft_ms(&outcome, 20..40), mean_ttft_ms(&outcome, 60..100));
    assert!(after < 2.0 * before, "{before} ms, then {after} ms");
}
