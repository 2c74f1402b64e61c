//! `portfwd explain`.

use std::{
    io::{self, Write},
    net::{IpAddr, SocketAddr},
};

use clap::Args;
use portfwd_common::abi::{Protocol, rule::ECHO_PORT};

use super::{
    facts::facts,
    output::{Output, Style, seconds},
};
use crate::{
    explain::{Conclusion, Explanation, Fate, Leg, Question, default_listen, explain},
    failure::{Failure, Kind, Result},
    instance::Instance,
    transport::Transport,
};

const AFTER_HELP: &str = "\
Puts such a packet, and the answer that its target would give, before a private copy of the programs and tables in the kernel.
Nothing is sent, counted or entered. Works with and without a daemon, for root.
CLIENT without port is taken with port 40000; LISTEN without address is the WAN's first. Of icmp, the packet is an echo request:
CLIENT's port is its identifier, and LISTEN is ADDR or echo.

Examples:
  portfwd explain tcp 198.51.100.7:40000 203.0.113.1:8080
  portfwd explain udp 198.51.100.7 27015                   to the WAN's own address
  portfwd explain tcp [2001:db8::7]:40000 [2001:db8:1::1]:443
  portfwd explain icmp 198.51.100.7 echo                   who answers ping
  portfwd explain tcp 198.51.100.7 8080 --in eth2          of several WANs, this one
  portfwd -j explain tcp 198.51.100.7 8080 | jq .problems";

/// The words of echo.
const ICMP: &str = "icmp";
const ECHO: &str = "echo";
/// The port of a client that names none: which it is makes no difference to a rule.
const ANY_PORT: u16 = 40_000;

#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct Arguments {
    /// tcp, udp or icmp
    #[arg(value_name = "PROTO")]
    proto: String,
    /// Who dials: ADDR or ADDR:PORT
    #[arg(value_name = "CLIENT")]
    client: String,
    /// What is dialled: PORT or ADDR:PORT; of icmp, echo or ADDR
    #[arg(value_name = "LISTEN")]
    listen: String,
    /// The interface it comes in by [default: the one on the way to the client]
    #[arg(long = "in", value_name = "IF")]
    ingress: Option<String>,
}

pub async fn run(instance: &Instance, output: Output, arguments: &Arguments) -> Result<()> {
    let protocol = match arguments.proto.as_str() {
        ICMP => Protocol::Echo,
        word => protocol(word)
            .map_err(|failure| failure.hint("tcp, udp or icmp"))?
            .protocol(),
    };
    let client = endpoint(&arguments.client, "CLIENT", "ADDR or ADDR:PORT", |ip| {
        Some(SocketAddr::new(ip.parse().ok()?, ANY_PORT))
    })?;
    // Nonsense is nonsense with and without a daemon.
    let dialled = dialled(protocol, &arguments.listen)?;
    let facts = facts(instance, Vec::new()).await?;
    let listen = match dialled {
        Dialled::Endpoint(listen) => listen,
        Dialled::Port(port) => {
            let address = default_listen(&facts, client.ip()).ok_or_else(|| {
                let family = if client.is_ipv4() { "IPv4" } else { "IPv6" };
                Failure::new(
                    Kind::NotFound,
                    format!("no WAN interface has an {family} address"),
                )
                .hint("name what is dialled: ADDR:PORT")
            })?;
            SocketAddr::new(address, port)
        }
    };
    if client.is_ipv4() != listen.is_ipv4() {
        return Err(Failure::new(
            Kind::Usage,
            format!(
                "CLIENT {} and LISTEN {} are of two families",
                client.ip(),
                listen.ip()
            ),
        )
        .hint("both IPv4 or both IPv6"));
    }
    let question = Question {
        protocol,
        client,
        listen,
        ingress: arguments.ingress.clone(),
    };
    let explanation = explain(instance, &facts, &question)?;
    output.print(&explanation, |out, explanation| {
        write(out, explanation, output.colour())
    })
}

/// What LISTEN says.
enum Dialled {
    /// A port of the WAN's first address.
    Port(u16),
    Endpoint(SocketAddr),
}

fn dialled(protocol: Protocol, text: &str) -> Result<Dialled> {
    match protocol {
        Protocol::Tcp | Protocol::Udp => match text.parse::<u16>() {
            Ok(port) if port != 0 => Ok(Dialled::Port(port)),
            Ok(_) | Err(_) => {
                endpoint(text, "LISTEN", "PORT or ADDR:PORT", |_| None).map(Dialled::Endpoint)
            }
        },
        Protocol::Echo if text == ECHO => Ok(Dialled::Port(ECHO_PORT)),
        Protocol::Echo => {
            let address = text.strip_suffix(":echo").unwrap_or(text);
            let inner = address.trim_start_matches('[').trim_end_matches(']');
            let address: IpAddr = inner.parse().map_err(|_| {
                Failure::new(Kind::Usage, format!("LISTEN {text:?} is not echo or ADDR"))
                    .hint("icmp has no ports: `portfwd explain icmp 198.51.100.7 echo`")
            })?;
            Ok(Dialled::Endpoint(SocketAddr::new(address, ECHO_PORT)))
        }
    }
}

