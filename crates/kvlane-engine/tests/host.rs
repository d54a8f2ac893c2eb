//! The host tier: what the device forgets comes back from host memory, in less time than computing it.

use kvlane_engine::{BlockPool, Engine, EngineConfig, Request, RequestId, StepOutput};
use kvlane_index::{BlockHash, KvEvent, Tier};

/// An engine whose device holds two prompts of 800 tokens, and whose host memory holds many.
fn engine() -> Engine {
    Engine::new(EngineConfig { blocks: 120, host_blocks: 1_000, ..EngineConfig::h200_llama_8b() })
}

fn prompt(id: u64, content: u64) -> Request {
    let blocks = (0..50).map(|i| BlockHash(content * 1_000 + i)).collect();
    Request { id: RequestId(id), prompt_tokens: 800, output_tokens: 1, blocks, content: None }
}

/// Runs one request on its own: its cached tokens, its time to first token in microseconds, and what was announced.
fn run(engine: &mut Engine, now: &mut u64, request: Request) -> (u32, u64, Vec<(Tier, bool, usize)>) {
    let submitted = *now;
    engine.submit(*now, request).expect("it fits");
    let (mut out, mut cached, mut first, mut said) = (StepOutput::default(), 0, 0, Vec::new());
    while let Some(at) = engine.next_step_at() {
        *now = at.max(*now);
        engine.step(*now, &mut out);
        if let Some(token) = out.tokens.first() {
            (cached, first) = (token.cached_tokens, out.at_us - submitted);
        }
        said.extend(out.events.iter().filter_map(|event| match &event.event {
            KvEvent::Stored { tier, blocks, .. } => Some((*tier, true, blocks.len())),
            KvEvent::Removed { tier, hashes, .. } => Some((*tier, false, hashes.len())),
            KvEvent::StoredByHash { .. } | KvEvent::Cleared { .. } => None,
        }));
    }
    (cached, first, said)
}

#[test]
fn an_evicted_prompt_is_loaded_instead_of_computed() {
    let (mut engine, mut now) = (engine(), 0);
    let (cached, cold_us, said) = run(&mut engine, &mut now, prompt(0, 1));
    assert_eq!((cached, said), (0, vec![(Tier::Device, true, 50), (Tier::Host, true, 50)]));
    for other in 2..5 {
        run(&mut engine, &mut now, prompt(other, other));
    }
    let (cached, loaded_us, said) = run(&mut engine, &mut now, prompt(9, 1));
    assert_eq!(cached, 49 * 16, "all but the block of the last token");
    assert_eq!(engine.totals().host_hit_tokens, 49 * 16);
    // Evicted for it; loaded; its last block computed again, which host memory has already.
    assert_eq!(said, [(Tier::Device, false, 50), (Tier::Device, true, 49), (Tier::Device, true, 1)]);
    assert!(loaded_us < cold_us, "{loaded_us} us against {cold_us} us");
    let (_, warm_us, _) = run(&mut engine, &mut now, prompt(10, 1));
    assert!(warm_us < loaded_us, "{warm_us} us against {loaded_us} us");
}

#[test]
fn a_cancelled_load_gives_its_blocks_back() {
    let (mut engine, mut now) = (engine(), 0);
    for content in 1..5 {
        run(&mut engine, &mut now, prompt(content, content));
    }
    engine.submit(now, prompt(9, 1)).expect("it fits");
    let mut out = StepOutput::default();
    while engine.load().held_blocks == 0 {
        now = engine.next_step_at().expect("a request is inside");
        engine.step(now, &mut out);
    }
    assert_eq!((engine.load().running, engine.load().waiting), (0, 1), "it is loading");
    assert!(engine.cancel(RequestId(9)));
    assert_eq!(engine.load().held_blocks, 0);
    assert_eq!(engine.next_step_at(), None);
    let (cached, ..) = run(&mut engine, &mut now, prompt(10, 1));
    assert_eq!(cached, 49 * 16, "host memory still has it");
}

#[test]
fn host_memory_forgets_the_least_recently_used() {
    let config = EngineConfig { blocks: 60, host_blocks: 101, ..EngineConfig::h200_llama_8b() };
    let (mut engine, mut now) = (Engine::new(config), 0);
    for (id, content) in [1, 2, 1, 3].into_iter().enumerate() {
        run(&mut engine, &mut now, prompt(id as u64, content));
    }
    let host = engine.host_pool().expect("it has a host tier");
    let held = |content: u64| {
        let blocks: Vec<BlockHash> = (0..50).map(|i| BlockHash(content * 1_000 + i)).collect();
        host.cached_run(&engine.engine_hashes(&blocks))
    };
    assert_eq!([held(1), held(2), held(3)], [50, 0, 50]);
    assert!(engine.pool().contents().count() <= BlockPool::new(60).usable() as usize);
}
