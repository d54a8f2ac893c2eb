//! One life of a publisher after another: connections, restarts, fences, deadlines.

use super::{Action, PROBES_UNANSWERED, Phase, Plan, Purpose, Stream};

impl Stream {
    pub(super) fn connected(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.buffer.clear();
        self.retains = true;
        self.heard_ms = now_ms;
        if self.next.is_none() {
            self.complete = false;
            self.learn(now_ms, out);
        } else if self.config.replay {
            self.unverified = true;
            self.claim_until(now_ms);
            self.ask(Plan::new(Purpose::Hole), now_ms, out);
        } else if self.process_start_s.is_some() {
            self.phase = Phase::Confirming { until_ms: now_ms + self.config.limits.reply_idle_ms };
        } else {
            self.fence(out);
            self.phase = Phase::Following;
        }
    }

    pub(super) fn disconnected(&mut self, now_ms: u64) {
        self.buffer.clear();
        self.phase = Phase::Blind;
        if self.next.is_some() {
            self.claim_until(now_ms);
        }
    }

    /// Begins to learn a publisher of which nothing is known.
    pub(super) fn learn(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        if self.config.replay {
            self.ask(Plan::new(Purpose::Start), now_ms, out);
        } else {
            self.phase = Phase::Following;
        }
    }

    pub(super) fn restarted(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        self.new_life(out);
        self.learn(now_ms, out);
    }

    pub(super) fn process_start(&mut self, start_s: f64, now_ms: u64, out: &mut Vec<Action>) {
        let before = self.process_start_s.replace(start_s);
        let same = before == Some(start_s);
        if let Phase::Confirming { .. } = self.phase {
            if !same {
                self.new_life(out);
            }
            return self.follow();
        }
        // The stream may have been the first to know; not while it hears nothing. No slack: an engine needs seconds before it publishes.
        let heard_since = self.first_ts_s.is_some_and(|ts_s| ts_s >= start_s);
        // A clock that was set back proves nothing.
        let clock_goes_on = before.is_none_or(|before| start_s >= before);
        let known_already = heard_since && clock_goes_on && self.phase != Phase::Blind;
        if before.is_none() || same || known_already || self.next.is_none() {
            return;
        }
        self.new_life(out);
        if self.phase != Phase::Blind {
            self.buffer.clear();
            self.learn(now_ms, out);
        }
    }

    pub(super) fn on_time(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let limits = self.config.limits;
        if self.stale_at_ms.is_some_and(|at| now_ms >= at) {
            self.fence(out);
            match self.phase {
                Phase::Blind => {}
                Phase::Confirming { .. } => self.follow(),
                _ => self.learn(now_ms, out),
            }
        }
        match self.phase {
            Phase::Asking { heard_ms, .. } if now_ms >= heard_ms + limits.reply_idle_ms => {
                self.retry(now_ms, out);
            }
            Phase::Healing { until_ms } if now_ms >= until_ms => self.follow(),
            Phase::Pausing { plan, until_ms } if now_ms >= until_ms => self.ask(plan, now_ms, out),
            Phase::Confirming { until_ms } if now_ms >= until_ms => {
                self.fence(out);
                self.follow();
            }
            Phase::Following if self.following_deadline_ms().is_some_and(|at| now_ms >= at) => {
                let again = self.again.is_some_and(|(at, _)| now_ms >= at);
                let purpose = if again { Purpose::Again } else { Purpose::Probe };
                self.ask(Plan { tries: limits.tries - 1, ..Plan::new(purpose) }, now_ms, out);
            }
            _ => {}
        }
    }

    pub(super) fn following_deadline_ms(&self) -> Option<u64> {
        let again = self.again.filter(|_| !self.complete).map(|(at, _)| at);
        let can_probe = self.config.replay && self.retains;
        let quiet = can_probe.then(|| {
            self.heard_ms + (self.config.limits.quiet_ms << self.probes_unanswered.min(PROBES_UNANSWERED))
        });
        [again, quiet].into_iter().flatten().min()
    }

    pub(super) fn follow(&mut self) {
        self.phase = Phase::Following;
        self.stale_at_ms = None;
        self.unverified = false;
        self.doubtful = false;
    }

    /// From now on what is known may be out of date; it is claimed for a while longer.
    pub(super) fn claim_until(&mut self, now_ms: u64) {
        self.stale_at_ms.get_or_insert(now_ms + self.config.limits.stale_ms);
    }

    /// The engine has restarted: all that was known is void, the meaning of its names included.
    pub(super) fn new_life(&mut self, out: &mut Vec<Action>) {
        self.counters.restarts += 1;
        // What the last life's replay left out says nothing of this one's.
        self.retains = true;
        self.end_epoch(true, out);
    }

    /// Ends the present epoch: all that was known is void.
    pub(super) fn fence(&mut self, out: &mut Vec<Action>) {
        let unsure = self.unverified || matches!(self.phase, Phase::Blind | Phase::Confirming { .. });
        self.end_epoch(unsure, out);
    }

    fn end_epoch(&mut self, restarted: bool, out: &mut Vec<Action>) {
        self.epoch += 1;
        self.counters.resets += 1;
        self.next = None;
        self.since = None;
        self.complete = false;
        self.unverified = false;
        self.doubtful = false;
        if std::mem::take(&mut self.adopting) {
            out.push(Action::DropSnapshot);
        }
        self.fault = None;
        self.recent.clear();
        self.replayed = None;
        self.unhealed = None;
        self.first_ts_s = None;
        self.last_ts_s = None;
        self.stale_at_ms = None;
        out.push(Action::Reset { epoch: self.epoch, restarted });
    }
}
