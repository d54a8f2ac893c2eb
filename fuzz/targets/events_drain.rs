//! JSON bodies through the machine of drained engines.

#![no_main]

use kvlane_events::drain::{Drain, Input};
use kvlane_index::BlockSize;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| {
    let Some((&head, bodies)) = input.split_first() else { return };
    let size = BlockSize::new(1 + u32::from(head % 4)).expect("not 0");
    let mut drain = Drain::new(size, 10);
    let mut out = Vec::new();
    for (now_ms, body) in (0..).zip(bodies.split(|&b| b == 0)) {
        let input = match body {
            b"" => Input::Failed,
            b"r" => Input::Relearn,
            _ => Input::Body(body),
        };
        drain.handle(input, now_ms, &mut out);
        if let Some(at) = drain.next_deadline_ms() {
            assert!(at > now_ms, "a deadline that passed was not handled");
        }
    }
});
