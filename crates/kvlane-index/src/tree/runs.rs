//! The life of runs: found, made, lengthened, split, cut and freed.
//!
//! Invariants: a place (prefix hash) is in at most one run. What follows a run begins a run of its own, whose parent is the run's
//! last block; so a run that others follow is neither lengthened nor cut, and is kept, even without holders, until they are gone. Hence a
//! walk from the root misses nothing, and where it ends, nothing follows.
//!
//! Blocks lie in pages of 16. A split moves no block: the upper run begins inside the lower one's last page.

use std::sync::atomic::{Ordering::*, fence};

use super::Tree;
use super::names::spread;
use super::prefetch::prefetch;
use super::shared::{HEADER, MAX_RUN, NONE, PAGE, Part, SetKind, VERSION, length, list, set_kind};
use super::words::class_of;
use crate::EngineHash;

/// A block without a main name; an engine that uses this very value gets aliases.
pub(super) const NAMELESS: u64 = 0;

/// The writer's notes on a run.
#[derive(Clone, Copy, Debug)]
pub(super) struct Meta {
    /// The block before the first one; `NONE` at the root.
    pub(super) parent: u32,
    /// Runs whose parent is this run's last block.
    pub(super) kids: u32,
    /// The run that begins in this run's last page, after it.
    pub(super) next: u32,
    /// Blocks before the first one.
    pub(super) depth: u32,
    /// Ranks in the set of full holders.
    pub(super) full: u32,
    /// The writer's clock when something was stored here last.
    pub(super) touched: u32,
}

/// Main names, by block.
#[derive(Debug, Default)]
pub(super) struct Engines {
    chunks: Vec<Box<[u64]>>,
}

const ENGINE_CHUNK: u32 = 1 << 16;

impl Engines {
    /// Where the name of a block lies.
    #[inline]
    pub(super) fn at(&self, block: u32) -> &u64 {
        &self.chunks[(block / ENGINE_CHUNK) as usize][(block % ENGINE_CHUNK) as usize]
    }

    #[inline]
    pub(super) fn get(&self, block: u32) -> u64 {
        *self.at(block)
    }

    fn reach(&mut self, block: u32) {
        while self.chunks.len() as u32 <= block / ENGINE_CHUNK {
            self.chunks.push(vec![NAMELESS; ENGINE_CHUNK as usize].into());
        }
    }

    /// The names of neighbours in a page.
    #[inline]
    pub(super) fn stretch(&self, block: u32, count: u32) -> &[u64] {
        let at = (block % ENGINE_CHUNK) as usize;
        &self.chunks[(block / ENGINE_CHUNK) as usize][at..at + count as usize]
    }

    #[inline]
    pub(super) fn stretch_mut(&mut self, block: u32, count: u32) -> &mut [u64] {
        let at = (block % ENGINE_CHUNK) as usize;
        &mut self.chunks[(block / ENGINE_CHUNK) as usize][at..at + count as usize]
    }

    #[inline]
    pub(super) fn set(&mut self, block: u32, name: u64) {
        self.chunks[(block / ENGINE_CHUNK) as usize][(block % ENGINE_CHUNK) as usize] = name;
    }
}

/// The pages of blocks and who uses them.
#[derive(Debug, Default)]
pub(super) struct Pages {
    free: Vec<u32>,
    /// For each page, the lowest run in it and the page's number in that run.
    owner: Vec<(u32, u32)>,
    /// Runs with blocks in the page.
    users: Vec<u8>,
}

impl Pages {
    pub(super) fn live(&self) -> u64 {
        (self.owner.len() - self.free.len()) as u64
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.owner.capacity() * 8 + self.users.capacity() + self.free.capacity() * 4) as u64
    }
}

/// A stretch of a run that a prompt goes through.
#[derive(Clone, Copy, Debug)]
pub(super) struct Segment {
    pub(super) run: u32,
    pub(super) from: u32,
    pub(super) count: u32,
    /// Made for this event: nobody had it before.
    pub(super) fresh: bool,
}

fn pages_of(skip: u32, len: u32) -> u32 {
    (skip + len).div_ceil(PAGE)
}

