//! `portfwd run`.

use std::time::Duration;

use clap::{Args, builder::RangedU64ValueParser};
use clap_complete::ArgValueCandidates;
use portfwd_common::abi::{MIN_MAX_HALF_OPEN, Role};

use super::complete;
use crate::{
    daemon::{
        self,
        options::{
            AttachMode, InterfaceOption, MAX_MAX_FLOWS, MAX_MAX_HALF_OPEN, MAX_MAX_PORTS, Options,
        },
    },
    failure::{Failure, Kind, Result},
    instance::Instance,
};

const AFTER_HELP: &str = "\
Runs in the foreground; it is ready when `portfwd status` exits 0. What it attaches stays when it ends, and forwards on: start it
again to manage it, `portfwd detach` takes it away. Rules outlive the daemon and the machine's restart. An interface that does not
exist yet is waited for; all are followed by name as they go and come back.

MODE is one of
  auto          native XDP on a real network card, TC on virtual devices
  xdp           native XDP, in the driver
  xdp-generic   XDP in the stack, for every driver
  tc            TC, behind the driver

Examples:
  portfwd run --wan eth0 --lan eth1
  portfwd run --wan eth0 --wan eth2 --lan br0=tc
  portfwd run --wan eth0=xdp --lan eth1=xdp --max-flows 1000000
  portfwd run --wan eth0 --lan eth0                        a gateway with one arm
  portfwd -n gateway run --wan wan0 --lan lan0 --mode tc";

/// A day.
const MAX_RESOLVE_EVERY: u32 = 86_400;

fn count(max: u32) -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(1..=u64::from(max))
}

fn half_open() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(u64::from(MIN_MAX_HALF_OPEN)..=u64::from(MAX_MAX_HALF_OPEN))
}

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Interfaces that clients come in on
    #[arg(long, value_name = "IF[=MODE]", add = ArgValueCandidates::new(complete::interfaces), required = true, num_args = 1..)]
    wan: Vec<String>,
    /// Interfaces that targets are behind
    #[arg(long, value_name = "IF[=MODE]", add = ArgValueCandidates::new(complete::interfaces), required = true, num_args = 1..)]
    lan: Vec<String>,
    /// How to attach where no mode is given: auto, xdp, xdp-generic or tc
    #[arg(long, value_name = "MODE", default_value_t)]
    mode: AttachMode,
    /// Connections that fit into the connection table [default: that of the tables in the kernel,
    /// 262144 at first]
    #[arg(long, value_name = "N", value_parser = count(MAX_MAX_FLOWS))]
    max_flows: Option<u32>,
    /// Connections and datagram flows that may be beginning at a time: answered, but not yet proven
    /// by their third segment or second datagram [default: likewise, 65536]
    #[arg(long, value_name = "N", value_parser = half_open())]
    max_half_open: Option<u32>,
    /// Listen ports that are counted, the sum over all rules; TCP and UDP count separately
    /// [default: likewise, 524288]
    #[arg(long, value_name = "N", value_parser = count(MAX_MAX_PORTS))]
    max_ports: Option<u32>,
    /// How often names that targets are get resolved again, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 60, value_parser = count(MAX_RESOLVE_EVERY))]
    resolve_every: u32,
}

pub fn run(instance: Instance, arguments: &Arguments) -> Result<()> {
    let options = arguments.options(instance)?;
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("info")).init();
    // Before there are other threads: they inherit it.
    options.instance.enter_netns()?;
    Ok(daemon::run(options)?)
}

impl Arguments {
    fn options(&self, instance: Instance) -> Result<Options> {
        let mut interfaces: Vec<InterfaceOption> = Vec::new();
        for (role, words) in [(Role::Wan, &self.wan), (Role::Lan, &self.lan)] {
            for word in words {
                let interface = self.interface(role, word)?;
                let known = interfaces
                    .iter_mut()
                    .find(|other| other.name == interface.name);
                match known {
                    None => interfaces.push(interface),
                    // A gateway with one arm.
                    Some(other)
                        if other.role == Role::Wan
                            && role == Role::Lan
                            && other.mode == interface.mode =>
                    {
                        other.role = Role::Both;
                    }
                    Some(_) => {
                        let error = format!("interface {} is named twice", interface.name);
                        return Err(Failure::new(Kind::Usage, error).hint(
                            "once --wan, or --lan, or both with the same mode if it is the gateway's only arm",
                        ));
                    }
                }
            }
        }
        Ok(Options {
            instance,
            interfaces,
            max_flows: self.max_flows,
            max_half_open: self.max_half_open,
            max_ports: self.max_ports,
            resolve_every: Duration::from_secs(self.resolve_every.into()),
        })
    }

    fn interface(&self, role: Role, word: &str) -> Result<InterfaceOption> {
        let (name, mode) = match word.split_once('=') {
            Some((name, mode)) => (
                name,
                mode.parse()
                    .map_err(|error: String| Failure::new(Kind::Usage, error))?,
            ),
            None => (word, self.mode),
        };
        // As the kernel judges names (dev_valid_name).
        let legal = !name.is_empty() && name.len() < libc::IFNAMSIZ && !matches!(name, "." | "..");
        if !legal || name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace()) {
            return Err(Failure::new(
                Kind::Usage,
                format!("{name:?} is not the name of an interface"),
            )
            .hint("`ip link` lists them"));
        }
        Ok(InterfaceOption {
            name: name.to_owned(),
            role,
            mode,
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn options(line: &str) -> Result<Options, String> {
        let line = Line::try_parse_from(std::iter::once("run").chain(line.split(' ')))
            .map_err(|error| error.to_string())?;
        line.arguments
            .options(Instance::new(None, None).unwrap())
            .map_err(|failure| failure.to_string())
    }

    #[test]
    fn interfaces_have_roles_and_modes() {
        let options = options(
            "--wan eth0 eth2=tc --lan eth1=xdp --wan eth3.7 --mode xdp-generic --max-flows 10",
        )
        .unwrap();
        let got: Vec<_> = options
            .interfaces
            .iter()
            .map(|i| (i.name.as_str(), i.role, i.mode))
            .collect();
        assert_eq!(
            got,
            [
                ("eth0", Role::Wan, AttachMode::XdpGeneric),
                ("eth2", Role::Wan, AttachMode::Tc),
                ("eth3.7", Role::Wan, AttachMode::XdpGeneric),
                ("eth1", Role::Lan, AttachMode::Xdp),
            ]
        );
        assert_eq!((options.max_flows, options.max_ports), (Some(10), None));
    }

    #[test]
    fn an_interface_can_be_both_sides() {
        let options = options("--wan eth0 --lan eth0 eth1").unwrap();
        let got: Vec<_> = options
            .interfaces
            .iter()
            .map(|i| (i.name.as_str(), i.role))
            .collect();
        assert_eq!(got, [("eth0", Role::Both), ("eth1", Role::Lan)]);
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "--wan eth0",
            "--lan eth0",
            "--wan eth0=xdp --lan eth0=tc",
            "--wan eth0 --lan eth0 eth0",
            "--wan eth0 eth0=tc --lan eth1",
            "--wan eth0=fast --lan eth1",
            "--wan =tc --lan eth1",
            "--wan a/b --lan eth1",
            "--wan a-name-that-is-too-long --lan eth1",
            "--wan eth0 --lan eth1 --mode fast",
            "--wan eth0 --lan eth1 --max-flows 0",
            "--wan eth0 --lan eth1 --max-half-open 1023",
            "--wan eth0 --lan eth1 --max-ports 4294967296",
        ] {
            assert!(options(line).is_err(), "{line}");
        }
    }
}
