//! Dialling a rule's target from the gateway itself.

use std::{io, net::SocketAddr, time::Duration};

use anyhow::{Context, Result};
use tokio::{
    net::{TcpStream, UdpSocket},
    time::timeout,
};

use super::{State, Step};
use crate::{
    netlink::{
        neighbour::{Resolution, neighbours},
        route::{Route, Routes},
    },
    transport::Transport,
};

/// A target on a LAN answers within milliseconds.
const PATIENCE: Duration = Duration::from_secs(3);
const PROBE: &[u8] = b"portfwd check-port";

/// Dials the target, and looks whether its next hop, which that has asked for, has answered.
pub(super) async fn reach(
    protocol: Transport,
    target: SocketAddr,
    egress: Option<&str>,
) -> Result<Vec<Step>> {
    let dialled = match protocol {
        Transport::Tcp => dial_tcp(target).await,
        Transport::Udp => dial_udp(target).await,
    };
    let mut steps = Vec::new();
    steps.extend(neighbour(target, egress)?);
    steps.push(dialled);
    Ok(steps)
}

async fn dial_tcp(target: SocketAddr) -> Step {
    let (state, detail) = match timeout(PATIENCE, TcpStream::connect(target)).await {
        Ok(Ok(_)) => (State::Good, format!("{target} accepts connections")),
        Ok(Err(error)) => (State::Bad, refusal(target, &error)),
        Err(_) => (
            State::Bad,
            format!("{target} does not answer: a firewall there, or no such machine"),
        ),
    };
    step(state, detail)
}

async fn dial_udp(target: SocketAddr) -> Step {
    let probed = timeout(PATIENCE, probe(target)).await;
    let (state, detail) = match probed {
        Ok(Ok(())) => (State::Good, format!("{target} answers")),
        Ok(Err(error)) => (State::Bad, refusal(target, &error)),
        Err(_) => (
            State::Unknown,
            format!("{target} says nothing, as many UDP services do to strangers"),
        ),
    };
    step(state, detail)
}

async fn probe(target: SocketAddr) -> io::Result<()> {
    let any = if target.is_ipv4() {
        "0.0.0.0:0"
    } else {
        "[::]:0"
    };
    let socket = UdpSocket::bind(any).await?;
    socket.connect(target).await?;
    socket.send(PROBE).await?;
    let mut answer = [0; 1];
    socket.recv(&mut answer).await.map(drop)
}

fn step(state: State, detail: String) -> Step {
    Step {
        step: "target",
        state,
        detail,
    }
}

fn refusal(target: SocketAddr, error: &io::Error) -> String {
    if error.kind() == io::ErrorKind::ConnectionRefused {
        return format!("{target} refuses: the machine is there, and nothing serves the port");
    }
    format!("{target} cannot be reached: {error}")
}

/// Whether the next hop has a MAC address; `None` on links without.
fn neighbour(target: SocketAddr, egress: Option<&str>) -> Result<Option<Step>> {
    let Route::Out(hop) = Routes::open()?.to(target.ip())? else {
        return Ok(None);
    };
    let ip = hop.neighbour(target.ip());
    let known = neighbours().context("cannot list the neighbours")?;
    let known = known
        .iter()
        .find(|of| of.ip == ip && of.ifindex == hop.ifindex);
    let by = egress.unwrap_or("the LAN");
    Ok(known.map(|known| {
        let (state, detail) = match known.state {
            Resolution::Known => (State::Good, format!("{ip} is there on {by}")),
            Resolution::Asking => (State::Bad, format!("{ip} has not answered on {by} so far")),
            Resolution::Failed => (
                State::Bad,
                format!("{ip} does not answer on {by}: it is off, or has another address"),
            ),
        };
        Step {
            step: "neighbour",
            state,
            detail,
        }
    }))
}
