//! Where choices come from: a seed, or the bytes of a fuzzer.

/// A source of choices.
pub enum Choice<'a> {
    /// SplitMix64; never ends.
    Seed(u64),
    /// Ends with the bytes; then everything is 0.
    Bytes(&'a [u8]),
}

/// One round of SplitMix64.
pub fn mix(x: u64) -> u64 {
    let mut z = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

impl Choice<'_> {
    /// Whether there are choices left.
    pub fn goes_on(&self) -> bool {
        !matches!(self, Self::Bytes([]))
    }

    /// A number below `n`, which is at least 1.
    pub fn below(&mut self, n: u64) -> u64 {
        match self {
            Self::Seed(state) => {
                let chosen = mix(*state) % n;
                *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
                chosen
            }
            Self::Bytes(bytes) => {
                let mut value = 0;
                // As many bytes as the number needs, so that small choices stay small inputs.
                let mut reach = 1u64;
                while reach < n {
                    let (byte, rest) = bytes.split_first().unwrap_or((&0, &[]));
                    *bytes = rest;
                    value = value << 8 | u64::from(*byte);
                    reach = reach.saturating_mul(256);
                }
                value % n
            }
        }
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<'t, T>(&mut self, from: &'t [T]) -> Option<&'t T> {
        if from.is_empty() { None } else { from.get(self.below(from.len() as u64) as usize) }
    }
}
