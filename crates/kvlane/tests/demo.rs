//! `kvlane demo` as a user runs it.

use std::process::Command;

#[test]
fn the_demo_ends_well_and_the_caches_are_used() {
    let output = Command::new(env!("CARGO_BIN_EXE_kvlane")).arg("demo").output().expect("the binary runs");
    let text = String::from_utf8(output.stdout).expect("text");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    assert!(text.lines().all(|line| line.chars().count() <= 80), "80 columns:\n{text}");
    let line = text.lines().find(|line| line.starts_with("prompt tokens found")).expect("a table");
    let shares: Vec<f64> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // Times are the machine's; what is found in the caches is the router's.
    assert!(shares[1] > 1.2 * shares[0], "{text}");
    assert_eq!(text.matches(" x\n").count() + text.matches(" no\n").count(), 6, "six measures:\n{text}");
}
