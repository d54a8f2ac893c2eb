//! Choosing and booking workers for callers that send their requests themselves.
//!
//! The same scheduler, ledger and explanations as the gateway's ([`kvlane_sched`]); what the gateway's guard does when a response ends, a
//! *lease* does here: a reservation that its caller does not renew, mark or free for as long as it asked for is freed by
//! [`Selector::expire`], so that a killed caller leaks nothing. Whatever the caller says of a reservation renews its lease.
//!
//! Knows nothing of HTTP; [`crate::indexer`] speaks it.

use crate::clock;
use kvlane_index::{Overlap, Worker};
use kvlane_sched::{
    BookError, Candidate, Decision, Load, OverlapTokens, Pin, Policy, Profile, Reject, Request, RequestId,
    Rng, Scheduler, Wishes,
};
use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Reservations held at a time; more are refused, because every caller that leaks would otherwise fill the memory.
pub(crate) const RESERVATIONS_MAX: usize = 262_144;

/// A worker that may be chosen.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Offer {
    pub(crate) worker: Worker,
    /// What it holds of the prompt.
    pub(crate) overlap: Option<Overlap>,
    /// How far that can be believed, 0 to 1.
    pub(crate) trust: f64,
}

/// What is asked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Ask {
    /// Stands for the model in what the scheduler learns.
    pub(crate) model: u64,
    pub(crate) block_size_tokens: u32,
    pub(crate) prompt_tokens: u32,
    pub(crate) expected_output_tokens: Option<u32>,
    pub(crate) max_output_tokens: Option<u32>,
    pub(crate) pinned: Option<Pin>,
    pub(crate) session: Option<u64>,
    /// Chained ids of the prompt's prefixes, and the tokens that each stands for.
    pub(crate) ledger_ids: Vec<u64>,
    pub(crate) ledger_id_tokens: u32,
    pub(crate) offers: Vec<Offer>,
}

/// A reservation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Reserved {
    pub(crate) worker: Worker,
    pub(crate) lease: Duration,
    until_ms: u64,
    id: RequestId,
}

/// What became of a wish to reserve.
#[derive(Clone, Debug)]
pub(crate) enum Booked {
    /// A worker was chosen and booked.
    New(Reserved, Decision),
    /// The reservation exists already: the caller did not hear the first answer. Its lease was renewed.
    Again(Reserved),
}

/// Why nothing was reserved.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum NotBooked {
    /// No worker could be chosen.
    Reject(Reject),
    /// [`RESERVATIONS_MAX`] are held.
    TooMany,
}

/// How many reservations ended, and how.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Ends {
    pub(crate) freed: u64,
    /// The lease ran out.
    pub(crate) expired: u64,
}

#[derive(Debug)]
struct Desk {
    scheduler: Scheduler,
    rng: Rng,
    reservations: HashMap<Arc<str>, Reserved>,
    next: u64,
    ends: Ends,
}

/// The scheduler behind its lock.
#[derive(Debug)]
pub(crate) struct Selector(Mutex<Desk>);

impl Selector {
    pub(crate) fn new(policy: Box<dyn Policy>, seed: u64) -> Self {
        Self(Mutex::new(Desk {
            scheduler: Scheduler::new(policy),
            rng: Rng::new(seed),
            reservations: HashMap::new(),
            next: 0,
            ends: Ends::default(),
        }))
    }

