//! Building the kernel object: package `portfwd-ebpf` for [`TARGET`], in a cargo run of its own.
//!
//! The inner cargo has its own target folder, so it never waits for the lock that the outer one
//! holds while a build script runs, and nothing of the outer one's environment reaches it.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, bail};

use crate::{
    btf, object_check, object_strip,
    toolchain::{Recipe, Toolchain},
    workspace_root,
};

/// The target of the kernel object: BPF in the byte order of every machine that portfwd runs on.
pub const TARGET: &str = "bpfel-unknown-none";

const PACKAGE: &str = "portfwd-ebpf";

/// Whatever the profile of the host programs, the object has this one (see the root's Cargo.toml).
const PROFILE: &str = "bpf";

/// What the object is made of, relative to the root of the workspace.
const SOURCES: [&str; 4] = ["portfwd-ebpf", "portfwd-common", "Cargo.lock", "Cargo.toml"];

/// Between two flags in `CARGO_ENCODED_RUSTFLAGS`.
const FLAG_SEPARATOR: &str = "\x1f";

/// Settings of cargo itself that the inner cargo shares: where things are and how to fetch and print.
const SHARED_SETTINGS: [&str; 7] = [
    "CARGO_BUILD_JOBS",
    "CARGO_HOME",
    "CARGO_HTTP_",
    "CARGO_MAKEFLAGS",
    "CARGO_NET_",
    "CARGO_REGISTR",
    "CARGO_TERM_",
];

/// What cargo sets for the programs that it starts, beside everything that begins with `CARGO` or `RUST`.
const BUILD_SCRIPT_VARIABLES: [&str; 8] = [
    "DEBUG",
    "HOST",
    "LD_LIBRARY_PATH",
    "NUM_JOBS",
    "OPT_LEVEL",
    "OUT_DIR",
    "PROFILE",
    "TARGET",
];

/// The body of a build script: builds the binary `bin` of `portfwd-ebpf` and hands the path of the
/// object to the crate as the environment variable `variable`, for `env!`. A failure is told to
/// cargo, in one line.
#[must_use]
pub fn build_script(bin: &str, variable: &str) -> ExitCode {
    for source in SOURCES {
        let source = workspace_root().join(source);
        println!("cargo::rerun-if-changed={}", source.display());
    }
    println!("cargo::rerun-if-changed=build.rs");
    match build_to_out_dir(bin) {
        Ok(object) => {
            println!("cargo::rustc-env={variable}={}", object.display());
            ExitCode::SUCCESS
        }
        Err(cause) => {
            println!("cargo::error={cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn build_to_out_dir(bin: &str) -> Result<PathBuf> {
    let out_dir = PathBuf::from(env::var_os("OUT_DIR").context("OUT_DIR is not set")?);
    let object = build(&target_dir_of(&out_dir), bin)?;
    // A copy, because another build may replace the original while the compiler reads it.
    let embedded = out_dir.join(bin).with_extension("bpf.o");
    let whole = fs::read(&object).with_context(|| format!("cannot read {}", object.display()))?;
    let stripped = object_strip::without_debug_information(&whole)
        .with_context(|| object.display().to_string())?;
    fs::write(&embedded, stripped)
        .with_context(|| format!("cannot write {}", embedded.display()))?;
    Ok(embedded)
}

/// Builds the binary `bin` of `portfwd-ebpf` under `target_dir`, and returns the path of the object.
/// What the inner cargo has to say goes to standard error.
///
/// # Errors
/// Without a BPF toolchain, when the object does not compile, or when it could panic.
pub fn build(target_dir: &Path, bin: &str) -> Result<PathBuf> {
    let toolchain = Toolchain::find()?;
    let mut cargo = cargo(&toolchain, target_dir, Subcommand::Build);
    cargo.args(["--bin", bin]);
    let status = cargo
        .stdout(Stdio::null())
        .status()
        .with_context(|| format!("cannot run {}", toolchain.compiler.tool("cargo").display()))?;
    if !status.success() {
        bail!("the kernel object {bin} does not compile, see the messages of its own cargo run");
    }
    let object = subfolder(target_dir).join(TARGET).join(PROFILE).join(bin);
    object_check::refuse_panics(&object)?;
    btf::make_steps_global(&object)?;
    Ok(object)
}

/// What is done to the kernel object.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcommand {
    /// Compile and link it.
    Build,
    /// Run the lints.
    Clippy,
    /// Write the documentation.
    Doc,
}

impl Subcommand {
    fn name(self) -> &'static str {
        match self {
            Self::Build => "build",
            Self::Clippy => "clippy",
            Self::Doc => "doc",
        }
    }

    /// The program that carries it out. Cargo would look for `cargo-clippy` among rustup's.
    fn program(self) -> &'static str {
        match self {
            Self::Build | Self::Doc => "cargo",
            Self::Clippy => "cargo-clippy",
        }
    }
}

