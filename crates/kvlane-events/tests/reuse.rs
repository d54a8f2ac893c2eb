//! A decoder that is used again says what a new one says, whatever it decoded before.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod support;

use kvlane_events::wire::{Decoder, EngineKind, decode};
use support::{Line, captures, message, read};

#[test]
fn what_was_decoded_before_leaves_no_trace() {
    let mut payloads = Vec::new();
    for (folder, engine) in [
        ("vllm-0.32.0", EngineKind::Vllm),
        ("vllm-versions", EngineKind::Vllm),
        ("sglang-0.5.23", EngineKind::Sglang),
        ("sglang-versions", EngineKind::Sglang),
        ("trtllm-dynamo-1.6.1", EngineKind::TrtLlm),
    ] {
        for line in captures(folder).iter().flat_map(|file| read(file)) {
            let Line::Frames { frames, .. } = line else { continue };
            let (_, payload) = message(&frames);
            payloads.push((engine, payload.to_vec()));
        }
    }
    assert!(payloads.len() > 100);
    let mut seed = 7u64;
    let mut next = |below: usize| {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (seed >> 33) as usize % below
    };
    let mut decoder = Decoder::default();
    let mut used = 0;
    for round in 0..20_000 {
        let (engine, payload) = &payloads[next(payloads.len())];
        let mut payload = payload.clone();
        // Two of three with bytes that no engine sends.
        for _ in 0..round % 3 {
            if !payload.is_empty() {
                let at = next(payload.len());
                payload[at] = next(256) as u8;
            }
        }
        let again = decoder.decode(*engine, &payload);
        let fresh = decode(*engine, &payload);
        // By their text, because a time may be NaN.
        assert_eq!(format!("{again:?}"), format!("{fresh:?}"), "round {round}: {payload:02x?}");
        if let Ok(batch) = again {
            used += 1;
            decoder.recycle(batch);
        }
    }
    assert!(used > 5_000, "{used}");
}
