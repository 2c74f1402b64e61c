//! Finding a compiler and a linker that can build the kernel object.
//!
//! There are two recipes, and the one that is there is taken:
//!
//! - [`Recipe::BuildStd`]: the rustup toolchain in use has the component `rust-src`, and cargo
//!   compiles `core` for BPF itself;
//! - [`Recipe::PrebuiltCore`]: Debian's `rustc-web` with `libstd-rust-web-dev-bpf`, which brings
//!   a `core` that is compiled already.
//!
//! Compiler and `bpf-linker` exchange LLVM bitcode, so their LLVM versions have to agree.

use std::{
    env, fmt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, anyhow, bail};

use crate::{ebpf::TARGET, workspace_root};

/// The LLVM major version that compiler and linker have to share.
const LLVM_MAJOR: &str = "22";

/// Where Debian's packages put the compiler and cargo.
const DEBIAN_BIN: &str = "/usr/bin";

/// How `core` for the BPF target is had.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Recipe {
    /// Debian's compiler with a prebuilt `core`.
    PrebuiltCore,
    /// A rustup toolchain with `rust-src`; cargo builds `core`.
    BuildStd,
}

impl Recipe {
    /// The versions of bpf-linker that are known to work, the one that set-up installs first.
    ///
    /// 0.10 loads the LLVM of the rustup toolchain and so cannot serve Debian's compiler; 0.13 is
    /// linked to Debian's LLVM and can serve both.
    #[must_use]
    pub fn linker_versions(self) -> &'static [&'static str] {
        match self {
            Self::PrebuiltCore => &["0.13.0"],
            Self::BuildStd => &["0.10.3", "0.13.0"],
        }
    }
}

impl fmt::Display for Recipe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PrebuiltCore => "prebuilt core",
            Self::BuildStd => "core built from rust-src",
        })
    }
}

/// A compiler for the BPF target.
#[derive(Clone, Debug)]
pub struct Compiler {
    /// How it comes by `core`.
    pub recipe: Recipe,
    /// The folder with its `rustc`, `cargo` and `rustdoc`, and with `cargo-clippy` if that is installed.
    pub bin: PathBuf,
    /// As printed by `rustc --version`.
    pub version: String,
}

impl Compiler {
    /// The compiler to use: the rustup toolchain in use if it has what it takes, Debian's otherwise.
    ///
    /// # Errors
    /// When neither is there; the message says for each what is missing.
    pub fn find() -> Result<Self> {
        let rustup = match Self::rustup() {
            Ok(compiler) => return Ok(compiler),
            Err(reason) => reason,
        };
        Self::debian().map_err(|debian| anyhow!("{rustup:#}; {debian:#}"))
    }

    fn rustup() -> Result<Self> {
        let sysroot = host_sysroot()?;
        let source = sysroot.join("lib/rustlib/src/rust/library/core/src/lib.rs");
        if !source.exists() {
            bail!("the Rust toolchain in use has no rust-src");
        }
        let bin = sysroot.join("bin");
        let version = version_with_llvm(&bin)?;
        Ok(Self {
            recipe: Recipe::BuildStd,
            bin,
            version,
        })
    }

    fn debian() -> Result<Self> {
        let bin = PathBuf::from(DEBIAN_BIN);
        for tool in ["rustc", "cargo"] {
            let tool = bin.join(tool);
            if !tool.exists() {
                bail!("{} does not exist", tool.display());
            }
        }
        if !has_prebuilt_core(&sysroot(&bin.join("rustc"))?) {
            bail!("{DEBIAN_BIN}/rustc has no core library for {TARGET}");
        }
        let version = version_with_llvm(&bin)?;
        Ok(Self {
            recipe: Recipe::PrebuiltCore,
            bin,
            version,
        })
    }

    /// The path of one of the compiler's tools, whether it is installed or not.
    #[must_use]
    pub fn tool(&self, name: &str) -> PathBuf {
        self.bin.join(name)
    }

    /// The folder with the shared libraries of a rustup toolchain, LLVM among them.
    #[must_use]
    pub fn libraries(&self) -> PathBuf {
        self.bin.with_file_name("lib")
    }
}

