//! How long does a decision take? `cargo bench -p kvlane-sched`; medians and tails of single decisions, on a scheduler with requests in flight at
//! every worker. Bar: 5 us among 64 workers, 60 us among 1,024.

#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a bench reads the clock and prints")]

use kvlane_index::Worker;
use kvlane_sched::{Candidate, Decision, Profile, Request, RequestId, Rng, Scheduler, policy::NAMES};
use std::time::Instant;

const ROUNDS: usize = 20_000;

fn main() {
    let profile = Profile::new(16);
    println!("{:<16} {:>7} {:>9} {:>9} {:>9}", "policy", "workers", "p50 us", "p90 us", "p99 us");
    for workers in [8, 64, 1024] {
        for name in NAMES {
            let mut scheduler = Scheduler::new(name.parse().expect("NAMES are policies"));
            let mut rng = Rng::new(1);
            let mut candidates: Vec<_> =
                (0..workers).map(|i| Candidate::new(Worker::new(i, 0), &profile)).collect();
            let mut decision = Decision::default();
            for id in 0..4 * workers {
                let request = Request::new(RequestId(id), 1 + rng.below(8000) as u32);
                scheduler
                    .decide(&request, &candidates, 0.0, &mut rng, &mut decision)
                    .expect("all are eligible");
                scheduler.book(&request, &decision, decision.order[0], 0.0).expect("ids differ");
                if id % 2 == 0 {
                    scheduler.first_token(request.id, 50.0);
                }
            }
            let mut times_us = Vec::with_capacity(ROUNDS);
            for round in 0..ROUNDS {
                let holder = rng.below(candidates.len());
                candidates[holder].overlap.device = rng.below(500) as u32 * 16;
                let request = Request::new(RequestId(u64::MAX), 8000);
                let before = Instant::now();
                scheduler
                    .decide(&request, &candidates, 100.0 + round as f64, &mut rng, &mut decision)
                    .expect("all are eligible");
                times_us.push(before.elapsed().as_secs_f64() * 1e6);
            }
            times_us.sort_by(f64::total_cmp);
            let at = |q: f64| times_us[(times_us.len() as f64 * q) as usize];
            println!("{name:<16} {workers:>7} {:>9.2} {:>9.2} {:>9.2}", at(0.5), at(0.9), at(0.99));
        }
    }
}