fn list_class(pages: u32) -> u32 {
    class_of(pages.div_ceil(2))
}

impl Tree {
    // ---- headers -------------------------------------------------------------------------------------------------------------------

    #[inline]
    pub(super) fn word(&self, run: u32, at: usize) -> u64 {
        self.shared.header(run)[at].load(Relaxed)
    }

    #[inline]
    pub(super) fn set_word(&self, run: u32, at: usize, value: u64) {
        self.shared.header(run)[at].store(value, Relaxed);
    }

    #[inline]
    pub(super) fn len(&self, run: u32) -> u32 {
        length(self.word(run, 0))
    }

    /// Tells readers that a run is being changed.
    #[inline]
    pub(super) fn open(&self, run: u32) {
        let word = &self.shared.header(run)[0];
        word.store(word.load(Relaxed).wrapping_add(VERSION), Relaxed);
        fence(Release);
    }

    /// Ends what [`open`](Self::open) began.
    #[inline]
    pub(super) fn close(&self, run: u32, len: u32, set_kind: u64) {
        let word = &self.shared.header(run)[0];
        let version = word.load(Relaxed).wrapping_add(VERSION) >> 32 << 32;
        word.store(version | u64::from(len) << 8 | set_kind, Release);
    }

    // ---- lists ---------------------------------------------------------------------------------------------------------------------

    pub(super) fn take(&mut self, class: u32) -> u32 {
        self.slab.take(&self.shared.slab, class).expect("room was checked before the event")
    }

    pub(super) fn list_from(&mut self, words: &[u64]) -> u64 {
        if words.is_empty() {
            return 0;
        }
        let class = class_of(words.len() as u32);
        let at = self.take(class);
        for (i, word) in (at..).zip(words) {
            self.shared.slab.set(i, *word);
        }
        u64::from(at) << 32 | (words.len() as u64) << 8 | u64::from(class)
    }

    pub(super) fn list_free(&mut self, word: u64) {
        if list(word).1 > 0 {
            self.slab.give(list(word).0, word as u32 & 0xff);
        }
    }

    pub(super) fn list_words(&self, word: u64) -> Vec<u64> {
        self.shared.items(word).iter().map(|w| w.load(Relaxed)).collect()
    }

    pub(super) fn list_push(&mut self, word: u64, items: &[u64]) -> u64 {
        let (at, count) = list(word);
        if count == 0 || count + items.len() as u32 > 1 << (word & 0xff) {
            let mut words = self.list_words(word);
            words.extend_from_slice(items);
            self.list_free(word);
            return self.list_from(&words);
        }
        for (i, item) in (at + count..).zip(items) {
            self.shared.slab.set(i, *item);
        }
        word + ((items.len() as u64) << 8)
    }

    /// Removes the `at`-th item by moving the last one there.
    pub(super) fn list_remove(&mut self, word: u64, at: u32) -> u64 {
        let (start, count) = list(word);
        if count == 1 {
            self.list_free(word);
            return 0;
        }
        self.shared.slab.set(start + at, self.shared.slab.get(start + count - 1));
        let word = word - (1 << 8);
        if (count - 1) * 4 <= 1 << (word & 0xff) && word & 0xff > 0 {
            let words = self.list_words(word);
            self.list_free(word);
            return self.list_from(&words);
        }
        word
    }

    // ---- places --------------------------------------------------------------------------------------------------------------------

    /// The run of a block, and its number there.
    #[inline]
    pub(super) fn locate(&self, block: u32) -> (u32, u32) {
        let (mut run, page) = self.pages.owner[(block / PAGE) as usize];
        let mut at = page * PAGE + block % PAGE;
        loop {
            let header = self.shared.header(run);
            let skip = (header[3].load(Relaxed) >> 32) as u32;
            if let Some(at) = at.checked_sub(skip)
                && at < length(header[0].load(Relaxed))
            {
                return (run, at);
            }
            run = self.metas[run as usize].next;
            at = block % PAGE;
        }
    }

