//! What the build and the tests need, and whether it is there.

use std::{
    fmt,
    path::Path,
    process::{Command, Stdio},
};

use xtask::toolchain::{self, Compiler, Recipe};

use Presence::{File, Program, PythonModule};

use crate::host;

/// A Debian package.
#[derive(Clone, Copy, Debug)]
pub struct Package {
    /// Its name.
    pub name: &'static str,
    /// What it is for, in a few words.
    pub purpose: &'static str,
}

/// A package, and how to tell that what it brings is there, wherever it came from.
#[derive(Clone, Copy, Debug)]
struct Need {
    package: Package,
    presence: Presence,
}

#[derive(Clone, Copy, Debug)]
enum Presence {
    Program(&'static str),
    File(&'static str),
    /// A module of the system's own Python; the first `python3` in PATH may be another one.
    PythonModule(&'static str),
}

/// What the tests and the demo run.
const TEST_TOOLS: &[Need] = &[
    need("bpftool", Program("bpftool"), "looks at programs and maps"),
    need(
        "coturn",
        Program("turnutils_natdiscovery"),
        "tells what kind of NAT it is behind",
    ),
    need("curl", Program("curl"), "fetches through a forward"),
    need(
        "dnsmasq-base",
        Program("dnsmasq"),
        "the name server of the lab",
    ),
    need(
        "ethtool",
        Program("ethtool"),
        "sets the offloads of veth devices",
    ),
    need("fish", Program("fish"), "asks for completions"),
    need("iperf3", Program("iperf3"), "bulk transfers"),
    need("iproute2", Program("ip"), "network namespaces and devices"),
    need("iputils-ping", Program("ping"), "echo requests"),
    need("jq", Program("jq"), "reads JSON output"),
    need("mandoc", Program("mandoc"), "judges the manual pages"),
    need(
        "nftables",
        Program("nft"),
        "the kernel's own forwarding, to compare",
    ),
    need("nginx", Program("nginx"), "the web server behind a forward"),
    need("python3-scapy", PythonModule("scapy"), "forges packets"),
    need(
        "strace",
        Program("strace"),
        "kills the daemon at a system call",
    ),
    need("socat", Program("socat"), "echo servers"),
    need(
        "stun-client",
        Program("stun"),
        "tells the same in other words",
    ),
    need(
        "systemd",
        Program("systemd-analyze"),
        "judges the unit of the package",
    ),
    need("tcpdump", Program("tcpdump"), "captures"),
    need(
        "traceroute",
        Program("traceroute"),
        "ICMP errors on the way",
    ),
    need(
        "tshark",
        Program("tshark"),
        "judges the checksums in captures",
    ),
    need("wrk", Program("wrk"), "web requests under load"),
];

/// What makes the Debian package and looks at it.
const DIST_TOOLS: [Need; 5] = [
    need(
        "dpkg-dev",
        Program("dpkg-shlibdeps"),
        "finds the libraries that the package needs",
    ),
    need(
        "lowdown",
        Program("lowdown"),
        "makes a manual page of a document",
    ),
    need(
        "mmdebstrap",
        Program("mmdebstrap"),
        "makes a Debian to install the package in",
    ),
    need(
        "systemd-container",
        Program("systemd-nspawn"),
        "boots that Debian to try the service",
    ),
    need(
        "util-linux",
        Program("unshare"),
        "keeps that Debian to itself",
    ),
];

/// What portfwd is measured beside.
const BENCH_TOOLS: [Need; 3] = [
    need("haproxy", Program("haproxy"), "a relay in user space"),
    need(
        "iptables",
        Program("iptables-legacy"),
        "destination NAT by other tables than nftables'",
    ),
    need("ipvsadm", Program("ipvsadm"), "the kernel's load balancer"),
];

/// What boots other kernels.
const VM_TOOLS: [Need; 4] = [
    need(
        "busybox-static",
        Program("busybox"),
        "mounts the root of virtual machines",
    ),
    need(
        "kmod",
        Program("modprobe"),
        "finds the modules of other kernels",
    ),
    need("mmdebstrap", Program("mmdebstrap"), "unpacks qemu"),
    need("xz-utils", Program("xz"), "unpacks modules"),
];

/// A compiler for the kernel object. Whether it is there, [`Compiler::find`] says.
const COMPILER: [Package; 3] = [
    Package {
        name: "rustc-web",
        purpose: "compiles the kernel object",
    },
    Package {
        name: "cargo-web",
        purpose: "builds the kernel object with that compiler",
    },
    Package {
        name: "libstd-rust-web-dev-bpf",
        purpose: "the core library for BPF",
    },
];

/// The lints that belong to that compiler.
const CLIPPY: Need = need(
    "rust-web-clippy",
    File("/usr/bin/cargo-clippy"),
    "lints the kernel object",
);

/// What bpf-linker is compiled with where it uses Debian's LLVM.
const LINKER_LIBRARIES: [Need; 5] = [
    need("g++", Program("g++"), "links bpf-linker"),
    need(
        "llvm-22-dev",
        File("/usr/lib/llvm-22/include/llvm-c/Core.h"),
        "LLVM for bpf-linker",
    ),
    need(
        "libxml2-dev",
        File("/usr/include/libxml2/libxml/parser.h"),
        "LLVM needs it",
    ),
    need("libzstd-dev", File("/usr/include/zstd.h"), "LLVM needs it"),
    need("zlib1g-dev", File("/usr/include/zlib.h"), "LLVM needs it"),
];

/// The rustup components, as (component, program), that the lints of the host programs run.
const COMPONENTS: [(&str, &str); 2] = [("clippy", "cargo-clippy"), ("rustfmt", "cargo-fmt")];

const fn need(name: &'static str, presence: Presence, purpose: &'static str) -> Need {
    Need {
        package: Package { name, purpose },
        presence,
    }
}

impl Need {
    fn is_missing(&self) -> bool {
        match self.presence {
            Program(name) => host::find_program(name).is_none(),
            File(path) => !Path::new(path).exists(),
            PythonModule(name) => !has_python_module(name),
        }
    }
}

fn has_python_module(name: &str) -> bool {
    // Found, not imported: scapy takes a second for that.
    let question =
        format!("import importlib.util, sys; sys.exit(not importlib.util.find_spec('{name}'))");
    Command::new("/usr/bin/python3")
        .args(["-c", &question])
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

/// A list of what is missing.
#[derive(Debug)]
pub struct Needs {
    /// Debian packages, in the order of installation.
    pub packages: Vec<Package>,
    /// Components of the rustup toolchain in use.
    pub components: Vec<&'static str>,
    /// The recipe to install bpf-linker for.
    pub linker: Option<Recipe>,
}

impl Needs {
    /// Looks for everything.
    pub fn missing() -> Self {
        let mut packages = Vec::new();
        let recipe = match Compiler::find() {
            Ok(compiler) => compiler.recipe,
            Err(_) => {
                // Debian's is the one that can be had in every case. All of it, though a part may
                // be there: that may be another version.
                packages.extend(COMPILER);
                Recipe::PrebuiltCore
            }
        };
        let linker = toolchain::find_linker(recipe).is_err().then_some(recipe);
        let mut probed = Vec::new();
        if recipe == Recipe::PrebuiltCore {
            probed.push(CLIPPY);
            if linker.is_some() {
                probed.extend(LINKER_LIBRARIES);
            }
        }
        probed.extend_from_slice(TEST_TOOLS);
        let missing = probed.into_iter().filter(Need::is_missing);
        packages.extend(missing.map(|need| need.package));
        Self {
            packages,
            components: missing_components(),
            linker,
        }
    }

    /// Looks for what the package needs beside all that.
    pub fn missing_for_dist() -> Self {
        Self::missing_with(&DIST_TOOLS)
    }

    /// Looks for what benchmarks need beside all that.
    pub fn missing_for_bench() -> Self {
        Self::missing_with(&BENCH_TOOLS)
    }

    /// Looks for what virtual machines need beside all that.
    pub fn missing_for_vm() -> Self {
        Self::missing_with(&VM_TOOLS)
    }

    fn missing_with(more: &[Need]) -> Self {
        let mut needs = Self::missing();
        let missing = more.iter().filter(|need| need.is_missing());
        needs.packages.extend(missing.map(|need| need.package));
        needs
    }

    /// Whether nothing is missing.
    pub fn is_empty(&self) -> bool {
        let Self {
            packages,
            components,
            linker,
        } = self;
        packages.is_empty() && components.is_empty() && linker.is_none()
    }

    /// Whether the kernel object cannot be built.
    pub fn lacks_bpf_toolchain(&self) -> bool {
        let compiler = COMPILER[0].name;
        self.linker.is_some() || self.packages.iter().any(|package| package.name == compiler)
    }
}

impl fmt::Display for Needs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Package { name, purpose } in &self.packages {
            writeln!(f, "  package    {name:<24} {purpose}")?;
        }
        for component in &self.components {
            writeln!(f, "  component  {component:<24} lints the host programs")?;
        }
        if let Some(recipe) = self.linker {
            let crate_name = format!("bpf-linker {}", recipe.linker_versions()[0]);
            writeln!(f, "  crate      {crate_name:<24} links the kernel object")?;
        }
        Ok(())
    }
}

fn missing_components() -> Vec<&'static str> {
    let Ok(sysroot) = toolchain::host_sysroot() else {
        return Vec::new();
    };
    COMPONENTS
        .iter()
        .filter(|(_, program)| !sysroot.join("bin").join(program).exists())
        .map(|(component, _)| *component)
        .collect()
}
