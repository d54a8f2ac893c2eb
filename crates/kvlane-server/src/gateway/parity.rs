//! Whether the tokens computed here are the engine's, proven while running.
//!
//! A wrong template or tokenizer makes no error: it only makes every hit vanish. So each model's local tokens are compared
//! with its engine's `/tokenize`: on fixed requests at the start, on samples of the real ones, and on the next few
//! requests whenever something speaks against them (the engine counts another length, or its events do not hold the
//! blocks that were computed here: [`Standing::suspect`]). On a difference the model falls back to the engine's tokens and says what differs,
//! in positions and lengths, never in content. While it is down the comparison goes on, and a row of equal results heals it.

use arc_swap::ArcSwapOption;
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// Real requests that are compared right after the start, and after each suspicion.
const CLOSE_LOOK: u32 = 4;
/// Of the others, one in so many.
const SAMPLE_EVERY: u64 = 512;
/// While the model is down, one in so many.
const SAMPLE_EVERY_DOWN: u64 = 8;
/// Equal results in a row that heal.
const EQUAL_TO_HEAL: u32 = 8;

/// What differs; the first difference that was seen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Difference {
    /// What seems to be to blame.
    pub blame: Blame,
    /// Position of the first token that differs, from 0.
    pub first_token: usize,
    /// Tokens computed here.
    pub here: usize,
    /// Tokens that the engine computed.
    pub engine: usize,
    /// Characters of the text that was rendered here; `None` where there is no template.
    pub rendered_chars: Option<usize>,
}

/// Which step differs from the engine's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Blame {
    /// The engine makes the same tokens of the text that was rendered here: its template is another.
    Template,
    /// The engine makes other tokens of the same text.
    Tokenizer,
    /// The engine did not answer the question that would tell.
    Unknown,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blame = match self.blame {
            Blame::Template => "the chat template differs",
            Blame::Tokenizer => "the tokenizer differs",
            Blame::Unknown => "the template or the tokenizer differs",
        };
        let Self { blame: _, first_token, here, engine, rendered_chars } = self;
        write!(
            f,
            "{blame}: {here} tokens here, {engine} at the engine, the first difference at token {first_token}"
        )?;
        rendered_chars.map_or(Ok(()), |chars| write!(f, ", {chars} characters rendered here"))
    }
}

/// Position of the first difference; `None` = equal.
pub(crate) fn first_difference(here: &[u32], engine: &[u32]) -> Option<usize> {
    if here == engine {
        return None;
    }
    let common = here.iter().zip(engine).take_while(|(a, b)| a == b).count();
    Some(common)
}

/// How one model's local tokens stand. All atomic: requests only look.
#[derive(Debug)]
pub(crate) struct Standing {
    /// Set while the engine's tokens are used in place of the local ones.
    down: ArcSwapOption<Difference>,
    requests: AtomicU64,
    /// Requests that are still to be compared, whatever the sampling says.
    close_look: AtomicU32,
    equal_in_a_row: AtomicU32,
    equal: AtomicU64,
    different: AtomicU64,
    impossible: AtomicU64,
}

impl Default for Standing {
    fn default() -> Self {
        Self {
            down: ArcSwapOption::empty(),
            requests: AtomicU64::new(0),
            close_look: AtomicU32::new(CLOSE_LOOK),
            equal_in_a_row: AtomicU32::new(0),
            equal: AtomicU64::new(0),
            different: AtomicU64::new(0),
            impossible: AtomicU64::new(0),
        }
    }
}

impl Standing {
    /// What differs, while the model is down.
    pub(crate) fn difference(&self) -> Option<Arc<Difference>> {
        self.down.load_full()
    }

    /// Whether the local tokens may be used.
    pub(crate) fn is_up(&self) -> bool {
        self.down.load().is_none()
    }

    /// Something speaks against the local tokens: look closely at what comes next.
    pub(crate) fn suspect(&self) {
        self.close_look.store(CLOSE_LOOK, Ordering::Relaxed);
    }

    /// Whether this request is one to compare.
    pub(crate) fn is_due(&self) -> bool {
        let count = self.requests.fetch_add(1, Ordering::Relaxed);
        let close = self.close_look.load(Ordering::Relaxed);
        if close > 0
            && self
                .close_look
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1))
                .is_ok()
        {
            return true;
        }
        count.is_multiple_of(if self.is_up() { SAMPLE_EVERY } else { SAMPLE_EVERY_DOWN })
    }

    /// A comparison was equal; `true` if that heals the model.
    pub(crate) fn passed(&self) -> bool {
        self.equal.fetch_add(1, Ordering::Relaxed);
        let row = self.equal_in_a_row.fetch_add(1, Ordering::Relaxed) + 1;
        row >= EQUAL_TO_HEAL && self.down.swap(None).is_some()
    }

    /// A comparison was not equal; `true` if the model was up before.
    pub(crate) fn failed(&self, difference: Difference) -> bool {
        self.different.fetch_add(1, Ordering::Relaxed);
        self.equal_in_a_row.store(0, Ordering::Relaxed);
        if self.is_up() {
            self.down.store(Some(Arc::new(difference)));
            return true;
        }
        false
    }

    /// The engine did not say its tokens.
    pub(crate) fn could_not(&self) {
        self.impossible.fetch_add(1, Ordering::Relaxed);
    }

    /// Comparisons that were equal, different, and impossible.
    pub(crate) fn counts(&self) -> (u64, u64, u64) {
        let get = |n: &AtomicU64| n.load(Ordering::Relaxed);
        (get(&self.equal), get(&self.different), get(&self.impossible))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn difference() -> Difference {
        Difference { blame: Blame::Template, first_token: 3, here: 9, engine: 8, rendered_chars: Some(40) }
    }

    #[test]
    fn the_first_difference_may_be_an_end() {
        assert_eq!(first_difference(&[1, 2], &[1, 2]), None);
        assert_eq!(first_difference(&[1, 2], &[1, 3]), Some(1));
        assert_eq!(first_difference(&[1, 2], &[1]), Some(1));
        assert_eq!(first_difference(&[], &[1]), Some(0));
    }

    #[test]
    fn a_difference_takes_it_down_and_a_row_of_equals_heals() {
        let standing = Standing::default();
        assert!(standing.is_up() && standing.failed(difference()));
        assert!(!standing.is_up() && !standing.failed(difference()), "down is said once");
        for _ in 1..EQUAL_TO_HEAL {
            assert!(!standing.passed());
        }
        assert!(standing.passed(), "healed");
        assert!(standing.is_up() && !standing.passed());
        assert_eq!(standing.counts(), (u64::from(EQUAL_TO_HEAL) + 1, 2, 0));
    }

    #[test]
    fn the_first_are_compared_then_few_then_more_after_a_suspicion() {
        let standing = Standing::default();
        let due = |n: u32| (0..n).filter(|_| standing.is_due()).count() as u32;
        assert_eq!(due(CLOSE_LOOK), CLOSE_LOOK);
        assert_eq!(due(SAMPLE_EVERY as u32 - CLOSE_LOOK), 0);
        assert_eq!(due(1), 1);
        standing.suspect();
        assert_eq!(due(2 * CLOSE_LOOK), CLOSE_LOOK);
    }

    #[test]
    fn says_positions_and_lengths_only() {
        assert_eq!(
            difference().to_string(),
            "the chat template differs: 9 tokens here, 8 at the engine, the first difference at token 3, 40 characters rendered here"
        );
    }
}
