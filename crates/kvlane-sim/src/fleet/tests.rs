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
