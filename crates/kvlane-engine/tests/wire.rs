//! The encoders write what a real vLLM 0.32 wrote, byte for byte.

#![expect(clippy::unwrap_used, reason = "helpers of tests, outside of test functions")]

use kvlane_engine::wire::{Form, ReplayForm, publish_frames, replay_end_frames, replay_frames, write_batch};
use kvlane_engine::{CacheEvent, Content, StoredContent};
use kvlane_index::{BlockHash, BlockSize, EngineHash, Group, GroupId, KvEvent, StoredBlock, Tier};
use serde_json::Value;
use std::sync::Arc;

const CAPTURES: [(&str, &str); 4] = [
    ("01", include_str!("captures/01-stored-root-and-chained.jsonl")),
    ("03", include_str!("captures/03-lora.jsonl")),
    ("04", include_str!("captures/04-cache-salt.jsonl")),
    ("08", include_str!("captures/08-all-cleared.jsonl")),
];

#[test]
fn a_batch_is_written_as_vllm_wrote_it() {
    let mut compared = 0;
    for (name, capture) in CAPTURES {
        for line in capture.lines().map(json).filter(|line| line["kind"] == "frames") {
            let [_, events, rank] = line["decoded"].as_array().unwrap().as_slice() else {
                panic!("a batch of 3")
            };
            let block_size = BlockSize::new(32).unwrap();
            let events: Vec<CacheEvent> = events.as_array().unwrap().iter().map(event).collect();
            let mut payload = Vec::new();
            let rank = rank.as_u64().map(|rank| rank as u32);
            // The recording's JSON does not carry the last bit of the time, its bytes do.
            let recorded: Vec<String> = line["frames_hex"].as_array().unwrap().iter().map(text).collect();
            let ts = f64::from_be_bytes(unhex(&recorded[2])[2..10].try_into().unwrap());
            write_batch(Form::VllmMap, ts, &events, rank, block_size, &mut payload);
            let topic = String::from_utf8(unhex(&recorded[0])).unwrap();
            let frames = publish_frames(&topic, line["seq"].as_u64().unwrap(), payload);
            let written: Vec<String> = frames.iter().map(|frame| hex(frame)).collect();
            assert_eq!(written, recorded, "scenario {name}, sequence {}", line["seq"]);
            compared += 1;
        }
    }
    assert_eq!(compared, 11, "recorded messages compared");
}

#[test]
fn older_and_other_forms_have_the_documented_bytes() {
    let event = [stored(&[0x0101_0101_0101_0101, 0x0202_0202_0202_0202], None, (1..=8).collect(), 4)];
    let check = |form, expected: &str| {
        let mut out = Vec::new();
        write_batch(form, 1_700_000_000.25, &event, Some(1), BlockSize::new(4).unwrap(), &mut out);
        assert_eq!(hex(&out), expected.replace(' ', ""), "{form:?}");
    };
    let head = "93 cb41d954fc40100000 91";
    let five = "ab426c6f636b53746f726564 92cf0101010101010101cf0202020202020202 c0 980102030405060708 04 c0";
    check(Form::VllmArray { stored_fields: 5 }, &format!("{head} 96 {five} 01"));
    check(Form::VllmArray { stored_fields: 6 }, &format!("{head} 97 {five} a3475055 01"));
    let full = "ae66756c6c5f617474656e74696f6e";
    check(Form::VLLM_0_23, &format!("{head} 9c {five} a3475055 c0 92c0c0 00 {full} c0 01"));
}

#[test]
fn sglang_hashes_are_signed() {
    let event = [stored(&[0xcf97_aded_db59_e05b, 7], None, vec![1, 2], 1)];
    let mut out = Vec::new();
    write_batch(Form::SglangMap, 0.0, &event, None, BlockSize::new(1).unwrap(), &mut out);
    assert!(hex(&out).starts_with("92cb0000000000000000"), "an array of two without a rank");
    assert!(hex(&out).contains("92d3cf97adeddb59e05b07"), "{}", hex(&out));
}

