//! `kvlane events check URL`.

use super::print;
use kvlane_server::config::WorkerSpec;
use kvlane_server::doctor::{self, Severity};

/// Arguments of `kvlane events check`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Each line is `ok`, a `hint` (something is lost or uncertain) or a `problem` (routing by the cache does not work, or is wrong),
with what to set below it. Looks at: engine and version, model, block size, restarts, prefix cache and its hash, event and replay
sockets, and by two small requests to each rank whether what is computed is published and reported as cached, and how late.

Examples:
  kvlane events check http://gpu1:8000
  kvlane events check http://gpu1:8000,block-size=32,kv-events=tcp://gpu1:5557 --no-requests")]
pub(crate) struct Args {
    /// The worker, as `--worker` of `kvlane serve` takes it.
    worker: WorkerSpec,
    /// Send no requests; without this, two prompts of random tokens go to each rank.
    #[arg(long)]
    no_requests: bool,
}

pub(crate) async fn run(args: Args) -> anyhow::Result<()> {
    let report = doctor::examine(&args.worker, !args.no_requests).await;
    for finding in &report.findings {
        print(&format!("{:<8} {}: {}", finding.severity.name(), finding.about, finding.text))?;
        if let Some(fix) = &finding.fix {
            print(&format!("{:<8}   set {fix}", ""))?;
        }
    }
    let count = |severity| report.findings.iter().filter(|f| f.severity == severity).count();
    let (problems, hints) = (count(Severity::Problem), count(Severity::Hint));
    anyhow::ensure!(problems == 0, "problems: {problems}, hints: {hints}");
    print(&format!("no problems; hints: {hints}"))
}
