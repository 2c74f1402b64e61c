//! The endpoint of the gateway that stands for a client, where a flow hides it: masquerade, SNAT and hairpin.
//!
//! A client endpoint keeps its port for as long as flows use it, whoever they lead to (RFC 4787 REQ-1), and shares it with
//! nobody (REQ-3). What the datapath takes from a pool it never gives back, but for a port that it has just taken in vain: the
//! sweep sees which ports no flow uses any more.

use super::{
    Scene,
    nat::Hiding,
    path::{Knowledge, Path},
    pool::{self, Search, Wish},
    tables::{InsertError, Tables},
    tcp::TcpFlags,
    verdict::{DropReason, Event, PassReason, Verdict},
    workspace::Workspace,
};
use crate::{
    abi::{Binding, BindingKey, FlowKey, Interface, Peer, Protocol, Rule, config::interface_slot},
    net::{Address, be::Ports},
};

/// Puts the endpoint that stands for the client into the translated key of a first packet, if its rule or its way hides the
/// client. An error is the verdict.
#[inline(always)]
pub fn hide<A, T>(work: &mut Workspace<A>, scene: &Scene<'_, T>) -> Result<(), Verdict>
where
    A: Address,
    T: Tables,
{
    // It begins nothing, and what it would end is not there.
    if work.subject.flags.any(TcpFlags::RST) {
        return Err(Verdict::Pass(PassReason::NoFlow));
    }
    let no_source = Verdict::Drop(DropReason::NoSource);
    let rule = scene.tables.rule(work.mapping.rule).ok_or(no_source)?;
    let source = source(work, rule, scene).ok_or(no_source)?;
    work.binding = BindingKey {
        client: work.key.src.widen(),
        source: source.widen(),
        port: work.key.ports.src(),
        class: work.subject.protocol.class(A::FAMILY),
        range: rule.source_ports,
    };
    let port = match scene.tables.bound(&work.binding, scene.now) {
        Some(port) => port,
        None => {
            let answer = FlowKey {
                src: work.to.dst,
                dst: source,
                ports: Ports::new(work.to.ports.dst(), 0),
                protocol: work.key.protocol,
            };
            bind(
                &work.binding,
                &answer,
                work.subject.protocol,
                &mut work.search,
                scene,
            )?
        }
    };
    work.to.src = source;
    work.to.ports = Ports::new(port, work.to.ports.dst());
    Ok(())
}

/// The address that stands for the client; `None` if the way out has none.
#[inline(always)]
fn source<A, T>(work: &Workspace<A>, rule: &Rule, scene: &Scene<'_, T>) -> Option<A>
where
    A: Address,
    T: Tables,
{
    match work.mapping.hiding {
        Hiding::BehindListen => Some(work.key.dst),
        Hiding::BehindSource => Some(A::narrow(rule.source)),
        // Never asked: the caller looks first.
        Hiding::None => None,
        Hiding::BehindEgress => egress(&work.path, scene.tables)?.address(),
    }
}

/// The interface that a packet leaves by, if it is attached.
#[inline(always)]
pub fn egress<'a, T: Tables>(path: &Path, tables: &'a T) -> Option<&'a Interface> {
    match path.knowledge {
        Knowledge::Ready => tables.interface(path.hop.slot),
        Knowledge::Interface => tables
            .interface(interface_slot(path.ifindex))
            .filter(|interface| interface.ifindex == path.ifindex),
        Knowledge::Nothing => None,
    }
}

/// How many ports are tried for a client whose first choice a socket of the gateway has: the sweep knows of all that were there when
/// it last looked.
const TRIES: u32 = 2;

/// Takes a port for a client endpoint that has none. `answer` is what the target's answers will be, but for the port.
#[inline(always)]
fn bind<A: Address, T: Tables>(
    key: &BindingKey,
    answer: &FlowKey<A>,
    protocol: Protocol,
    search: &mut Search,
    scene: &Scene<'_, T>,
) -> Result<u16, Verdict> {
    let no_port = Verdict::Drop(DropReason::NoPort);
    let Some(pool) = scene.tables.pool(&key.pool()) else {
        return Err(Verdict::Drop(DropReason::NoSource));
    };
    let wish = Wish {
        port: key.port,
        range: key.range,
        seed: seed(key, scene.config.seed),
    };
    let mut tries = 0;
    let port = loop {
        let port = pool::take(pool, &wish, search, scene.tables).ok_or(no_port)?;
        let answer = FlowKey {
            ports: Ports::new(answer.ports.src(), port),
            ..*answer
        };
        if !scene.tables.has_socket(&answer, protocol) {
            break port;
        }
        // It stays taken: the sweep finds it to be nobody's, or the gateway's.
        tries += 1;
        if tries == TRIES {
            return Err(no_port);
        }
    };
    let binding = Binding {
        used: scene.now,
        port,
        padding: 0,
    };
    match scene.tables.bind(key, &binding) {
        Ok(()) => {
            scene.tables.note(Event::Bound);
            Ok(port)
        }
        Err(error) => {
            pool::give(pool, port);
            match error {
                // Another CPU has seen another flow of the same endpoint begin.
                InsertError::Exists => scene.tables.bound(key, scene.now).ok_or(no_port),
                InsertError::Full => Err(no_port),
            }
        }
    }
}

/// Where the search begins: not to be guessed without the secret, and the same for the same client.
#[inline(always)]
const fn seed(key: &BindingKey, secret: [u32; 2]) -> u32 {
    let (client, source) = (key.client.raw(), key.source.raw());
    let mut state = (secret[0] as u64) << 32 | secret[1] as u64;
    let words = [
        client[0] ^ client[1].rotate_left(7),
        client[2] ^ client[3].rotate_left(11),
        source[0] ^ source[3],
        (key.port as u32) << 16 | key.class as u32,
    ];
    let mut word = 0;
    while word < words.len() {
        // The multiplier is 2^64 divided by the golden ratio: every bit of a word reaches the upper half.
        state = (state ^ words[word] as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        state ^= state >> 32;
        word += 1;
    }
    state as u32
}

/// Whether the endpoint that stands for a flow's client is still the one that its rule would choose.
#[inline(always)]
pub fn still_stands<A: Address, T: Tables>(
    rule: &Rule,
    peer: Peer,
    [listen, source]: [A; 2],
    tables: &T,
) -> bool {
    match peer {
        Peer::Client => !rule.hides_clients(),
        Peer::Gateway if rule.is_snat() => rule.source == source.widen(),
        Peer::Gateway if rule.is_masquerade() => tables.is_local(source),
        Peer::Gateway => source == listen,
    }
}