    #[inline]
    pub(super) fn block_at(&self, run: u32, at: u32) -> u32 {
        self.shared.block_at(self.word(run, 3), at)
    }

    #[inline]
    pub(super) fn prefix_of(&self, block: u32) -> u64 {
        self.shared.prefixes.get(block)
    }

    pub(super) fn live_runs(&self) -> impl Iterator<Item = u32> {
        (0..self.metas.len() as u32).filter(|&run| self.len(run) > 0)
    }

    /// Blocks of a run from `from` on that continue a prompt as `prefixes` does.
    fn matching(&self, run: u32, from: u32, prefixes: &[u64]) -> u32 {
        let (word3, avail) = (self.word(run, 3), (self.len(run) - from).min(prefixes.len() as u32));
        let mut done = 0;
        while done < avail {
            let block = self.shared.block_at(word3, from + done);
            let here = (PAGE - block % PAGE).min(avail - done);
            let stored = self.shared.prefixes.from(block).iter();
            let wanted = &prefixes[done as usize..(done + here) as usize];
            let same = wanted.iter().zip(stored).take_while(|(a, b)| **a == b.load(Relaxed)).count() as u32;
            done += same;
            if same < here {
                break;
            }
        }
        done
    }

    fn find_run(&self, prefix: u64) -> Option<u32> {
        self.shared.table.find(prefix, |run| {
            let header = self.shared.header(run);
            (header[1].load(Relaxed) == prefix && length(header[0].load(Relaxed)) > 0).then_some(run)
        })
    }

    /// The next stretch of the prompt that follows `after` (`NONE`: the root, and `depth` 0) and continues with
    /// `prefixes`: at least one block, made if it is not there.
    ///
    /// Nobody holds the blocks that had to be made; they go again at the end of the event unless somebody does then.
    pub(super) fn advance(&mut self, after: u32, depth: u32, prefixes: &[u64], rank: u32) -> Segment {
        let mut last = NONE;
        if after != NONE {
            let (run, at) = self.locate(after);
            let from = at + 1;
            if from < self.len(run) {
                let count = self.matching(run, from, prefixes);
                if count > 0 {
                    return Segment { run, from, count, fresh: false };
                }
                self.split(run, from);
            }
            last = run;
        }
        if last == NONE || self.metas[last as usize].kids > 0 {
            if let Some(run) = self.find_run(prefixes[0]) {
                let count = self.matching(run, 0, prefixes);
                debug_assert!(count > 0);
                return Segment { run, from: 0, count, fresh: false };
            }
        } else if self.may_grow(last, rank) {
            let from = self.len(last);
            self.metas[last as usize].touched = self.clock;
            self.demote_full(last);
            let count = self.append(last, &prefixes[..prefixes.len().min((MAX_RUN - from) as usize)]);
            self.dying.push(last);
            return Segment { run: last, from, count, fresh: true };
        }
        let count = prefixes.len().min(MAX_RUN as usize) as u32;
        let run = self.make_run(after, depth, &prefixes[..count as usize]);
        self.dying.push(run);
        Segment { run, from: 0, count, fresh: true }
    }

    /// A run may be lengthened by a rank if nothing follows it and no other rank holds it whole.
    fn may_grow(&self, run: u32, rank: u32) -> bool {
        let full = self.metas[run as usize].full;
        self.len(run) < MAX_RUN && (full == 0 || full == 1 && self.in_full(run, rank))
    }

    /// Whether the arrays can take `blocks` more blocks, whatever runs they form.
    pub(super) fn has_room(&self, blocks: usize) -> bool {
        let limit = |words: u64, chunks: u64| words + (1 << 18) < chunks << 16;
        let blocks = blocks as u64 + u64::from(PAGE);
        limit((self.pages.owner.len() as u64 + blocks) * u64::from(PAGE), 1 << 12)
            && limit((self.metas.len() as u64 + 2 * blocks) * u64::from(HEADER), 1 << 11)
            && limit(self.slab.live * 2 + blocks, 1 << 12)
    }

