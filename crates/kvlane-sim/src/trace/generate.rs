//! Synthetic traces of the natures that tell routers apart. Poisson arrivals; the same seed gives the same trace.

use super::{Start, Trace};
use kvlane_sched::Rng;
use std::fmt;
use std::str::FromStr;

/// Tokens of a block in generated traces.
const BLOCK_TOKENS: u32 = 64;

/// What the traffic is like.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Nature {
    /// Groups that share a long system prompt, one short question each, long answers.
    SharedPrompts,
    /// Conversations of several turns over a shared system prompt; the next turn follows the answer.
    MultiTurn,
    /// A few very hot prefixes with short answers.
    HotPrefixes,
    /// No two prompts share anything.
    NoReuse,
}

impl Nature {
    /// All natures.
    pub const ALL: [Self; 4] = [Self::SharedPrompts, Self::MultiTurn, Self::HotPrefixes, Self::NoReuse];

    /// The name on the command line.
    pub const fn name(self) -> &'static str {
        match self {
            Self::SharedPrompts => "shared-prompts",
            Self::MultiTurn => "multi-turn",
            Self::HotPrefixes => "hot-prefixes",
            Self::NoReuse => "no-reuse",
        }
    }
}

/// No nature has this name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UnknownNature(String);

impl fmt::Display for UnknownNature {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is no nature of traffic; there are ", self.0)?;
        for (i, nature) in Nature::ALL.iter().enumerate() {
            write!(f, "{}{}", if i == 0 { "" } else { ", " }, nature.name())?;
        }
        Ok(())
    }
}

impl std::error::Error for UnknownNature {}

impl FromStr for Nature {
    type Err = UnknownNature;

    fn from_str(name: &str) -> Result<Self, UnknownNature> {
        Self::ALL.into_iter().find(|n| n.name() == name).ok_or_else(|| UnknownNature(name.to_owned()))
    }
}

/// Makes new ids and draws.
struct Source {
    rng: Rng,
    next_id: u32,
}

impl Source {
    fn blocks(&mut self, count: u32) -> Vec<u32> {
        let from = self.next_id;
        self.next_id += count;
        (from..self.next_id).collect()
    }

    fn exponential(&mut self, mean: f64) -> f64 {
        -mean * (1.0 - self.rng.unit()).ln()
    }

    /// About `mean`, between a quarter and four times it.
    fn around(&mut self, mean: u32) -> u32 {
        let factor = self.exponential(1.0).clamp(0.25, 4.0);
        ((f64::from(mean) * factor) as u32).max(1)
    }

    /// Zipf-like choice among `n`: the first is the hottest.
    fn zipf(&mut self, n: u32) -> u32 {
        let x = f64::from(n).powf(self.rng.unit());
        (x as u32).clamp(1, n) - 1
    }
}

/// About `requests` requests at `rate_per_s`.
pub fn generate(nature: Nature, requests: u32, rate_per_s: f64, seed: u64) -> Trace {
    let mut source = Source { rng: Rng::new(seed ^ 0x9e_4e_4a_7e), next_id: 0 };
    let mut trace = Trace::new(nature.name(), BLOCK_TOKENS);
    let mut at_ms = 0.0;
    let gap_ms = 1000.0 / rate_per_s;
    let tail = |source: &mut Source, prefix: &[u32], tokens: u32| {
        let mut ids = prefix.to_vec();
        ids.extend(source.blocks(tokens.div_ceil(BLOCK_TOKENS)));
        (prefix.len() as u32 * BLOCK_TOKENS + tokens, ids)
    };
    match nature {
        Nature::SharedPrompts => {
            let groups: Vec<Vec<u32>> = (0..150).map(|_| source.blocks(6_000 / BLOCK_TOKENS)).collect();
            for session in 0..requests {
                at_ms += source.exponential(gap_ms);
                let group = source.rng.below(groups.len());
                let question = source.around(1_200);
                let (input, ids) = tail(&mut source, &groups[group], question);
                let output = source.around(500);
                trace.push(session, Start::AtMs(at_ms), input, output, &ids);
            }
        }
        Nature::MultiTurn => {
            let system: Vec<Vec<u32>> = (0..16).map(|_| source.blocks(2_048 / BLOCK_TOKENS)).collect();
            const TURNS: u32 = 6;
            for session in 0..requests.div_ceil(TURNS) {
                at_ms += source.exponential(gap_ms * f64::from(TURNS));
                let mut context = system[source.zipf(16) as usize].clone();
                for turn in 0..TURNS {
                    let question = source.around(400);
                    let (input, ids) = tail(&mut source, &context, question);
                    let output = source.around(300);
                    let start = if turn == 0 {
                        Start::AtMs(at_ms)
                    } else {
                        Start::AfterMs(source.exponential(8_000.0))
                    };
                    trace.push(session, start, input, output, &ids);
                    context = ids;
                    context.extend(source.blocks(output.div_ceil(BLOCK_TOKENS)));
                }
            }
        }
        Nature::HotPrefixes => {
            let prefixes: Vec<Vec<u32>> = (0..40).map(|_| source.blocks(8_192 / BLOCK_TOKENS)).collect();
            for session in 0..requests {
                at_ms += source.exponential(gap_ms);
                let hot = source.zipf(40) as usize;
                let question = source.around(600);
                let (input, ids) = tail(&mut source, &prefixes[hot], question);
                let output = source.around(60);
                trace.push(session, Start::AtMs(at_ms), input, output, &ids);
            }
        }
        Nature::NoReuse => {
            for session in 0..requests {
                at_ms += source.exponential(gap_ms);
                let input = source.around(4_000);
                let (input, ids) = tail(&mut source, &[], input);
                let output = source.around(250);
                trace.push(session, Start::AtMs(at_ms), input, output, &ids);
            }
        }
    }
    super::arrival::order(&mut trace);
    trace
}
