//! Other routers' work in flight, as they told it.

use super::wire::Loads;
use kvlane_sched::{Busy, Load};
use std::collections::HashMap;
use std::time::{Duration, Instant};

/// Who has not been heard of for this long has no work in flight any more: its connections to the engines ended with it.
pub(super) const EXPIRY: Duration = Duration::from_secs(1);
/// Ranks of one teller that are kept; more are not believed.
const RANKS_MAX: usize = 65_536;
/// Tellers at a time; more are not believed.
const TELLERS_MAX: usize = 1_024;

/// Loads by engine (`host:port`) and rank, as routers name them to each other.
pub(crate) type Sums = HashMap<String, HashMap<u32, Load>>;

/// By teller.
#[derive(Debug)]
pub(super) struct Heard {
    tellers: HashMap<u64, Teller>,
    /// Times of loads count from here.
    began: Instant,
}

#[derive(Debug)]
struct Teller {
    sequence: u64,
    at: Instant,
    ranks: HashMap<(String, u32), Load>,
    busy: Busy,
}

/// What became of a message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Taken {
    /// All that it said counts now.
    Applied,
    /// It is older than what is known, as when two ways lead to one teller.
    Old,
    /// It says what changed after a state that is not known here: ask for everything.
    Unfounded,
}

impl Heard {
    pub(super) fn new(now: Instant) -> Self {
        Self { tellers: HashMap::new(), began: now }
    }

    fn ms(&self, at: Instant) -> f64 {
        at.saturating_duration_since(self.began).as_secs_f64() * 1e3
    }

    /// Enters a message that answers a question for what changed after `after`.
    pub(super) fn enter(&mut self, told: &Loads, after: u64, now: Instant) -> Taken {
        let known = self.tellers.get(&told.boot).map(|teller| teller.sequence);
        if known.is_some_and(|sequence| told.sequence < sequence) {
            return Taken::Old;
        }
        let room = known.is_some() || self.tellers.len() < TELLERS_MAX;
        if !room || (!told.full && known.is_none_or(|sequence| sequence < after)) {
            return Taken::Unfounded;
        }
        let now_ms = self.ms(now);
        let teller = self.tellers.entry(told.boot).or_insert_with(|| Teller {
            sequence: 0,
            at: now,
            ranks: HashMap::new(),
            busy: Busy::default(),
        });
        (teller.sequence, teller.at, teller.busy) = (told.sequence, now, told.busy(now_ms));
        if told.full {
            teller.ranks.clear();
        }
        for rank in &told.ranks {
            let (name, load) = ((rank.engine.clone(), rank.rank), rank.load(now_ms));
            if load.requests() == 0 {
                teller.ranks.remove(&name);
            } else if teller.ranks.len() < RANKS_MAX {
                teller.ranks.insert(name, load);
            }
        }
        Taken::Applied
    }

    /// Forgets who was not heard of; whether anybody was forgotten.
    pub(super) fn expire(&mut self, now: Instant) -> bool {
        let before = self.tellers.len();
        self.tellers.retain(|_, teller| now.saturating_duration_since(teller.at) < EXPIRY);
        self.tellers.len() != before
    }

    /// The number of the last message of a teller; `None` = nothing is known of it.
    pub(super) fn sequence(&self, boot: u64) -> Option<u64> {
        self.tellers.get(&boot).map(|teller| teller.sequence)
    }

    /// Routers that are heard.
    pub(super) fn tellers(&self) -> usize {
        self.tellers.len()
    }

    /// All work, and all that was booked of late, with times on a clock that shows `now_ms` at `now`.
    pub(super) fn sums(&self, now: Instant, now_ms: f64) -> (Sums, Busy) {
        let here_ms = self.ms(now);
        let ahead_ms = now_ms - here_ms;
        let (mut sums, mut busy) = (Sums::new(), Busy { at_ms: now_ms, ..Busy::default() });
        for teller in self.tellers.values() {
            let booked = teller.busy.at(here_ms);
            busy.prefill_ms += booked.prefill_ms;
            busy.bookings += booked.bookings;
            for ((engine, rank), load) in &teller.ranks {
                let load = Load { prefill_since_ms: load.prefill_since_ms + ahead_ms, ..*load };
                // Few engines are named for the first time; a lookup by `&str` spares the others a copy.
                let ranks = match sums.get_mut(engine.as_str()) {
                    Some(ranks) => ranks,
                    None => sums.entry(engine.clone()).or_default(),
                };
                let sum = ranks.entry(*rank).or_default();
                *sum = sum.and(&load);
            }
        }
        (sums, busy)
    }
}