    fn take_page(&mut self, owner: (u32, u32)) -> u32 {
        let page = self.pages.free.pop().unwrap_or_else(|| {
            self.pages.owner.push(owner);
            self.pages.users.push(0);
            self.pages.owner.len() as u32 - 1
        });
        self.pages.owner[page as usize] = owner;
        self.pages.users[page as usize] = 1;
        let reached = self.shared.prefixes.reach(page * PAGE);
        debug_assert!(reached, "room was checked before the event");
        self.engines.reach(page * PAGE);
        page
    }

    /// A run leaves the pages `from..to` of a list. The last goes first, so that they are taken again in their order.
    fn release_pages(&mut self, list: u32, from: u32, to: u32) {
        for at in (from..to).rev() {
            let page = self.page(list, at);
            let users = &mut self.pages.users[page as usize];
            *users -= 1;
            if *users == 0 {
                self.pages.free.push(page);
            }
        }
    }

    fn page(&self, list: u32, at: u32) -> u32 {
        (self.shared.slab.get(list + at / 2) >> (32 * (at % 2))) as u32
    }

    fn set_page(&self, list: u32, at: u32, page: u32) {
        let old = self.shared.slab.get(list + at / 2);
        let shift = 32 * (at % 2);
        self.shared.slab.set(list + at / 2, old & !(0xffff_ffff << shift) | u64::from(page) << shift);
    }

    fn write_prefixes(&mut self, word3: u64, from: u32, prefixes: &[u64]) {
        let mut done = 0;
        while done < prefixes.len() {
            let block = self.shared.block_at(word3, from + done as u32);
            let here = ((PAGE - block % PAGE) as usize).min(prefixes.len() - done);
            let slots = self.shared.prefixes.from(block);
            for (slot, prefix) in slots.iter().zip(&prefixes[done..done + here]) {
                slot.store(*prefix, Relaxed);
            }
            done += here;
        }
    }

    /// Lengthens a run; the full holders hold the new blocks too.
    fn append(&mut self, run: u32, prefixes: &[u64]) -> u32 {
        let (len, word3) = (self.len(run), self.word(run, 3));
        let (skip, old_list) = ((word3 >> 32) as u32, word3 as u32);
        let count = prefixes.len() as u32;
        let (old_pages, pages) = (pages_of(skip, len), pages_of(skip, len + count));
        let mut new_list = old_list;
        if list_class(pages) != list_class(old_pages) {
            new_list = self.take(list_class(pages));
            for i in 0..old_pages.div_ceil(2) {
                self.shared.slab.set(new_list + i, self.shared.slab.get(old_list + i));
            }
        }
        for at in old_pages..pages {
            let page = self.take_page((run, at));
            self.set_page(new_list, at, page);
        }
        let word3 = u64::from(skip) << 32 | u64::from(new_list);
        self.write_prefixes(word3, len, prefixes);
        let kind = set_kind(self.word(run, 0));
        self.open(run);
        self.set_word(run, 3, word3);
        self.set_word(run, 2, prefixes[prefixes.len() - 1]);
        self.close(run, len + count, kind);
        if new_list != old_list {
            self.slab.give(old_list, list_class(old_pages));
        }
        count
    }

    fn take_run(&mut self) -> u32 {
        self.free_runs.pop().unwrap_or_else(|| {
            self.metas.push(Meta { parent: NONE, kids: 0, next: NONE, depth: 0, full: 0, touched: 0 });
            let run = self.metas.len() as u32 - 1;
            let reached = self.shared.headers.reach(run * HEADER);
            debug_assert!(reached, "room was checked before the event");
            run
        })
    }

    fn make_run(&mut self, parent: u32, depth: u32, prefixes: &[u64]) -> u32 {
        let run = self.take_run();
        self.metas[run as usize] = Meta { parent, kids: 0, next: NONE, depth, full: 0, touched: self.clock };
        let pages = pages_of(0, prefixes.len() as u32);
        let list = self.take(list_class(pages));
        for at in 0..pages {
            let page = self.take_page((run, at));
            self.set_page(list, at, page);
        }
        self.write_prefixes(u64::from(list), 0, prefixes);
        self.open(run);
        let last = prefixes[prefixes.len() - 1];
        for (at, value) in (1..8).zip([prefixes[0], last, u64::from(list), 0, 0, 0, 0]) {
            self.set_word(run, at, value);
        }
        self.close(run, prefixes.len() as u32, SetKind::INLINE);
        if parent != NONE {
            let (before, _) = self.locate(parent);
            self.metas[before as usize].kids += 1;
        }
        self.enter_table(prefixes[0], run);
        run
    }

