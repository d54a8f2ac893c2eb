//! `cargo run --manifest-path xtask/proto/Cargo.toml`: from `crates/kvlane-server/proto` to `crates/kvlane-server/src/grpc`.
//!
//! The result is checked in: a build of kvlane needs neither protoc nor a protobuf compiler in Rust. The descriptor set beside it is what the
//! reflection service shows.

use anyhow::{Context, ensure};
use prost::Message;
use std::path::Path;
use std::process::Command;

const FILE: &str = "kvlane/index/v1/index.proto";
const GENERATED: &str = "kvlane.index.v1.rs";
const HEADER: &str = "//! Messages and stubs of `proto/kvlane/index/v1/index.proto`, written by `xtask/proto`: change that file, not this one.\n\n";

fn main() -> anyhow::Result<()> {
    let server = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../crates/kvlane-server");
    let out = server.join("src/grpc");
    let descriptors = protox::compile([FILE], [server.join("proto")]).context(FILE)?;
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().build_transport(false).out_dir(&out).compile_fds(descriptors)?;
    let code = std::fs::read_to_string(out.join(GENERATED))?;
    std::fs::remove_file(out.join(GENERATED))?;
    let module = out.join("v1.rs");
    std::fs::write(&module, format!("{HEADER}{code}"))?;
    let formatted = Command::new("rustfmt").args(["--edition", "2024"]).arg(&module).status()?;
    ensure!(formatted.success(), "rustfmt failed");
    Ok(())
}