    fn desk<R>(&self, work: impl FnOnce(&mut Desk, f64) -> R) -> R {
        let now_ms = clock::now_ms() as f64;
        // A panic inside leaves the account of one request open, which is better than to refuse all others.
        work(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner), now_ms)
    }

    /// Chooses and books nothing. After a reject the decision's rows name the filters.
    pub(crate) fn choose(&self, ask: &Ask) -> (Decision, Result<Worker, Reject>) {
        let profile = Profile::new(ask.block_size_tokens);
        let candidates = ask.candidates(&profile);
        let mut decision = Decision::default();
        let result = self.desk(|desk, now_ms| {
            let request = ask.request(RequestId(0));
            desk.scheduler.decide(&request, &candidates, now_ms, &mut desk.rng, &mut decision)
        });
        let worker = result.map(|()| decision.worker().expect("a decision without an error names a worker"));
        (decision, worker)
    }

    /// Chooses and books under one lock. A name that is reserved already gives that reservation again.
    pub(crate) fn reserve(&self, name: &str, lease: Duration, ask: &Ask) -> Result<Booked, NotBooked> {
        let profile = Profile::new(ask.block_size_tokens);
        let candidates = ask.candidates(&profile);
        self.desk(|desk, now_ms| {
            let until_ms = until(lease);
            if let Some(reserved) = desk.reservations.get_mut(name) {
                reserved.until_ms = until_ms;
                return Ok(Booked::Again(*reserved));
            }
            if desk.reservations.len() >= RESERVATIONS_MAX {
                return Err(NotBooked::TooMany);
            }
            desk.next += 1;
            let id = RequestId(desk.next);
            let request = ask.request(id);
            let mut decision = Decision::default();
            desk.scheduler
                .decide(&request, &candidates, now_ms, &mut desk.rng, &mut decision)
                .map_err(NotBooked::Reject)?;
            let worker = decision.worker().expect("a decision without an error names a worker");
            match desk.scheduler.book(&request, &decision, worker, now_ms) {
                Ok(()) | Err(BookError::Duplicate) => {}
            }
            let reserved = Reserved { worker, lease, until_ms, id };
            desk.reservations.insert(name.into(), reserved);
            Ok(Booked::New(reserved, decision))
        })
    }

    /// The first token came. `false`: there is no such reservation (any more).
    pub(crate) fn first_token(&self, name: &str) -> bool {
        self.marked(name, |desk, id, now_ms| desk.scheduler.first_token(id, now_ms))
    }

    /// So many more output tokens came. `false`: there is no such reservation (any more).
    pub(crate) fn output(&self, name: &str, tokens: u32) -> bool {
        self.marked(name, |desk, id, now_ms| desk.scheduler.output(id, tokens, now_ms))
    }

    /// Still running. `false`: there is no such reservation (any more).
    pub(crate) fn renew(&self, name: &str) -> bool {
        self.marked(name, |_, _, _| {})
    }

    fn marked(&self, name: &str, mark: impl FnOnce(&mut Desk, RequestId, f64)) -> bool {
        self.desk(|desk, now_ms| {
            let Some(reserved) = desk.reservations.get_mut(name) else { return false };
            reserved.until_ms = until(reserved.lease);
            let id = reserved.id;
            mark(desk, id, now_ms);
            true
        })
    }

    /// The request ended. `false`: there is no such reservation (any more).
    pub(crate) fn free(&self, name: &str) -> bool {
        self.desk(|desk, now_ms| {
            let Entry::Occupied(entry) = desk.reservations.entry(name.into()) else { return false };
            let reserved = entry.remove();
            desk.scheduler.end(reserved.id, now_ms);
            desk.ends.freed += 1;
            true
        })
    }

    /// Frees what nobody has spoken of for the length of its lease.
    pub(crate) fn expire(&self) {
        self.desk(|desk, now_ms| {
            let Desk { scheduler, reservations, ends, .. } = desk;
            reservations.retain(|_, reserved| {
                let alive = reserved.until_ms > now_ms as u64;
                if !alive {
                    scheduler.end(reserved.id, now_ms);
                    ends.expired += 1;
                }
                alive
            });
        });
    }

    /// The worker left for good.
    pub(crate) fn forget(&self, worker: Worker) {
        self.desk(|desk, _| desk.scheduler.forget(worker));
    }

    /// Work in flight, of every worker that has or had any, in order.
    pub(crate) fn loads(&self) -> Vec<(Worker, Load)> {
        let mut loads: Vec<(Worker, Load)> = self.desk(|desk, _| desk.scheduler.ledger().loads().collect());
        loads.sort_unstable_by_key(|(worker, _)| *worker);
        loads
    }

    /// Reservations held now, and how the others ended.
    pub(crate) fn figures(&self) -> (usize, Ends) {
        self.desk(|desk, _| (desk.reservations.len(), desk.ends))
    }
}