    fn enter_table(&mut self, prefix: u64, run: u32) {
        let Self { table, shared, .. } = self;
        table.insert(&shared.table, prefix, run, |r| shared.header(r)[1].load(Relaxed));
    }

    /// Cuts a run in two before its block `at`.
    pub(super) fn split(&mut self, run: u32, at: u32) {
        let upper = self.take_run();
        let (len, word3) = (self.len(run), self.word(run, 3));
        let (skip, old_list) = ((word3 >> 32) as u32, word3 as u32);
        let meta = self.metas[run as usize];
        let parent = self.shared.block_at(word3, at - 1);

        // Pages: the upper run gets its own list, the lower keeps the beginning of the old one.
        let (pages, low_pages) = (pages_of(skip, len), pages_of(skip, at));
        let (first_page, up_skip) = ((skip + at) / PAGE, (skip + at) % PAGE);
        let up_pages = pages - first_page;
        let up_list = self.take(list_class(up_pages));
        for i in 0..up_pages {
            let page = self.page(old_list, first_page + i);
            self.set_page(up_list, i, page);
            if i > 0 || up_skip == 0 {
                self.pages.owner[page as usize] = (upper, i);
            } else {
                self.pages.users[page as usize] += 1;
            }
        }
        let mut low_list = old_list;
        if list_class(low_pages) != list_class(pages) {
            low_list = self.take(list_class(low_pages));
            for i in 0..low_pages.div_ceil(2) {
                self.shared.slab.set(low_list + i, self.shared.slab.get(old_list + i));
            }
        }
        self.metas[upper as usize] = Meta {
            parent,
            kids: meta.kids,
            next: meta.next,
            depth: meta.depth + at,
            full: 0,
            touched: meta.touched,
        };
        let low = &mut self.metas[run as usize];
        low.kids = 1;
        low.next = if up_skip == 0 { NONE } else { upper };

        // Who holds what of either.
        let parts = self.list_words(self.word(run, 6));
        let predictions = self.list_words(self.word(run, 7));
        let (kind, set) = (set_kind(self.word(run, 0)), [self.word(run, 4), self.word(run, 5)]);
        let first = self.shared.prefix_at(word3, at);

        self.open(upper);
        let up_word3 = u64::from(up_skip) << 32 | u64::from(up_list);
        for (k, value) in (1..8).zip([first, self.word(run, 2), up_word3, 0, 0, 0, 0]) {
            self.set_word(upper, k, value);
        }
        self.close(upper, len - at, SetKind::INLINE);
        self.copy_set(upper, kind, set);
        self.enter_table(first, upper);

        self.open(run);
        self.set_word(run, 2, self.shared.prefix_at(word3, at - 1));
        self.set_word(run, 3, u64::from(skip) << 32 | u64::from(low_list));
        self.close(run, at, kind);
        if low_list != old_list {
            self.slab.give(old_list, list_class(pages));
        }
        for part in parts.into_iter().map(Part::decode) {
            self.split_part(run, upper, at, len, part);
        }
        self.split_predictions(run, upper, at, &predictions);
        self.dying.push(upper);
    }

    // ---- the end of runs -----------------------------------------------------------------------------------------------------------

    /// Cuts or frees the runs that lost holders in this event.
    pub(super) fn reap(&mut self) {
        while let Some(run) = self.dying.pop() {
            let len = self.len(run);
            let Meta { kids, full, .. } = self.metas[run as usize];
            if len == 0 || kids > 0 || full > 0 {
                continue;
            }
            let held = self.held_end(run);
            if held == 0 {
                self.free_run(run);
            } else if held < len {
                self.cut(run, held);
            }
        }
    }

