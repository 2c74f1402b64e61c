//! Sockets made inside a namespace and bound there.

use std::io::{self, ErrorKind};
use std::net::SocketAddr;

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

use crate::deadline::{PATIENCE, wait_for};
use crate::namespace::Namespace;

/// A socket of `kind` inside `namespace`, bound to `endpoint`, and to its family alone.
///
/// A test that closes a port and binds it anew may find it in use for a moment: a process that
/// another test starts holds all descriptors of this one between fork and exec.
pub fn bind(namespace: &Namespace, kind: Type, endpoint: SocketAddr) -> Result<Socket> {
    wait_for("the port to be free", PATIENCE, || {
        let bound = namespace.run(|| try_bind(kind, endpoint))?;
        match bound {
            Err(error) if error.kind() == ErrorKind::AddrInUse => Ok(None),
            other => Ok(Some(other?)),
        }
    })
    .with_context(|| format!("bind a socket to {endpoint} in {}", namespace.name()))
}

fn try_bind(kind: Type, endpoint: SocketAddr) -> io::Result<Socket> {
    let socket = Socket::new(Domain::for_address(endpoint), kind, None)?;
    if endpoint.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    if kind == Type::STREAM {
        // Connections of an earlier server may still be in TIME-WAIT.
        socket.set_reuse_address(true)?;
    }
    socket.bind(&endpoint.into())?;
    Ok(socket)
}
