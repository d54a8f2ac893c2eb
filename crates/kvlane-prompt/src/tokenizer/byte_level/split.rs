//! Text into words: a pre-tokenizer's regular expression as an automaton.
//!
//! The library runs these expressions through Oniguruma, by backtracking. They are simple enough for an automaton that reads each byte once:
//! alternatives of runs of character classes, first one wins. Only the rule for blanks looks ahead (`\s+(?!\S)|\s+`: a run of blanks
//! leaves its last one to the word behind it), and that is done after the match.
//!
//! Classes are the one thing on which two regular expression libraries may differ (versions of Unicode, what `\s` or `\p{P}` mean, how letters fold), so they are not
//! translated: Oniguruma itself is asked, once at load, which characters each class matches. The structure around them is translated from the syntax tree,
//! and anything beyond alternatives, sequences and greedy repetitions is refused.

use regex_automata::hybrid::dfa::{Cache, Config, DFA};
use regex_automata::nfa::thompson::{self, NFA, State, WhichCaptures};
use regex_automata::util::primitives::StateID;
use regex_automata::{Anchored, Input, MatchKind};
use regex_syntax::ast::{self, Ast, GroupKind, RepetitionKind, RepetitionRange};
use regex_syntax::hir::{self, Hir};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};
use tokenizers::utils::SysRegex;

/// Working memory of one automaton: states are built when they are first needed, and built anew when this is full.
const AUTOMATON_BYTES: usize = 8 << 20;
/// Longest expression that is looked at.
const PATTERN_BYTES_MAX: usize = 4096;

/// How a run of blanks is split, at the end of nearly every expression.
const BLANKS: [&str; 2] = [r"|\s+(?!\S)|\s+", r"|\s+(?!\S)|\s"];

/// An expression, ready to split.
#[derive(Debug)]
pub(super) struct Splitter {
    dfa: DFA,
    /// Bytes that a match can begin with.
    begins: [bool; 256],
    /// Whether the second pattern is that of [`BLANKS`].
    blanks: bool,
    /// Whether text between matches is a word too.
    gaps: bool,
    /// See [`Splitter::joins_words`].
    joins: bool,
}

/// What an automaton has built so far, and where it begins.
#[derive(Debug)]
pub(super) struct Automaton(Cache);

impl Splitter {
    /// `None`: the expression has something that is not understood.
    pub(super) fn new(pattern: &str, gaps: bool) -> Option<Self> {
        if pattern.len() > PATTERN_BYTES_MAX {
            return None;
        }
        let head = BLANKS.iter().find_map(|blanks| pattern.strip_suffix(blanks));
        let mut hirs = vec![translate(head.unwrap_or(pattern))?];
        if head.is_some() {
            hirs.push(translate(r"\s+")?);
        }
        // An empty match would not advance.
        if hirs.iter().any(|hir| hir.properties().minimum_len().is_none_or(|len| len == 0)) {
            return None;
        }
        let nfa = NFA::compiler()
            .configure(thompson::Config::new().which_captures(WhichCaptures::None))
            .build_many_from_hir(&hirs)
            .ok()?;
        let joins = joins_words(&nfa);
        let config = Config::new()
            .match_kind(MatchKind::LeftmostFirst)
            .cache_capacity(AUTOMATON_BYTES)
            .skip_cache_capacity_check(true);
        let dfa = DFA::builder().configure(config).build_from_nfa(nfa).ok()?;
        let mut cache = dfa.create_cache();
        let mut begins = [false; 256];
        let start = dfa.start_state_forward(&mut cache, &Input::new("").anchored(Anchored::Yes)).ok()?;
        for byte in 0..=u8::MAX {
            begins[usize::from(byte)] = !dfa.next_state(&mut cache, start, byte).ok()?.is_dead();
        }
        Some(Self { dfa, begins, blanks: head.is_some(), gaps, joins })
    }

    pub(super) fn automaton(&self) -> Automaton {
        Automaton(self.dfa.create_cache())
    }

    /// Whether a match may hold a letter of `a` to `z` with a blank behind it. If not, then whatever was found up to such a letter does not
    /// depend on what is behind it, and the search goes on at the blank as at the beginning of a text.
    pub(super) fn joins_words(&self) -> bool {
        self.joins
    }

