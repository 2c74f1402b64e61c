//! The HTTP server on the control socket. `curl --unix-socket` talks to it as well as the command
//! line does.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status`, `/v1/rules`, `/v1/flows`, `/v1/counters` | what `portfwd -j NOUN` prints |
//! | `POST /v1/rules` with [`RuleWords`] | 201 and [`Added`] |
//! | `DELETE /v1/rules/{id or name}`, or `DELETE /v1/rules` with [`RemoveRequest`] | the rules that were removed |
//! | `POST /v1/shutdown` | 202; the daemon ends, what it attached stays |
//!
//! Errors are [`Failure`] as JSON.

use std::{
    fs, io,
    os::{
        fd::AsFd,
        unix::{
            fs::{PermissionsExt, chown},
            net::UnixStream as StdUnixStream,
        },
    },
    path::{Path as FilePath, PathBuf},
};

use axum::{
    Json, Router,
    extract::{
        ConnectInfo, Path, Request, State,
        connect_info::Connected,
        rejection::{JsonRejection, PathRejection},
    },
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
    serve::IncomingStream,
};
use nix::unistd::Gid;
use serde::Serialize;
use tokio::net::UnixListener;

use super::{
    gateway::{Gateway, Shared},
    peer::{self, Peer},
    protocol::{Added, RemoveRequest, RuleLine},
    shutdown::Shutdown,
};
use crate::{
    failure::{Failure, Kind, Result},
    ruleset::RuleWords,
};

/// Mode of the socket: owner and group.
const SOCKET_MODE: u32 = 0o660;
/// Mode of its directory: everybody may look, the socket itself decides.
const DIRECTORY_MODE: u32 = 0o755;

/// The control socket of a daemon, removed when dropped.
#[derive(Debug)]
pub struct ControlSocket {
    listener: Option<UnixListener>,
    path: PathBuf,
    group: Option<Gid>,
}

impl ControlSocket {
    /// Makes the socket, in place of one that a killed daemon left. Must be called in a tokio
    /// runtime.
    pub fn bind(path: &FilePath) -> Result<Self> {
        let doing = format!("make the control socket {}", path.display());
        let failed = |error: io::Error| Failure::during(&doing, &error);
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).map_err(failed)?;
            fs::set_permissions(directory, fs::Permissions::from_mode(DIRECTORY_MODE))
                .map_err(failed)?;
        }
        if StdUnixStream::connect(path).is_ok() {
            return Err(Failure::new(
                Kind::Conflict,
                format!("another daemon answers on {}", path.display()),
            )
            .hint(
                "one daemon runs per instance; `portfwd status` shows it, --instance names another",
            ));
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            Ok(()) | Err(_) => {}
        }
        let group = peer::group_id()?;
        // Nobody else can connect before mode and owner are right: every connection is checked
        // again.
        let listener = UnixListener::bind(path).map_err(failed)?;
        let socket = Self {
            listener: Some(listener),
            path: path.to_owned(),
            group,
        };
        fs::set_permissions(path, fs::Permissions::from_mode(SOCKET_MODE)).map_err(failed)?;
        chown(path, Some(0), Some(group.map_or(0, Gid::as_raw))).map_err(failed)?;
        Ok(socket)
    }

    /// Answers requests until `shutdown` is requested, which `POST /v1/shutdown` does too. Requests
    /// under way are finished.
    pub async fn serve(mut self, gateway: Shared, shutdown: Shutdown) -> Result<()> {
        let Some(listener) = self.listener.take() else {
            return Ok(());
        };
        let stop = shutdown.clone();
        let service =
            router(gateway, shutdown, self.group).into_make_service_with_connect_info::<Caller>();
        let served = axum::serve(listener, service)
            .with_graceful_shutdown(async move { stop.requested().await })
            .await;
        served.map_err(|error| Failure::during("serve the control socket", &error))
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("remove {}: {error}", self.path.display());
        }
    }
}

/// Who is at the other end of a connection; an error is answered, not ignored.
#[derive(Clone, Debug)]
struct Caller(Result<Peer>);

impl Connected<IncomingStream<'_, UnixListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, UnixListener>) -> Self {
        Self(Peer::of(stream.io().as_fd()).map_err(Failure::from))
    }
}

/// What every request handler can reach.
#[derive(Clone)]
struct App {
    gateway: Shared,
    shutdown: Shutdown,
}