#[test]
fn removals_are_one_event_each_in_vllm_and_one_for_all_in_sglang() {
    let removed = KvEvent::Removed {
        tier: Tier::Device,
        group: GroupId(0),
        hashes: vec![EngineHash(1), EngineHash(2)],
    };
    let events = [CacheEvent { event: removed, content: None }];
    let write = |form| {
        let mut out = Vec::new();
        write_batch(form, 0.0, &events, Some(0), BlockSize::new(4).unwrap(), &mut out);
        hex(&out)
    };
    assert!(write(Form::VllmMap).starts_with("93cb000000000000000092"));
    assert!(write(Form::SglangMap).starts_with("93cb000000000000000091"));
}

#[test]
fn replays_end_with_the_last_number_and_nothing() {
    let hexed = |frames: Vec<Vec<u8>>| frames.iter().map(|frame| hex(frame)).collect::<Vec<_>>();
    assert_eq!(hexed(replay_end_frames(ReplayForm::WithTopic)), ["", "", "ffffffffffffffff", ""]);
    assert_eq!(hexed(replay_end_frames(ReplayForm::WithoutTopic)), ["", "ffffffffffffffff", ""]);
    let reply = hexed(replay_frames(ReplayForm::WithTopic, "kv", 3, vec![9]));
    assert_eq!(reply, ["", "6b76", "0000000000000003", "09"]);
}

/// An event as the recording decodes it. The encoder never sees block hashes, so any will do.
fn event(recorded: &Value) -> CacheEvent {
    match recorded["type"].as_str().unwrap() {
        "AllBlocksCleared" => CacheEvent { event: KvEvent::Cleared { tier: None }, content: None },
        "BlockRemoved" => CacheEvent {
            event: KvEvent::Removed {
                tier: Tier::Device,
                group: GroupId(recorded["group_idx"].as_u64().unwrap() as u16),
                hashes: numbers(&recorded["block_hashes"]).into_iter().map(EngineHash).collect(),
            },
            content: None,
        },
        _ => {
            let tokens = numbers(&recorded["token_ids"]).into_iter().map(|token| token as u32).collect();
            let parent = recorded["parent_block_hash"].as_u64();
            let block_size = recorded["block_size"].as_u64().unwrap() as usize;
            let mut event = stored(&numbers(&recorded["block_hashes"]), parent, tokens, block_size);
            let content = event.content.as_mut().unwrap();
            let inner = Arc::get_mut(&mut content.content).unwrap();
            inner.adapter = recorded["lora_id"].as_u64().map(|id| (id as u32, text(&recorded["lora_name"])));
            let first_keys = recorded["extra_keys"][0].as_array();
            let salt = first_keys.and_then(|keys| keys.get(usize::from(inner.adapter.is_some())));
            inner.salt = salt.map(text);
            event
        }
    }
}

fn stored(hashes: &[u64], parent: Option<u64>, tokens: Vec<u32>, block_size: usize) -> CacheEvent {
    let first_block = u32::from(parent.is_some());
    let before = vec![0; first_block as usize * block_size];
    let content = Content { tokens: [before, tokens].concat(), adapter: None, salt: None };
    let blocks =
        hashes.iter().map(|hash| StoredBlock { engine: EngineHash(*hash), block: BlockHash(0) }).collect();
    CacheEvent {
        event: KvEvent::Stored {
            tier: Tier::Device,
            group: Group::default(),
            parent: parent.map(EngineHash),
            blocks,
        },
        content: Some(StoredContent { content: Arc::new(content), first_block }),
    }
}

fn json(line: &str) -> Value {
    serde_json::from_str(line).unwrap()
}

fn text(value: &Value) -> String {
    value.as_str().unwrap().to_owned()
}

fn numbers(value: &Value) -> Vec<u64> {
    value.as_array().unwrap().iter().map(|number| number.as_u64().unwrap()).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Vec<u8> {
    (0..text.len() / 2).map(|i| u8::from_str_radix(&text[2 * i..2 * i + 2], 16).unwrap()).collect()
}