    /// Whether a blank and a letter of `a` to `z` always begin a match, so that a word ends before them unless a match joins it to them.
    pub(super) fn begins_at_blank(&self, Automaton(cache): &mut Automaton) -> bool {
        (b'a'..=b'z').all(|letter| {
            let text = [b' ', letter];
            let found = self.dfa.try_search_fwd(cache, &Input::new(&text).anchored(Anchored::Yes));
            found.is_ok_and(|found| found.is_some_and(|found| found.pattern().as_usize() == 0))
        })
    }

    /// Appends the words of `range` of `text`, which must begin and end between characters. `None`: the automaton gave up.
    pub(super) fn split(
        &self,
        Automaton(cache): &mut Automaton,
        text: &[u8],
        range: Range<usize>,
        words: &mut Vec<Range<usize>>,
    ) -> Option<()> {
        // What lies beyond the piece does not count: for the rule of blanks, its end is the end of the text.
        let text = &text[..range.end];
        let (mut gap, mut at) = (range.start, range.start);
        while at < text.len() {
            if self.begins[usize::from(text[at])] {
                let input = Input::new(text).range(at..).anchored(Anchored::Yes);
                if let Some(found) = self.dfa.try_search_fwd(cache, &input).ok()? {
                    let mut end = found.offset();
                    if self.blanks && found.pattern().as_usize() == 1 && end < text.len() {
                        end = before_last_character(text, at, end);
                    }
                    if self.gaps && gap < at {
                        words.push(gap..at);
                    }
                    words.push(at..end);
                    (gap, at) = (end, end);
                    continue;
                }
            }
            at += 1;
        }
        if self.gaps && gap < text.len() {
            words.push(gap..text.len());
        }
        Some(())
    }
}

/// Whether some way through `nfa` reads a letter of `a` to `z` and a blank after it.
fn joins_words(nfa: &NFA) -> bool {
    let (mut behind_letters, mut joins) = (Vec::new(), false);
    // From the beginning of a match, not from before it, where an unanchored search reads anything.
    walk(nfa, vec![nfa.start_anchored()], |state| {
        behind_letters.extend((b'a'..=b'z').filter_map(|letter| read(state, letter)));
        true
    });
    walk(nfa, behind_letters, |state| {
        joins |= read(state, b' ').is_some();
        false
    });
    joins
}

/// Visits every state that is reached from `from` without reading anything, or by reading where `visit` says so.
fn walk(nfa: &NFA, from: Vec<StateID>, mut visit: impl FnMut(&State) -> bool) {
    let mut seen = vec![false; nfa.states().len()];
    let mut left = from;
    while let Some(id) = left.pop() {
        if std::mem::replace(&mut seen[id.as_usize()], true) {
            continue;
        }
        let state = nfa.state(id);
        if visit(state) {
            left.extend((0..=u8::MAX).filter_map(|byte| read(state, byte)));
        }
        match state {
            State::Look { next, .. } | State::Capture { next, .. } => left.push(*next),
            State::Union { alternates } => left.extend(alternates),
            State::BinaryUnion { alt1, alt2 } => left.extend([*alt1, *alt2]),
            _ => {}
        }
    }
}

/// Where `state` goes to by reading `byte`.
fn read(state: &State, byte: u8) -> Option<StateID> {
    match state {
        State::ByteRange { trans } => trans.matches_byte(byte).then_some(trans.next),
        State::Sparse(sparse) => sparse.matches_byte(byte),
        State::Dense(dense) => dense.matches_byte(byte),
        _ => None,
    }
}

/// Where the last character of `text[start..end]` begins; `end` if it is the only one.
fn before_last_character(text: &[u8], start: usize, end: usize) -> usize {
    let mut last = end - 1;
    while text[last] & 0xc0 == 0x80 {
        last -= 1;
    }
    if last > start { last } else { end }
}

/// Appends `range` of `text` with every numeric character by itself.
pub(super) fn digits(text: &str, range: Range<usize>, words: &mut Vec<Range<usize>>) {
    let mut from = range.start;
    for (at, c) in text[range.clone()].char_indices().filter(|(_, c)| c.is_numeric()) {
        let at = range.start + at;
        if from < at {
            words.push(from..at);
        }
        from = at + c.len_utf8();
        words.push(at..from);
    }
    if from < range.end {
        words.push(from..range.end);
    }
}

fn translate(pattern: &str) -> Option<Hir> {
    let tree = ast::parse::Parser::new().parse(pattern).ok()?;
    node(pattern, &tree, false)
}

