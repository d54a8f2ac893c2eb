//! Live batches: applied in order, put aside while a replay runs, or found to be a hole, a duplicate or a restart.

use super::buffer::Waiting;
use super::frames::{self, Message};
use super::recent::{Seen, fingerprint};
use super::{Action, CLOCK_SLACK_S, Fault, Phase, Plan, Purpose, Stream, distance};
use crate::wire::{self, DropReason, EngineKind, WireEvent};
use kvlane_index::KvEvent;
use std::cmp::Ordering;

/// So many batches in a row may be taken for strays of an earlier life because their clock is behind; then it is the clock.
const STRAYS_MAX: u32 = 1024;

impl Stream {
    pub(super) fn live(&mut self, frames: &[&[u8]], now_ms: u64, out: &mut Vec<Action>) {
        let message = match frames::live(frames, self.config.topic.as_deref()) {
            Ok(message) => message,
            Err(reason) => return out.push(Action::Dropped(reason)),
        };
        if self.phase == Phase::Blind {
            // The socket speaks before its monitor does.
            self.connected(now_ms, out);
        }
        if let Phase::Asking { plan, .. } | Phase::Pausing { plan, .. } = self.phase
            && plan.purpose == Purpose::Probe
        {
            // Not silent any more: no need to ask.
            self.attempt += 1;
            self.phase = Phase::Following;
        }
        self.heard_ms = now_ms;
        if self.phase == Phase::Following {
            self.in_order(message, now_ms, out);
        } else if !self.buffer.push(message.seq, message.payload, &self.config.limits) {
            out.push(Action::Dropped(DropReason::BufferFull));
        }
    }

    /// Applies what waited, until it runs out or leads to another question.
    pub(super) fn drain(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        while self.phase == Phase::Following {
            let Some(Waiting { seq, payload }) = self.buffer.pop() else { break };
            self.in_order(Message { seq, payload: &payload }, now_ms, out);
        }
    }

    /// Takes a live batch while following.
    pub(super) fn in_order(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        if self.precedes_process(message.payload) && !self.begins_life(message) && self.drop_stray(out) {
            return;
        }
        let Some(next) = self.next else {
            if message.seq != 0 && self.config.replay && self.retains && self.fault.is_none() {
                if self.unhealed.is_none() {
                    // The replay was empty, and then the first batches were missed: ask once more.
                    self.unhealed = Some((0, 1));
                    self.put_back(message);
                    return self.ask(Plan::new(Purpose::Start), now_ms, out);
                }
                self.retains = false;
                self.try_again_later(now_ms);
            }
            return self.begin(message, now_ms, out);
        };
        match distance(message.seq, next) {
            0 if self.age(message.payload) == Some(Ordering::Less) => self.out_of_time(message, now_ms, out),
            0 => self.apply_live(message, now_ms, out),
            1.. => self.gap(message, next, now_ms, out),
            _ => self.backwards(message, now_ms, out),
        }
    }

    /// The first batch of what will be known.
    pub(super) fn begin(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        if self.complete && message.seq != 0 {
            // It had published before, and said otherwise.
            self.fence(out);
        }
        self.start_at(message.seq);
        self.apply_live(message, now_ms, out);
    }

    /// Nothing is known before `seq`.
    pub(super) fn start_at(&mut self, seq: u64) {
        self.next = Some(seq);
        self.since = Some(seq);
        self.complete = seq == 0;
    }

    /// The expected number, but published before the batch applied last: the clock was set back, or it is a stray of an earlier
    /// life that happens to have this number.
    fn out_of_time(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let asked = self.unhealed.is_some_and(|(at, _)| at == message.seq);
        if self.config.replay && self.retains && !asked {
            // The engine knows what its next batch is.
            self.unhealed = Some((message.seq, 1));
            self.put_back(message);
            self.claim_until(now_ms);
            self.ask(Plan::new(Purpose::Hole), now_ms, out);
        } else if self.is_of_process(message.payload) || !self.drop_stray(out) {
            self.apply_live(message, now_ms, out);
        }
    }

    pub(super) fn gap(&mut self, message: Message<'_>, next: u64, now_ms: u64, out: &mut Vec<Action>) {
        let limits = self.config.limits;
        let asked = self.unhealed.filter(|&(at, _)| at == next).map_or(0, |(_, tries)| tries);
        let can_ask = self.config.replay && self.retains;
        // No replay brings it, and it is older than what was applied: a rest of the life before.
        let stray = (asked > 0 || !can_ask) && self.is_older(message.payload);
        if stray && self.drop_stray(out) {
            return;
        }
        self.counters.gaps += u64::from(asked == 0);
        if !can_ask || asked >= limits.tries {
            self.fence(out);
            return self.begin(message, now_ms, out);
        }
        self.put_back(message);
        self.unhealed = Some((next, asked + 1));
        self.claim_until(now_ms);
        let plan = Plan::new(Purpose::Hole);
        if asked == 0 {
            self.ask(plan, now_ms, out);
        } else {
            self.phase = Phase::Pausing { plan, until_ms: now_ms + self.backoff_ms(asked) };
        }
    }

