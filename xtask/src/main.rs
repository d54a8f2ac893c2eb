//! The project's own chores, as `cargo xtask TASK`.
//!
//! A chore is here when both people and CI run it and a shell line would not say why it failed.

#![expect(clippy::print_stdout, reason = "a command-line tool speaks to a person")]

mod bench;
mod events;
mod layers;
mod tidy;

use clap::Parser;

/// The project's own chores.
#[derive(Parser)]
enum Task {
    /// Measure beside the peers.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// Compare the crates' dependencies with the table in ARCHITECTURE.md.
    Layers,
    /// Check what no compiler checks: module headers, forbidden words, file sizes.
    Tidy,
}

fn main() -> anyhow::Result<()> {
    match Task::parse() {
        Task::Bench(what) => bench::run(&what),
        Task::Layers => layers::check(),
        Task::Tidy => tidy::check(),
    }
}
