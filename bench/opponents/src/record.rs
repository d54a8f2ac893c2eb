//! What a run measured, one JSON line a row, so that tables can be made again and checked by others.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use serde::{Deserialize, Serialize};

use crate::clock;
use crate::exactness::Wrong;
use crate::spread::Spread;

/// How a question was run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Head {
    /// Machine, compiler, commit, date.
    pub machine: String,
    /// Interleaved rounds.
    pub rounds: usize,
    /// A quick run: smaller sizes, fewer rounds, no figures to quote.
    pub quick: bool,
    /// The machine's load average when it began and ended.
    pub load: (f64, f64),
}

/// One contender in one cell.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Row {
    /// The cell: sizes and kinds, by name.
    pub cell: BTreeMap<String, String>,
    /// The index and the way to ask it.
    pub contender: String,
    /// Figures by name; the name ends in the unit.
    pub figures: BTreeMap<String, Spread>,
    /// Its answers in this cell against the right ones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub wrong: Option<Wrong>,
}

/// The rows of one question, each written as soon as it is known.
pub struct Sheet {
    path: PathBuf,
    head: Head,
    rows: Vec<Row>,
}

impl Sheet {
    /// Begins the sheet `question` in `folder`.
    pub fn begin(folder: &Path, question: &str, rounds: usize, quick: bool) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)?;
        let load = clock::load();
        let head = Head { machine: clock::machine(), rounds, quick, load: (load, load) };
        Ok(Self { path: folder.join(format!("{question}.jsonl")), head, rows: Vec::new() })
    }

    /// Adds a row and says so.
    pub fn row(
        &mut self,
        cell: &[(&str, &dyn std::fmt::Display)],
        contender: &str,
        figures: &[(&str, Spread)],
        wrong: Option<Wrong>,
    ) {
        let row = Row {
            cell: cell.iter().map(|(name, value)| ((*name).to_owned(), value.to_string())).collect(),
            contender: contender.to_owned(),
            figures: figures.iter().map(|(name, spread)| ((*name).to_owned(), *spread)).collect(),
            wrong,
        };
        let cell: Vec<String> = row.cell.iter().map(|(name, value)| format!("{name}={value}")).collect();
        let shown: Vec<String> =
            figures.iter().map(|(name, s)| format!("{name} {:.4} ±{:.0}%", s.median, s.percent())).collect();
        let wrong =
            wrong.map(|w| format!("  wrong {:.1}% of {}", w.percent(), w.answers)).unwrap_or_default();
        println!("{}  {contender:<13} {}{wrong}", cell.join(" "), shown.join("  "));
        self.rows.push(row);
    }

    /// Writes the file.
    pub fn end(mut self) -> anyhow::Result<()> {
        self.head.load.1 = clock::load();
        let mut file = std::fs::File::create(&self.path)
            .with_context(|| format!("could not write {}", self.path.display()))?;
        writeln!(file, "{}", serde_json::to_string(&self.head)?)?;
        for row in &self.rows {
            writeln!(file, "{}", serde_json::to_string(row)?)?;
        }
        Ok(())
    }
}

/// A finished sheet.
pub struct Read {
    /// How it was run.
    pub head: Head,
    /// Its rows, in order.
    pub rows: Vec<Row>,
}

/// Reads the sheet `question` of `folder`; `None` if it was never run.
pub fn read(folder: &Path, question: &str) -> anyhow::Result<Option<Read>> {
    let Ok(text) = std::fs::read_to_string(folder.join(format!("{question}.jsonl"))) else { return Ok(None) };
    let mut lines = text.lines();
    let head = serde_json::from_str(lines.next().context("a sheet begins with its head")?)?;
    let rows = lines.map(serde_json::from_str).collect::<Result<_, _>>()?;
    Ok(Some(Read { head, rows }))
}
