//! Benchmarks, which live in workspaces of their own so that no shipped crate sees a peer's.
//!
//! Each needs a release build of minutes and a machine that is not too busy; none runs in CI.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// What to measure. What follows is passed on.
#[derive(clap::Subcommand)]
pub enum Bench {
    /// The index beside its peers (`bench/opponents`): tables and plots of BENCHMARKS.md.
    Index {
        /// A question or `all` (without one: all), and its options: `--quick`, `--trace FILE`, `--only NAMES`, `--rounds N`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// Whether the policy `reference` chooses as the reference's own selector does, on seeded states.
    Picks {
        /// How many decisions.
        #[arg(default_value_t = 100_000)]
        decisions: u64,
    },
    /// Engine events: decoding beside `rmp-serde`, and ingest from a socket into the index. Rewrites their tables in BENCHMARKS.md.
    Events {
        /// `--quick`: less exact, and BENCHMARKS.md stays as it is.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// The gateway beside its peers and nginx (`bench/gateway`); installs them into target/bench/peers.
    Gateway {
        /// Its options: `--quick`, `--only NAMES`, `--cells NAMES`, `--rounds N`, `--time-ms N`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// One trace through kvlane, SMG and SGLang's router to mock engines over real sockets, driven by `kvlane replay`.
    Routing {
        /// Its options: `--speeds X,...`, `--rounds N`, `--engines N`, `--only NAMES`; then those of `kvlane replay`, such as a trace.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
    /// 512 streaming clients that leave at random, for ten minutes: what stays behind in the gateway.
    Soak {
        /// Its options: `--clients N`, `--seconds N`.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<String>,
    },
}

/// Runs it.
pub fn run(bench: &Bench) -> Result<()> {
    match bench {
        Bench::Index { arguments } => {
            let question = arguments.first().is_some_and(|a| !a.starts_with('-'));
            let mut all = if question { vec![] } else { vec!["all".to_owned()] };
            all.extend(arguments.iter().cloned());
            workspace("bench/opponents", "opponents", &all)
        }
        Bench::Picks { decisions } => workspace("bench/opponents", "picks", &[decisions.to_string()]),
        Bench::Events { arguments } => crate::events::run(arguments),
        Bench::Gateway { arguments } => gateway("run", arguments),
        Bench::Routing { arguments } => gateway("routing", arguments),
        Bench::Soak { arguments } => gateway("soak", arguments),
    }
}

/// Builds kvlane and hands it to the gateway's bench.
fn gateway(command: &str, arguments: &[String]) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let status = Command::new(env!("CARGO"))
        .args(["build", "--release", "--locked", "--package", "kvlane"])
        .current_dir(&root)
        .status()
        .context("could not build kvlane")?;
    ensure!(status.success(), "kvlane: {status}");
    let kvlane = root.join("target/release/kvlane").display().to_string();
    let folder = root.join("target/bench/peers").display().to_string();
    let mut all = vec![command.to_owned(), "--kvlane".into(), kvlane, "--folder".into(), folder];
    all.extend(arguments.iter().cloned());
    workspace("bench/gateway", "gateway-bench", &all)
}

fn workspace(folder: &str, package: &str, arguments: &[String]) -> Result<()> {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(folder).join("Cargo.toml");
    let status = Command::new(env!("CARGO"))
        .args(["run", "--release", "--locked", "--manifest-path"])
        .arg(&manifest)
        .args(["--package", package, "--"])
        .args(arguments)
        .status()
        .with_context(|| format!("could not run {}", manifest.display()))?;
    ensure!(status.success(), "{folder}: {status}");
    Ok(())
}
