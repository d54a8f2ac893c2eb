//! The stream machine, one story each.

use super::*;
use kvlane_index::{EngineHash, Tier};

/// A batch that stores one block named `name` at the root, published at `ts_s`, as vLLM's map form has it.
fn batch(ts_s: f64, name: u8) -> Vec<u8> {
    let mut out = vec![0x93, 0xcb];
    out.extend_from_slice(&ts_s.to_be_bytes());
    out.extend_from_slice(&[0x91, 0x96, 0xab]);
    out.extend_from_slice(b"BlockStored");
    out.extend_from_slice(&[0x91, name, 0xc0, 0x92, 1, name, 2, 0xc0, 0]);
    out
}

fn cleared(ts_s: f64) -> Vec<u8> {
    let mut out = vec![0x93, 0xcb];
    out.extend_from_slice(&ts_s.to_be_bytes());
    out.extend_from_slice(&[0x91, 0x91, 0xb0]);
    out.extend_from_slice(b"AllBlocksCleared");
    out.push(0);
    out
}

struct Test {
    stream: Stream,
    now_ms: u64,
}

impl Test {
    fn new(replay: bool) -> Self {
        Self::with(EngineKind::Vllm, replay, false)
    }

    fn with(engine: EngineKind, replay: bool, snapshots: bool) -> Self {
        let config = StreamConfig {
            engine,
            block_size: BlockSize::new(2).unwrap(),
            topic: None,
            replay,
            snapshots,
            limits: Limits::default(),
        };
        Self { stream: Stream::new(config), now_ms: 1_000 }
    }

    fn input(&mut self, input: Input<'_>) -> Vec<String> {
        let mut out = Vec::new();
        self.stream.handle(input, self.now_ms, &mut out);
        out.iter().map(line).collect()
    }

    fn live(&mut self, seq: u64, payload: &[u8]) -> Vec<String> {
        self.input(Input::Live(&[b"", &seq.to_be_bytes(), payload]))
    }

    fn reply(&mut self, seq: u64, payload: &[u8]) -> Vec<String> {
        let attempt = self.stream.attempt;
        self.input(Input::Replay { attempt, frames: &[b"", b"topic", &seq.to_be_bytes(), payload] })
    }

    fn end(&mut self) -> Vec<String> {
        let attempt = self.stream.attempt;
        self.input(Input::Replay { attempt, frames: &[b"", &u64::MAX.to_be_bytes(), b""] })
    }

    fn snapshot(&mut self, position: &Position) -> Vec<String> {
        let attempt = self.stream.attempt;
        self.input(Input::Snapshot { attempt, position })
    }

    fn wait(&mut self) -> Vec<String> {
        self.now_ms = self.stream.next_deadline_ms().expect("nothing to wait for").max(self.now_ms);
        self.input(Input::Tick)
    }
}

fn line(action: &Action) -> String {
    match action {
        Action::Apply(KvEvent::Stored { blocks, tier: Tier::Device, .. }) => {
            format!("+{}", blocks.iter().map(|b| b.engine.0.to_string()).collect::<Vec<_>>().join(","))
        }
        Action::Apply(KvEvent::Cleared { tier: None }) => "clear".into(),
        Action::Apply(other) => format!("{other:?}"),
        Action::Reset { epoch, .. } => format!("reset {epoch}"),
        Action::RequestReplay { from_seq, .. } => format!("ask {from_seq}"),
        Action::StateChanged(State::Degraded(fault)) => format!("degraded: {}", fault.name()),
        Action::StateChanged(state) => state.name().into(),
        Action::Dropped(reason) => format!("drop {}", reason.name()),
        Action::RequestSnapshot { .. } => "ask elsewhere".into(),
        Action::AdoptSnapshot => "adopt".into(),
        Action::DropSnapshot => "no use".into(),
    }
}

