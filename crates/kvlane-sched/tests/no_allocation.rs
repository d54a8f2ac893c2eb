//! A decision allocates nothing once its `Decision` is warm: a router decides for every request, under a lock.

use kvlane_index::Worker;
use kvlane_sched::{Candidate, Decision, Profile, Request, RequestId, Rng, Scheduler, policy::NAMES};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

struct Counting;

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

#[expect(
    unsafe_code,
    reason = "the only way to see allocations; every call is handed to the system's allocator unchanged"
)]
// SAFETY: each method passes its arguments on to `System`, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.with(|n| n.set(n.get() + 1));
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn warm_decisions_allocate_nothing() {
    let profile = Profile::new(16);
    for name in NAMES {
        let mut scheduler = Scheduler::new(name.parse().unwrap());
        let mut candidates: Vec<_> = (0..64).map(|i| Candidate::new(Worker::new(i, 0), &profile)).collect();
        for (i, c) in candidates.iter_mut().enumerate() {
            c.overlap.device = 16 * i as u32;
        }
        let (mut rng, mut decision) = (Rng::new(1), Decision::default());
        let mut counted = 0;
        for id in 0..200 {
            let mut request = Request::new(RequestId(id), 2000);
            request.session = Some(id % 7);
            let before = ALLOCATIONS.with(Cell::get);
            scheduler.decide(&request, &candidates, id as f64, &mut rng, &mut decision).unwrap();
            if id > 0 {
                counted += ALLOCATIONS.with(Cell::get) - before;
            }
            scheduler.book(&request, &decision, decision.order[0], id as f64).unwrap();
        }
        assert_eq!(counted, 0, "{name}");
    }
}
