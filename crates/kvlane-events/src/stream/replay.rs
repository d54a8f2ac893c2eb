//! Replays: what to ask for, what the answer says about the publisher's life, when to give up.

use super::frames::{self, Message, Reply};
use super::recent::Seen;
use super::{Action, Fault, PROBES_UNANSWERED, Phase, Plan, Purpose, Stream, distance};
use crate::wire::DropReason;

/// After a reconnect so many of the batches applied last are compared with the engine's: the first ones of a new life may have
/// been taken for a continuation before the loss of the connection was noticed.
const VERIFIED_AFTER_RECONNECT: usize = 32;

impl Stream {
    pub(super) fn replay(&mut self, attempt: u64, frames: &[&[u8]], now_ms: u64, out: &mut Vec<Action>) {
        let Phase::Asking { plan, answered, .. } = self.phase else {
            return out.push(Action::Dropped(DropReason::LateReply));
        };
        if attempt != self.attempt {
            return out.push(Action::Dropped(DropReason::LateReply));
        }
        let reply = match frames::reply(frames, self.config.topic.as_deref()) {
            Ok(reply) => reply,
            Err(reason) => return out.push(Action::Dropped(reason)),
        };
        self.phase = Phase::Asking { plan, heard_ms: now_ms, answered: true };
        self.retains |= matches!(reply, Reply::Batch(_));
        match reply {
            Reply::End => self.replay_end(plan, answered, now_ms, out),
            Reply::Batch(message) if answered => self.replay_next(message, plan, now_ms, out),
            Reply::Batch(message) => self.replay_first(message, plan, now_ms, out),
        }
    }

    /// The first batch of a replay says which life it comes from and how far back it reaches.
    pub(super) fn replay_first(
        &mut self,
        message: Message<'_>,
        plan: Plan,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        if matches!(plan.purpose, Purpose::Start | Purpose::Again) {
            if plan.purpose == Purpose::Again {
                self.again = None;
                if self.since.is_some_and(|since| distance(message.seq, since) >= 0) {
                    // The engine reaches no further back than what is known.
                    self.attempt += 1;
                    return self.follow();
                }
                self.fence(out);
                self.set_plan(Plan::new(Purpose::Start));
            }
            self.start_at(message.seq);
            return self.replay_batch(message, now_ms, out);
        }
        let Some(next) = self.next else {
            // The first that is heard of it, after a silence.
            self.set_plan(Plan::new(Purpose::Start));
            self.start_at(message.seq);
            return self.replay_batch(message, now_ms, out);
        };
        match distance(message.seq, next) {
            0 if !self.unverified && !self.doubtful => self.replay_batch(message, now_ms, out),
            // The right number, but no proof that it is the same life.
            0 => self.restarted(now_ms, out),
            1.. => self.replay_hole(message, plan, next, now_ms, out),
            _ => self.replay_known(message, now_ms, out),
        }
    }

    /// A reply that leaves batches out.
    fn replay_hole(
        &mut self,
        message: Message<'_>,
        mut plan: Plan,
        next: u64,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        if plan.missing == Some(next) {
            // Twice at one place: the engine does not have them any more.
            self.fence(out);
            self.start_at(message.seq);
            self.replay_batch(message, now_ms, out);
            self.try_again_later(now_ms);
        } else {
            // The engine's reply queue may have overflowed: ask for the rest.
            if plan.purpose == Purpose::Probe {
                self.claim_until(now_ms);
                plan = Plan::new(Purpose::Hole);
            }
            plan.missing = Some(next);
            self.set_plan(plan);
            self.retry(now_ms, out);
        }
    }

    /// A replayed batch that was applied before: the proof of the same life, or of another.
    fn replay_known(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        match self.recent.look(message.seq, message.payload) {
            Seen::Same => self.prove(out),
            Seen::Other => self.restarted(now_ms, out),
            Seen::Forgotten => out.push(Action::Dropped(DropReason::Duplicate)),
        }
    }