#[cfg(test)]
mod tests {
    use super::super::wire::RankLoad;
    use super::*;

    fn loads(boot: u64, sequence: u64, full: bool, ranks: &[(&str, u32)]) -> Loads {
        let rank = |(engine, requests): &(&str, u32)| RankLoad {
            engine: (*engine).to_owned(),
            prefill_requests: *requests,
            ..RankLoad::default()
        };
        let ranks = ranks.iter().map(rank).collect();
        Loads { boot, sequence, full, ranks, busy_prefill_ms: 10.0, busy_bookings: 1.0 }
    }

    fn requests(heard: &Heard, engine: &str) -> u32 {
        let (sums, _) = heard.sums(heard.began, 0.0);
        sums.get(engine).and_then(|ranks| ranks.get(&0)).map_or(0, Load::requests)
    }

    #[test]
    fn loads_of_several_tellers_add_up_and_end_with_them() {
        let now = Instant::now();
        let mut heard = Heard::new(now);
        assert_eq!(heard.enter(&loads(1, 5, true, &[("a", 2), ("b", 1)]), 0, now), Taken::Applied);
        assert_eq!(heard.enter(&loads(2, 1, true, &[("a", 3)]), 0, now), Taken::Applied);
        assert_eq!((requests(&heard, "a"), requests(&heard, "b")), (5, 1));
        assert_eq!(heard.sums(now, 0.0).1.bookings, 2.0);
        assert_eq!(heard.enter(&loads(1, 6, false, &[("b", 0)]), 5, now), Taken::Applied);
        assert_eq!((requests(&heard, "a"), requests(&heard, "b")), (5, 0));
        // The second is silent; the first goes on.
        let later = now + EXPIRY / 2;
        assert_eq!(heard.enter(&loads(1, 6, false, &[]), 6, later), Taken::Applied);
        assert!(heard.expire(now + EXPIRY));
        assert_eq!((requests(&heard, "a"), heard.tellers()), (2, 1));
        assert!(heard.sums(now, 0.0).1.bookings <= 1.0);
    }

    #[test]
    fn what_does_not_follow_on_what_is_known_is_not_entered() {
        let now = Instant::now();
        let mut heard = Heard::new(now);
        assert_eq!(heard.enter(&loads(1, 9, false, &[("a", 1)]), 8, now), Taken::Unfounded);
        assert_eq!(heard.enter(&loads(1, 9, true, &[("a", 1)]), 0, now), Taken::Applied);
        // Two addresses of one teller: each answer is entered once, whichever comes first.
        assert_eq!(heard.enter(&loads(1, 8, true, &[("a", 7)]), 0, now), Taken::Old);
        assert_eq!(heard.enter(&loads(1, 12, false, &[("a", 7)]), 11, now), Taken::Unfounded);
        assert_eq!(heard.enter(&loads(1, 12, false, &[("a", 2)]), 9, now), Taken::Applied);
        assert_eq!(requests(&heard, "a"), 2);
        // A new life begins anew, and the old one ends by itself.
        assert_eq!(heard.enter(&loads(3, 1, true, &[]), 0, now), Taken::Applied);
        assert_eq!(requests(&heard, "a"), 2);
        assert!(heard.expire(now + EXPIRY));
        assert_eq!(requests(&heard, "a"), 0);
    }

    #[test]
    fn times_are_on_the_clock_of_whoever_asks() {
        let now = Instant::now();
        let mut heard = Heard::new(now);
        let mut told = loads(1, 1, true, &[("a", 1)]);
        (told.ranks[0].prefill_us, told.ranks[0].head_prefill_us) = (100_000, 100_000);
        told.ranks[0].prefill_age_us = 20_000;
        heard.enter(&told, 0, now + Duration::from_millis(5));
        let asked = now + Duration::from_millis(15);
        let (sums, _) = heard.sums(asked, 1_000.0);
        // 20 ms were done when it was told, 10 ms ago.
        assert!((sums["a"][&0].queue_ms(1_000.0) - 70.0).abs() < 1e-6, "{sums:?}");
    }
}
