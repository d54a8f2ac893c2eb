//! What does it cost that all requests share one lock? `cargo bench -p kvlane-sched --bench shared -- [SECONDS]`
//!
//! Threads do nothing but the scheduler's part of requests, one after another: the most contention that there can be. In a gateway a request's other work,
//! some 50 us and more of a core, lies between two of these. `one step` decides and books under one lock, as the gateway does; `two steps`
//! decides under a lock that others share and books under one of its own, which lets decisions run at once and has each miss the bookings that
//! came in between: how many is told.

#![expect(clippy::disallowed_methods, clippy::print_stdout, reason = "a bench reads the clock and prints")]

use kvlane_index::Worker;
use kvlane_sched::{Candidate, Decision, Profile, Request, RequestId, Rng, Scheduler};
use std::collections::VecDeque;
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Requests that each thread has in flight.
const IN_FLIGHT: usize = 16;

#[derive(Clone, Copy, PartialEq)]
enum Way {
    OneStep,
    TwoSteps,
}

/// What one thread saw.
#[derive(Default)]
struct Seen {
    /// ns from asking for the lock to giving it back, deciding and booking, of each request.
    with_ns: Vec<u64>,
    /// Bookings of others between a decision and its own booking.
    missed: u64,
}

fn main() {
    let seconds = std::env::args().filter_map(|a| a.parse().ok()).next().unwrap_or(1.0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    println!("{cores} cores, {seconds} s each, policy kv, {IN_FLIGHT} requests in flight a thread");
    println!(
        "{:<10} {:>7} {:>7} {:>12} {:>9} {:>9} {:>9} {:>9}",
        "way", "workers", "threads", "requests/s", "p50 us", "p99 us", "p99.9 us", "missed"
    );
    for workers in [8, 64, 256, 1024] {
        for way in [Way::OneStep, Way::TwoSteps] {
            for threads in [1, 2, 4, 8, 16] {
                if threads <= cores.max(2) {
                    measure(way, workers, threads, Duration::from_secs_f64(seconds));
                }
            }
        }
    }
}

fn measure(way: Way, workers: u64, threads: usize, time: Duration) {
    let scheduler = RwLock::new(Scheduler::new("kv".parse().expect("a policy")));
    let (bookings, over, began) = (AtomicU64::new(0), AtomicBool::new(false), Instant::now());
    let profile = Profile::new(16);
    let (seen, elapsed) = std::thread::scope(|scope| {
        let running: Vec<_> = (0..threads as u64)
            .map(|thread| {
                let (scheduler, bookings, over, profile) = (&scheduler, &bookings, &over, &profile);
                scope.spawn(move || {
                    let mut client = Client::new(thread, workers, profile);
                    while !over.load(Ordering::Relaxed) {
                        client.request(way, scheduler, bookings, began);
                    }
                    client.seen
                })
            })
            .collect();
        std::thread::sleep(time);
        over.store(true, Ordering::Relaxed);
        let elapsed = began.elapsed();
        let seen: Vec<Seen> = running.into_iter().map(|r| r.join().expect("no thread panics")).collect();
        (seen, elapsed)
    });
    let mut with_ns: Vec<u64> = seen.iter().flat_map(|s| s.with_ns.iter().copied()).collect();
    with_ns.sort_unstable();
    let missed: u64 = seen.iter().map(|s| s.missed).sum();
    let at = |q: f64| with_ns[((with_ns.len() - 1) as f64 * q) as usize] as f64 / 1e3;
    println!(
        "{:<10} {workers:>7} {threads:>7} {:>12.0} {:>9.2} {:>9.2} {:>9.2} {:>9.2}",
        if way == Way::OneStep { "one step" } else { "two steps" },
        with_ns.len() as f64 / elapsed.as_secs_f64(),
        at(0.5),
        at(0.99),
        at(0.999),
        missed as f64 / with_ns.len() as f64,
    );
}

struct Client<'a> {
    next: u64,
    rng: Rng,
    candidates: Vec<Candidate<'a>>,
    decision: Decision,
    running: VecDeque<RequestId>,
    seen: Seen,
}

impl<'a> Client<'a> {
    fn new(thread: u64, workers: u64, profile: &'a Profile) -> Self {
        Self {
            next: thread << 48,
            rng: Rng::new(thread + 1),
            candidates: (0..workers).map(|i| Candidate::new(Worker::new(i, 0), profile)).collect(),
            decision: Decision::default(),
            running: VecDeque::new(),
            seen: Seen::default(),
        }
    }

    /// One request begins, and the oldest that runs has its first token and its end.
    fn request(&mut self, way: Way, scheduler: &RwLock<Scheduler>, bookings: &AtomicU64, began: Instant) {
        let Self { next, rng, candidates, decision, running, seen } = self;
        *next += 1;
        let request = Request { streams: true, ..Request::new(RequestId(*next), 8000) };
        let holder = rng.below(candidates.len());
        candidates[holder].overlap.device = rng.below(500) as u32 * 16;
        let now_ms = || began.elapsed().as_secs_f64() * 1e3;
        let start = Instant::now();
        let mut decide = |scheduler: &Scheduler| {
            scheduler.decide(&request, candidates, now_ms(), rng, decision).expect("all are eligible");
            bookings.load(Ordering::Relaxed)
        };
        let (before, mut books) = match way {
            Way::OneStep => {
                let books = scheduler.write().expect("no thread panics");
                (decide(&books), books)
            }
            Way::TwoSteps => {
                let before = decide(&scheduler.read().expect("no thread panics"));
                (before, scheduler.write().expect("no thread panics"))
            }
        };
        books.book(&request, decision, decision.order[0], now_ms()).expect("ids differ");
        seen.missed += bookings.fetch_add(1, Ordering::Relaxed) - before;
        drop(books);
        seen.with_ns.push(start.elapsed().as_nanos() as u64);
        running.push_back(request.id);
        candidates[holder].overlap.device = 0;
        if running.len() > IN_FLIGHT {
            let oldest = running.pop_front().expect("more than none");
            scheduler.write().expect("no thread panics").first_token(oldest, now_ms());
            scheduler.write().expect("no thread panics").end(oldest, now_ms());
        }
    }
}
