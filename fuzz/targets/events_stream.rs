//! Any order of connections, batches of two lives, replies and time through the stream machine.

#![no_main]

use arbitrary::Arbitrary;
use kvlane_events::stream::{Action, Input, Limits, Position, State, Stream, StreamConfig};
use kvlane_events::wire::EngineKind;
use kvlane_index::BlockSize;
use libfuzzer_sys::fuzz_target;
use xxhash_rust::xxh3::xxh3_64;

#[derive(Arbitrary, Debug)]
enum Step {
    Connected,
    Disconnected,
    Live { life: bool, seq: u8 },
    LiveRaw { seq: Vec<u8>, payload: Vec<u8> },
    Reply { life: bool, seq: u8, late: bool },
    ReplyRaw { frames: Vec<Vec<u8>> },
    ReplyEnd,
    ReplayFailed,
    ProcessStart(u8),
    /// Somebody else stood before `next`, having heard of a life.
    Snapshot { life: bool, next: u8, complete: bool, late: bool },
    NoSnapshot,
    Relearn,
    Wait(u16),
    Deadline,
}

#[derive(Arbitrary, Debug)]
struct Case {
    replay: bool,
    topic: bool,
    /// Where the sequence numbers begin: also right before they wrap around.
    wrap: bool,
    small_buffer: bool,
    snapshots: bool,
    sglang: bool,
    steps: Vec<Step>,
}

/// A batch that stores one block named after its number and life.
fn batch(life: bool, seq: u8) -> Vec<u8> {
    let mut out = vec![0x93, 0xcb];
    out.extend((f64::from(seq) + if life { 1000.0 } else { 0.0 }).to_be_bytes());
    out.extend([0x91, 0x95, 0xab]);
    out.extend(b"BlockStored");
    out.extend([0x91, 0xcd, u8::from(life), seq, 0xc0, 0x91, 1, 1]);
    out.push(0);
    out
}

fuzz_target!(|case: Case| {
    let limits = Limits { buffer_batches: if case.small_buffer { 3 } else { 100 }, buffer_bytes: 10_000, ..Limits::default() };
    let config = StreamConfig {
        engine: if case.sglang { EngineKind::Sglang } else { EngineKind::Vllm },
        block_size: BlockSize::new(1).expect("not 0"),
        topic: case.topic.then(|| b"kv".to_vec()),
        replay: case.replay,
        snapshots: case.snapshots,
        limits,
    };
    let mut stream = Stream::new(config);
    let base = if case.wrap { u64::MAX - 20 } else { 0 };
    let (mut now_ms, mut attempt, mut epoch) = (0u64, 0u64, 0u64);
    let (mut out, mut offered) = (Vec::new(), false);
    for step in &case.steps {
        let (next, applied) = (stream.next_seq(), stream.counters().batches);
        match step {
            Step::Connected => stream.handle(Input::Connected, now_ms, &mut out),
            Step::Disconnected => stream.handle(Input::Disconnected, now_ms, &mut out),
            Step::Live { life, seq } => {
                let number = base.wrapping_add(u64::from(*seq)).to_be_bytes();
                stream.handle(Input::Live(&[b"kv", &number, &batch(*life, *seq)]), now_ms, &mut out);
            }
            Step::LiveRaw { seq, payload } => stream.handle(Input::Live(&[b"kv", seq, payload]), now_ms, &mut out),
            Step::Reply { life, seq, late } => {
                let number = base.wrapping_add(u64::from(*seq)).to_be_bytes();
                let payload = batch(*life, *seq);
                let frames: [&[u8]; 4] = [b"", b"kv", &number, &payload];
                stream.handle(Input::Replay { attempt: attempt - u64::from(*late && attempt > 0), frames: &frames }, now_ms, &mut out);
            }
            Step::ReplyRaw { frames } => {
                let frames: Vec<&[u8]> = frames.iter().map(Vec::as_slice).collect();
                stream.handle(Input::Replay { attempt, frames: &frames }, now_ms, &mut out);
            }
            Step::ReplyEnd => {
                let frames: [&[u8]; 4] = [b"", b"", &u64::MAX.to_be_bytes(), b""];
                stream.handle(Input::Replay { attempt, frames: &frames }, now_ms, &mut out);
            }
            Step::ReplayFailed => stream.handle(Input::ReplayFailed { attempt }, now_ms, &mut out),
            Step::ProcessStart(start) => stream.handle(Input::ProcessStart(f64::from(*start)), now_ms, &mut out),
            Step::Snapshot { life, next, complete, late } => {
                let first = next.saturating_sub(32);
                let position = Position {
                    next_seq: base.wrapping_add(u64::from(*next)),
                    since_seq: Some(base),
                    complete: *complete,
                    recent: (first..*next).map(|seq| xxh3_64(&batch(*life, seq))).collect(),
                    first_ts_s: Some(0.0),
                    last_ts_s: Some(f64::from(*next)),
                    process_start_s: None,
                };
                let attempt = attempt - u64::from(*late && attempt > 0);
                offered = true;
                stream.handle(Input::Snapshot { attempt, position: &position }, now_ms, &mut out);
            }
            Step::NoSnapshot => stream.handle(Input::SnapshotFailed { attempt }, now_ms, &mut out),
            Step::Relearn => stream.handle(Input::Relearn, now_ms, &mut out),
            Step::Wait(ms) => {
                now_ms += u64::from(*ms);
                stream.handle(Input::Tick, now_ms, &mut out);
            }
            Step::Deadline => {
                if let Some(at) = stream.next_deadline_ms() {
                    now_ms = now_ms.max(at);
                    stream.handle(Input::Tick, now_ms, &mut out);
                }
            }
        }
        let mut fenced = false;
        for action in out.drain(..) {
            match action {
                Action::RequestReplay { attempt: new, .. } => {
                    assert!(case.replay && new > attempt, "attempts grow");
                    attempt = new;
                }
                Action::RequestSnapshot { attempt: new } => {
                    assert!(case.snapshots && new > attempt, "attempts grow");
                    attempt = new;
                }
                Action::AdoptSnapshot | Action::DropSnapshot => {
                    assert!(offered, "each offer has one end");
                    offered = false;
                }
                Action::Reset { epoch: new, .. } => {
                    assert_eq!(new, epoch + 1, "each fence begins the next epoch");
                    epoch = new;
                    fenced = true;
                }
                Action::Apply(_) | Action::Dropped(_) | Action::StateChanged(_) => {}
            }
        }
        if let (Some(next), false) = (next, fenced) {
            let new = stream.counters().batches - applied;
            let moved = stream.next_seq().expect("nothing was fenced").wrapping_sub(next);
            assert!(moved >= new && moved <= new + 1_000, "in order, once");
        }
        let (batches, bytes) = stream.waiting();
        assert!(batches <= limits.buffer_batches + 1 && bytes <= limits.buffer_bytes + 10_000);
        if stream.state() == State::Live {
            assert!(stream.since_seq().is_some() || stream.next_seq().is_none());
        }
    }
});