#[test]
fn live_waits_for_the_replay_and_overlaps_it() {
    let mut t = Test::new(true);
    assert_eq!(t.input(Input::Connected), ["ask 0", "replaying"]);
    assert!(t.live(1, &batch(2.0, 11)).is_empty());
    assert!(t.live(2, &batch(3.0, 12)).is_empty());
    assert_eq!(t.reply(0, &batch(1.0, 10)), ["+10"]);
    assert_eq!(t.reply(1, &batch(2.0, 11)), ["+11"]);
    assert_eq!(t.end(), ["drop duplicate", "+12", "live"]);
    assert_eq!(t.live(3, &batch(4.0, 13)), ["+13"]);
}

#[test]
fn a_truncated_replay_leaves_the_beginning_unknown_until_a_clear() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    assert_eq!(t.reply(7, &batch(1.0, 7)), ["+7"]);
    assert_eq!(t.end(), ["rebuilding"]);
    assert_eq!(t.live(8, &cleared(2.0)), ["clear", "live"]);
}

#[test]
fn a_gap_is_filled_from_the_last_applied_batch_on() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    assert_eq!(t.end(), ["live"]);
    assert_eq!(t.live(0, &batch(1.0, 10)), ["+10"]);
    assert_eq!(t.live(2, &batch(3.0, 12)), ["ask 0", "replaying"]);
    assert!(t.reply(0, &batch(1.0, 10)).is_empty());
    assert_eq!(t.reply(1, &batch(2.0, 11)), ["+11"]);
    assert_eq!(t.end(), ["+12", "live"]);
}

#[test]
fn a_gap_that_the_engine_cannot_fill_fences_the_worker() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    t.live(5, &batch(6.0, 15));
    assert!(t.reply(4, &batch(5.0, 14)).is_empty());
    assert_eq!(t.wait(), ["ask 0"]);
    assert_eq!(t.reply(4, &batch(5.0, 14)), ["reset 1", "+14"]);
    assert_eq!(t.end(), ["+15", "rebuilding"]);
}

#[test]
fn without_a_replay_endpoint_a_gap_fences_at_once() {
    let mut t = Test::new(false);
    assert_eq!(t.input(Input::Connected), ["rebuilding"]);
    assert_eq!(t.live(0, &batch(1.0, 10)), ["+10", "live"]);
    assert_eq!(t.live(2, &batch(3.0, 12)), ["reset 1", "+12", "rebuilding"]);
}

#[test]
fn a_sequence_that_falls_back_with_other_bytes_is_a_restart() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    t.live(1, &batch(2.0, 11));
    assert_eq!(t.live(0, &batch(1.0, 10)), ["drop duplicate"]);
    assert_eq!(t.live(0, &batch(9.0, 10)), ["reset 1", "ask 0", "replaying"]);
    t.reply(0, &batch(9.0, 10));
    assert_eq!(t.end(), ["drop duplicate", "live"]);
}

#[test]
fn a_restart_that_has_passed_the_old_sequence_is_seen_after_the_reconnect() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    assert_eq!(t.input(Input::Disconnected), ["degraded: disconnected"]);
    assert_eq!(t.input(Input::Connected), ["ask 0", "replaying"]);
    assert!(t.live(1, &batch(9.5, 21)).is_empty());
    assert_eq!(t.reply(0, &batch(9.0, 20)), ["reset 1", "ask 0"]);
    assert_eq!(t.reply(0, &batch(9.0, 20)), ["+20"]);
    assert_eq!(t.end(), ["+21", "live"]);
}

#[test]
fn the_same_life_after_a_reconnect_keeps_what_is_known() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    t.input(Input::Disconnected);
    t.input(Input::Connected);
    assert!(t.reply(0, &batch(1.0, 10)).is_empty());
    assert_eq!(t.reply(1, &batch(2.0, 11)), ["+11"]);
    assert_eq!(t.end(), ["live"]);
}

#[test]
fn a_lost_connection_is_claimed_for_a_while_only() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    t.input(Input::Disconnected);
    assert_eq!(t.wait(), ["reset 1", "blind"]);
    assert_eq!(t.input(Input::Connected), ["ask 0", "replaying"]);
}

#[test]
fn a_replay_endpoint_that_never_answers_is_given_up() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.live(4, &batch(1.0, 10));
    let mut asked = 0;
    let end = loop {
        let out = t.wait();
        asked += out.iter().filter(|a| *a == "ask 0").count();
        if out.iter().any(|a| a.starts_with("degraded")) {
            break out;
        }
        assert!(asked < 20);
    };
    assert_eq!(end, ["+10", "degraded: replay_unanswered"]);
    assert_eq!(asked as u32, t.stream.config.limits.tries - 1);
}

