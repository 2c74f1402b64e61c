//! The command line's side of the control socket.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

use http_body_util::{BodyExt, Full};
use hyper::{
    Method, Request, StatusCode,
    body::Bytes,
    client::conn::http1::{SendRequest, handshake},
    header::{CONTENT_TYPE, HOST},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::UnixStream,
    time::{sleep, timeout},
};

use crate::{
    failure::{Failure, Kind, Result},
    instance::Instance,
};

/// How long the daemon has to answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause before another attempt when too many clients wait for the daemon.
const PAUSE: Duration = Duration::from_millis(20);

/// A connection to the daemon of an instance.
#[derive(Debug)]
pub struct Client {
    sender: SendRequest<Full<Bytes>>,
    socket: PathBuf,
}

impl Client {
    /// Connects; [`Kind::NotRunning`] if no daemon answers.
    pub async fn connect(instance: &Instance) -> Result<Self> {
        let socket = instance.socket();
        let stream = timeout(PATIENCE, dial(&socket))
            .await
            .map_err(|_| silent(&socket))?
            .map_err(|error| refused(instance, &socket, &error))?;
        let (sender, connection) = handshake(TokioIo::new(stream))
            .await
            .map_err(|error| Failure::during(format!("talk to {}", socket.display()), &error))?;
        // An error of the connection is seen by the request that waits for its answer.
        tokio::spawn(async move { drop(connection.await) });
        Ok(Self { sender, socket })
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T> {
        let body = self.send(Method::GET, path, Bytes::new()).await?;
        self.understand(&body)
    }

    /// A request with a JSON body.
    pub async fn call<T: DeserializeOwned>(
        &mut self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T> {
        let body = serde_json::to_vec(body)
            .map_err(|error| Failure::during("write the request", &error))?;
        let body = self.send(method, path, body.into()).await?;
        self.understand(&body)
    }

    /// `POST path`, for an answer without body.
    pub async fn post(&mut self, path: &str) -> Result<()> {
        self.send(Method::POST, path, Bytes::new()).await.map(drop)
    }

    async fn send(&mut self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let socket = self.socket.clone();
        let answer = timeout(PATIENCE, self.exchange(method, path, body)).await;
        answer.map_err(|_| silent(&socket))?
    }

    async fn exchange(&mut self, method: Method, path: &str, body: Bytes) -> Result<Bytes> {
        let failed = |error: &(dyn std::error::Error + 'static)| {
            Failure::during(
                format!("talk to the daemon on {}", self.socket.display()),
                error,
            )
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "portfwd")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|error| failed(&error))?;
        let response = self
            .sender
            .send_request(request)
            .await
            .map_err(|error| failed(&error))?;
        let status = response.status();
        let body = response
            .into_body()
            .collect()
            .await
            .map_err(|error| failed(&error))?
            .to_bytes();
        if status.is_success() {
            Ok(body)
        } else {
            Err(self.failure(status, &body))
        }
    }

    fn failure(&self, status: StatusCode, body: &[u8]) -> Failure {
        serde_json::from_slice(body).unwrap_or_else(|_| {
            Failure::new(
                Kind::Failed,
                format!("the daemon on {} answered {status}", self.socket.display()),
            )
        })
    }

    fn understand<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T> {
        serde_json::from_slice(body).map_err(|error| {
            Failure::during(
                format!("understand the daemon on {}", self.socket.display()),
                &error,
            )
            .hint("is it of another version? `portfwd -j status` shows it")
        })
    }
}

/// Connects; waits while the backlog of the socket is full.
async fn dial(socket: &Path) -> io::Result<UnixStream> {
    loop {
        match UnixStream::connect(socket).await {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => sleep(PAUSE).await,
            connected => return connected,
        }
    }
}

/// A daemon that is there and does nothing.
fn silent(socket: &Path) -> Failure {
    let lock = socket.with_extension("lock");
    let error = format!(
        "the daemon on {} does not answer within {} s; forwarding goes on",
        socket.display(),
        PATIENCE.as_secs()
    );
    Failure::new(Kind::Failed, error).hint(format!(
        "`kill -9 $(cat {})` ends it, a new `portfwd run` takes over",
        lock.display()
    ))
}

fn refused(instance: &Instance, socket: &Path, error: &io::Error) -> Failure {
    let kind = error.kind();
    if matches!(
        kind,
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
    ) {
        return Failure::new(
            Kind::NotRunning,
            format!("no daemon runs for instance {}", instance.name()),
        )
        .hint("`portfwd run --wan IF --lan IF` starts it");
    }
    if kind == io::ErrorKind::PermissionDenied {
        return Failure::new(
            Kind::Permission,
            format!("you may not talk to the daemon on {}", socket.display()),
        )
        .hint(format!("be root, or join the group {}", super::peer::GROUP));
    }
    Failure::during(format!("connect to {}", socket.display()), error)
}
