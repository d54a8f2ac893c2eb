//! `kvlane demo`: the whole way on one machine, without an engine: four mock engines and the router in one process.
pub(crate) mod client;
/// Arguments of `kvlane demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {}

/// Runs the comparison and prints its table.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args {} = args;
    anyhow::bail!("the router is not wired into this command yet")
}
