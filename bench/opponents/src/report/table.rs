//! Rows of a sheet as a table: a line for each cell, a column for each contender.

use std::fmt::Write;

use crate::record::{Read, Row};

/// A cell's values for `keys`.
pub fn cell(row: &Row, keys: &[&str]) -> Vec<String> {
    keys.iter().map(|key| row.cell.get(*key).cloned().unwrap_or_default()).collect()
}

/// In order of first mention.
pub fn distinct<T: PartialEq>(all: impl Iterator<Item = T>) -> Vec<T> {
    let mut out = Vec::new();
    for one in all {
        if !out.contains(&one) {
            out.push(one);
        }
    }
    out
}

/// The contenders of a sheet.
pub fn contenders(sheet: &Read) -> Vec<String> {
    distinct(sheet.rows.iter().map(|row| row.contender.clone()))
}

/// The median of `figure` for one contender in one cell.
pub fn median(sheet: &Read, keys: &[&str], values: &[String], contender: &str, figure: &str) -> Option<f64> {
    let row = sheet.rows.iter().find(|r| r.contender == contender && cell(r, keys) == values)?;
    row.figures.get(figure).map(|spread| spread.median)
}

/// Whether it is one of the ways to ask kvlane.
pub fn is_ours(contender: &str) -> bool {
    contender.starts_with("kvlane")
}

fn shown(value: f64, digits: usize) -> String {
    format!("{value:.digits$}")
}

/// How one figure is tabulated.
pub struct Pivot<'a> {
    /// Keys of the cell, one column each.
    pub keys: &'a [&'a str],
    /// The figure.
    pub figure: &'a str,
    /// Digits after the point.
    pub digits: usize,
    /// Lower is better, as for costs; otherwise higher, as for rates.
    pub lower_is_better: bool,
}

impl Pivot<'_> {
    /// The table; where the best peer is ahead of `kvlane`, the last column says so in bold.
    pub fn table(&self, sheet: &Read) -> String {
        let cells = distinct(sheet.rows.iter().map(|row| cell(row, self.keys)));
        let contenders = contenders(sheet);
        let ours = contenders.iter().any(|c| c == "kvlane");
        let mut out = format!("| {} | {} |", self.keys.join(" | "), contenders.join(" | "));
        out += if ours { " kvlane against the best peer |\n" } else { "\n" };
        let columns = self.keys.len() + contenders.len() + usize::from(ours);
        let _ = writeln!(out, "|{}", "---|".repeat(columns));
        for values in cells {
            let find = |contender: &String| median(sheet, self.keys, &values, contender, self.figure);
            let medians: Vec<Option<f64>> = contenders.iter().map(find).collect();
            if medians.iter().all(Option::is_none) {
                continue;
            }
            let _ = write!(out, "| {} |", values.join(" | "));
            for median in &medians {
                let _ = write!(out, " {} |", median.map_or("-".to_owned(), |m| shown(m, self.digits)));
            }
            if ours {
                let peers = contenders.iter().zip(&medians).filter(|(c, _)| !is_ours(c));
                let peers = peers.filter_map(|(_, m)| *m);
                let best = if self.lower_is_better {
                    peers.fold(f64::MAX, f64::min)
                } else {
                    peers.fold(0.0, f64::max)
                };
                let own = find(&"kvlane".to_owned());
                let gain = own.map(|own| if self.lower_is_better { best / own } else { own / best });
                let _ = match gain {
                    Some(gain) if gain < 1.0 => write!(out, " **loses: {gain:.2} ×** |"),
                    Some(gain) => write!(out, " {gain:.1} × |"),
                    None => write!(out, " - |"),
                };
            }
            out.push('\n');
        }
        out
    }

    /// Geometric mean of `other / own` over the cells that `take` accepts, in how many of them `own` is behind, and of how many.
    pub fn against(
        &self,
        sheet: &Read,
        other: &str,
        own: &str,
        take: impl Fn(&[String]) -> bool,
    ) -> Option<(f64, usize, usize)> {
        let cells = distinct(sheet.rows.iter().map(|row| cell(row, self.keys)));
        let gains: Vec<f64> = cells
            .iter()
            .filter(|values| take(values))
            .filter_map(|values| {
                let of = |contender| median(sheet, self.keys, values, contender, self.figure);
                Some(of(other)? / of(own)?)
            })
            .collect();
        if gains.is_empty() {
            return None;
        }
        let mean = (gains.iter().map(|g| g.ln()).sum::<f64>() / gains.len() as f64).exp();
        Some((mean, gains.iter().filter(|g| **g < 1.0).count(), gains.len()))
    }
}

/// Under a table: machine, load, rounds, spread.
pub fn foot(sheet: &Read, figures: &[&str]) -> String {
    let head = &sheet.head;
    let mut spreads: Vec<f64> = sheet
        .rows
        .iter()
        .flat_map(|row| row.figures.iter().filter(|(name, _)| figures.contains(&name.as_str())))
        .map(|(_, spread)| spread.percent())
        .collect();
    spreads.sort_by(f64::total_cmp);
    let spread = match spreads.last() {
        Some(worst) if head.rounds > 1 => {
            format!(
                " Medians of {} interleaved rounds; half the range of the rounds: median {:.0} %, worst {worst:.0} %.",
                head.rounds,
                spreads[spreads.len() / 2]
            )
        }
        _ => String::new(),
    };
    let quick = if head.quick { "**A quick run: small sizes, not to be quoted.** " } else { "" };
    format!("{quick}{}; load average {:.1} to {:.1}.{spread}\n", head.machine, head.load.0, head.load.1)
}

/// The share of wrong answers of each contender over the whole sheet.
pub fn wrong(sheet: &Read) -> String {
    let shares: Vec<String> = contenders(sheet)
        .into_iter()
        .filter_map(|contender| {
            let mut sum = crate::exactness::Wrong::default();
            for row in sheet.rows.iter().filter(|row| row.contender == contender) {
                sum += row.wrong?;
            }
            Some(format!("{contender} {} of {}", sum.wrong, sum.answers))
        })
        .collect();
    if shares.is_empty() { String::new() } else { format!("Wrong answers: {}.\n", shares.join(", ")) }
}
