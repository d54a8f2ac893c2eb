//! Routers over the same engines as processes of their own: what they tell each other of their load, whatever is killed or stalled.

#![expect(clippy::panic, reason = "a failure in a helper fails the test that called")]

mod process;

use process::{Process, free_address, until};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Engines slow enough that a request runs for as long as a test needs it.
fn slow_engines(count: usize) -> Vec<Process> {
    (0..count).map(|_| Process::engine(0.05, &[])).collect()
}

fn routers(count: usize, engines: &[Process]) -> (Vec<SocketAddr>, Vec<Process>) {
    let at: Vec<SocketAddr> = (0..count).map(|_| free_address()).collect();
    let routers = at.iter().map(|own| Process::router(*own, engines, &at, "--policy least-loaded")).collect();
    (at, routers)
}

#[test]
fn two_routers_know_each_others_load_and_forget_who_was_killed() {
    let engines = slow_engines(2);
    let (at, mut routers) = routers(2, &engines);
    let (_first, one) = routers[0].begin(&[1; 40]);
    until("the second knows of it", || routers[1].sum("in_flight_elsewhere") == 1);
    let (_second, other) = routers[1].begin(&[2; 40]);
    assert_ne!(one, other, "it goes where the other router sent nothing");
    until("the first knows of it", || routers[0].sum("in_flight_elsewhere") == 1);
    assert_eq!(routers[0].sum("in_flight"), 1, "what others have in flight is not its own");
    let standing = routers[0].get("/kvlane/workers")["replicas"].clone();
    let heard = standing.as_array().expect("replicas").iter().filter(|r| r["heard"] == true).count();
    assert_eq!((heard, standing.as_array().map(Vec::len)), (1, Some(2)), "itself is not heard: {standing}");

    drop(routers.remove(0));
    until("its load has expired", || routers[0].sum("in_flight_elsewhere") == 0);
    // Back with nothing: it is told everything at once.
    routers.push(Process::router(at[0], &engines, &at, "--policy least-loaded"));
    until("it knows what runs", || routers[1].sum("in_flight_elsewhere") == 1);
    let (_third, again) = routers[1].begin(&[3; 40]);
    assert_eq!(again, one, "the other engine is the second router's");

    // Stalled, it cannot say that it lives; and is believed again when it does.
    routers[1].signal("STOP");
    until("it is not counted", || routers[0].sum("in_flight_elsewhere") == 0);
    routers[1].signal("CONT");
    until("it is counted again", || routers[0].sum("in_flight_elsewhere") == 1);
}

#[test]
fn eight_routers_spread_their_requests_as_one_would() {
    let engines = slow_engines(4);
    let (at, mut routers) = routers(8, &engines);
    let mut running = Vec::new();
    let mut at_engine: BTreeMap<String, usize> = BTreeMap::new();
    let mut begun = 0;
    for round in 0..2 {
        for (i, router) in routers.iter().enumerate() {
            let own = router.sum("in_flight");
            until("it knows what the others began", || router.sum("in_flight_elsewhere") == begun - own);
            let (stream, worker) = router.begin(&[100 * round + i as u32; 40]);
            running.push((i, stream));
            *at_engine.entry(worker).or_default() += 1;
            begun += 1;
        }
    }
    assert_eq!(at_engine.values().copied().collect::<Vec<_>>(), [4; 4], "{at_engine:?}");

    drop(routers.remove(7));
    for router in &routers {
        until("what the killed one had is gone", || router.sum("in_flight_elsewhere") == 12);
    }
    let back = Process::router(at[7], &engines, &at, "--policy least-loaded");
    until("the new one knows everything", || back.sum("in_flight_elsewhere") == 14);
    running.retain(|(router, _)| *router != 3);
    for router in routers.iter().filter(|router| router.at != at[3]) {
        until("what ended is told", || router.sum("in_flight_elsewhere") == 10);
    }
    drop(running);
    for router in routers.iter().chain([&back]) {
        until("all is released", || router.sum("in_flight_elsewhere") + router.sum("in_flight") == 0);
    }
}