#[test]
fn late_replies_are_dropped() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    let frames: &[&[u8]] = &[b"", &0u64.to_be_bytes(), b"x"];
    assert_eq!(t.input(Input::Replay { attempt: 1, frames }), ["drop late_reply"]);
}

#[test]
fn a_lost_tail_is_found_after_a_silence() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    assert_eq!(t.wait(), ["ask 0"]);
    assert!(t.reply(0, &batch(1.0, 10)).is_empty());
    assert_eq!(t.reply(1, &batch(2.0, 11)), ["+11"]);
    assert!(t.end().is_empty());
    assert_eq!(t.stream.state(), State::Live);
}

#[test]
fn an_undecodable_batch_is_asked_for_again_and_then_fenced() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    t.live(0, &batch(1.0, 10));
    assert_eq!(t.live(1, b"\x93\xcb"), ["drop malformed", "ask 0", "replaying"]);
    t.reply(0, &batch(1.0, 10));
    assert_eq!(t.reply(1, b"\x93\xcb"), ["drop malformed", "reset 1"]);
    assert_eq!(t.end(), ["degraded: undecodable"]);
    assert_eq!(t.live(2, &batch(3.0, 12)), ["+12", "rebuilding"]);
}

#[test]
fn a_new_process_start_time_is_a_restart() {
    let mut t = Test::new(false);
    t.input(Input::Connected);
    t.input(Input::ProcessStart(0.5));
    t.live(0, &batch(1.0, 10));
    assert!(t.input(Input::ProcessStart(0.5)).is_empty());
    assert_eq!(t.input(Input::ProcessStart(5.0)), ["reset 1", "rebuilding"]);
    assert_eq!(t.live(0, &batch(6.0, 10)), ["+10", "live"]);
    assert!(t.input(Input::ProcessStart(5.1)).is_empty(), "the stream was the first to know");
}

#[test]
fn a_process_start_before_the_last_one_is_a_restart_whatever_was_heard_since() {
    let mut t = Test::new(false);
    t.input(Input::Connected);
    t.input(Input::ProcessStart(500.0));
    t.live(0, &batch(501.0, 10));
    // The clock was set back before the engine came up again.
    assert_eq!(t.input(Input::ProcessStart(100.0)), ["reset 1", "rebuilding"]);
    assert_eq!(t.live(0, &batch(101.0, 11)), ["+11", "live"]);
}

#[test]
fn a_batch_right_before_a_restart_does_not_hide_it() {
    let mut t = Test::new(false);
    t.input(Input::Connected);
    t.input(Input::ProcessStart(500.0));
    t.live(0, &batch(599.95, 10));
    assert_eq!(t.input(Input::ProcessStart(600.0)), ["reset 1", "rebuilding"]);
}

#[test]
fn names_survive_the_way() {
    let mut t = Test::new(false);
    t.input(Input::Connected);
    let mut out = Vec::new();
    t.stream.handle(Input::Live(&[b"", &0u64.to_be_bytes(), &batch(1.0, 9)]), 0, &mut out);
    let Action::Apply(KvEvent::Stored { blocks, parent: None, .. }) = &out[0] else { panic!("{out:?}") };
    assert_eq!(blocks[0].engine, EngineHash(9));
}

#[test]
fn an_engine_that_has_published_nothing_is_known_whole() {
    let mut t = Test::new(true);
    t.input(Input::Connected);
    assert_eq!(t.end(), ["live"]);
    assert_eq!(t.live(0, &batch(1.0, 10)), ["+10"]);
    // Unless it turns out to have forgotten what it published.
    let mut t = Test::new(true);
    t.input(Input::Connected);
    t.end();
    assert_eq!(t.live(5, &batch(1.0, 10)), ["ask 0", "replaying"]);
    assert_eq!(t.end(), ["reset 1", "+10", "rebuilding"]);
}

