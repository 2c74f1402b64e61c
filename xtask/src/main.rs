//! `cargo xtask`: everything that is done to portfwd beside `cargo build`.

mod bench;
mod demo;
mod dist;
mod fuzz;
mod host;
mod lint;
mod mutants;
mod setup;
mod soak;
mod sources;
mod steps;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Development tasks of portfwd
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Install what the build and the tests need; does nothing when everything is there
    #[command(after_help = "\
On Debian 12 the packages are installed with apt-get, as root or through sudo, and bpf-linker with
`cargo install`. Elsewhere it prints what to install.

Example:
  cargo xtask setup")]
    Setup,

    /// Build a kernel object and print its path
    #[command(after_help = "\
Examples:
  cargo xtask build-ebpf
  bpftool prog load \"$(cargo xtask build-ebpf)\" /sys/fs/bpf/trial")]
    BuildEbpf {
        /// Binary of the package portfwd-ebpf
        #[arg(default_value = "portfwd")]
        bin: String,
    },

    /// Check format, lints and documentation, of the host programs and of the kernel object
    #[command(after_help = "Example:\n  cargo xtask lint")]
    Lint,

    /// Set up, lint and run every test there is
    #[command(after_help = "\
Without a filter this is what CI runs. With one, the lints are left out and the arguments go to the
test programs.

Examples:
  cargo xtask test
  cargo xtask test -- checksum
  cargo xtask test -- --nocapture --exact udp::zero_checksum")]
    Test {
        /// Filter and options for the test programs
        #[arg(last = true, value_name = "FILTER")]
        arguments: Vec<String>,
    },

    /// Start the daemon again and again under load, dial a million connections, or disturb the gateway
    /// in every other way: nothing may be lost
    #[command(after_help = "\
The load is an iperf3 transfer, 1,000 datagrams a second and 10,000 flows. Upgrades go back and forth
between two builds whose programs differ.

Examples:
  cargo xtask soak restarts --count 1000
  cargo xtask soak upgrades --count 100
  cargo xtask soak starts --count 10
  cargo xtask soak connections
  cargo xtask soak flood
  cargo xtask soak chaos
  cargo xtask soak chaos -- --mode xdp --ip 6 upgrade rule-swap
  cargo xtask soak restarts --count 20 -- --mode xdp --flows 1000")]
    Soak {
        /// What is repeated
        #[arg(value_enum)]
        what: soak::What,
        /// How often; without it 1,000 times, and 1,200,000 connections
        #[arg(long)]
        count: Option<u32>,
        /// Arguments for the soak program
        #[arg(last = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },

    /// Measure portfwd beside a bare redirect, the floor, plain forwarding and nftables
    #[command(after_help = "\
Builds for release. Without arguments it measures everything that a target is about, for a quarter of an
hour, and writes the report, its charts and which targets are met into docs/benchmarks. The machine should
do nothing else.

Examples:
  cargo xtask bench
  cargo xtask bench -- --report docs/benchmarks all --rounds 3
  cargo xtask bench -- packets flows --flows 1,1024 --rounds 15
  cargo xtask bench -- sockets
  cargo xtask bench -- --help")]
    Bench {
        /// Arguments for the benchmark
        #[arg(last = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },

    /// Build the Debian package and print its path
    #[command(after_help = "\
--check installs it in a clean root and tries everything that it brings: the program, the manual
pages, the completions of three shells, and, booted in a container, the service. That takes root, or
sudo.

Examples:
  cargo xtask dist
  cargo xtask dist --check
  sudo apt-get install \"$(cargo xtask dist)\"")]
    Dist {
        /// Install it in a clean root and try it
        #[arg(long)]
        check: bool,
    },

    /// Load every program on other kernels, or run tests there, in virtual machines
    #[command(after_help = "\
Of each series the newest kernel that Debian has is downloaded into target/vm and booted, emulated: a
machine takes about half a minute. Printed is what the verifier counts for each program, which must be
within its budget, or why it refuses. With --test the suites that need a kernel run there, on this
system's root: all tests, which takes hours, or those whose names contain a WORD. With --gateway the
machine is the gateway, with virtio network cards between a client and a server on this one; each way
of attaching and each set of offloads has its checks, a line each. Five to ten minutes. With --bench
the kernel's own forwarders, flowtables and IPVS among them, are measured beside portfwd, in the time
of the emulated machine: one is to be compared with the other, and with nothing else.

Examples:
  cargo xtask vm
  cargo xtask vm 6.1
  cargo xtask vm --test every_row --test udp_forwards
  cargo xtask vm 6.12 --test ''
  cargo xtask vm --gateway 6.12
  cargo xtask vm --bench 6.12")]
    Vm {
        /// Kernel series
        #[arg(default_values = vm::SERIES)]
        series: Vec<String>,
        /// Run the tests whose names contain this
        #[arg(long, value_name = "WORD")]
        test: Vec<String>,
        /// Send traffic through portfwd there, on network cards
        #[arg(long, conflicts_with = "test")]
        gateway: bool,
        /// Measure the kernel's own forwarders and portfwd there
        #[arg(long, conflicts_with_all = ["test", "gateway"])]
        bench: bool,
    },

    /// Put old bugs of translators back in, one by one, and see a test fail for each
    #[command(after_help = "\
The sources are copied into target/mutants; a bug is one changed line there. The suite runs without
any first. A few minutes; the kernel's suite needs root, or sudo.

Examples:
  cargo xtask mutants
  cargo xtask mutants fold-once mask-in-host-order")]
    Mutants {
        /// Some of them, by name
        #[arg(value_name = "NAME")]
        names: Vec<String>,
    },

    /// Try inputs that nobody thought of: frames before the core, files and words before the daemon
    #[command(after_help = "\
Kept inputs are changed at random; those that do something new are written to
portfwd-common/tests/corpus and portfwd/tests/corpus, for every run after. One that breaks what must
hold is printed, and kept.

Examples:
  cargo xtask fuzz
  cargo xtask fuzz --minutes 0.5")]
    Fuzz {
        /// How long, for each of the two
        #[arg(long, default_value_t = 5.0)]
        minutes: f64,
    },

    /// Forward ports between network namespaces of an embedded lab, and show it
    #[command(after_help = "Example:\n  cargo xtask demo")]
    Demo {
        /// Arguments for the demo program
        #[arg(last = true, value_name = "ARGUMENT")]
        arguments: Vec<String>,
    },
}

fn main() -> ExitCode {
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(cause) => {
            eprintln!("error: {cause:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup => setup::run(),
        Task::BuildEbpf { bin } => {
            let object = xtask::ebpf::build(&host::target_dir(), &bin)?;
            println!("{}", object.display());
            Ok(())
        }
        Task::Lint => lint::run(),
        Task::Test { arguments } => test::run(&arguments),
        Task::Soak {
            what,
            count,
            arguments,
        } => soak::run(what, count, &arguments),
        Task::Bench { arguments } => bench::run(&arguments),
        Task::Dist { check } => dist::run(if check {
            dist::Look::InCleanRoot
        } else {
            dist::Look::No
        }),
        Task::Vm {
            series,
            test,
            gateway,
            bench,
        } => {
            let what = if gateway {
                vm::What::Gateway
            } else if bench {
                vm::What::Bench
            } else if test.is_empty() {
                vm::What::Load
            } else {
                vm::What::Test(test)
            };
            vm::run(&series, &what)
        }
        Task::Mutants { names } => mutants::run(&names),
        Task::Fuzz { minutes } => fuzz::run(minutes),
        Task::Demo { arguments } => demo::run(&arguments),
    }
}