fn router(gateway: Shared, shutdown: Shutdown, group: Option<Gid>) -> Router {
    Router::new()
        .route(
            "/v1/status",
            get(|State(app): State<App>| app.ask(|gateway| gateway.status())),
        )
        .route(
            "/v1/rules",
            get(|State(app): State<App>| app.ask(|gateway| gateway.rules()))
                .post(add)
                .delete(remove),
        )
        .route("/v1/rules/{rule}", delete(remove_one))
        .route(
            "/v1/flows",
            get(|State(app): State<App>| app.ask(|gateway| gateway.flows())),
        )
        .route(
            "/v1/counters",
            get(|State(app): State<App>| app.ask(|gateway| gateway.counters())),
        )
        .route("/v1/shutdown", post(shut_down))
        .fallback(async || {
            Failure::new(Kind::NotFound, "no such path")
                .hint("GET /v1/status, /v1/rules, /v1/flows or /v1/counters")
        })
        .method_not_allowed_fallback(async || {
            (
                StatusCode::METHOD_NOT_ALLOWED,
                Json(Failure::new(
                    Kind::Usage,
                    "this path does not know that method",
                )),
            )
        })
        .layer(from_fn_with_state(group, admit))
        .with_state(App { gateway, shutdown })
}

/// Lets only those through that may control the gateway.
async fn admit(
    State(group): State<Option<Gid>>,
    ConnectInfo(Caller(peer)): ConnectInfo<Caller>,
    request: Request,
    next: Next,
) -> Response {
    match peer.and_then(|peer| peer.check(group)) {
        Ok(()) => next.run(request).await,
        Err(failure) => failure.into_response(),
    }
}

impl App {
    /// Runs a request on a thread where it may wait for the disk and for its turn.
    async fn run<T: Send + 'static>(
        self,
        request: impl FnOnce(&mut Gateway) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let task = tokio::task::spawn_blocking(move || request(&mut self.gateway.lock()));
        task.await.map_err(|error| {
            Failure::new(
                Kind::Failed,
                format!("the request was not finished: {error}"),
            )
        })?
    }

    async fn ask<T: Serialize + Send + 'static>(
        self,
        request: impl FnOnce(&mut Gateway) -> Result<T> + Send + 'static,
    ) -> Result<Json<T>> {
        self.run(request).await.map(Json)
    }
}

async fn add(
    State(app): State<App>,
    body: Result<Json<RuleWords>, JsonRejection>,
) -> Result<(StatusCode, Json<Added>)> {
    let Json(request) = body.map_err(malformed)?;
    let added = app.run(move |gateway| gateway.add(&request)).await?;
    Ok((StatusCode::CREATED, Json(added)))
}

async fn remove(
    State(app): State<App>,
    body: Result<Json<RemoveRequest>, JsonRejection>,
) -> Result<Json<Vec<RuleLine>>> {
    let Json(request) = body.map_err(malformed)?;
    app.ask(move |gateway| gateway.remove(&request.rules)).await
}

async fn remove_one(
    State(app): State<App>,
    rule: Result<Path<String>, PathRejection>,
) -> Result<Json<Vec<RuleLine>>> {
    let Path(rule) = rule.map_err(|rejection| Failure::new(Kind::Usage, rejection))?;
    app.ask(move |gateway| gateway.remove(&[rule])).await
}

async fn shut_down(State(app): State<App>) -> StatusCode {
    log::info!("asked to end over the control socket");
    app.shutdown.request();
    StatusCode::ACCEPTED
}

fn malformed(rejection: JsonRejection) -> Failure {
    Failure::new(Kind::Usage, rejection.body_text())
        .hint("a JSON object, with content-type: application/json")
}

impl IntoResponse for Failure {
    fn into_response(self) -> Response {
        let status = match self.kind {
            Kind::Failed => StatusCode::INTERNAL_SERVER_ERROR,
            Kind::Usage => StatusCode::BAD_REQUEST,
            Kind::NotRunning => StatusCode::SERVICE_UNAVAILABLE,
            Kind::Permission => StatusCode::FORBIDDEN,
            Kind::NotFound => StatusCode::NOT_FOUND,
            Kind::Conflict => StatusCode::CONFLICT,
        };
        (status, Json(self)).into_response()
    }
}