    fn forget_names(&mut self, run: u32, from: u32, to: u32) {
        let word3 = self.word(run, 3);
        let Self { shared, engines, names, homes, .. } = self;
        let mut at = from;
        while at < to {
            // Some pages at once, so that the loads of their buckets overlap; and meanwhile those of the next pages' names.
            homes.clear();
            for page in (at + 4 * PAGE..(at + 8 * PAGE).min(to)).step_by(PAGE as usize) {
                let names = engines.stretch(shared.block_at(word3, page) / PAGE * PAGE, PAGE);
                prefetch(&names[0]);
                prefetch(&names[8]);
            }
            while at < to && homes.len() < 4 * PAGE as usize {
                let first = shared.block_at(word3, at);
                let count = (PAGE - first % PAGE).min(to - at);
                for (block, name) in (first..).zip(engines.stretch_mut(first, count)) {
                    if *name != NAMELESS {
                        homes.push((names.warm(spread(*name)), block));
                        *name = NAMELESS;
                    }
                }
                at += count;
            }
            for &(home, block) in homes.iter() {
                names.remove(home, block);
            }
        }
    }

    /// Cuts the blocks from `to` on, which nobody holds and nothing follows; those who hold the rest hold all.
    pub(super) fn cut(&mut self, run: u32, to: u32) {
        let (word0, word3, len) = (self.word(run, 0), self.word(run, 3), self.len(run));
        let (skip, old_list) = ((word3 >> 32) as u32, word3 as u32);
        self.forget_names(run, to, len);
        let (pages, left) = (pages_of(skip, len), pages_of(skip, to));
        if left == pages {
            self.open(run);
            self.set_word(run, 2, self.shared.prefix_at(word3, to - 1));
            self.close(run, to, set_kind(word0));
            if self.word(run, 6) != 0 {
                self.promote_parts(run);
            }
            return;
        }
        let mut new_list = old_list;
        if list_class(left) != list_class(pages) {
            new_list = self.take(list_class(left));
            for i in 0..left.div_ceil(2) {
                self.shared.slab.set(new_list + i, self.shared.slab.get(old_list + i));
            }
        }
        self.open(run);
        self.set_word(run, 2, self.shared.prefix_at(word3, to - 1));
        self.set_word(run, 3, u64::from(skip) << 32 | u64::from(new_list));
        self.close(run, to, set_kind(word0));
        self.release_pages(old_list, left, pages);
        if new_list != old_list {
            self.slab.give(old_list, list_class(pages));
        }
        if self.word(run, 6) != 0 {
            self.promote_parts(run);
        }
    }

    pub(super) fn free_run(&mut self, run: u32) {
        let (len, word3) = (self.len(run), self.word(run, 3));
        self.forget_names(run, 0, len);
        let first = self.word(run, 1);
        let Self { table, shared, .. } = self;
        table.remove(&shared.table, first, run, |r| shared.header(r)[1].load(Relaxed));
        let (skip, pages_list) = ((word3 >> 32) as u32, word3 as u32);
        let count = pages_of(skip, len);
        self.open(run);
        self.close(run, 0, SetKind::INLINE);
        self.release_pages(pages_list, 0, count);
        self.slab.give(pages_list, list_class(count));
        let Meta { parent, next, .. } = self.metas[run as usize];
        if parent != NONE {
            let (before, _) = self.locate(parent);
            let before_meta = &mut self.metas[before as usize];
            before_meta.kids -= 1;
            if before_meta.next == run {
                before_meta.next = next;
            }
            self.dying.push(before);
        }
        self.free_runs.push(run);
    }

    /// Gives a nameless block a main name, if the name is free.
    #[inline]
    pub(super) fn give_main_name(&mut self, block: u32, name: EngineHash) -> bool {
        if name.0 == NAMELESS || self.engines.get(block) != NAMELESS {
            return false;
        }
        let Self { names, engines, .. } = self;
        if names.enter(name.0, names.home(spread(name.0)), block, |b| engines.get(b)) != NONE {
            return false;
        }
        engines.set(block, name.0);
        true
    }
}
