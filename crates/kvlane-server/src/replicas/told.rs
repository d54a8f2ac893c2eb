//! This router's work in flight, as it is told to others.

use super::wire::{Loads, RankLoad};
use kvlane_index::Worker;
use kvlane_sched::{Busy, Load};
use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;
use tokio::sync::watch;

/// An asker gets an answer after this time also where nothing changed: it is how a router shows that it is alive.
pub(super) const HEARTBEAT: Duration = Duration::from_millis(250);
/// That a worker has nothing in flight any more is told for so long, longer than anybody who asks can lag behind ([`super::heard::EXPIRY`]).
const ENDS_FOR_MS: f64 = 10_000.0;

/// What has been told, with the number of the change that made it so.
#[derive(Debug)]
pub(super) struct Told {
    boot: u64,
    state: Mutex<State>,
    /// The number of the latest change that is worth an answer at once.
    urgent: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct State {
    sequence: u64,
    ranks: BTreeMap<Worker, Rank>,
    busy: Busy,
}

/// One worker that has, or lately had, work in flight.
#[derive(Debug)]
struct Rank {
    engine: String,
    load: Load,
    /// The number of its last change, and when that was.
    changed: u64,
    changed_ms: f64,
}

impl Told {
    pub(super) fn new(boot: u64) -> Self {
        Self { boot, state: Mutex::default(), urgent: watch::Sender::new(0) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes all loads of this moment; who is left out has none. Workers are named when they first have load.
    ///
    /// That requests came or went is told at once; that running ones have grown can wait for the heartbeat.
    pub(super) fn note(
        &self,
        loads: Vec<(Worker, Load)>,
        name: impl Fn(Worker) -> Option<String>,
        busy: Busy,
        now_ms: f64,
    ) {
        let mut state = self.state();
        let State { sequence, ranks, busy: before } = &mut *state;
        *before = busy;
        let next = *sequence + 1;
        let (mut changed, mut urgent) = (false, false);
        let mut change = |rank: &mut Rank, load: Load| {
            let phases = |load: &Load| (load.prefill_requests, load.decode_requests);
            urgent |= phases(&rank.load) != phases(&load);
            changed = true;
            (rank.load, rank.changed, rank.changed_ms) = (load, next, now_ms);
        };
        let mut named = loads.iter().map(|(worker, ..)| *worker).collect::<Vec<_>>();
        named.sort_unstable();
        for (worker, load) in loads {
            match ranks.get_mut(&worker) {
                Some(rank) if rank.load == load => {}
                Some(rank) => change(rank, load),
                None if load.requests() == 0 => {}
                None => {
                    let Some(engine) = name(worker) else { continue };
                    let fresh = Rank { engine, load: Load::default(), changed: 0, changed_ms: 0.0 };
                    change(ranks.entry(worker).or_insert(fresh), load);
                }
            }
        }
        for (worker, rank) in ranks.iter_mut() {
            if rank.load.requests() > 0 && named.binary_search(worker).is_err() {
                change(rank, Load::default());
            }
        }
        ranks.retain(|_, rank| rank.load.requests() > 0 || now_ms - rank.changed_ms < ENDS_FOR_MS);
        if changed {
            *sequence = next;
        }
        if urgent {
            self.urgent.send_replace(next);
        }
    }

    /// What changed after `after`, once something did or [`HEARTBEAT`] has passed; everything, at once, for an asker that knows another
    /// life of this process (`boot`). `clock` is the one on which loads are noted.
    pub(super) async fn tell(&self, boot: u64, after: u64, clock: impl Fn() -> f64) -> Loads {
        let known = boot == self.boot && after <= self.state().sequence;
        if known {
            let mut urgent = self.urgent.subscribe();
            // Either way there is something to say.
            let _ = tokio::time::timeout(HEARTBEAT, urgent.wait_for(|latest| *latest > after)).await;
        }
        let (state, now_ms) = (self.state(), clock());
        let told = state
            .ranks
            .iter()
            .filter(|(_, rank)| if known { rank.changed > after } else { rank.load.requests() > 0 });
        let busy = state.busy.at(now_ms);
        Loads {
            boot: self.boot,
            sequence: state.sequence,
            full: !known,
            ranks: told.map(|(worker, r)| RankLoad::new(&r.engine, worker.rank, &r.load, now_ms)).collect(),
            busy_prefill_ms: busy.prefill_ms,
            busy_bookings: busy.bookings,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(prefill_requests: u32, decode_tokens: u64) -> Load {
        Load { prefill_requests, decode_tokens, ..Load::default() }
    }

    fn note(told: &Told, loads: &[(u64, Load)], now_ms: f64) {
        let loads = loads.iter().map(|(i, load)| (Worker::new(*i, 0), *load)).collect();
        told.note(loads, |worker| Some(format!("e:{}", worker.instance.0)), Busy::default(), now_ms);
    }

    #[tokio::test(start_paused = true)]
    async fn an_asker_is_told_all_at_first_and_then_what_changed() {
        let told = Told::new(7);
        let first = told.tell(0, 0, || 0.0).await;
        assert_eq!((first.full, first.boot, first.ranks.len()), (true, 7, 0));
        note(&told, &[(1, load(1, 0)), (2, load(0, 0))], 0.0);
        let second = told.tell(7, first.sequence, || 0.0).await;
        assert_eq!((second.full, second.ranks.len(), second.ranks[0].prefill_requests), (false, 1, 1));
        // Nothing new: the heartbeat answers.
        note(&told, &[(1, load(1, 0))], 0.0);
        let began = tokio::time::Instant::now();
        assert!(told.tell(7, second.sequence, || 0.0).await.ranks.is_empty());
        assert!(began.elapsed() >= HEARTBEAT);
        // Growth waits for the heartbeat, an end does not.
        note(&told, &[(1, load(1, 9))], 0.0);
        let began = tokio::time::Instant::now();
        let third = told.tell(7, second.sequence, || 0.0).await;
        assert_eq!((third.ranks[0].decode_tokens, began.elapsed() >= HEARTBEAT), (9, true));
        let began = tokio::time::Instant::now();
        let (asked, ()) = tokio::join!(told.tell(7, third.sequence, || 0.0), async {
            tokio::time::sleep(Duration::from_millis(3)).await;
            note(&told, &[(1, load(0, 0))], 0.0);
        });
        assert!(began.elapsed() < HEARTBEAT);
        assert_eq!((asked.ranks.len(), asked.ranks[0].prefill_requests), (1, 0), "that it ended is told too");
        // Who remembers another life, or a number that never was, is told all; and nothing is in flight.
        for (boot, after) in [(8, 1), (7, 99)] {
            let all = told.tell(boot, after, || 0.0).await;
            assert!(all.full && all.ranks.is_empty());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_worker_that_left_has_nothing_in_flight_and_is_forgotten() {
        let told = Told::new(7);
        note(&told, &[(1, load(1, 0)), (2, load(3, 0))], 0.0);
        let all = told.tell(0, 0, || 0.0).await;
        assert_eq!(all.ranks.len(), 2);
        note(&told, &[(2, load(3, 0))], 1.0);
        let gone = told.tell(7, all.sequence, || 0.0).await;
        assert_eq!((gone.ranks.len(), gone.ranks[0].engine.as_str()), (1, "e:1"));
        assert_eq!(gone.ranks[0].prefill_requests, 0);
        note(&told, &[(2, load(3, 0))], 1.0 + ENDS_FOR_MS);
        assert_eq!(told.state().ranks.len(), 1);
    }
}
