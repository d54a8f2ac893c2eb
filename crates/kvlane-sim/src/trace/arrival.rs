//! Changes to when and how often the requests of a trace come.

use super::{Start, Trace};
use kvlane_sched::Rng;
use std::collections::HashMap;

/// How to reshape a trace before it is run.
#[derive(Clone, Debug)]
pub struct Shape {
    /// Divides all times, starts and delays alike.
    pub speed: f64,
    /// Spreads each start over this long from its time: some sources give times in batches (Mooncake's conversation: 3,000 ms).
    pub spread_ms: f64,
    /// Repeats the trace with disjoint ids; copies run at the same time, each a random part of `stagger_ms` later.
    pub copies: u32,
    /// How far copies lie apart at most.
    pub stagger_ms: f64,
    /// Keep only starts in this window of the trace's own time (before speed-up), shifted to begin at 0. Sessions are kept whole.
    pub window_ms: Option<(f64, f64)>,
    /// Leave out requests with longer prompts.
    pub max_input_tokens: Option<u32>,
    /// Cap of each delay inside a session, before speed-up.
    pub think_cap_ms: Option<f64>,
    /// So many requests with one prefix more, within a second from this time on (after speed-up).
    pub burst: Option<(u32, f64)>,
}

/// Prompt that all requests of a burst begin with.
const BURST_PREFIX_TOKENS: u32 = 8_192;
/// What follows it in each.
const BURST_OWN_TOKENS: u32 = 200;
/// Their answers.
const BURST_OUTPUT_TOKENS: u32 = 100;

impl Default for Shape {
    fn default() -> Self {
        Self {
            speed: 1.0,
            spread_ms: 0.0,
            copies: 1,
            stagger_ms: 0.0,
            window_ms: None,
            max_input_tokens: None,
            think_cap_ms: None,
            burst: None,
        }
    }
}

impl Shape {
    /// The reshaped trace; the same seed gives the same one.
    pub fn apply(&self, trace: &Trace, seed: u64) -> Trace {
        let mut rng = Rng::new(seed ^ 0x5e_ed_0f_7a_ce);
        let mut out =
            Trace { name: trace.name.clone(), block_tokens: trace.block_tokens, ..Trace::default() };
        let mut ids = Vec::new();
        for copy in 0..self.copies.max(1) {
            let offset_ms = if copy == 0 { 0.0 } else { rng.unit() * self.stagger_ms };
            let mut dropped = vec![false; trace.sessions as usize];
            for request in &trace.requests {
                let start = match request.start {
                    Start::AtMs(at) => {
                        let (from, to) = self.window_ms.unwrap_or((0.0, f64::INFINITY));
                        if !(from..to).contains(&at) {
                            dropped[request.session as usize] = true;
                            continue;
                        }
                        dropped[request.session as usize] = false;
                        Start::AtMs((at - from + offset_ms + rng.unit() * self.spread_ms) / self.speed)
                    }
                    Start::AfterMs(_) if dropped[request.session as usize] => continue,
                    Start::AfterMs(delay) => {
                        Start::AfterMs(delay.min(self.think_cap_ms.unwrap_or(f64::INFINITY)) / self.speed)
                    }
                };
                if self.max_input_tokens.is_some_and(|most| request.input_tokens > most) {
                    continue;
                }
                ids.clear();
                ids.extend(trace.blocks(request).iter().map(|id| id + copy * trace.distinct));
                out.push(
                    request.session + copy * trace.sessions,
                    start,
                    request.input_tokens,
                    request.output_tokens,
                    &ids,
                );
            }
        }
        if let Some((requests, at_ms)) = self.burst {
            let (first, sessions) = (out.distinct, out.sessions);
            ids.clear();
            ids.extend(first..first + BURST_PREFIX_TOKENS.div_ceil(out.block_tokens));
            let prompt_tokens =
                ids.len() as u32 * out.block_tokens + BURST_OWN_TOKENS.min(out.block_tokens - 1);
            for n in 0..requests {
                let start = Start::AtMs(at_ms + rng.unit() * 1000.0);
                out.push(sessions + n, start, prompt_tokens, BURST_OUTPUT_TOKENS, &ids);
            }
        }
        order(&mut out);
        out
    }
}

/// Gives the requests of a trace without sessions those that their prompts show: a prompt that repeats the whole blocks of an earlier one (but
/// perhaps its last) continues that conversation. Starts stay as they are.
pub(super) fn infer_sessions(trace: &mut Trace) {
    /// Fewer shared blocks are a system prompt.
    const SHORTEST: usize = 2;
    let mut seen_in: Vec<Option<u32>> = vec![None; trace.distinct as usize];
    let mut latest: Vec<usize> = Vec::new();
    for i in 0..trace.requests.len() {
        let blocks = &trace.arena[trace.requests[i].ids.clone()];
        let deepest =
            blocks.iter().enumerate().rev().find_map(|(at, b)| seen_in[*b as usize].map(|s| (at + 1, s)));
        let session = match deepest {
            Some((depth, s)) if depth >= SHORTEST && depth + 1 >= latest[s as usize] => s,
            _ => {
                latest.push(0);
                latest.len() as u32 - 1
            }
        };
        latest[session as usize] = blocks.len();
        for b in blocks {
            seen_in[*b as usize] = Some(session);
        }
        trace.requests[i].session = session;
    }
    trace.sessions = latest.len() as u32;
}

/// Orders the requests: sessions by their first start, open-loop requests by time, turns in order; renumbers the sessions densely.
pub(super) fn order(trace: &mut Trace) {
    // A turn sorts with the latest start before it in its session, so that it keeps its place behind it.
    let mut latest: HashMap<u32, f64> = HashMap::new();
    let mut keyed: Vec<(f64, super::TraceRequest)> = Vec::with_capacity(trace.requests.len());
    for mut request in std::mem::take(&mut trace.requests) {
        let key = match (request.start, latest.get(&request.session)) {
            (Start::AtMs(at), _) => at,
            (Start::AfterMs(_), Some(at)) => *at,
            // Its first turn was left out: it begins the session.
            (Start::AfterMs(_), None) => {
                request.start = Start::AtMs(0.0);
                0.0
            }
        };
        latest.insert(request.session, key);
        keyed.push((key, request));
    }
    keyed.sort_by(|a, b| a.0.total_cmp(&b.0));
    let mut numbers: HashMap<u32, u32> = HashMap::new();
    for (_, request) in &mut keyed {
        let next = numbers.len() as u32;
        request.session = *numbers.entry(request.session).or_insert(next);
    }
    trace.sessions = numbers.len() as u32;
    trace.requests = keyed.into_iter().map(|(_, r)| r).collect();
}
