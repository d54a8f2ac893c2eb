//! Finds a run by the prefix hash of its first block.
//!
//! Open addressing in sub-tables that grow one at a time, each into a new array twice as large: no growth stalls the
//! writer for long. Old arrays stay (together they are smaller than the newest), so a reader may finish in one.
//! An entry is a tag and a run; whether that run really begins with the hash is seen in its header, which the reader
//! needs anyway. Removal moves later entries back; a reader that misses meanwhile sees the sub-table's version change and looks again.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::*, fence};

const SUB_BITS: u32 = 6;
const FIRST_BITS: u32 = 4;
const GENERATIONS: usize = 26;
/// Looks of one reader into a sub-table that keeps changing, before it reports a miss (an under-count).
const MAX_LOOKS: usize = 4;

#[derive(Debug, Default)]
struct Sub {
    /// Odd while entries move.
    version: AtomicU32,
    generation: AtomicU32,
    arrays: [OnceLock<Box<[AtomicU64]>>; GENERATIONS],
}

/// Prefix hash of a first block → run. The hash is mixed already, under the partition's key, so its bits choose the place.
#[derive(Debug)]
pub(super) struct RunTable {
    subs: Box<[Sub]>,
}

fn entry(hash: u64, run: u32) -> u64 {
    (hash << 32) | (u64::from(run) + 1)
}

impl Sub {
    fn array(&self) -> &[AtomicU64] {
        self.arrays[self.generation.load(Acquire) as usize].get_or_init(|| fresh(FIRST_BITS))
    }
}

fn fresh(bits: u32) -> Box<[AtomicU64]> {
    std::iter::repeat_with(AtomicU64::default).take(1 << bits).collect()
}

impl RunTable {
    pub(super) fn new() -> Self {
        Self { subs: std::iter::repeat_with(Sub::default).take(1 << SUB_BITS).collect() }
    }

    fn sub(&self, hash: u64) -> &Sub {
        &self.subs[(hash >> (64 - SUB_BITS)) as usize]
    }

    /// Calls `check` on each run that may begin with `hash` until it returns `Some`.
    #[inline(always)]
    pub(super) fn find<T>(&self, hash: u64, mut check: impl FnMut(u32) -> Option<T>) -> Option<T> {
        let sub = self.sub(hash);
        for _ in 0..MAX_LOOKS {
            let version = sub.version.load(Acquire);
            let array = sub.arrays.get(sub.generation.load(Acquire) as usize)?.get()?;
            let mask = array.len() - 1;
            let mut at = (hash >> 20) as usize & mask;
            for _ in 0..array.len() {
                let found = array[at].load(Acquire);
                if found == 0 {
                    break;
                }
                if (found >> 32) as u32 == hash as u32
                    && let Some(result) = check(found as u32 - 1)
                {
                    return Some(result);
                }
                at = (at + 1) & mask;
            }
            fence(Acquire);
            if version.is_multiple_of(2) && sub.version.load(Relaxed) == version {
                return None;
            }
            std::hint::spin_loop();
        }
        None
    }
}

/// The writer's side: how full each sub-table is.
#[derive(Debug)]
pub(super) struct RunTableWriter {
    live: Vec<u32>,
}

impl RunTableWriter {
    pub(super) fn new() -> Self {
        Self { live: vec![0; 1 << SUB_BITS] }
    }

    /// Enters a run; `key_of` names the key of any run in the table.
    pub(super) fn insert(&mut self, table: &RunTable, hash: u64, run: u32, key_of: impl Fn(u32) -> u64) {
        let index = (hash >> (64 - SUB_BITS)) as usize;
        let sub = &table.subs[index];
        self.live[index] += 1;
        if self.live[index] as usize * 8 > sub.array().len() * 5 {
            let generation = sub.generation.load(Relaxed) + 1;
            let old = sub.array();
            let array = fresh(FIRST_BITS + generation);
            for word in old {
                let word = word.load(Relaxed);
                if word != 0 {
                    put(&array, key_of(word as u32 - 1), word);
                }
            }
            if sub.arrays[generation as usize].set(array).is_err() {
                unreachable!("each generation is made once, by the one writer");
            }
            sub.generation.store(generation, Release);
        }
        put(sub.array(), hash, entry(hash, run));
    }

    pub(super) fn remove(&mut self, table: &RunTable, hash: u64, run: u32, key_of: impl Fn(u32) -> u64) {
        let index = (hash >> (64 - SUB_BITS)) as usize;
        let sub = &table.subs[index];
        let array = sub.array();
        let mask = array.len() - 1;
        let wanted = entry(hash, run);
        let mut hole = (hash >> 20) as usize & mask;
        loop {
            match array[hole].load(Relaxed) {
                0 => return,
                found if found == wanted => break,
                _ => hole = (hole + 1) & mask,
            }
        }
        self.live[index] -= 1;
        let version = sub.version.load(Relaxed);
        sub.version.store(version.wrapping_add(1), Relaxed);
        fence(Release);
        let mut at = hole;
        loop {
            at = (at + 1) & mask;
            let word = array[at].load(Relaxed);
            if word == 0 {
                break;
            }
            let home = (key_of(word as u32 - 1) >> 20) as usize & mask;
            // Move back only what does not thereby come before its home.
            if at.wrapping_sub(home) & mask >= at.wrapping_sub(hole) & mask {
                array[hole].store(word, Relaxed);
                hole = at;
            }
        }
        array[hole].store(0, Relaxed);
        sub.version.store(version.wrapping_add(2), Release);
    }

    pub(super) fn bytes(&self, table: &RunTable) -> u64 {
        let arrays = table.subs.iter().flat_map(|s| s.arrays.iter().filter_map(OnceLock::get));
        (arrays.map(|a| a.len() * 8).sum::<usize>() + table.subs.len() * size_of::<Sub>()) as u64
    }
}

fn put(array: &[AtomicU64], hash: u64, word: u64) {
    let mask = array.len() - 1;
    let mut at = (hash >> 20) as usize & mask;
    while array[at].load(Relaxed) != 0 {
        at = (at + 1) & mask;
    }
    array[at].store(word, Release);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_survive_growth_and_removal_of_others() {
        let table = RunTable::new();
        let mut writer = RunTableWriter::new();
        let key_of = |run: u32| u64::from(run).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let find = |run: u32| table.find(key_of(run), |r| (r == run).then_some(r));
        for run in 0..20_000 {
            writer.insert(&table, key_of(run), run, key_of);
        }
        for run in (0..20_000).step_by(3) {
            writer.remove(&table, key_of(run), run, key_of);
        }
        for run in 0..20_000 {
            assert_eq!(find(run).is_some(), run % 3 != 0, "run {run}");
        }
    }
}