fn until(lease: Duration) -> u64 {
    clock::now_ms().saturating_add(u64::try_from(lease.as_millis()).unwrap_or(u64::MAX))
}

impl Ask {
    fn request(&self, id: RequestId) -> Request<'_> {
        Request {
            id,
            model: self.model,
            prompt_tokens: Some(self.prompt_tokens),
            prompt_bytes: 0,
            expected_output_tokens: self.expected_output_tokens,
            max_output_tokens: self.max_output_tokens,
            streams: true,
            pinned: self.pinned,
            wishes: Wishes::default(),
            priority: 0,
            session: self.session,
            blocks: &self.ledger_ids,
            block_id_tokens: self.ledger_id_tokens,
        }
    }

    fn candidates<'a>(&self, profile: &'a Profile) -> Vec<Candidate<'a>> {
        let candidate = |offer: &Offer| Candidate {
            overlap: offer.overlap.as_ref().map_or_else(OverlapTokens::default, |o| {
                OverlapTokens::from_blocks(o, self.block_size_tokens)
            }),
            trust: offer.trust,
            ..Candidate::new(offer.worker, profile)
        };
        self.offers.iter().map(candidate).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(workers: u64) -> Ask {
        let offer = |i| Offer { worker: Worker::new(i, 0), overlap: None, trust: 1.0 };
        Ask {
            block_size_tokens: 16,
            prompt_tokens: 1000,
            offers: (0..workers).map(offer).collect(),
            ..Ask::default()
        }
    }

    fn idle(selector: &Selector) -> bool {
        selector.figures().0 == 0 && selector.loads().iter().all(|(_, load)| load.requests() == 0)
    }

    #[test]
    fn a_reservation_is_load_until_it_is_freed() {
        let selector = Selector::new(Box::default(), 1);
        let lease = Duration::from_secs(60);
        let mut workers = Vec::new();
        for name in ["a", "b"] {
            let Ok(Booked::New(reserved, decision)) = selector.reserve(name, lease, &ask(2)) else {
                panic!("{name}")
            };
            assert_eq!(decision.worker(), Some(reserved.worker));
            workers.push(reserved.worker);
        }
        assert_ne!(workers[0], workers[1], "the second goes where the first did not");
        let Ok(Booked::Again(again)) = selector.reserve("a", lease, &ask(2)) else { panic!("booked twice") };
        assert_eq!(again.worker, workers[0]);
        assert!(selector.first_token("a") && selector.output("a", 5) && selector.renew("a"));
        assert!(selector.free("a") && selector.free("b") && !selector.free("a") && !selector.renew("b"));
        assert!(idle(&selector));
        assert_eq!(selector.figures().1, Ends { freed: 2, expired: 0 });
    }

    #[test]
    fn what_nobody_speaks_of_is_freed() {
        let selector = Selector::new(Box::default(), 1);
        selector.reserve("short", Duration::ZERO, &ask(1)).unwrap();
        selector.reserve("long", Duration::from_secs(60), &ask(1)).unwrap();
        selector.expire();
        assert!(!selector.renew("short") && selector.free("long"));
        assert!(idle(&selector));
        assert_eq!(selector.figures().1, Ends { freed: 1, expired: 1 });
    }

    #[test]
    fn nobody_to_choose_is_an_error_and_books_nothing() {
        let selector = Selector::new(Box::default(), 1);
        assert_eq!(selector.choose(&ask(0)).1, Err(Reject::NoWorkers));
        let pinned = Ask { pinned: Some(Pin::Rank(3)), ..ask(2) };
        let refused = selector.reserve("a", Duration::from_secs(1), &pinned).unwrap_err();
        assert_eq!(refused, NotBooked::Reject(Reject::PinnedAbsent));
        assert!(idle(&selector));
    }
}
