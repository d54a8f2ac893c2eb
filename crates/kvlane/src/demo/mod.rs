//! `kvlane demo`: the whole way on one machine, without an engine: four mock engines and the router in one process.
//!
//! The same conversations are played twice, each time with fresh engines: once routed round-robin, once by the caches. The
//! engines take twice the times of an 8B model on an H200; their caches are small, so that not everything fits into each.

pub(crate) mod client;
mod play;
mod table;
mod work;

use indicatif::{ProgressBar, ProgressStyle};
use kvlane_sched::Policy;
use std::path::PathBuf;
use std::sync::Arc;

/// Arguments of `kvlane demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs the comparison and prints its table.
#[expect(clippy::print_stdout, reason = "the table is what the command is asked for")]
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args {} = args;
    let scratch = Scratch::new();
    let conversations = Arc::new(work::conversations());
    let requests: usize = conversations.iter().map(|conversation| conversation.questions.len()).sum();
    println!(
        "{} mock engines (an 8B model at half the speed of an H200), each with a cache of\n\
         {} tokens; {} people chat with assistants that have long instructions, some\n\
         about a document of their own: {requests} requests, the same for both policies.\n",
        play::ENGINES,
        play::BLOCKS * 16,
        conversations.len(),
    );
    let mut outcomes = Vec::new();
    for name in ["round-robin", "kv"] {
        let policy: Box<dyn Policy> = name.parse()?;
        let progress = ProgressBar::new(requests as u64).with_prefix(name).with_style(
            ProgressStyle::with_template("{prefix:>11} {bar:40} {pos:>3} of {len} requests, {elapsed}")?,
        );
        outcomes.push(play::play(policy, &conversations, &scratch.0, &progress).await?);
        progress.finish();
    }
    println!("\n{}", table::table(&outcomes[0], &outcomes[1]));
    println!("With engines of your own:  kvlane serve --worker http://HOST:8000 --worker ...");
    Ok(())
}

/// A directory of this process that goes with it.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        Self(std::env::temp_dir().join(format!("kvlane-demo-{}", std::process::id())))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // It may not have been written yet.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
