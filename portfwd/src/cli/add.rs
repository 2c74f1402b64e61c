//! `portfwd add`.

use clap::Args;
use hyper::Method;

use super::output::{Output, Style};
use crate::{
    control::{client::Client, protocol::Added},
    failure::Result,
    instance::Instance,
    ruleset::{Refusal, RuleSpec, RuleWords, sources},
};

const AFTER_HELP: &str = "\
LISTEN without address means every address of the WAN interfaces, followed as they change; a rule is IPv4 or IPv6 as its TARGET is.
A TARGET that is a name is resolved by the system's resolver, and again every minute (`portfwd run --resolve-every`); when it leads
elsewhere, the rule follows, and --flows says what becomes of its flows.
Ranges are forwarded 1:1. TARGET without port keeps the port or ports.
A listen with an address goes before one without, an exact port before a range.
dmz rest forwards TCP, UDP and ping that are nobody else's: all other rules go before it, and so do the gateway's own services and
connections, what machines behind its masquerade get answered, and what --except names.
The target sees the client's own address, unless the client is on the LAN itself: then it sees the address that the client dialled.
--masquerade is for targets whose default route is not this gateway.
The maximum segment size that SYN and SYN-ACK say is lowered, never raised, to what the smaller MTU of both sides leaves: 40 bytes
less over IPv4, 60 over IPv6. --no-mss-clamp leaves it.
--track light is for many flows, of TCP and UDP: a packet costs nearly the same whatever their number. Figures of rules and ports are
exact; what `portfwd flows` says of a flow is what some of its packets have told. Not with --masquerade, --snat or limits, and its
flows follow changes of the rule at once.
LIST is addresses and prefixes separated by commas; @FILE stands for those in FILE, one a line, # begins a comment.
What a refused source sends to the rule is dropped and counted as source_refused; connections that it has end.
What is beyond a limit is dropped and counted as source_rate, source_flows, rule_rate or rule_flows; connections that are there are
never touched. A closed TCP connection does not count; a source is asked before the rule, so none can use up the whole of it.

Examples:
  portfwd add tcp 80 10.0.0.2                              port kept
  portfwd add tcp 8080 10.0.0.2:80 --name web              port changed
  portfwd add both 27000-27050 10.0.0.3                    a range, TCP and UDP
  portfwd add udp 5000-5099 10.0.0.3:6000-6099             a range, shifted
  portfwd add icmp echo 10.0.0.3                           ping is answered by 10.0.0.3
  portfwd add dmz rest 10.0.0.9 --except tcp/22            all that is nobody else's
  portfwd add tcp 203.0.113.5:443 10.0.0.4                 on one address only
  portfwd add tcp 2222 10.0.0.5:22 --expires 2h            gone after two hours
  portfwd add tcp 3389 10.0.0.6 --tag office --disabled    to be enabled later
  portfwd add tcp 8080 web.lan:80 --flows kill             a name, followed as it changes
  portfwd add tcp 443 [2001:db8::2]:8443                   IPv6
  portfwd add tcp [2001:db8:ffff::1]:80 2001:db8::2        IPv6, on one address only
  portfwd add tcp 80 10.0.0.2 --masquerade                 the target answers to the gateway
  portfwd add udp 53 10.0.0.2 --snat 10.0.0.1:2000-2999    likewise, to certain ports of it
  portfwd add udp 27015 10.0.0.8 --track light             many players
  portfwd add tcp 22 10.0.0.2 --from 203.0.113.0/24        for some sources only
  portfwd add tcp 25 10.0.0.2 --not-from 192.0.2.0/24,198.51.100.7
  portfwd add tcp 443 10.0.0.2 --max-flows 10000 --max-flows-per-source 100
  portfwd add tcp 22 10.0.0.2 --rate-per-source 6/min      six at once, then one every ten seconds
  portfwd add udp 53 10.0.0.2 --rate 2000/s:4000           4000 at once, then 2000 a second";

#[derive(Clone, Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    #[command(flatten)]
    rule: RuleArguments,
}