/// Everything that is needed to build the kernel object.
#[derive(Clone, Debug)]
pub struct Toolchain {
    /// Compiles to bitcode.
    pub compiler: Compiler,
    /// The path of bpf-linker, which makes BPF instructions and BTF of it.
    pub linker: PathBuf,
}

impl Toolchain {
    /// Finds compiler and linker.
    ///
    /// # Errors
    /// One line that names what is missing and the command that installs it.
    pub fn find() -> Result<Self> {
        Self::find_parts()
            .map_err(|cause| anyhow!("BPF toolchain not found: {cause:#}; run `cargo xtask setup`"))
    }

    fn find_parts() -> Result<Self> {
        let compiler = Compiler::find()?;
        let linker = find_linker(compiler.recipe)?;
        Ok(Self { compiler, linker })
    }
}

/// The first bpf-linker in PATH, or in cargo's own bin folder, that fits the recipe.
///
/// # Errors
/// When there is none, or only ones of another version.
pub fn find_linker(recipe: Recipe) -> Result<PathBuf> {
    let wanted = recipe.linker_versions();
    let mut others = Vec::new();
    for folder in linker_folders() {
        let linker = folder.join("bpf-linker");
        if !linker.exists() {
            continue;
        }
        // One that cannot start (its LLVM library is gone) is as good as none.
        let version = output_of(Command::new(&linker).arg("--version")).unwrap_or_default();
        let version = version.trim().trim_start_matches("bpf-linker ");
        if wanted.contains(&version) {
            return Ok(linker);
        }
        others.push(format!("{} ({version:?})", linker.display()));
    }
    let wanted = wanted.join(" or ");
    if others.is_empty() {
        bail!("there is no bpf-linker {wanted}");
    }
    bail!("{} is not bpf-linker {wanted}", others.join(", "));
}

fn linker_folders() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::home_dir().map(|home| home.join(".cargo")));
    let mut folders: Vec<_> = env::split_paths(&path)
        .chain(cargo_home.map(|home| home.join("bin")))
        .collect();
    let mut seen = Vec::new();
    folders.retain(|folder| {
        let new = !seen.contains(folder);
        seen.push(folder.clone());
        new
    });
    folders
}

/// The sysroot of the toolchain that compiles for the host: the one that cargo runs build scripts
/// of, or that `rustc` in PATH is.
///
/// # Errors
/// When there is no `rustc`.
pub fn host_sysroot() -> Result<PathBuf> {
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    sysroot(Path::new(&rustc))
}

fn sysroot(rustc: &Path) -> Result<PathBuf> {
    let printed = output_of(Command::new(rustc).args(["--print", "sysroot"]))?;
    Ok(PathBuf::from(printed.trim()))
}

fn has_prebuilt_core(sysroot: &Path) -> bool {
    let Ok(libraries) = sysroot
        .join("lib/rustlib")
        .join(TARGET)
        .join("lib")
        .read_dir()
    else {
        return false;
    };
    libraries.flatten().any(|library| {
        let name = library.file_name();
        let name = name.to_string_lossy();
        name.starts_with("libcore-") && name.ends_with(".rlib")
    })
}

/// The version of `rustc` in `bin`, if its LLVM is the one that bpf-linker is for.
fn version_with_llvm(bin: &Path) -> Result<String> {
    let rustc = bin.join("rustc");
    let printed = output_of(Command::new(&rustc).arg("-vV"))?;
    let llvm = printed
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))
        .with_context(|| format!("{} does not tell its LLVM version", rustc.display()))?;
    if llvm.split('.').next() != Some(LLVM_MAJOR) {
        bail!(
            "{} has LLVM {llvm}, bpf-linker needs {LLVM_MAJOR}",
            rustc.display()
        );
    }
    Ok(printed.lines().next().unwrap_or_default().to_owned())
}

/// Standard output of a command that has to succeed.
fn output_of(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .current_dir(workspace_root())
        .output()
        .with_context(|| format!("cannot run {program}"))?;
    if !output.status.success() {
        let errors = String::from_utf8_lossy(&output.stderr);
        let cause = errors.lines().next().unwrap_or("no message");
        bail!("{program} failed ({}): {cause}", output.status);
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} did not print UTF-8"))
}
