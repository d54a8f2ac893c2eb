//! `kvlane serve`: the router as a process.

/// Arguments of `kvlane serve`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Base URL of an engine, such as http://10.0.0.1:8000; repeat for each one.
    #[arg(long = "worker", value_name = "URL", required = true)]
    workers: Vec<String>,
}

/// Runs until it is told to stop.
pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let Args { workers } = args;
    anyhow::bail!("cannot serve {} workers: the gateway is not wired into this command yet", workers.len())
}
