//! The scheduler's only source of chance: SplitMix64, seeded by the caller.
//!
//! Ties and samples need a fair generator, not a secret one. The server seeds it from the operating system, the simulator from its seed.
//! Algorithm: Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.

/// A seeded generator; equal seeds give equal draws.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// A generator that starts at `seed`; every seed is a good one.
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 fair bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        mix(self.0)
    }

    /// A number in `0..n`; `n` must be above 0. The bias is below 2^-32 for the sizes of fleets.
    pub fn below(&mut self, n: usize) -> usize {
        debug_assert!(n > 0, "a draw from nothing");
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// A number in `0.0..1.0`.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

/// Scrambles 64 bits: a bijection whose output bits each depend on all input bits.
pub(crate) const fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
