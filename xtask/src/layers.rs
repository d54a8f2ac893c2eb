//! The dependency rules of ARCHITECTURE.md, held against what cargo resolves.
//!
//! The table is the single source: a person reads it, and this file parses it. Dev-dependencies are free, since a test
//! may see what the crate must not.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// One row of the table.
struct Rule {
    may: BTreeSet<String>,
    must_not: BTreeSet<String>,
}

/// Fails with every broken rule, not only the first.
pub fn check() -> Result<()> {
    let page = std::fs::read_to_string("ARCHITECTURE.md").context("run this from the repository's root")?;
    let rules = parse(&page);
    if rules.is_empty() {
        bail!("found no row starting with `| kvlane` in ARCHITECTURE.md");
    }
    let graph = Graph::load()?;
    let mut broken = Vec::new();
    for name in graph.ours.iter().filter(|n| *n != "xtask") {
        let Some(rule) = rules.get(name) else {
            broken.push(format!("{name} has no row in the table of ARCHITECTURE.md"));
            continue;
        };
        for direct in graph.direct.get(name).into_iter().flatten() {
            if graph.ours.contains(direct) && !rule.may.contains(direct) {
                broken.push(format!("{name} depends on {direct}, which its row does not allow"));
            }
        }
        for forbidden in rule.must_not.intersection(&graph.reachable(name)) {
            broken.push(format!("{name} reaches {forbidden}, which its row forbids"));
        }
    }
    for name in rules.keys().filter(|n| !graph.ours.contains(*n)) {
        broken.push(format!("ARCHITECTURE.md has a row for {name}, which does not exist"));
    }
    if !broken.is_empty() {
        bail!("layers:\n  {}", broken.join("\n  "));
    }
    println!("layers: {} crates keep their rules", rules.len());
    Ok(())
}

fn parse(page: &str) -> BTreeMap<String, Rule> {
    let list = |cell: &str| cell.split(',').map(|s| s.trim().to_owned()).filter(|s| !s.is_empty()).collect();
    page.lines()
        .filter(|line| line.starts_with("| kvlane"))
        .filter_map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
            let [name, may, must_not, _what] = cells[..] else { return None };
            Some((name.to_owned(), Rule { may: list(may), must_not: list(must_not) }))
        })
        .collect()
}

/// Normal dependencies by package name. Two versions of one package count as one. What a procedural macro depends on is left out: it runs in the
/// compiler and is in no program.
struct Graph {
    ours: BTreeSet<String>,
    direct: BTreeMap<String, BTreeSet<String>>,
}

impl Graph {
    fn load() -> Result<Self> {
        let output = std::process::Command::new(env!("CARGO"))
            .args(["metadata", "--format-version=1", "--locked"])
            .output()
            .context("could not run cargo metadata")?;
        if !output.status.success() {
            bail!("cargo metadata failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        let metadata: Value = serde_json::from_slice(&output.stdout)?;
        let array = |v: &Value| v.as_array().cloned().unwrap_or_default();
        let text = |v: &Value| v.as_str().unwrap_or_default().to_owned();
        let names: BTreeMap<String, String> =
            array(&metadata["packages"]).iter().map(|p| (text(&p["id"]), text(&p["name"]))).collect();
        let name = |id: &Value| names.get(id.as_str().unwrap_or_default()).cloned().unwrap_or_default();
        let ours = array(&metadata["workspace_members"]).iter().map(name).collect();
        let is_macro = |package: &Value| {
            array(&package["targets"])
                .iter()
                .any(|t| array(&t["kind"]).iter().any(|kind| kind == "proc-macro"))
        };
        let macros: BTreeSet<String> =
            array(&metadata["packages"]).iter().filter(|p| is_macro(p)).map(|p| text(&p["id"])).collect();
        let mut direct: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for node in array(&metadata["resolve"]["nodes"]) {
            if macros.contains(&text(&node["id"])) {
                continue;
            }
            let normal = array(&node["deps"])
                .iter()
                .filter(|d| array(&d["dep_kinds"]).iter().any(|k| k["kind"].is_null()))
                .map(|d| name(&d["pkg"]))
                .collect::<Vec<_>>();
            direct.entry(name(&node["id"])).or_default().extend(normal);
        }
        Ok(Self { ours, direct })
    }

    fn reachable(&self, from: &str) -> BTreeSet<String> {
        let mut seen = BTreeSet::new();
        let mut todo = vec![from];
        while let Some(next) = todo.pop() {
            for dependency in self.direct.get(next).into_iter().flatten() {
                if seen.insert(dependency.clone()) {
                    todo.push(dependency);
                }
            }
        }
        seen
    }
}