    /// A number below the expected one: seen before, a stray of an earlier life, or a restart.
    pub(super) fn backwards(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let seen = self.recent.look(message.seq, message.payload);
        let in_replay = self.replayed.is_some_and(|(first, last)| {
            distance(message.seq, first) >= 0 && distance(message.seq, last) <= 0
        });
        let age = self.age(message.payload);
        if seen == Seen::Same || seen == Seen::Forgotten && in_replay && age != Some(Ordering::Greater) {
            return out.push(Action::Dropped(DropReason::Duplicate));
        }
        // A restarted engine publishes later than what was applied. The one batch that told of a restart and was not found in the
        // replay that followed is a stray as well.
        let print = fingerprint(message.payload);
        let stray =
            self.is_older(message.payload) && !self.begins_life(message) || self.restarted_by == Some(print);
        if stray && self.drop_stray(out) {
            return;
        }
        self.restarted_by = Some(print);
        self.new_life(out);
        if self.config.replay && self.retains {
            self.put_back(message);
            self.ask(Plan::new(Purpose::Start), now_ms, out);
        } else {
            self.begin(message, now_ms, out);
        }
    }

    pub(super) fn put_back(&mut self, message: Message<'_>) {
        self.buffer.unpop(Waiting { seq: message.seq, payload: message.payload.to_vec() });
    }

    /// When a batch was published, against the one applied last; `None` if either does not say.
    fn age(&self, payload: &[u8]) -> Option<Ordering> {
        wire::published_s(payload)?.partial_cmp(&self.last_ts_s?)
    }

    /// Published before the batch applied last, and not by the engine's present process after its clock was set back.
    fn is_older(&self, payload: &[u8]) -> bool {
        self.age(payload) == Some(Ordering::Less) && !self.is_of_process(payload)
    }

    /// Published since the engine's present process began, as far as that is known.
    fn is_of_process(&self, payload: &[u8]) -> bool {
        self.process_start_s.is_some() && !self.precedes_process(payload)
    }

    /// Published before the engine's present process began.
    fn precedes_process(&self, payload: &[u8]) -> bool {
        let published = wire::published_s(payload);
        published.zip(self.process_start_s).is_some_and(|(ts_s, start_s)| ts_s + CLOCK_SLACK_S < start_s)
    }

    /// Whether a batch says of itself that it is the first of a life: SGLang begins each with a clear. Then its clock, which may have been
    /// set back, proves nothing.
    fn begins_life(&self, message: Message<'_>) -> bool {
        message.seq == 0
            && self.config.engine == EngineKind::Sglang
            && wire::decode(EngineKind::Sglang, message.payload)
                .is_ok_and(|batch| batch.events.first() == Some(&WireEvent::Cleared))
    }

    /// Counts and drops a batch of an earlier life, unless there were so many that it must be the clock.
    fn drop_stray(&mut self, out: &mut Vec<Action>) -> bool {
        if self.strays == STRAYS_MAX {
            return false;
        }
        self.strays += 1;
        out.push(Action::Dropped(DropReason::EarlierLife));
        true
    }

    /// Applies the next batch of the live stream.
    pub(super) fn apply_live(&mut self, message: Message<'_>, now_ms: u64, out: &mut Vec<Action>) {
        let Err(reason) = self.apply(message, out) else { return };
        out.push(Action::Dropped(reason));
        if self.config.replay && self.retains && self.fault != Some(Fault::Undecodable) {
            // The engine's own copy may be whole. If not, `replay_batch` gives it up.
            self.claim_until(now_ms);
            self.ask(Plan::new(Purpose::Hole), now_ms, out);
        } else {
            self.pass_over(message, out);
        }
    }

    /// Gives up a batch that cannot be decoded: a hole that nothing fills.
    pub(super) fn pass_over(&mut self, message: Message<'_>, out: &mut Vec<Action>) {
        if self.fault != Some(Fault::Undecodable) {
            self.fence(out);
        }
        self.fault = Some(Fault::Undecodable);
        self.complete = false;
        self.since = Some(message.seq.wrapping_add(1));
        self.applied(message);
    }

    /// Decodes the next batch and emits its events.
    pub(super) fn apply(&mut self, message: Message<'_>, out: &mut Vec<Action>) -> Result<(), DropReason> {
        let batch = self.decoder.decode(self.config.engine, message.payload)?;
        self.reasons.clear();
        self.reasons.extend(&batch.dropped);
        self.resolver.resolve(&batch, &mut self.events, &mut self.reasons);
        if self.fault == Some(Fault::Undecodable) {
            self.fault = None;
        }
        for &reason in &self.reasons {
            if reason == DropReason::BadRemoval {
                self.fault = Some(Fault::RemovalLost);
            }
            out.push(Action::Dropped(reason));
        }
        self.counters.batches += 1;
        self.counters.events += self.events.len() as u64;
        self.counters.unknown_media += u64::from(batch.unknown_media);
        for event in self.events.drain(..) {
            if event == (KvEvent::Cleared { tier: None }) {
                self.complete = true;
                self.fault = self.fault.filter(|&fault| fault != Fault::RemovalLost);
            }
            out.push(Action::Apply(event));
        }
        self.first_ts_s.get_or_insert(batch.ts_s);
        self.last_ts_s = Some(batch.ts_s);
        self.decoder.recycle(batch);
        self.applied(message);
        Ok(())
    }

    pub(super) fn applied(&mut self, message: Message<'_>) {
        self.recent.push(message.seq, message.payload);
        self.next = Some(message.seq.wrapping_add(1));
        self.unhealed = None;
        self.strays = 0;
    }
}
