//! Readers on lines as the formats' tools write them; shapes and generators.

use super::*;
use std::io::Write;

fn read_text(text: &str, options: &ReadOptions) -> Result<Trace, ReadError> {
    read("t", text.as_bytes(), options)
}

fn starts(trace: &Trace) -> Vec<Start> {
    trace.requests.iter().map(|r| r.start).collect()
}

#[test]
fn mooncake_rows_are_open_loop_and_partial_blocks_are_left_out() {
    let text = r#"{"timestamp": 10, "input_length": 1100, "output_length": 5, "hash_ids": [900, 7, 8]}
{"timestamp": 0, "input_length": 512, "output_length": 0, "hash_ids": [900]}"#;
    let t = read_text(text, &ReadOptions::default()).unwrap();
    assert_eq!(t.block_tokens, 512);
    assert_eq!(starts(&t), [Start::AtMs(0.0), Start::AtMs(10.0)]);
    assert_eq!(t.blocks(&t.requests[1]), [0, 1]);
    assert_eq!(t.blocks(&t.requests[0]), [0]);
    assert_eq!(t.requests[0].output_tokens, 1);
}

#[test]
fn later_turns_follow_the_answer_by_delay_or_by_the_difference_of_times() {
    let text = r#"{"session_id": "a", "timestamp": 100, "input_length": 64, "output_length": 1, "hash_ids": [1]}
{"session_id": "a", "delay": 50, "input_length": 128, "output_length": 1, "hash_ids": [1, 2]}
{"session_id": "b", "timestamp": 30, "input_length": 64, "output_length": 1, "hash_ids": [3]}
{"session_id": "b", "timestamp": 70, "input_length": 64, "output_length": 1, "hash_ids": [3]}
{"session_id": "b", "input_length": 64, "output_length": 1, "hash_ids": [3]}"#;
    let t = read_text(text, &ReadOptions { block_tokens: Some(64), ..Default::default() }).unwrap();
    let by_session: Vec<_> = t.requests.iter().map(|r| (r.session, r.start)).collect();
    assert_eq!(
        by_session,
        [
            (0, Start::AtMs(30.0)),
            (0, Start::AfterMs(40.0)),
            (0, Start::AfterMs(0.0)),
            (1, Start::AtMs(100.0)),
            (1, Start::AfterMs(50.0)),
        ]
    );
}

#[test]
fn delta_rows_grow_by_the_rows_before() {
    let text = r#"{"session_id": 1, "timestamp": 0, "input_length": 64, "output_length": 1, "hash_ids": [1]}
{"session_id": 1, "input_length": 64, "output_length": 1, "hash_ids": [2]}"#;
    let options =
        ReadOptions { block_tokens: Some(64), prompt_mode: PromptMode::Delta, ..Default::default() };
    let t = read_text(text, &options).unwrap();
    assert_eq!(t.requests[1].input_tokens, 128);
    assert_eq!(t.blocks(&t.requests[1]), [0, 1]);
}

#[test]
fn bailian_azure_and_weka_are_told_by_their_first_line() {
    let t = read_text(
        r#"{"chat_id": 1, "parent_chat_id": -1, "timestamp": 0.5, "input_length": 32, "output_length": 3, "type": "text", "turn": 1, "hash_ids": [5, 6]}
{"chat_id": 2, "parent_chat_id": 1, "timestamp": 2.0, "input_length": 48, "output_length": 3, "type": "text", "turn": 2, "hash_ids": [5, 6, 7]}"#,
        &ReadOptions::default(),
    )
    .unwrap();
    assert_eq!((t.block_tokens, t.sessions()), (16, 1));
    assert_eq!(starts(&t), [Start::AtMs(500.0), Start::AtMs(2000.0)]);

    let t = read_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\r\n2023-11-30 23:59:59.5000000,374,44\r\n2023-12-01 00:00:01.0000000,396,109\r\n",
        &ReadOptions::default(),
    )
    .unwrap();
    assert_eq!(starts(&t), [Start::AtMs(0.0), Start::AtMs(1500.0)]);
    assert_eq!(t.requests[1].output_tokens, 109);

    let t = read_text(
        r#"{"id": "x", "block_size": 64, "hash_id_scope": "local", "requests": [{"t": 1.0, "in": 128, "out": 4, "hash_ids": [1, 2]}, {"t": 9.0, "in": 192, "out": 4, "think_time": 2.0, "hash_ids": [1, 2, 3]}]}
{"id": "y", "block_size": 64, "hash_id_scope": "local", "requests": [{"t": 3.0, "in": 64, "out": 4, "hash_ids": [1]}]}"#,
        &ReadOptions::default(),
    )
    .unwrap();
    assert_eq!(t.block_tokens, 64);
    assert_eq!(starts(&t), [Start::AtMs(1000.0), Start::AfterMs(2000.0), Start::AtMs(3000.0)]);
    assert_eq!(t.blocks(&t.requests[2]), [3]);
}

#[test]
fn gzip_is_told_by_its_bytes() {
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gz.write_all(br#"{"timestamp": 0, "input_length": 512, "output_length": 2, "hash_ids": [9]}"#).unwrap();
    let t = read("t", gz.finish().unwrap().as_slice(), &ReadOptions::default()).unwrap();
    assert_eq!(t.requests.len(), 1);
}

#[test]
fn bad_lines_are_named_and_not_shown() {
    let good = r#"{"timestamp": 0, "input_length": 1, "output_length": 1, "hash_ids": []}"#;
    for bad in [
        "{\"secret\": 1}",
        "secret",
        r#"{"timestamp": -5, "input_length": 1, "output_length": 1}"#,
        "{",
        "[1e999]",
    ] {
        let error =
            read_text(&format!("{good}\n\n{bad}\n"), &ReadOptions::default()).unwrap_err().to_string();
        assert!(error.contains("line 3") && !error.contains("secret"), "{error}");
    }
    assert!(matches!(read_text("", &ReadOptions::default()), Err(ReadError::Empty)));
    assert!(matches!(read_text("hello\n", &ReadOptions::default()), Err(ReadError::UnknownFormat)));
}

#[test]
fn shapes_repeat_by_seed_and_copies_share_nothing() {
    let t = generate(Nature::MultiTurn, 100, 10.0, 1);
    let shape = Shape { speed: 2.0, copies: 3, spread_ms: 100.0, stagger_ms: 1000.0, ..Default::default() };
    let (a, b) = (shape.apply(&t, 5), shape.apply(&t, 5));
    assert_eq!(starts(&a), starts(&b));
    assert_ne!(starts(&a), starts(&shape.apply(&t, 6)));
    assert_eq!(a.requests.len(), 3 * t.requests.len());
    assert_eq!(a.distinct_blocks(), 3 * t.distinct_blocks());
    assert_eq!(a.sessions(), 3 * t.sessions());
}

#[test]
fn generated_natures_have_the_reuse_that_they_are_named_for() {
    let infinite = |nature| {
        crate::bounds::bounds(
            &generate(nature, 2000, 10.0, 3),
            &kvlane_engine::EngineConfig::h200_llama_8b(),
            1 << 40,
        )
        .infinite
    };
    assert_eq!(infinite(Nature::NoReuse), 0.0);
    assert!(infinite(Nature::HotPrefixes) > 0.85);
    assert!(infinite(Nature::SharedPrompts) > 0.7);
    assert!(infinite(Nature::MultiTurn) > 0.8);
}
