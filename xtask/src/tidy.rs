//! What no compiler checks: each source file says why it exists, and nothing private leaks into the project.

use anyhow::{Context, Result, bail};

/// Longest source file that a reader is asked to hold in mind, in lines.
const MAX_LINES: usize = 1_200;

/// Fails with every finding.
pub fn check() -> Result<()> {
    let output = std::process::Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .output()
        .context("could not run git ls-files")?;
    let mut findings = Vec::new();
    let mut files = 0;
    for path in String::from_utf8_lossy(&output.stdout).lines() {
        let Ok(text) = std::fs::read_to_string(path) else { continue };
        files += 1;
        // Home directories are private paths; assembled here so that this file does not contain them.
        for private in [concat!("/ro", "ot/"), concat!("/ho", "me/")] {
            if text.contains(private) && !path.ends_with(".jsonl") {
                findings.push(format!("{path}: contains a private path ({private}…)"));
            }
        }
        if !path.ends_with(".rs") {
            continue;
        }
        if !text.trim_start().starts_with("//!") {
            findings.push(format!("{path}: does not begin with a `//!` header that says what it is for"));
        }
        let lines = text.lines().count();
        if lines > MAX_LINES {
            findings.push(format!("{path}: {lines} lines; cut it by operation (limit {MAX_LINES})"));
        }
    }
    if !findings.is_empty() {
        bail!("tidy:\n  {}", findings.join("\n  "));
    }
    println!("tidy: {files} files");
    Ok(())
}
