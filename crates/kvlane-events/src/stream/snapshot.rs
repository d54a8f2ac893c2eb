//! Knowledge of the worker from elsewhere, where the engine itself cannot fill a hole any more: a peer's, or what this router wrote
//! down before it was restarted.
//!
//! The content stays with the caller. The stream asks ([`Action::RequestSnapshot`]), is told after which batch the snapshot was taken
//! ([`Position`]), and says when to apply it ([`Action::AdoptSnapshot`]): once the engine's replay shows one of the batches before that
//! point with the same bytes, so that it is the same life of the engine, and the stream can go on exactly there. Without a replay
//! endpoint that batch must be among those heard here. Otherwise [`Action::DropSnapshot`].
//!
//! Asked once when knowledge turns out to begin late, and again after pauses that grow; live batches wait for
//! [`Limits::snapshot_ms`](super::Limits::snapshot_ms) at most.

use super::recent::Seen;
use super::{Action, Fault, Phase, Plan, Purpose, Stream, distance};
use crate::wire::DropReason;

/// Fingerprints that a position carries at most.
pub const PRINTS_MAX: usize = 32;

/// Where a stream stands: after which batch of which life. Plain data, to be written down or sent.
#[derive(Clone, PartialEq, Debug)]
pub struct Position {
    /// The number of the batch to apply next.
    pub next_seq: u64,
    /// The number of the first batch of what is known.
    pub since_seq: Option<u64>,
    /// All that the worker holds is known.
    pub complete: bool,
    /// XXH3-64 of the payloads right before `next_seq`, the oldest first, at most [`PRINTS_MAX`]; no two lives of an engine have one in
    /// common, since payloads hold the time.
    pub recent: Vec<u64>,
    /// The engine's clock in the first batch applied: seconds since the Unix epoch.
    pub first_ts_s: Option<f64>,
    /// The same in the last batch applied.
    pub last_ts_s: Option<f64>,
    /// The engine's `process_start_time_seconds`, where known.
    pub process_start_s: Option<f64>,
}

impl Stream {
    /// Where this stream stands; `None` while that is in question, or nothing is known. It belongs to an index to which all that the
    /// stream said so far was applied, and nothing more.
    pub fn position(&self) -> Option<Position> {
        let settled = self.phase == Phase::Following && self.fault.is_none() && !self.unverified;
        let recent = self.recent.newest(PRINTS_MAX);
        let next_seq = self.next.filter(|_| settled && !recent.is_empty())?;
        Some(Position {
            next_seq,
            since_seq: self.since,
            complete: self.complete,
            recent,
            first_ts_s: self.first_ts_s,
            last_ts_s: self.last_ts_s,
            process_start_s: self.process_start_s,
        })
    }

    /// Asks for a snapshot, if what is known began late and it is time to.
    pub(super) fn ask_elsewhere(&mut self, now_ms: u64, out: &mut Vec<Action>) {
        let due = self.asked_elsewhere.is_none_or(|(at, _)| now_ms >= at);
        let late = self.phase == Phase::Following && !self.complete && self.next.is_some();
        if !self.config.snapshots || !late || !due {
            return;
        }
        let limits = self.config.limits;
        let pause = self.asked_elsewhere.map_or(limits.again_ms, |(_, pause)| pause);
        self.asked_elsewhere = Some((now_ms + pause, (pause * 2).min(limits.again_max_ms)));
        self.attempt += 1;
        self.phase = Phase::Healing { until_ms: now_ms + limits.snapshot_ms };
        out.push(Action::RequestSnapshot { attempt: self.attempt });
    }

    /// When it is time to ask (again).
    pub(super) fn elsewhere_deadline_ms(&self) -> Option<u64> {
        let late = self.config.snapshots && !self.complete && self.next.is_some();
        self.asked_elsewhere.filter(|_| late).map(|(at, _)| at)
    }

    /// There is a snapshot.
    pub(super) fn snapshot(&mut self, attempt: u64, position: &Position, now_ms: u64, out: &mut Vec<Action>) {
        if !matches!(self.phase, Phase::Healing { .. }) || attempt != self.attempt {
            out.push(Action::Dropped(DropReason::LateReply));
            if !self.adopting {
                out.push(Action::DropSnapshot);
            }
            return;
        }
        self.follow();
        let Position { next_seq, since_seq, complete, recent, first_ts_s, last_ts_s, process_start_s } =
            position;
        let before = next_seq.wrapping_sub(1);
        let can_replay = self.config.replay && self.retains && self.fault != Some(Fault::ReplayUnanswered);
        let fits = recent.last().is_some_and(|&print| match self.recent.look_print(before, print) {
            Seen::Other => false,
            // What was applied since would have to be replayed.
            Seen::Same => can_replay || self.next == Some(*next_seq),
            Seen::Forgotten => can_replay || self.buffer.has(before, print),
        });
        let earlier = since_seq.zip(self.since).is_some_and(|(theirs, ours)| distance(theirs, ours) < 0);
        let other_process =
            self.process_start_s.zip(*process_start_s).is_some_and(|(ours, theirs)| ours != theirs);
        if !fits || other_process || !(*complete || earlier) {
            return out.push(Action::DropSnapshot);
        }
        let heard_from = self.next.filter(|&next| distance(next, *next_seq) < 0);
        self.fence(out);
        self.next = Some(*next_seq);
        self.since = *since_seq;
        self.complete = *complete;
        self.first_ts_s = *first_ts_s;
        self.last_ts_s = *last_ts_s;
        self.recent.restart(*next_seq, recent);
        // Batches that the snapshot has and that were heard here as well.
        self.replayed = Some((heard_from.or(*since_seq).unwrap_or(before), before));
        self.adopting = true;
        if can_replay {
            self.unverified = true;
            self.ask(Plan::new(Purpose::Hole), now_ms, out);
        } else {
            self.prove(out);
        }
    }

    /// There is none.
    pub(super) fn no_snapshot(&mut self, attempt: u64) {
        if matches!(self.phase, Phase::Healing { .. }) && attempt == self.attempt {
            self.follow();
        }
    }

    /// It is the same life of the engine as before.
    pub(super) fn prove(&mut self, out: &mut Vec<Action>) {
        self.unverified = false;
        self.doubtful = false;
        if std::mem::take(&mut self.adopting) {
            out.push(Action::AdoptSnapshot);
        }
    }
}