/// A cargo subcommand on `portfwd-ebpf`, for the BPF target, with the toolchain's compiler, linker and flags.
#[must_use]
pub fn cargo(toolchain: &Toolchain, target_dir: &Path, subcommand: Subcommand) -> Command {
    let compiler = &toolchain.compiler;
    let mut cargo = Command::new(compiler.tool(subcommand.program()));
    cargo.current_dir(workspace_root());
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(belongs_to_outer_cargo) {
            cargo.env_remove(name);
        }
    }
    cargo
        // Not the outer cargo: it may be newer than the compiler and pass it flags that it does not know.
        .env("CARGO", compiler.tool("cargo"))
        .env("RUSTC", compiler.tool("rustc"))
        .env("RUSTDOC", compiler.tool("rustdoc"))
        // The target is a tier 3 one, and `build-std` is unstable.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags(toolchain))
        .arg(subcommand.name())
        .args(["--locked", "--package", PACKAGE, "--profile", PROFILE])
        .args(["--target", TARGET])
        .arg("--target-dir")
        .arg(subfolder(target_dir));
    match compiler.recipe {
        Recipe::PrebuiltCore => {}
        Recipe::BuildStd => {
            cargo
                .arg("-Zbuild-std=core")
                // A bpf-linker without an LLVM of its own loads the compiler's.
                .env("LD_LIBRARY_PATH", compiler.libraries());
        }
    }
    cargo
}

fn flags(toolchain: &Toolchain) -> String {
    [
        format!("-Clinker={}", toolchain.linker.display()),
        "-Clink-arg=--btf".to_owned(),
        "-Cdebuginfo=2".to_owned(),
        "-Cpanic=abort".to_owned(),
        // Below v3 there are no 32-bit instructions, and no atomics that return a value.
        "-Ctarget-cpu=v3".to_owned(),
    ]
    .join(FLAG_SEPARATOR)
}

fn belongs_to_outer_cargo(name: &str) -> bool {
    if SHARED_SETTINGS
        .iter()
        .any(|shared| name.starts_with(shared))
    {
        return false;
    }
    // RUSTUP_TOOLCHAIN and RUSTUP_HOME too: the compiler is called by its path, not through rustup.
    ["CARGO", "RUST", "DEP_"]
        .iter()
        .any(|prefix| name.starts_with(prefix))
        || BUILD_SCRIPT_VARIABLES.contains(&name)
}

fn subfolder(target_dir: &Path) -> PathBuf {
    target_dir.join("ebpf")
}

/// The target folder that a build script's OUT_DIR, `TARGET_DIR/PROFILE/build/PACKAGE-HASH/out`,
/// is in; shared by all profiles, so that the object is compiled once for all of them.
fn target_dir_of(out_dir: &Path) -> PathBuf {
    out_dir.ancestors().nth(4).unwrap_or(out_dir).to_path_buf()
}