/// A rule on the command line.
#[derive(Clone, Debug, Args)]
pub struct RuleArguments {
    /// tcp, udp, both, icmp or dmz
    #[arg(value_name = "PROTO")]
    proto: String,
    /// PORT, FIRST-LAST, ADDR:PORT, ADDR:FIRST-LAST or [V6]:PORT; of icmp, echo is the port, of dmz, rest
    #[arg(value_name = "LISTEN")]
    listen: String,
    /// ADDR, ADDR:PORT, ADDR:FIRST-LAST or [V6]:PORT; a name may stand for ADDR
    #[arg(value_name = "TARGET")]
    target: String,
    /// The target sees this gateway's own address instead of the client's
    #[arg(long)]
    masquerade: bool,
    /// The target sees this address, and one of these ports, instead of the client's
    #[arg(long, value_name = "ADDR[:FIRST-LAST]")]
    snat: Option<String>,
    /// Leave the maximum segment size that SYN and SYN-ACK say as it is
    #[arg(long)]
    no_mss_clamp: bool,
    /// How closely flows are followed: full, or light: packets are translated by the rule alone, whatever the number of flows
    #[arg(long, value_name = "HOW")]
    track: Option<String>,
    /// Name of the rule: a-z, 0-9 and . _ -
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// What becomes of its flows when it changes or goes: keep, drain or kill
    #[arg(long, value_name = "POLICY")]
    flows: Option<String>,
    /// Keep it to be enabled later: packets do not find it, and it is in no other rule's way
    #[arg(long)]
    disabled: bool,
    /// A line for people
    #[arg(long, value_name = "TEXT")]
    comment: Option<String>,
    /// A word to find it by, with others; may be given several times
    #[arg(long = "tag", value_name = "TAG")]
    tags: Vec<String>,
    /// When it ends: a length of time (90s, 2h, 7d) or a point in time (2030-12-31T23:59:59Z)
    #[arg(long, value_name = "WHEN")]
    expires: Option<String>,
    /// When packets find it: DAYS HH:MM-HH:MM, several with ; between, and a time zone
    #[arg(long, value_name = "WHEN")]
    schedule: Option<String>,
    /// Which addresses of a TARGET that is a name are taken: ipv4 or ipv6 [default: as LISTEN, else ipv4 if it has any]
    #[arg(long, value_name = "FAMILY")]
    family: Option<String>,
    /// Who may use it: addresses and prefixes, @FILE for those in a file; everybody else is refused
    #[arg(long, value_name = "LIST")]
    from: Vec<String>,
    /// Who may not: likewise; of --from and --not-from the longest prefix decides
    #[arg(long, value_name = "LIST")]
    not_from: Vec<String>,
    /// New flows in a time: COUNT/s, COUNT/min or COUNT/h, and how many at once [default: COUNT]
    #[arg(long, value_name = "COUNT/UNIT[:BURST]")]
    rate: Option<String>,
    /// The same of each source
    #[arg(long, value_name = "COUNT/UNIT[:BURST]")]
    rate_per_source: Option<String>,
    /// Flows at the same time
    #[arg(long, value_name = "COUNT")]
    max_flows: Option<u32>,
    /// The same of each source
    #[arg(long, value_name = "COUNT")]
    max_flows_per_source: Option<u32>,
    /// Addresses with the same first BITS are one source [default: 32 for IPv4, 64 for IPv6]
    #[arg(long, value_name = "BITS")]
    source_prefix: Option<u8>,
    /// What a dmz rule leaves to the gateway: tcp/PORT, udp/FIRST-LAST, both/PORT or icmp; may be given several times
    #[arg(long, value_name = "PROTO/PORTS")]
    except: Vec<String>,
}

impl RuleArguments {
    /// The rule in words. Nonsense is nonsense with and without a daemon.
    pub fn words(&self) -> Result<RuleWords> {
        let Self {
            proto,
            listen,
            target,
            masquerade,
            snat,
            no_mss_clamp,
            track,
            name,
            flows,
            disabled,
            comment,
            tags,
            expires,
            schedule,
            family,
            from,
            not_from,
            rate,
            rate_per_source,
            max_flows,
            max_flows_per_source,
            source_prefix,
            except,
        } = self.clone();
        let words = RuleWords {
            proto,
            listen,
            target,
            masquerade,
            snat,
            mss_clamp: no_mss_clamp.then_some(false),
            track,
            name,
            flows,
            enabled: disabled.then_some(false),
            comment,
            tags,
            expires,
            schedule,
            family,
            resolved: None,
            from: sources::expand(&from).map_err(Refusal::from)?,
            not_from: sources::expand(&not_from).map_err(Refusal::from)?,
            rate,
            rate_per_source,
            max_flows,
            max_flows_per_source,
            source_prefix,
            except,
        };
        RuleSpec::check(&words)?;
        Ok(words)
    }
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let words = arguments.rule.words()?;
    let added: Added = Client::connect(instance)
        .await?
        .call(Method::POST, "/v1/rules", &words)
        .await?;
    for warning in &added.warnings {
        eprintln!("portfwd: warning: {warning}");
    }
    output.print(&added, |out, added| {
        let id = Style::Bold.paint(&added.rule.id.to_string(), output.colour());
        writeln!(out, "{id}: {}", added.rule)
    })
}
