//! `portfwd run`.

use std::path::PathBuf;

use clap::Args;
use clap_complete::ArgValueCandidates;

use super::{complete, configuration::tell, output::Output};
use crate::{
    config::Config,
    daemon::{self, options::Options, words::GatewayWords},
    failure::{Kind, Result},
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
  portfwd run                                              interfaces and rules of /etc/portfwd
  portfwd run --wan eth0 --lan eth1
  portfwd run --wan eth0 --wan eth2 --lan br0=tc
  portfwd run --wan eth0=xdp --lan eth1=xdp --max-flows 1000000
  portfwd run --wan eth0 --lan eth0                        a gateway with one arm
  portfwd -n gateway run --wan wan0 --lan lan0 --mode tc";

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// Interfaces that clients come in on
    #[arg(long, value_name = "IF[=MODE]", add = ArgValueCandidates::new(complete::interfaces), num_args = 1..)]
    wan: Vec<String>,
    /// Interfaces that targets are behind
    #[arg(long, value_name = "IF[=MODE]", add = ArgValueCandidates::new(complete::interfaces), num_args = 1..)]
    lan: Vec<String>,
    /// How to attach where no mode is given: auto, xdp, xdp-generic or tc
    #[arg(long, value_name = "MODE")]
    mode: Option<String>,
    /// Connections that fit into the connection table [default: that of the tables in the kernel,
    /// 262144 at first]
    #[arg(long, value_name = "N")]
    max_flows: Option<u32>,
    /// Connections and datagram flows that may be beginning at a time: answered, but not yet proven
    /// by their third segment or second datagram [default: likewise, 65536]
    #[arg(long, value_name = "N")]
    max_half_open: Option<u32>,
    /// Listen ports that are counted, the sum over all rules; TCP and UDP count separately
    /// [default: likewise, 262144]
    #[arg(long, value_name = "N")]
    max_ports: Option<u32>,
    /// Leave the maximum segment size that SYN and SYN-ACK say as it is, whatever the rule
    #[arg(long)]
    no_mss_clamp: bool,
    /// Take new flows from sources that, by the routing table, cannot have come in where they did:
    /// for gateways that see one direction of a client on the WAN and the other on the LAN
    #[arg(long)]
    no_source_check: bool,
    /// How often names that targets are get resolved again, seconds [default: 60]
    #[arg(long, value_name = "SECONDS")]
    resolve_every: Option<u32>,
    /// How long a silent UDP flow is kept [default: 5m]
    #[arg(long, value_name = "TIME")]
    udp_timeout: Option<String>,
    /// How long a silent TCP connection is kept before both sides have acknowledged [default: 2m]
    #[arg(long, value_name = "TIME")]
    tcp_opening_timeout: Option<String>,
    /// How long a silent TCP connection is kept that is established [default: 2h 4m]
    #[arg(long, value_name = "TIME")]
    tcp_established_timeout: Option<String>,
    /// How long a silent TCP connection is kept that has ended [default: 4m]
    #[arg(long, value_name = "TIME")]
    tcp_closing_timeout: Option<String>,
    /// Configuration whose rules a start and SIGHUP apply, and whose [gateway] says what is not said
    /// here; a file or a directory [default: /etc/portfwd if no interface is named]
    #[arg(long, value_name = "PATH")]
    config: Option<PathBuf>,
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
        let said = GatewayWords {
            wan: self.wan.clone(),
            lan: self.lan.clone(),
            mode: self.mode.clone(),
            max_flows: self.max_flows,
            max_half_open: self.max_half_open,
            max_ports: self.max_ports,
            mss_clamp: self.no_mss_clamp.then_some(false),
            source_check: self.no_source_check.then_some(false),
            resolve_every: self.resolve_every,
            udp_timeout: self.udp_timeout.clone(),
            tcp_opening_timeout: self.tcp_opening_timeout.clone(),
            tcp_established_timeout: self.tcp_established_timeout.clone(),
            tcp_closing_timeout: self.tcp_closing_timeout.clone(),
        };
        let names_none = said.wan.is_empty() && said.lan.is_empty();
        let path = match &self.config {
            Some(path) => path.clone(),
            None if names_none => instance.config(),
            None => return said.options(instance),
        };
        let config = Config::read(&path)
            .map_err(|problems| tell(problems, Output::stdout(false)))
            .map_err(|failure| match self.config {
                None if failure.kind == Kind::NotFound => failure.hint(
                    "`portfwd run --wan IF --lan IF` needs none; `portfwd config sample` prints one",
                ),
                Some(_) | None => failure,
            })?;
        Ok(Options {
            config: Some(path),
            ..said.over(config.gateway).options(instance)?
        })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::daemon::options::{AttachMode, Role};

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
