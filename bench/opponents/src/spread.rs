//! Medians of interleaved rounds and how far the rounds lay apart.

use serde::{Deserialize, Serialize};

/// One figure over several rounds.
#[derive(Clone, Copy, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Spread {
    /// The middle round.
    pub median: f64,
    /// The lowest round.
    pub low: f64,
    /// The highest round.
    pub high: f64,
}

impl Spread {
    /// Of at least one round.
    pub fn of(mut rounds: Vec<f64>) -> Self {
        rounds.sort_by(f64::total_cmp);
        let n = rounds.len();
        let median = (rounds[(n - 1) / 2] + rounds[n / 2]) / 2.0;
        Self { median, low: rounds[0], high: rounds[n - 1] }
    }

    /// Half the range of the rounds over the median, in percent.
    pub fn percent(&self) -> f64 {
        if self.median == 0.0 { 0.0 } else { (self.high - self.low) / self.median * 50.0 }
    }
}

/// The value below which the share `p` of `sorted` lies.
pub fn quantile(sorted: &[u32], p: f64) -> f64 {
    if sorted.is_empty() {
        return 0.0;
    }
    f64::from(sorted[((sorted.len() - 1) as f64 * p).round() as usize])
}
