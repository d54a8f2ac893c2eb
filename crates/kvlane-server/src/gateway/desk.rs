//! The scheduler's one lock, and the way past it.
//!
//! A decision and its booking must be one step: the very next decision has to see what this one reserved, or requests that come together all
//! choose the worker that was idle. So decisions wait for one another, for about a microsecond each. Nobody else waits: what a running request
//! has to tell (its first token, its output, its end) goes into the account at once if the lock is free, and is left beside it if not. Whoever takes the
//! lock next enters what was left before doing anything else, so every decision sees every report that was made before it.
//!
//! What is left at a time is bounded by the requests in flight: a request tells a few things, and only a decision brings a new request.

use kvlane_sched::shadow::Shadow;
use kvlane_sched::{RequestId, Rng, Scheduler};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, MutexGuard, PoisonError, TryLockError};
use std::time::Instant;
use tokio::sync::Notify;

/// What the lock guards.
#[derive(Debug)]
pub(crate) struct Books {
    /// Chooses and keeps account.
    pub scheduler: Scheduler,
    /// Policies that look on.
    pub shadows: Vec<Shadow>,
    /// Draws among equals.
    pub rng: Rng,
    left: Receiver<Told>,
}

/// What a running request tells.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Report {
    /// Its first token came.
    FirstToken,
    /// So many more tokens came.
    Output(u32),
    /// It ended, and so many tokens had come that were not told.
    End(u32),
}

#[derive(Debug)]
struct Told {
    id: RequestId,
    report: Report,
    now_ms: f64,
}

/// Scheduler and account of one gateway.
#[derive(Debug)]
pub(crate) struct Desk {
    books: Mutex<Books>,
    leave: Sender<Told>,
    began: Instant,
    /// Rung when what is in flight changed.
    pub(super) stirred: Notify,
}

impl Desk {
    /// An empty account.
    pub(crate) fn new(scheduler: Scheduler, shadows: Vec<Shadow>, rng: Rng) -> Self {
        let (leave, left) = channel();
        Self {
            books: Mutex::new(Books { scheduler, shadows, rng, left }),
            leave,
            began: Instant::now(),
            stirred: Notify::new(),
        }
    }

    /// The time on its clock, in milliseconds.
    pub(crate) fn now_ms(&self) -> f64 {
        self.began.elapsed().as_secs_f64() * 1e3
    }

    /// Runs `work` on the books, with the time on their clock. Waits for whoever has them.
    pub(crate) fn with<R>(&self, work: impl FnOnce(&mut Books, f64) -> R) -> R {
        // A panic inside leaves the account of one request open, which is better than to refuse all others.
        let mut books = self.books.lock().unwrap_or_else(PoisonError::into_inner);
        books.enter_what_was_left();
        work(&mut books, self.now_ms())
    }

    /// Tells something about a request. Never waits.
    pub(crate) fn tell(&self, id: RequestId, report: Report) {
        let told = Told { id, report, now_ms: self.now_ms() };
        let free: Option<MutexGuard<'_, Books>> = match self.books.try_lock() {
            Ok(books) => Some(books),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        match free {
            Some(mut books) => {
                books.enter_what_was_left();
                books.enter(&told);
            }
            None => self.leave.send(told).expect("the books hold the other end"),
        }
        self.stirred.notify_one();
    }
}

impl Books {
    fn enter_what_was_left(&mut self) {
        while let Ok(told) = self.left.try_recv() {
            self.enter(&told);
        }
    }

    fn enter(&mut self, &Told { id, report, now_ms }: &Told) {
        match report {
            Report::FirstToken => {
                self.scheduler.first_token(id, now_ms);
                self.shadows.iter_mut().for_each(|shadow| shadow.first_token(id, now_ms));
            }
            Report::Output(tokens) => self.output(id, tokens, now_ms),
            Report::End(tokens) => {
                if tokens > 0 {
                    self.output(id, tokens, now_ms);
                }
                self.scheduler.end(id, now_ms);
                self.shadows.iter_mut().for_each(|shadow| shadow.end(id, now_ms));
            }
        }
    }

    fn output(&mut self, id: RequestId, tokens: u32, now_ms: f64) {
        self.scheduler.output(id, tokens, now_ms);
        self.shadows.iter_mut().for_each(|shadow| shadow.output(id, tokens, now_ms));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvlane_index::{InstanceId, Worker};
    use kvlane_sched::{Candidate, Decision, Profile, Request};

    #[test]
    fn what_was_told_while_the_books_were_out_is_in_the_next_decision() {
        let policy = "least-loaded".parse().expect("a policy of that name");
        let desk = Desk::new(Scheduler::new(policy), Vec::new(), Rng::new(1));
        let profile = Profile::new(16);
        let workers = [0, 1].map(|id| Worker { instance: InstanceId(id), rank: 0 });
        let candidates = workers.map(|worker| Candidate::new(worker, &profile));
        let book = |id| {
            desk.with(|books, now_ms| {
                let mut decision = Decision::default();
                let request = Request::new(RequestId(id), 100);
                let Books { scheduler, rng, .. } = books;
                scheduler.decide(&request, &candidates, now_ms, rng, &mut decision).expect("two candidates");
                let worker = decision.worker().expect("a decision");
                scheduler.book(&request, &decision, worker, now_ms).expect("a new id");
                worker
            })
        };
        let (first, second) = (book(1), book(2));
        assert_ne!(first, second, "the second decision saw the first booking");
        desk.with(|_, _| {
            desk.tell(RequestId(1), Report::FirstToken);
            desk.tell(RequestId(1), Report::Output(3));
            desk.tell(RequestId(1), Report::End(2));
        });
        assert_eq!(book(3), first, "its end was told while the books were out");
        desk.tell(RequestId(3), Report::End(0));
        desk.tell(RequestId(2), Report::End(0));
        assert_eq!(desk.with(|books, _| books.scheduler.ledger().requests()), 0);
    }
}
