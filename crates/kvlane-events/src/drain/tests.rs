//! Drained bodies, one story each.

use super::*;

fn stored(id: u64, parent: &str, names: &[u64], more: &str) -> String {
    let block = |name: &u64| {
        format!(
            r#"{{"type":"stored_block","block_hash":{name},"tokens":[{{"token_id":{name},"token_extra_id":0}},{{"token_id":2}}],
            "cache_level":0,"priority":35,"mm_keys":[],"cache_salt":null}}"#
        )
    };
    let blocks: Vec<String> = names.iter().map(block).collect();
    let data = format!(r#"{{"type":"stored","parent_hash":{parent},"blocks":[{}]}}"#, blocks.join(","));
    format!(r#"{{"event_id":{id},"data":{data}{more}}}"#)
}

fn event(id: u64, data: &str) -> String {
    format!(r#"{{"event_id":{id},"data":{data},"window_size":4096}}"#)
}

const CREATED: &str = r#"{"type":"created","num_blocks_per_cache_level":[1000,0]}"#;

struct Test {
    drain: Drain,
}

impl Test {
    fn new() -> Self {
        Self { drain: Drain::new(BlockSize::new(2).unwrap(), 10_000) }
    }

    fn at(&mut self, now_ms: u64, input: Input<'_>) -> Vec<String> {
        let mut out = Vec::new();
        self.drain.handle(input, now_ms, &mut out);
        out.iter().map(|(rank, action)| format!("{rank}: {}", line(action))).collect()
    }

    fn body(&mut self, events: &[String]) -> Vec<String> {
        self.at(0, Input::Body(format!("[{}]", events.join(",")).as_bytes()))
    }
}

fn line(action: &Action) -> String {
    let names = |hashes: &[EngineHash]| hashes.iter().map(|h| h.0.to_string()).collect::<Vec<_>>().join(",");
    match action {
        Action::Apply(KvEvent::Stored { tier, parent, blocks, .. }) => {
            let blocks: Vec<EngineHash> = blocks.iter().map(|b| b.engine).collect();
            format!("+{} {} after {:?}", tier.name(), names(&blocks), parent.map(|p| p.0))
        }
        Action::Apply(KvEvent::StoredByHash { tier, hashes, .. }) => {
            format!("~{} {}", tier.name(), names(hashes))
        }
        Action::Apply(KvEvent::Removed { tier, hashes, .. }) => format!("-{} {}", tier.name(), names(hashes)),
        Action::Reset { epoch, .. } => format!("reset {epoch}"),
        Action::StateChanged(state) => state.name().into(),
        Action::Dropped(reason) => format!("drop {}", reason.name()),
        other => format!("{other:?}"),
    }
}

#[test]
fn a_life_from_its_first_event_is_whole() {
    let mut t = Test::new();
    assert_eq!(t.body(&[event(0, CREATED)]), ["0: live"]);
    assert_eq!(t.body(&[stored(1, "null", &[5, 6], "")]), ["0: +device 5,6 after None"]);
    assert_eq!(t.body(&[stored(2, "6", &[7], "")]), ["0: +device 7 after Some(6)"]);
    assert!(t.body(&[]).is_empty());
}

#[test]
fn a_gap_is_a_fence_because_nothing_can_be_asked_for_again() {
    let mut t = Test::new();
    t.body(&[event(0, CREATED), stored(1, "null", &[5], "")]);
    assert_eq!(
        t.body(&[stored(3, "5", &[6], "")]),
        ["0: reset 1", "0: +device 6 after Some(5)", "0: rebuilding"]
    );
}

#[test]
fn a_number_that_falls_back_is_a_restart() {
    let mut t = Test::new();
    t.body(&[event(0, CREATED), stored(1, "null", &[5], "")]);
    assert_eq!(t.body(&[event(0, CREATED)]), ["0: reset 1"]);
    assert_eq!(t.drain.state(0), State::Live);
}

#[test]
fn partial_blocks_and_their_removals_are_passed_over() {
    let mut t = Test::new();
    let partial = r#"{"type":"stored","parent_hash":null,"blocks":[
        {"block_hash":5,"tokens":[{"token_id":1},{"token_id":2}]},{"block_hash":77,"tokens":[{"token_id":3}]}]}"#;
    t.body(&[event(0, CREATED)]);
    assert_eq!(t.body(&[event(1, partial)]), ["0: drop partial_block", "0: +device 5 after None"]);
    assert_eq!(t.body(&[event(2, r#"{"type":"removed","block_hashes":[77,5]}"#)]), ["0: -device 5"]);
    assert!(t.body(&[event(3, r#"{"type":"removed","block_hashes":[77]}"#)]).is_empty());
}

#[test]
fn a_block_moves_between_levels() {
    let mut t = Test::new();
    t.body(&[event(0, CREATED), stored(1, "null", &[5], "")]);
    let moved = r#"{"type":"updated","block_hash":5,"cache_level":{"type":"event_diff","new_value":1,"old_value":0}}"#;
    assert_eq!(t.body(&[event(2, moved)]), ["0: ~host 5", "0: -device 5"]);
    let removed = r#"{"type":"removed","block_hashes":[5]}"#;
    assert_eq!(t.body(&[event(3, removed)]), ["0: -device 5", "0: -host 5"]);
    let priority = r#"{"type":"updated","block_hash":5,"priority":{"new_value":1,"old_value":2}}"#;
    assert!(t.body(&[event(4, priority)]).is_empty());
}

#[test]
fn only_the_largest_window_counts() {
    let mut t = Test::new();
    let small = |id| format!(r#"{{"event_id":{id},"data":{CREATED},"window_size":512}}"#);
    t.body(&[event(0, CREATED), small(1)]);
    assert_eq!(
        t.body(&[
            stored(2, "null", &[5], r#","window_size":512"#),
            stored(3, "null", &[5], r#","window_size":4096"#)
        ]),
        ["0: drop ignored_group", "0: +device 5 after None"]
    );
}

#[test]
fn ranks_count_apart() {
    let mut t = Test::new();
    t.body(&[event(0, CREATED)]);
    assert_eq!(
        t.body(&[stored(4, "null", &[5], r#","attention_dp_rank":1"#)]),
        ["1: +device 5 after None", "1: rebuilding"]
    );
    assert_eq!(t.drain.state(0), State::Live);
}

#[test]
fn hashes_are_numbers_or_digests() {
    let mut t = Test::new();
    let data = r#"{"type":"stored","parent_hash":null,"blocks":[
        {"block_hash":"000000000000000000000000000000ff","tokens":[1,2]},{"block_hash":-1,"tokens":[1,2]}]}"#;
    assert_eq!(t.body(&[event(0, data)]), ["0: +device 255,18446744073709551615 after None", "0: live"]);
}

#[test]
fn garbage_loses_what_it_carried_and_nothing_else() {
    let mut t = Test::new();
    t.body(&[event(0, CREATED), stored(1, "null", &[5], "")]);
    assert_eq!(
        t.body(&[event(2, r#"{"type":"new"}"#), r#"{"data":1}"#.into()]),
        ["0: drop unknown_event", "0: drop bad_field"]
    );
    assert_eq!(t.at(0, Input::Body(b"<html>")), ["0: drop malformed", "0: reset 1", "0: rebuilding"]);
}

#[test]
fn an_engine_that_is_away_is_claimed_for_a_while_only() {
    let mut t = Test::new();
    t.body(&[event(0, CREATED), stored(1, "null", &[5], "")]);
    assert_eq!(t.at(1_000, Input::Failed), ["0: degraded"]);
    assert!(t.at(10_999, Input::Failed).is_empty());
    assert_eq!(t.drain.next_deadline_ms(), Some(11_000));
    assert_eq!(t.at(11_000, Input::Tick), ["0: reset 1", "0: blind"]);
    assert_eq!(t.body(&[stored(2, "5", &[6], "")]), ["0: +device 6 after Some(5)", "0: rebuilding"]);
}

#[test]
fn a_salt_and_media_are_part_of_the_identity() {
    let block = |more: &str| {
        let mut t = Test::new();
        let data = format!(
            r#"{{"type":"stored","parent_hash":null,"blocks":[{{"block_hash":5,"tokens":[1,2]{more}}}]}}"#
        );
        let mut out = Vec::new();
        t.drain.handle(Input::Body(format!("[{}]", event(0, &data)).as_bytes()), 0, &mut out);
        let blocks = out.into_iter().find_map(|(_, action)| match action {
            Action::Apply(KvEvent::Stored { blocks, .. }) => Some(blocks),
            _ => None,
        });
        blocks.unwrap()[0].block
    };
    let all =
        [block(""), block(r#","cache_salt":"s""#), block(r#","mm_keys":[{"hash":"ab","start_offset":0}]"#)];
    assert!(all[0] != all[1] && all[0] != all[2] && all[1] != all[2]);
}
