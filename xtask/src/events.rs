//! `cargo xtask bench events`: runs the two event benches and keeps their tables in BENCHMARKS.md.

use anyhow::{Context, Result, ensure};
use std::path::Path;
use std::process::Command;

/// Marker in BENCHMARKS.md, package and bench.
const BENCHES: [(&str, &str, &str); 2] =
    [("events-decode", "kvlane-events", "decode"), ("events-ingest", "kvlane", "ingest")];

/// Runs both; with `--quick` only prints.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let path = root.join("BENCHMARKS.md");
    let mut text = std::fs::read_to_string(&path).context("BENCHMARKS.md")?;
    for (marker, package, bench) in BENCHES {
        let load = load();
        let output = Command::new(env!("CARGO"))
            .args(["bench", "--locked", "--package", package, "--bench", bench, "--"])
            .args(arguments)
            .current_dir(&root)
            .stderr(std::process::Stdio::inherit())
            .output()
            .with_context(|| format!("could not run the bench {bench}"))?;
        ensure!(output.status.success(), "{bench}: {}", output.status);
        let tables = String::from_utf8(output.stdout).context("the bench prints text")?;
        let tables = format!("{}\n\n{}\n", tables.trim(), machine(&load));
        println!("{tables}");
        text = between(&text, marker, &tables)?;
    }
    if arguments.iter().any(|a| a == "--quick") {
        return Ok(());
    }
    std::fs::write(&path, text).context("BENCHMARKS.md")
}

/// `text` with what lies between a marker and its end replaced.
fn between(text: &str, marker: &str, new: &str) -> Result<String> {
    let begin = format!("<!-- {marker} -->");
    let at = text.find(&begin).with_context(|| format!("BENCHMARKS.md has no {begin}"))? + begin.len();
    let end = at + text[at..].find("<!-- end -->").with_context(|| format!("{begin} has no end"))?;
    Ok(format!("{}\n{new}\n{}", &text[..at], &text[end..]))
}

fn said(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(env!("CARGO_MANIFEST_DIR")).output();
    output.map_or_else(|_| "unknown".to_owned(), |o| String::from_utf8_lossy(&o.stdout).trim().to_owned())
}

fn load() -> String {
    std::fs::read_to_string("/proc/loadavg")
        .map_or_else(|_| "unknown".to_owned(), |l| l.split(' ').next().unwrap_or_default().to_owned())
}

fn machine(load_before: &str) -> String {
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus
        .lines()
        .find_map(|l| l.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, m)| m);
    let cores = cpus.lines().filter(|l| l.starts_with("processor")).count();
    let memory = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = memory.split_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0);
    let dirty = if said("git", &["status", "--porcelain", "--untracked-files=no"]).is_empty() {
        ""
    } else {
        ", changed"
    };
    format!(
        "{cores} × {model}, {} GiB; Linux {}; {}; kvlane of {}{dirty}; {}; load average {load_before} to {}.",
        (kib + (1 << 19)) >> 20,
        said("uname", &["-r"]),
        said("rustc", &["--version"]),
        said("git", &["rev-parse", "--short", "HEAD"]),
        said("date", &["-u", "+%Y-%m-%d %H:%M UTC"]),
        load()
    )
}

#[cfg(test)]
mod tests {
    use super::between;

    #[test]
    fn only_what_lies_between_the_markers_is_replaced() {
        let text = "a\n<!-- x -->\nold\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n";
        let new = between(text, "x", "new\n").unwrap();
        assert_eq!(new, "a\n<!-- x -->\nnew\n\n<!-- end -->\nb\n<!-- y -->\nkept\n<!-- end -->\n");
        assert!(between(text, "z", "").is_err());
    }
}
