//! A query allocates nothing once warm, in either form of the answer and whatever the workers hold.

#![expect(unsafe_code, reason = "a test that counts allocations")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

use kvlane_index::hash::Namespace;
use kvlane_index::{
    BlockHash, BlockSize, DepthGroups, EngineHash, Group, GroupId, GroupKind, HashedPrompt, IndexConfig,
    KvEvent, Overlaps, StoredBlock, Tier, Worker,
};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

struct Counting;

// SAFETY: every call goes to the system's allocator with the same arguments.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: `pointer` came from `alloc`, which asked the system.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

#[test]
fn a_warm_query_allocates_nothing() {
    let size = BlockSize::new(16).unwrap();
    let (mut writer, index) = kvlane_index::partition(IndexConfig::new(size));
    let tokens: Vec<u32> = (0..16 * 300).collect();
    let mut hashed = HashedPrompt::default();
    index.hash(&tokens, &Namespace::default(), &mut hashed);
    let prompt = hashed.blocks().to_vec();
    let sliding = Group { id: GroupId(1), kind: GroupKind::Sliding { window_tokens: 100 } };
    for number in 0..300u64 {
        let worker = Worker::new(number, 0);
        let blocks = |count: usize| -> Vec<StoredBlock> {
            let names = (number << 32..).map(EngineHash);
            names.zip(&prompt[..count]).map(|(engine, block)| StoredBlock { engine, block: *block }).collect()
        };
        let mut store = |tier, group, count| {
            let _ =
                writer.apply(worker, &KvEvent::Stored { tier, group, parent: None, blocks: blocks(count) });
        };
        store(Tier::Device, Group::default(), 10 + number as usize % 70);
        match number % 4 {
            1 => store(Tier::Host, Group::default(), 150),
            2 => store(Tier::Device, sliding, 200),
            3 => index.predict(worker, &prompt[..120], 1_000),
            _ => {}
        }
    }
    let other: Vec<BlockHash> = (0..50).map(BlockHash).collect();
    let (mut overlaps, mut groups, mut second) =
        (Overlaps::default(), DepthGroups::default(), HashedPrompt::default());
    let mut ask = || {
        index.hash(&tokens, &Namespace::default(), &mut second);
        index.overlap(&prompt, &mut overlaps);
        assert_eq!(overlaps.ranks.len(), 300);
        index.overlap_hashed(&second, &mut overlaps);
        index.overlap(&prompt[..130], &mut overlaps);
        index.depth_groups(&prompt, &mut groups);
        assert!(groups.iter().map(|group| group.len()).sum::<usize>() == 300 && groups.others().len() > 100);
        index.depth_groups_hashed(&second, &mut groups);
        index.depth_groups(&other, &mut groups);
        index.overlap(&other, &mut overlaps);
    };
    (0..4).for_each(|_| ask());
    let before = ALLOCATIONS.get();
    (0..50).for_each(|_| ask());
    assert_eq!(ALLOCATIONS.get() - before, 0);
}