#[test]
fn an_sglang_that_begins_with_a_clear_is_another_life_whatever_its_clock_says() {
    let other_life = |engine, first: &[u8]| {
        let mut t = Test::with(engine, true, false);
        t.input(Input::Connected);
        t.end();
        t.live(0, &cleared(1000.0));
        t.live(1, &batch(1001.0, 10));
        t.live(0, first)
    };
    // The clock was set back.
    assert_eq!(other_life(EngineKind::Sglang, &cleared(500.0)), ["reset 1", "ask 0", "replaying"]);
    assert_eq!(other_life(EngineKind::Sglang, &batch(500.0, 10)), ["drop earlier_life"]);
    assert_eq!(other_life(EngineKind::Vllm, &cleared(500.0)), ["drop earlier_life"]);
}

/// Two streams of one engine: the first knows it whole up to batch 9, the second comes when the engine has only batch 7 and later ones.
fn two_routers(replay: bool) -> (Position, Test) {
    let mut t = Test::new(replay);
    t.input(Input::Connected);
    t.end();
    for seq in 0..10 {
        t.live(seq, &batch(seq as f64, 10 + seq as u8));
    }
    let mut late = Test::with(EngineKind::Vllm, replay, true);
    late.input(Input::Connected);
    if replay {
        assert_eq!(late.reply(7, &batch(7.0, 17)), ["+17"]);
        assert_eq!(late.end(), ["ask elsewhere"]);
    } else {
        assert_eq!(late.live(7, &batch(7.0, 17)), ["+17", "ask elsewhere", "replaying"]);
    }
    (t.stream.position().unwrap(), late)
}

#[test]
fn a_snapshot_fills_what_the_engine_has_forgotten() {
    let (position, mut t) = two_routers(true);
    assert!(t.live(8, &batch(8.0, 18)).is_empty(), "it waits");
    assert_eq!(t.snapshot(&position), ["reset 1", "ask 0"]);
    assert!(t.live(10, &batch(10.0, 20)).is_empty());
    assert_eq!(t.reply(7, &batch(7.0, 17)), ["adopt"], "the same bytes: the same life");
    assert!(t.reply(8, &batch(8.0, 18)).is_empty());
    assert!(t.reply(9, &batch(9.0, 19)).is_empty());
    assert_eq!(t.end(), ["drop duplicate", "+20", "live"]);
    assert_eq!(t.stream.position().unwrap().since_seq, Some(0));
}

#[test]
fn without_a_replay_endpoint_a_snapshot_goes_on_where_it_was_heard() {
    let (position, mut t) = two_routers(false);
    assert!(t.live(8, &batch(8.0, 18)).is_empty());
    assert!(t.live(9, &batch(9.0, 19)).is_empty());
    assert!(t.live(10, &batch(10.0, 20)).is_empty());
    assert_eq!(
        t.snapshot(&position),
        ["reset 1", "adopt", "drop duplicate", "drop duplicate", "+20", "live"]
    );

    let (position, mut t) = two_routers(false);
    assert!(t.live(10, &batch(10.0, 20)).is_empty());
    assert_eq!(t.snapshot(&position)[0], "no use", "batch 9 is not proven to be of this life");
}

#[test]
fn a_snapshot_of_another_life_is_not_adopted() {
    let (position, mut t) = two_routers(true);
    assert_eq!(t.snapshot(&position), ["reset 1", "ask 0"]);
    assert_eq!(t.reply(7, &batch(77.0, 17)), ["no use", "reset 2", "ask 0"]);
    // And one that comes too late, or says nothing more, is of no use.
    let (position, mut t) = two_routers(true);
    assert_eq!(t.wait(), ["rebuilding"]);
    assert_eq!(t.snapshot(&position), ["drop late_reply", "no use"]);
    let (position, mut t) = two_routers(true);
    let partial = Position { complete: false, since_seq: Some(8), ..position };
    assert_eq!(t.snapshot(&partial), ["no use", "rebuilding"]);
    let (_, mut t) = two_routers(true);
    let attempt = t.stream.attempt;
    assert_eq!(t.input(Input::SnapshotFailed { attempt }), ["rebuilding"]);
}
