//! The HTTP server on the control socket. `curl --unix-socket` talks to it as well as the command
//! line does.
//!
//! | request | answer |
//! |---|---|
//! | `GET /v1/status`, `/v1/rules`, `/v1/flows`, `/v1/counters` | what `portfwd -j NOUN` prints |
//! | `POST /v1/rules` with [`RuleWords`] | 201 and [`Added`](super::protocol::Added) |
//! | `PUT /v1/rules/{id or name}` with [`RuleWords`] | [`Replaced`](super::protocol::Replaced) |
//! | `DELETE /v1/rules/{id or name}`, or `DELETE /v1/rules` with [`RemoveRequest`] | the rules that were removed |
//! | `GET /v1/words` | settings and rules as a file has them |
//! | `POST /v1/apply` with [`ApplyRequest`] | [`Applied`] |
//! | `POST /v1/confirm` | 200; what was applied stays |
//! | `POST /v1/rollback` | [`Applied`]: the rules are what they were |
//! | `POST /v1/shutdown` | 202; the daemon ends, what it attached stays |
//!
//! Errors are [`Failure`] as JSON. A body of more than 8 MiB is refused with 413, one that does not come within 10 seconds is
//! given up.

use std::{
    fs, io,
    os::unix::{
        fs::{PermissionsExt, chown},
        net::UnixStream as StdUnixStream,
    },
    path::{Path as FilePath, PathBuf},
    sync::Arc,
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{
        ConnectInfo, DefaultBodyLimit, Path, Request, State,
        rejection::{JsonRejection, PathRejection},
    },
    http::StatusCode,
    middleware::{Next, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use hyper::body::Body;
use nix::unistd::Gid;
use serde::Serialize;
use tokio::{net::UnixListener, sync::Semaphore};
use tower_http::timeout::RequestBodyDeadlineLayer;

use super::{
    answers::{Answer, Answers},
    apply::resolve_names,
    connections::{self, Caller},
    gateway::{Gateway, Shared},
    peer,
    protocol::{Applied, ApplyRequest, RemoveRequest},
    shutdown::Shutdown,
};
use crate::{
    failure::{Failure, Kind, Result},
    resolve::resolve,
    ruleset::RuleWords,
};

/// Mode of the socket: owner and group.
const SOCKET_MODE: u32 = 0o660;
/// Mode of its directory: everybody may look, the socket itself decides.
const DIRECTORY_MODE: u32 = 0o755;
/// Longest body of a request, in bytes.
const MAX_REQUEST: usize = 8 << 20;
/// A body up to this length, in bytes, may come at any time; longer ones take turns.
const SMALL_REQUEST: u64 = 64 << 10;
/// Bodies at a time that are longer, or do not say how long they are.
const LARGE_REQUESTS: usize = 4;
/// How long the body of a request may take.
const BODY: Duration = Duration::from_secs(10);

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
    pub async fn serve(mut self, gateway: Shared, shutdown: Shutdown) {
        let Some(listener) = self.listener.take() else {
            return;
        };
        let router = router(gateway, shutdown.clone(), self.group);
        connections::serve(listener, router, shutdown).await;
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_file(&self.path) {
            log::warn!("remove {}: {error}", self.path.display());
        }
    }
}

/// What every request handler can reach.
#[derive(Clone)]
struct App {
    gateway: Shared,
    answers: Answers,
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
        .route("/v1/rules/{rule}", delete(remove_one).put(replace))
        .route(
            "/v1/flows",
            get(|State(app): State<App>| app.ask(|gateway| gateway.flows())),
        )
        .route(
            "/v1/counters",
            get(|State(app): State<App>| app.ask(|gateway| gateway.counters())),
        )
        .route(
            "/v1/words",
            get(|State(app): State<App>| app.ask(|gateway| gateway.words())),
        )
        .route("/v1/apply", post(apply))
        .route(
            "/v1/confirm",
            post(|State(app): State<App>| app.ask(Gateway::confirm)),
        )
        .route(
            "/v1/rollback",
            post(|State(app): State<App>| app.ask(Gateway::rollback)),
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
        .layer(DefaultBodyLimit::max(MAX_REQUEST))
        .layer(RequestBodyDeadlineLayer::new(BODY))
        .layer(from_fn_with_state(
            Arc::new(Semaphore::new(LARGE_REQUESTS)),
            take_turns,
        ))
        .layer(from_fn_with_state(group, admit))
        .with_state(App {
            gateway,
            answers: Answers::new(),
            shutdown,
        })
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

/// Keeps requests waiting whose bodies would take much memory, while others of that kind are under way. Refuses what says that
/// it is too long.
async fn take_turns(State(turns): State<Arc<Semaphore>>, request: Request, next: Next) -> Response {
    let length = request.body().size_hint();
    if length.lower() > MAX_REQUEST as u64 {
        return too_long("the body is too long");
    }
    let is_small = length.upper().is_some_and(|length| length <= SMALL_REQUEST);
    let _turn = if is_small {
        None
    } else {
        turns.acquire().await.ok()
    };
    next.run(request).await
}

impl App {
    /// Answers a request on a thread where it may wait for the disk and for its turn.
    async fn ask<T: Serialize>(
        self,
        request: impl FnOnce(&mut Gateway) -> Result<T> + Send + 'static,
    ) -> Result<Answer> {
        let gateway = self.gateway;
        let work = move || {
            let answer = request(&mut gateway.lock())?;
            serde_json::to_vec(&answer).map_err(|error| Failure::during("write the answer", &error))
        };
        self.answers.work_at(work).await
    }
}

async fn add(
    State(app): State<App>,
    body: Result<Json<RuleWords>, JsonRejection>,
) -> Result<Answer, Response> {
    let Json(request) = body.map_err(malformed)?;
    let request = resolve(request)
        .await
        .map_err(IntoResponse::into_response)?;
    let added = app.ask(move |gateway| gateway.add(&request)).await;
    let added = added.map_err(IntoResponse::into_response)?;
    Ok(added.with_status(StatusCode::CREATED))
}

async fn remove(
    State(app): State<App>,
    body: Result<Json<RemoveRequest>, JsonRejection>,
) -> Result<Answer, Response> {
    let Json(request) = body.map_err(malformed)?;
    let removed = app.ask(move |gateway| gateway.remove(&request));
    removed.await.map_err(IntoResponse::into_response)
}

async fn remove_one(
    State(app): State<App>,
    rule: Result<Path<String>, PathRejection>,
) -> Result<Answer> {
    let Path(rule) = rule.map_err(|rejection| Failure::new(Kind::Usage, rejection))?;
    app.ask(move |gateway| gateway.remove(&RemoveRequest::of(rule)))
        .await
}

async fn replace(
    State(app): State<App>,
    rule: Result<Path<String>, PathRejection>,
    body: Result<Json<RuleWords>, JsonRejection>,
) -> Result<Answer, Response> {
    let rule = rule.map_err(|rejection| Failure::new(Kind::Usage, rejection));
    let Path(rule) = rule.map_err(IntoResponse::into_response)?;
    let Json(words) = body.map_err(malformed)?;
    let words = resolve(words).await.map_err(IntoResponse::into_response)?;
    let replaced = app.ask(move |gateway| gateway.replace(&rule, &words));
    replaced.await.map_err(IntoResponse::into_response)
}

async fn apply(
    State(app): State<App>,
    body: Result<Json<ApplyRequest>, JsonRejection>,
) -> Result<Answer, Response> {
    let Json(request) = body.map_err(malformed)?;
    let (request, refused) = resolve_names(&app.gateway, request).await;
    let applied = app.ask(move |gateway| {
        if refused.is_empty() {
            return gateway.apply(&request);
        }
        Ok(Applied {
            refused,
            ..Applied::default()
        })
    });
    applied.await.map_err(IntoResponse::into_response)
}

async fn shut_down(State(app): State<App>) -> StatusCode {
    log::info!("asked to end over the control socket");
    app.shutdown.request();
    StatusCode::ACCEPTED
}

fn too_long(error: &str) -> Response {
    let failure =
        Failure::new(Kind::Usage, error).hint(format!("a request has at most {MAX_REQUEST} bytes"));
    (StatusCode::PAYLOAD_TOO_LARGE, Json(failure)).into_response()
}

/// A body that is too long or comes too slowly is answered by the status that HTTP has for it, anything else as a mistake.
fn malformed(rejection: JsonRejection) -> Response {
    if rejection.status() == StatusCode::PAYLOAD_TOO_LARGE {
        return too_long(&rejection.body_text());
    }
    Failure::new(Kind::Usage, rejection.body_text())
        .hint("a JSON object, with content-type: application/json")
        .into_response()
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
