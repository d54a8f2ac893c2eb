//! What goes wrong on purpose, drawn from a seed so that it goes wrong the same way again.

use serde::Deserialize;

/// What may happen to a published message, and to a stream of tokens. Everything off by default.
///
/// The replay buffer always keeps every batch, as a real engine's does when a subscriber's queue overflows.
#[derive(Clone, Debug, PartialEq, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Faults {
    /// Share of event messages that are never published (0 to 1).
    #[arg(long = "fault-drop", default_value_t = 0.0, value_name = "SHARE")]
    pub(crate) drop: f64,
    /// Share of event messages that are published twice.
    #[arg(long = "fault-duplicate", default_value_t = 0.0, value_name = "SHARE")]
    pub(crate) duplicate: f64,
    /// Share of event messages that are published after their successor.
    #[arg(long = "fault-reorder", default_value_t = 0.0, value_name = "SHARE")]
    pub(crate) reorder: f64,
    /// Milliseconds by which every event message is late.
    #[arg(long = "fault-delay-ms", default_value_t = 0, value_name = "MS")]
    pub(crate) delay_ms: u64,
    /// Share of answers whose connection breaks after their first token.
    #[arg(long = "fault-die-mid-stream", default_value_t = 0.0, value_name = "SHARE")]
    pub(crate) die_mid_stream: f64,
    /// Slow down by this factor, beside --speed (2 = everything takes twice as long).
    #[arg(long = "fault-slow", default_value_t = 1.0, value_name = "FACTOR")]
    pub(crate) slow: f64,
    /// Seed of the draws.
    #[arg(long = "fault-seed", default_value_t = 0, value_name = "SEED")]
    pub(crate) seed: u64,
}

impl Default for Faults {
    fn default() -> Self {
        Self { drop: 0.0, duplicate: 0.0, reorder: 0.0, delay_ms: 0, die_mid_stream: 0.0, slow: 1.0, seed: 0 }
    }
}

/// What happens to one published message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fate {
    /// It is published.
    Published,
    /// It is lost.
    Dropped,
    /// It is published twice.
    Doubled,
    /// It waits for its successor and follows it.
    Overtaken,
}

/// A source of draws.
#[derive(Clone, Debug)]
pub(super) struct Dice(u64);

impl Dice {
    /// The same seed and stream draw the same.
    pub(super) fn new(seed: u64, stream: u64) -> Self {
        Self(seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) ^ stream.rotate_left(32))
    }

    /// Whether something with this probability happens now.
    pub(super) fn happens(&mut self, share: f64) -> bool {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^= z >> 31;
        ((z >> 11) as f64) < share * (1u64 << 53) as f64
    }
}

impl Faults {
    /// Draws the fate of the next message.
    pub(super) fn fate(&self, dice: &mut Dice) -> Fate {
        // One draw for each, whatever comes of them, so that changing one share does not shift the others.
        let (dropped, doubled, overtaken) =
            (dice.happens(self.drop), dice.happens(self.duplicate), dice.happens(self.reorder));
        match (dropped, doubled, overtaken) {
            (true, ..) => Fate::Dropped,
            (_, true, _) => Fate::Doubled,
            (.., true) => Fate::Overtaken,
            _ => Fate::Published,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_kept_and_seeds_repeat() {
        let faults = Faults { drop: 0.25, duplicate: 0.25, ..Faults::default() };
        let draw = |seed| {
            let mut dice = Dice::new(seed, 0);
            (0..4_000).map(|_| faults.fate(&mut dice)).collect::<Vec<_>>()
        };
        let fates = draw(7);
        let share = |fate| fates.iter().filter(|f| **f == fate).count();
        assert!((900..1_100).contains(&share(Fate::Dropped)), "{}", share(Fate::Dropped));
        assert_eq!(share(Fate::Overtaken), 0);
        assert_eq!(fates, draw(7));
        assert_ne!(fates, draw(8));
    }
}
