//! The connections to the control socket. However many there are and however slowly they talk, they take a bounded amount of
//! memory, and each has an end: none keeps the others from being answered.

use std::{os::fd::AsFd, pin::pin, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{ConnectInfo, Request},
};
use hyper::{body::Incoming, server::conn::http1};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{sleep, timeout},
};
use tower::ServiceExt;

use super::{peer::Peer, shutdown::Shutdown};
use crate::failure::{Failure, Result};

/// Connections at a time, if there are descriptors for them. Others wait in the socket's backlog.
const CONNECTIONS: u32 = 2048;
/// Every client is on this machine: it has its request ready when it connects.
const HEADER: Duration = Duration::from_secs(5);
/// After that a connection takes no other request.
const USE: Duration = Duration::from_secs(15);
/// After that it is closed, whatever it is at: a reader that does not read, a writer that does not write.
const LIFETIME: Duration = Duration::from_secs(30);
/// What a connection buffers of a request and of an answer, in bytes; a longer header is refused.
const BUFFER: usize = 16 << 10;
/// Pause after a connection could not be taken, for want of descriptors or memory.
const RELIEF: Duration = Duration::from_millis(100);

/// Who is at the other end of a connection; an error is answered, not ignored.
#[derive(Clone, Debug)]
pub(super) struct Caller(pub(super) Result<Peer>);

/// Answers requests until `shutdown` is requested, and then until those under way are finished. Handlers find the [`Caller`] as
/// [`ConnectInfo`].
pub(super) async fn serve(listener: UnixListener, router: Router, shutdown: Shutdown) {
    let connections = settle_connections();
    let slots = Arc::new(Semaphore::new(connections as usize));
    loop {
        let accepted = tokio::select! {
            () = shutdown.requested() => break,
            accepted = accept(&listener, &slots) => accepted,
        };
        let (stream, slot) = accepted;
        tokio::spawn(answer(stream, slot, router.clone(), shutdown.clone()));
    }
    drop(listener);
    // They are all back when every connection has ended.
    drop(slots.acquire_many(connections).await);
}

/// How many connections there is room for, at most [`CONNECTIONS`]: half of the descriptors that this process may have, for
/// which the limit is raised if it can be. The other half is for maps, links and files.
fn settle_connections() -> u32 {
    let wanted = 2 * u64::from(CONNECTIONS);
    let limit = getrlimit(Resource::RLIMIT_NOFILE).and_then(|(soft, hard)| {
        let raised = soft.max(wanted.min(hard));
        setrlimit(Resource::RLIMIT_NOFILE, raised, hard)?;
        Ok(raised)
    });
    let descriptors = limit.unwrap_or_else(|error| {
        log::warn!("cannot raise the limit of descriptors: {error}");
        wanted / 4
    });
    u32::try_from(descriptors / 2).map_or(CONNECTIONS, |half| half.clamp(1, CONNECTIONS))
}

/// The next connection, once there is room for it. Nothing is lost if this is dropped while it waits.
async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> (UnixStream, Option<OwnedSemaphorePermit>) {
    // An error would mean that the semaphore is closed, which nobody does.
    let slot = Arc::clone(slots).acquire_owned().await.ok();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return (stream, slot),
            Err(error) => {
                log::warn!("cannot take a connection to the control socket: {error}");
                sleep(RELIEF).await;
            }
        }
    }
}

/// Answers the requests of one connection; the slot is its own until it ends.
async fn answer(
    stream: UnixStream,
    _slot: Option<OwnedSemaphorePermit>,
    router: Router,
    shutdown: Shutdown,
) {
    let caller = Caller(Peer::of(stream.as_fd()).map_err(Failure::from));
    let service = router.map_request(move |request: hyper::Request<Incoming>| {
        let mut request: Request = request.map(axum::body::Body::new);
        request.extensions_mut().insert(ConnectInfo(caller.clone()));
        request
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER)
        .max_buf_size(BUFFER)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service));
    let mut connection = pin!(connection);
    let ended = timeout(LIFETIME, async {
        tokio::select! {
            ended = connection.as_mut() => return ended,
            () = shutdown.requested() => {}
            () = sleep(USE) => {}
        }
        connection.as_mut().graceful_shutdown();
        connection.as_mut().await
    });
    match ended.await {
        Ok(Ok(())) => {}
        // The client's doing, and it was told if it still listens.
        Ok(Err(error)) => log::debug!("a connection to the control socket has failed: {error}"),
        Err(_) => log::debug!("a connection to the control socket has lasted too long"),
    }
}