fn node(pattern: &str, tree: &Ast, fold: bool) -> Option<Hir> {
    let source = |span: &ast::Span| &pattern[span.start.offset..span.end.offset];
    match tree {
        Ast::Empty(_) => Some(Hir::empty()),
        Ast::Literal(literal) => class(source(&literal.span), fold),
        Ast::ClassUnicode(it) => class(source(&it.span), fold),
        Ast::ClassPerl(it) => class(source(&it.span), fold),
        Ast::ClassBracketed(it) => class(source(&it.span), fold),
        Ast::Repetition(repetition) => {
            // A sign behind a sign means "lazy" or "possessive" in one library and something else in the other.
            if !repetition.greedy || matches!(*repetition.ast, Ast::Repetition(_)) {
                return None;
            }
            let (min, max) = match &repetition.op.kind {
                RepetitionKind::ZeroOrOne => (0, Some(1)),
                RepetitionKind::ZeroOrMore => (0, None),
                RepetitionKind::OneOrMore => (1, None),
                RepetitionKind::Range(RepetitionRange::Exactly(n)) => (*n, Some(*n)),
                RepetitionKind::Range(RepetitionRange::AtLeast(n)) => (*n, None),
                RepetitionKind::Range(RepetitionRange::Bounded(n, m)) => (*n, Some(*m)),
            };
            let sub = Box::new(node(pattern, &repetition.ast, fold)?);
            Some(Hir::repetition(hir::Repetition { min, max, greedy: true, sub }))
        }
        Ast::Group(group) => {
            let fold = match &group.kind {
                GroupKind::CaptureIndex(_) => fold,
                GroupKind::NonCapturing(flags) => match source(&flags.span) {
                    "" => fold,
                    // Folding may join letters (ss and ß), which a class of single characters cannot say.
                    "i" if !joins(source(&group.span)) => true,
                    _ => return None,
                },
                GroupKind::CaptureName { .. } => return None,
            };
            node(pattern, &group.ast, fold)
        }
        Ast::Alternation(alternation) => {
            let all: Option<Vec<Hir>> = alternation.asts.iter().map(|ast| node(pattern, ast, fold)).collect();
            Some(Hir::alternation(all?))
        }
        Ast::Concat(concat) => {
            let all: Option<Vec<Hir>> = concat.asts.iter().map(|ast| node(pattern, ast, fold)).collect();
            Some(Hir::concat(all?))
        }
        Ast::Flags(_) | Ast::Dot(_) | Ast::Assertion(_) => None,
    }
}

/// What `source`, which stands for one character, matches. Asking takes a few milliseconds, and models share their classes.
fn class(source: &str, fold: bool) -> Option<Hir> {
    /// Answers that are kept: more than all expressions in use have.
    const KNOWN_MAX: usize = 256;
    static KNOWN: Mutex<BTreeMap<String, hir::ClassUnicode>> = Mutex::new(BTreeMap::new());
    let key = if fold { format!("(?i:{source})") } else { source.to_owned() };
    let known = || KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    let found = known().get(&key).cloned();
    let class = match found {
        Some(class) => class,
        None => {
            let class = characters(&key)?;
            let mut known = known();
            if known.len() < KNOWN_MAX {
                known.insert(key, class.clone());
            }
            class
        }
    };
    Some(Hir::class(hir::Class::Unicode(class)))
}

fn joins(folded: &str) -> bool {
    let lower = folded.to_lowercase();
    !lower.is_ascii() || ["ss", "ff", "fi", "fl", "st"].iter().any(|pair| lower.contains(pair))
}

/// All characters that `class` matches, found by running it over every character there is.
fn characters(class: &str) -> Option<hir::ClassUnicode> {
    /// Characters in one text.
    const TEXT_CHARS: u32 = 4096;
    let run = SysRegex::new(&format!("(?:{class})+")).ok()?;
    let mut ranges = Vec::new();
    let mut text = String::new();
    for from in (0..=u32::from(char::MAX)).step_by(TEXT_CHARS as usize) {
        text.clear();
        // Surrogates, which are no characters, end where a text ends: what is in one text is a range without holes.
        text.extend((from..from + TEXT_CHARS).filter_map(char::from_u32));
        for (start, end) in run.find_iter(&text) {
            let found = &text[start..end];
            let (first, last) = (found.chars().next()?, found.chars().next_back()?);
            // Anything else matched more than single characters.
            if found.chars().count() as u32 != u32::from(last) - u32::from(first) + 1 {
                return None;
            }
            ranges.push(hir::ClassUnicodeRange::new(first, last));
        }
    }
    Some(hir::ClassUnicode::new(ranges))
}