/// A protocol by its word.
pub(super) fn protocol(word: &str) -> Result<Transport> {
    match word {
        "tcp" => Ok(Transport::Tcp),
        "udp" => Ok(Transport::Udp),
        _ => Err(Failure::new(
            Kind::Usage,
            format!("{word:?} is not a protocol of a packet"),
        )
        .hint("tcp or udp")),
    }
}

fn endpoint(
    text: &str,
    what: &str,
    form: &str,
    bare: impl Fn(&str) -> Option<SocketAddr>,
) -> Result<SocketAddr> {
    let whole = text.parse::<SocketAddr>().ok().filter(|of| of.port() != 0);
    let inner = text.trim_start_matches('[').trim_end_matches(']');
    whole.or_else(|| bare(inner)).ok_or_else(|| {
        Failure::new(Kind::Usage, format!("{what} {text:?} is not {form}"))
            .hint("an IPv6 address with a port is in brackets: [2001:db8::7]:443")
    })
}

fn write(out: &mut dyn Write, explanation: &Explanation, colour: bool) -> io::Result<()> {
    let Explanation {
        proto,
        client,
        listen,
        rule,
        flow,
        there,
        back,
        conclusion,
        problems,
        findings,
        same_build,
    } = explanation;
    writeln!(
        out,
        "packet  {} {client} -> {listen}, in by {}",
        proto.word(),
        there.ingress
    )?;
    match rule {
        Some(rule) => writeln!(
            out,
            "rule    {}: {} -> {}",
            rule.label, rule.listen, rule.target
        )?,
        None => writeln!(out, "rule    none")?,
    }
    match flow {
        Some(flow) => writeln!(
            out,
            "flow    {}, {} old, silent for {}, {} packets there and {} back",
            flow.state,
            seconds(flow.age_s),
            seconds(flow.idle_s),
            flow.to_target.packets,
            flow.to_client.packets
        )?,
        None => writeln!(out, "flow    none yet")?,
    }
    write_leg(out, "there ", there)?;
    if let Some(back) = back {
        write_leg(out, "back  ", back)?;
    }
    if let Some(rule) = rule {
        writeln!(
            out,
            "so far  {} packets of this rule to the target, {} back",
            rule.to_target.packets, rule.to_client.packets
        )?;
    }
    let (style, words) = match conclusion {
        Conclusion::Works => (
            Style::Good,
            "works: both ways are open, and the target has answered before",
        ),
        Conclusion::Unproven => (
            Style::Bold,
            "unproven: both ways are open, and no packet of the target was ever seen",
        ),
        Conclusion::Fails => (Style::Bad, "fails"),
    };
    writeln!(out, "\n{}", style.paint(words, colour))?;
    for problem in problems {
        writeln!(out, "- {problem}")?;
    }
    for finding in findings {
        writeln!(
            out,
            "- doctor: {}: {} ({})",
            finding.id, finding.cause, finding.subject
        )?;
    }
    if !same_build {
        writeln!(
            out,
            "- the programs that are attached are of another build than this one"
        )?;
    }
    Ok(())
}

fn write_leg(out: &mut dyn Write, name: &str, leg: &Leg) -> io::Result<()> {
    let word = match leg.fate {
        Fate::Forwarded => "forwarded",
        Fate::Stack => "given to the kernel translated",
        Fate::Passed => "left to the gateway itself",
        Fate::Dropped => "dropped",
        Fate::Unseen => "not seen by portfwd",
    };
    write!(out, "{name}  {word}")?;
    if let (Some(source), Some(destination)) = (leg.translated_source, leg.translated_destination) {
        write!(out, ": {source} -> {destination}")?;
    }
    if let Some(egress) = &leg.egress {
        write!(out, ", out by {egress}")?;
    }
    if let Some(hop) = &leg.next_hop {
        let ip: IpAddr = hop.ip;
        match &hop.mac {
            Some(mac) => write!(out, " to {ip} ({mac})")?,
            None => write!(out, " to {ip}")?,
        }
    }
    writeln!(out)?;
    for (reason, because) in leg.reasons.iter().zip(&leg.because) {
        writeln!(out, "        {reason}: {because}")?;
    }
    for because in leg.because.iter().skip(leg.reasons.len()) {
        writeln!(out, "        {because}")?;
    }
    Ok(())
}