    pub(super) fn replay_next(
        &mut self,
        message: Message<'_>,
        plan: Plan,
        now_ms: u64,
        out: &mut Vec<Action>,
    ) {
        let next = self.next.expect("set by the first batch of the replay");
        match distance(message.seq, next) {
            0 => self.replay_batch(message, now_ms, out),
            1.. => self.replay_hole(message, plan, next, now_ms, out),
            _ if plan.purpose == Purpose::Start => out.push(Action::Dropped(DropReason::Duplicate)),
            _ => self.replay_known(message, now_ms, out),
        }
    }

    pub(super) fn replay_batch(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let (first, _) = self.replayed.unwrap_or((message.seq, message.seq));
        if let Err(reason) = self.apply(message, out) {
            out.push(Action::Dropped(reason));
            self.pass_over(message, out);
        }
        self.replayed = Some((first, message.seq));
        if let Phase::Asking { plan, .. } = &mut self.phase {
            plan.tries = 0;
        }
        self.heard_ms = now_ms;
    }

    pub(super) fn replay_end(&mut self, plan: Plan, answered: bool, now_ms: u64, out: &mut Vec<Action>) {
        let nothing =
            !answered && self.next.is_some() && matches!(plan.purpose, Purpose::Hole | Purpose::Probe);
        if nothing || self.adopting {
            // Not even the last batch: it has none of this life's.
            return self.restarted(now_ms, out);
        }
        if !answered && self.next.is_none() {
            // It has published nothing: what follows from number 0 on is all there is.
            self.complete = self.retains;
        }
        self.heard_ms = now_ms;
        self.probes_unanswered = 0;
        self.fault = self.fault.filter(|&fault| fault != Fault::ReplayUnanswered);
        if self.complete || plan.purpose == Purpose::Again {
            self.again = None;
        }
        self.follow();
    }

    pub(super) fn ask(&mut self, plan: Plan, now_ms: u64, out: &mut Vec<Action>) {
        let from_seq = match (plan.purpose, self.next) {
            (Purpose::Hole | Purpose::Probe, Some(next)) => {
                let back = if self.unverified || self.doubtful { VERIFIED_AFTER_RECONNECT } else { 1 };
                next.wrapping_sub(self.recent.len().min(back) as u64)
            }
            _ => 0,
        };
        self.attempt += 1;
        self.counters.replays += 1;
        self.phase = Phase::Asking { plan, heard_ms: now_ms, answered: false };
        out.push(Action::RequestReplay { attempt: self.attempt, from_seq });
    }

    pub(super) fn set_plan(&mut self, new: Plan) {
        if let Phase::Asking { plan, .. } = &mut self.phase {
            *plan = new;
        }
    }

    /// The replay under way brings nothing more: pause and try again, or give it up.
    pub(super) fn retry(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let Phase::Asking { mut plan, .. } = self.phase else { return };
        plan.tries += 1;
        self.doubtful = self.next.is_some();
        if plan.purpose == Purpose::Start && self.next.is_some() {
            plan.purpose = Purpose::Hole;
        }
        if plan.tries < self.config.limits.tries {
            let until_ms = now_ms + self.backoff_ms(plan.tries);
            self.phase = Phase::Pausing { plan, until_ms };
            return;
        }
        match plan.purpose {
            Purpose::Probe => {
                self.probes_unanswered += 1;
                if self.probes_unanswered >= PROBES_UNANSWERED {
                    self.fault = Some(Fault::ReplayUnanswered);
                }
                self.heard_ms = now_ms;
            }
            Purpose::Start | Purpose::Hole | Purpose::Again => {
                if plan.purpose == Purpose::Hole {
                    self.fence(out);
                }
                self.fault = Some(Fault::ReplayUnanswered);
                self.try_again_later(now_ms);
            }
        }
        self.follow();
    }

    /// What is known begins late, and not because the engine has forgotten the rest.
    pub(super) fn try_again_later(&mut self, now_ms: u64) {
        let limits = self.config.limits;
        let pause = self.again.map_or(limits.again_ms, |(_, pause)| pause);
        self.again = Some((now_ms + pause, (pause * 2).min(limits.again_max_ms)));
    }

    pub(super) fn backoff_ms(&self, tries: u32) -> u64 {
        let limits = self.config.limits;
        (limits.backoff_ms << tries.saturating_sub(1).min(16)).min(limits.backoff_max_ms)
    }
}
