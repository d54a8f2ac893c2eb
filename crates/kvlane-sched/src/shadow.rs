//! A policy that looks on: it chooses for every request, and nobody acts on it.
//!
//! It keeps a ledger of its own, in which its choices are booked for as long as the requests really run: judged by the loads that another policy
//! made, a policy that spreads load would choose the worker that the other left idle again and again. What it cannot have of its own are the
//! caches: it sees what they hold after the acting policy's choices, so a policy that gathers prefixes looks worse here than if it acted. Speeds
//! are the acting scheduler's, since only real requests teach any.

use crate::{Candidate, Decision, Load, Policy, Request, RequestId, Rng, Scheduler};
use kvlane_index::Worker;

/// What a shadow would have done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Choice {
    /// Where it would have sent the request.
    pub worker: Worker,
    /// Prompt tokens that are believed to be there.
    pub cached_tokens: u32,
}

/// One such policy with its imagined load.
#[derive(Debug)]
pub struct Shadow {
    imagined: Scheduler,
    decision: Decision,
}

impl Shadow {
    /// A shadow that has seen nothing yet.
    pub fn new(policy: Box<dyn Policy>) -> Self {
        Self { imagined: Scheduler::new(policy), decision: Decision::default() }
    }

    /// Its policy.
    pub fn policy(&self) -> &dyn Policy {
        self.imagined.policy()
    }

    /// The load that its choices would have made.
    pub fn load(&self, worker: Worker) -> Load {
        self.imagined.ledger().load(worker)
    }

    /// Chooses for a request that `acting` books, and books it at the choice in the imagined ledger. `None` if no candidate may serve it.
    pub fn choose(
        &mut self,
        acting: &Scheduler,
        request: &Request<'_>,
        candidates: &[Candidate<'_>],
        now_ms: f64,
        rng: &mut Rng,
    ) -> Option<Choice> {
        let Self { imagined, decision } = self;
        imagined.decide_knowing(acting.learnt(), request, candidates, now_ms, rng, decision).ok()?;
        let worker = decision.worker()?;
        let rates = acting.rates(worker);
        // A request that was booked before keeps its first booking.
        let _ = imagined.book_at(rates, request, decision, worker, now_ms);
        let cached_tokens = decision.row(worker).map_or(0, |row| row.cached_tokens);
        Some(Choice { worker, cached_tokens })
    }

    /// The request's first token came.
    pub fn first_token(&mut self, id: RequestId, now_ms: f64) {
        self.imagined.ledger_mut().first_token(id, now_ms);
    }

    /// `tokens` more output tokens came.
    pub fn output(&mut self, id: RequestId, tokens: u32, now_ms: f64) {
        let mut more = tokens;
        if self.imagined.ledger().first_is_due(id) && tokens > 0 {
            self.first_token(id, now_ms);
            more -= 1;
        }
        self.imagined.ledger_mut().output(id, more);
    }

    /// The request ended.
    pub fn end(&mut self, id: RequestId, now_ms: f64) {
        self.imagined.ledger_mut().end(id, now_ms);
    }

    /// The worker left for good.
    pub fn forget(&mut self, worker: Worker) {
        self.imagined.forget(worker);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{OverlapTokens, Pin, Profile};

    /// Round robin spreads in its own books, whatever the acting policy does in its own.
    #[test]
    fn a_shadow_lives_with_its_own_choices() {
        let mut acting = Scheduler::new("least-loaded".parse().expect("a policy"));
        let mut shadow = Shadow::new("round-robin".parse().expect("a policy"));
        let profile = Profile::new(16);
        let workers = [0, 1, 2].map(|id| Worker::new(id, 0));
        let held = OverlapTokens { device: 160, ..OverlapTokens::default() };
        let candidates =
            workers.map(|worker| Candidate { overlap: held, ..Candidate::new(worker, &profile) });
        let (mut rng, mut decision) = (Rng::new(1), Decision::default());
        for id in 0..9 {
            let mut request = Request::new(RequestId(id), 1000);
            request.streams = true;
            request.pinned = Some(Pin::Worker(workers[0]));
            acting.decide(&request, &candidates, 0.0, &mut rng, &mut decision).expect("three candidates");
            let worker = decision.worker().expect("a choice");
            acting.book(&request, &decision, worker, 0.0).expect("a new id");
            request.pinned = None;
            let choice =
                shadow.choose(&acting, &request, &candidates, 0.0, &mut rng).expect("three candidates");
            assert_eq!(choice.cached_tokens, 160);
        }
        assert_eq!(acting.ledger().load(workers[0]).requests(), 9);
        assert!(workers.iter().all(|w| shadow.load(*w).requests() == 3));
        for id in 0..9 {
            shadow.output(RequestId(id), 2, 1.0);
            shadow.end(RequestId(id), 2.0);
            shadow.end(RequestId(id), 2.0);
        }
        assert!(workers.iter().all(|w| shadow.load(*w).requests() == 0));
        assert_eq!(shadow.choose(&acting, &Request::new(RequestId(9), 1), &[], 3.0, &mut rng), None);
    }
}
