//! What a consumer of engine events must tolerate, one case each (the engines' versions and forks all do some of it).

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

use kvlane_events::resolve::Resolver;
use kvlane_events::wire::{Batch, DropReason, EngineKind, Stored, WireEvent, decode};
use kvlane_index::{BlockSize, EngineHash, GroupKind, KvEvent, Tier};

/// A MessagePack value, written as a test reads.
#[derive(Clone)]
enum V {
    Nil,
    Int(i64),
    Float(f64),
    Str(&'static str),
    Bin(Vec<u8>),
    Array(Vec<V>),
    Map(Vec<(&'static str, V)>),
}

use V::{Array, Bin, Float, Int, Map, Nil, Str};

impl V {
    fn write(&self, out: &mut Vec<u8>) {
        let head = |out: &mut Vec<u8>, marker: u8, len: usize| {
            out.push(marker);
            out.extend((len as u32).to_be_bytes());
        };
        match self {
            Nil => out.push(0xc0),
            Int(v) => {
                out.push(0xd3);
                out.extend(v.to_be_bytes());
            }
            Float(v) => {
                out.push(0xcb);
                out.extend(v.to_be_bytes());
            }
            Str(v) => {
                head(out, 0xdb, v.len());
                out.extend(v.as_bytes());
            }
            Bin(v) => {
                head(out, 0xc6, v.len());
                out.extend(v);
            }
            Array(v) => {
                head(out, 0xdd, v.len());
                v.iter().for_each(|v| v.write(out));
            }
            Map(v) => {
                head(out, 0xdf, v.len());
                for (key, v) in v {
                    Str(key).write(out);
                    v.write(out);
                }
            }
        }
    }
}

fn ints(values: &[i64]) -> V {
    Array(values.iter().copied().map(Int).collect())
}

fn payload(events: Vec<V>) -> Vec<u8> {
    let mut out = Vec::new();
    Array(vec![Float(1.0), Array(events), Int(0)]).write(&mut out);
    out
}

/// `BlockStored` as a map, with some fields replaced or added.
fn stored(changes: &[(&'static str, V)]) -> V {
    let mut fields = vec![
        ("type", Str("BlockStored")),
        ("block_hashes", ints(&[1, 2])),
        ("parent_block_hash", Nil),
        ("token_ids", ints(&[10, 11, 12, 13])),
        ("block_size", Int(2)),
    ];
    for (key, value) in changes {
        fields.retain(|(name, _)| name != key);
        fields.push((key, value.clone()));
    }
    Map(fields)
}

fn decoded(payload: &[u8]) -> Batch<'_> {
    decode(EngineKind::Vllm, payload).unwrap()
}

fn only(payload: &[u8]) -> Stored<'_> {
    match decoded(payload).events.as_slice() {
        [WireEvent::Stored(stored)] => stored.clone(),
        other => panic!("{other:?}"),
    }
}

fn resolved(batch: &Batch<'_>) -> (Vec<KvEvent>, Vec<DropReason>) {
    let (mut events, mut dropped) = (Vec::new(), Vec::new());
    Resolver::new(BlockSize::new(2).unwrap()).resolve(batch, &mut events, &mut dropped);
    (events, dropped)
}

#[test]
fn an_unknown_event_costs_only_itself() {
    let unknown = [
        Map(vec![("type", Str("BlockPinned")), ("block_hashes", ints(&[1]))]),
        Array(vec![Str("BlockUpdateEvent"), Int(1)]),
        Map(vec![("kind", Str("BlockStored"))]),
        Array(vec![]),
        Int(7),
        Str("BlockStored"),
        Nil,
    ];
    for odd in unknown {
        let payload = payload(vec![odd, stored(&[]), Array(vec![Str("AllBlocksCleared")])]);
        let batch = decoded(&payload);
        assert_eq!(batch.dropped, [DropReason::UnknownEvent]);
        assert_eq!(batch.events.len(), 2, "arrays and maps may be mixed");
    }
}

#[test]
fn a_batch_has_two_elements_or_more() {
    for rest in [vec![], vec![Int(3)], vec![Nil], vec![Int(3), Str("more"), Array(vec![Nil])]] {
        let rank = matches!(rest.first(), Some(Int(_))).then_some(3);
        let mut out = Vec::new();
        Array([vec![Float(1.0), Array(vec![stored(&[])])], rest].concat()).write(&mut out);
        let batch = decoded(&out);
        assert_eq!((batch.events.len(), batch.dp_rank), (1, rank));
    }
    for bad in [Array(vec![Float(1.0)]), Int(1), Map(vec![]), Array(vec![Nil, Array(vec![])])] {
        let mut out = Vec::new();
        bad.write(&mut out);
        assert_eq!(decode(EngineKind::Vllm, &out), Err(DropReason::NotABatch));
    }
}

#[test]
fn keys_come_in_any_order_and_unknown_ones_are_passed_over() {
    let Map(mut fields) = stored(&[("new_field", Map(vec![("deep", Array(vec![Nil, Bin(vec![1])]))]))])
    else {
        panic!()
    };
    fields.reverse();
    let payload = payload(vec![Map(fields)]);
    assert_eq!(only(&payload).tokens, [10, 11, 12, 13]);
}

#[test]
fn arrays_may_be_shorter_or_longer_than_known() {
    let full = [Str("BlockStored"), ints(&[1]), Nil, ints(&[10, 11]), Int(2)];
    let extra = vec![Nil, Str("cpu"), Nil, Nil, Int(3), Str("mamba"), Nil, Str("later"), Int(1)];
    for len in 0..=extra.len() {
        let payload = payload(vec![Array([&full[..], &extra[..len]].concat())]);
        let stored = only(&payload);
        assert_eq!(stored.hashes, [EngineHash(1)]);
        assert_eq!(stored.tier, if len >= 2 { Tier::Host } else { Tier::Device });
        assert_eq!(stored.group.0, if len >= 5 { 3 } else { 0 });
        assert_eq!(stored.group_kind, (len >= 6).then_some(GroupKind::Recurrent));
    }
    let payload = payload(vec![Array(vec![Str("BlockRemoved"), ints(&[1])])]);
    assert!(
        matches!(decoded(&payload).events.as_slice(), [WireEvent::Removed(removed)] if removed.tier == Tier::Device)
    );
}

#[test]
fn hashes_come_in_any_width_sign_and_kind() {
    let digest: Vec<u8> = (0..32).collect();
    let cases = [
        (Int(-1), u64::MAX),
        (Int(0), 0),
        (Bin(digest.clone()), 0x1819_1a1b_1c1d_1e1f),
        (Bin(vec![1, 2]), 0x0102),
        (Str("000102030405060708090a0b0c0d0e0f"), 0x0809_0a0b_0c0d_0e0f),
        (Str("18446744073709551615"), u64::MAX),
        (Str("-1"), u64::MAX),
    ];
    for (hash, bits) in cases {
        let payload = payload(vec![stored(&[
            ("block_hashes", Array(vec![hash.clone()])),
            ("parent_block_hash", hash),
        ])]);
        let stored = only(&payload);
        assert_eq!((stored.hashes[0].0, stored.parent.unwrap().0), (bits, bits));
    }
    // SGLang keeps the other end of its digests.
    let payload = payload(vec![stored(&[("block_hashes", Array(vec![Bin(digest)]))])]);
    let batch = decode(EngineKind::Sglang, &payload).unwrap();
    assert!(matches!(&batch.events[0], WireEvent::Stored(s) if s.hashes[0].0 == 0x0001_0203_0405_0607));
}

#[test]
fn lengths_that_do_not_fit_lose_what_is_not_whole() {
    let cases = [
        (ints(&[1, 2]), ints(&[10, 11, 12]), 2, Ok(1)),
        (ints(&[1]), ints(&[10, 11, 12, 13]), 2, Ok(1)),
        (ints(&[1, 2]), ints(&[10]), 2, Err(DropReason::PartialBlock)),
        (ints(&[1]), ints(&[10, 11]), 0, Err(DropReason::BlockSize)),
        (ints(&[1]), ints(&[10, 11, 12]), 3, Err(DropReason::BlockSize)),
        (ints(&[1]), ints(&[10]), 1, Err(DropReason::PartialBlock)),
    ];
    for (hashes, tokens, size, expected) in cases {
        let payload = payload(vec![stored(&[
            ("block_hashes", hashes),
            ("token_ids", tokens),
            ("block_size", Int(size)),
        ])]);
        let (events, dropped) = resolved(&decoded(&payload));
        match expected {
            Ok(blocks) => {
                assert!(
                    matches!(&events[0], KvEvent::Stored { blocks: b, .. } if b.len() == blocks),
                    "{events:?}"
                );
                assert!(dropped.is_empty());
            }
            Err(reason) => assert_eq!((events.len(), dropped), (0, vec![reason])),
        }
    }
}

#[test]
fn an_offload_placeholder_is_resolved_by_its_name() {
    let payload = payload(vec![stored(&[
        ("block_hashes", ints(&[5])),
        ("token_ids", ints(&[])),
        ("block_size", Int(0)),
        ("medium", Str("CPU")),
    ])]);
    let (events, dropped) = resolved(&decoded(&payload));
    assert!(dropped.is_empty());
    assert!(
        matches!(&events[..], [KvEvent::StoredByHash { tier: Tier::Host, hashes, .. }] if hashes == &[EngineHash(5)])
    );
}

#[test]
fn larger_blocks_of_another_tier_are_taken_apart_and_removed_whole() {
    let chunk = |medium| [("block_hashes", ints(&[7])), ("block_size", Int(4)), ("medium", Str(medium))];
    let removed =
        Map(vec![("type", Str("BlockRemoved")), ("block_hashes", ints(&[7])), ("medium", Str("cpu"))]);
    let payload = payload(vec![stored(&chunk("cpu")), removed, stored(&[])]);
    let (events, dropped) = resolved(&decoded(&payload));
    assert!(dropped.is_empty());
    let [
        KvEvent::Stored { tier: Tier::Host, blocks: parts, .. },
        KvEvent::Removed { hashes, .. },
        KvEvent::Stored { blocks, .. },
    ] = &events[..]
    else {
        panic!("{events:?}")
    };
    let content = |blocks: &[kvlane_index::StoredBlock]| blocks.iter().map(|b| b.block).collect::<Vec<_>>();
    assert_eq!(content(parts), content(blocks), "the same content in either block size");
    assert_eq!(parts[1].engine, EngineHash(7), "children of the chunk find its end");
    let mut names: Vec<EngineHash> = parts.iter().map(|b| b.engine).collect();
    let mut gone = hashes.clone();
    names.sort();
    gone.sort();
    assert_eq!(names, gone);
}

#[test]
fn media_are_read_whatever_their_case_and_unknown_ones_are_kept_far_away() {
    for (medium, tier, unknown) in [
        ("gpu", Tier::Device, 0),
        ("Cpu_Pinned", Tier::Host, 0),
        ("nvme", Tier::Disk, 0),
        ("tape", Tier::External, 1),
    ] {
        let payload = payload(vec![stored(&[("medium", Str(medium))])]);
        assert_eq!(decoded(&payload).unknown_media, unknown);
        assert_eq!(only(&payload).tier, tier);
    }
}

#[test]
fn what_is_beside_the_tokens_makes_other_blocks() {
    let extra = |keys: V| [("extra_keys", Array(vec![keys, Nil]))];
    let block = |changes: &[(&'static str, V)]| {
        let payload = payload(vec![stored(changes)]);
        let (events, _) = resolved(&decoded(&payload));
        match &events[0] {
            KvEvent::Stored { blocks, .. } => (blocks[0].block, blocks[1].block),
            other => panic!("{other:?}"),
        }
    };
    let plain = block(&[]);
    let salted = block(&extra(Array(vec![Str("tenant")])));
    let tagged = block(&extra(Array(vec![Array(vec![Str("cache_salt"), Str("tenant")])])));
    let named = block(&[("cache_salt", Str("tenant"))]);
    assert!(salted == tagged && salted == named, "however the salt is written");
    assert!(salted.0 != plain.0 && salted.1 == plain.1, "a salt counts in the first block");
    let adapted = block(&[
        ("lora_name", Str("a")),
        ("extra_keys", Array(vec![Array(vec![Str("a")]), Array(vec![Str("a")])])),
    ]);
    assert!(adapted.0 != plain.0 && adapted.1 != plain.1, "an adapter counts in all");
    assert_eq!(adapted, block(&[("lora_name", Str("a"))]));
    let both =
        block(&[("lora_name", Str("a")), ("extra_keys", Array(vec![Array(vec![Str("a"), Str("tenant")])]))]);
    assert!(both.0 != adapted.0 && both.0 != salted.0);
    let picture = |offset| block(&extra(Array(vec![Array(vec![Str("picture"), Int(offset)])])));
    assert!(picture(0).0 != plain.0 && picture(0) != picture(-1));
    let embeds = block(&extra(Array(vec![Bin(vec![7; 32])])));
    assert!(embeds.0 != plain.0 && embeds.1 == plain.1);
}

#[test]
fn a_field_of_a_wrong_type_costs_the_event_only_if_it_is_needed() {
    for (field, value) in
        [("lora_id", Str("x")), ("group_idx", Str("x")), ("medium", Int(1)), ("session_id", Int(1))]
    {
        let payload = payload(vec![stored(&[(field, value)])]);
        assert_eq!(decoded(&payload).events.len(), 1, "{field}");
    }
    for (field, value) in [
        ("token_ids", Str("x")),
        ("token_ids", Array(vec![Int(-1)])),
        ("token_ids", Array(vec![Int(1 << 40)])),
        ("block_hashes", Int(1)),
        ("block_hashes", Array(vec![Float(1.0)])),
        ("parent_block_hash", Float(1.0)),
        ("lora_name", Int(1)),
        ("cache_salt", Int(1)),
        ("extra_keys", Int(1)),
    ] {
        let payload = payload(vec![stored(&[(field, value)]), stored(&[])]);
        let batch = decoded(&payload);
        assert_eq!((batch.events.len(), batch.dropped), (1, vec![DropReason::BadField]), "{field}");
    }
    let removed = Map(vec![("type", Str("BlockRemoved")), ("block_hashes", Nil)]);
    assert_eq!(decoded(&payload(vec![removed])).dropped, [DropReason::BadRemoval]);
}

#[test]
fn a_window_group_before_its_full_group_is_resolved_after_it() {
    let window = stored(&[
        ("block_hashes", ints(&[2])),
        ("group_idx", Int(0)),
        ("kv_cache_spec_kind", Str("sliding_window")),
        ("kv_cache_spec_sliding_window", Int(4)),
    ]);
    let full = stored(&[("group_idx", Int(1)), ("kv_cache_spec_kind", Str("full_attention"))]);
    let payload = payload(vec![window, full]);
    let (events, _) = resolved(&decoded(&payload));
    assert!(matches!(&events[..], [KvEvent::Stored { .. }, KvEvent::StoredByHash { .. }]), "{events:?}");
}

#[test]
fn every_truncation_is_malformed_and_none_panics() {
    let whole = payload(vec![
        stored(&[("extra_keys", Array(vec![Array(vec![Array(vec![Str("m"), Int(1)])])]))]),
        Int(1),
    ]);
    for cut in 0..whole.len() {
        assert!(decode(EngineKind::Vllm, &whole[..cut]).is_err(), "cut to {cut}");
    }
}
