//! What can be asked for, and how it is answered.

use std::{convert::Infallible, sync::Arc, time::Duration};

use axum::{
    Extension, Json, Router,
    body::Bytes,
    extract::{DefaultBodyLimit, Query, Request, State},
    http::{
        HeaderMap, StatusCode, Uri,
        header::{CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_TYPE, SET_COOKIE},
    },
    middleware::{Next, from_fn, from_fn_with_state, map_response},
    response::{
        IntoResponse, Response, Sse,
        sse::{Event, KeepAlive},
    },
    routing::{get, post},
};
use florence_engine::task::Task;
use futures_util::{Stream, stream};
use redis::{RedisError, cmd};
use serde::Deserialize;
use serde_json::{Value, json};

use super::{
    App, assets, celery,
    guard::{self, Peer},
    jobs::{self, MOST_NAMED, Named, Order},
    list::{self, List, Wanted},
    metrics, picture, submit, view,
};
use crate::servers::{server::words, watch::NoServer};

/// The largest picture that is passed on: what a server takes by default, and room for the rest.
const MOST_BYTES: usize = (32 << 20) + (64 << 10);
/// Room for as many jobs as one request names, with keys as long as a server takes them, of which
/// every byte may be percent-encoded.
const MOST_NAMES: usize = MOST_NAMED * (3 * 8192 + 256);

/// Why there is no answer.
#[derive(Debug)]
pub(super) struct Refusal(pub(super) StatusCode, pub(super) String);

impl Refusal {
    pub(super) fn bad(text: &str) -> Self {
        Self(StatusCode::BAD_REQUEST, text.to_owned())
    }

    pub(super) fn missing(text: &str) -> Self {
        Self(StatusCode::NOT_FOUND, text.to_owned())
    }
}

impl From<NoServer> for Refusal {
    fn from(_: NoServer) -> Self {
        Self::bad("there is no such server")
    }
}

impl From<RedisError> for Refusal {
    fn from(error: RedisError) -> Self {
        let text = words(&error);
        // What a server says is the request's fault; what it does not say is the connection's.
        let is_said = error.code().is_some();
        Self(if is_said { StatusCode::CONFLICT } else { StatusCode::BAD_GATEWAY }, text)
    }
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        (self.0, Json(json!({ "error": self.1 }))).into_response()
    }
}

type Answer = Result<Json<Value>, Refusal>;
type Shared = State<Arc<App>>;

pub(super) fn router(app: &Arc<App>) -> Router {
    let named = DefaultBodyLimit::max(MOST_NAMES);
    let changes = Router::new()
        .route("/api/act", post(act).layer(named))
        .route("/api/pause", post(pause))
        .route(
            "/api/submit",
            post(submitted).layer(DefaultBodyLimit::max(MOST_BYTES)).layer(from_fn(sized)),
        )
        .route_layer(from_fn_with_state(Arc::clone(app), guard::writable));
    Router::new()
        .route("/api/info", get(info))
        .route("/api/live", get(live))
        .route("/api/history", get(history))
        .route("/api/jobs", get(listed))
        .route("/api/job", get(job))
        .route("/api/picture", get(shown_picture))
        .route("/api/annotated", get(annotated))
        .route("/api/rows", post(rows).layer(named))
        .route("/api/tasks", post(tasks).layer(named))
        .route("/api/login", post(log_in))
        .route("/api/logout", post(log_out))
        .route("/metrics", get(prometheus))
        .route("/healthz", get(async || "ok\n"))
        .route("/readyz", get(ready))
        .fallback(get(async |uri: Uri| assets::file(uri.path())))
        .merge(changes)
        .layer(map_response(as_json))
        .layer(from_fn_with_state(Arc::clone(app), guard::check))
        .with_state(Arc::clone(app))
}

/// Refusals of the framework itself, such as a query that cannot be read, as ours.
async fn as_json(answer: Response) -> Response {
    let kind = answer.headers().get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok());
    let is_plain = kind.is_none_or(|kind| kind.starts_with("text/plain"));
    match answer.status() {
        StatusCode::PAYLOAD_TOO_LARGE if is_plain => too_large("request"),
        StatusCode::BAD_REQUEST
        | StatusCode::UNPROCESSABLE_ENTITY
        | StatusCode::UNSUPPORTED_MEDIA_TYPE
            if is_plain =>
        {
            Refusal::bad("the request cannot be read").into_response()
        }
        _ => answer,
    }
}

fn too_large(what: &str) -> Response {
    Refusal(StatusCode::PAYLOAD_TOO_LARGE, format!("the {what} is too large")).into_response()
}

/// What the page has to know at its start.
async fn info(State(app): Shared) -> Json<Value> {
    let servers = &app.watch.servers;
    let names: Vec<&str> = servers.iter().map(|server| server.name.as_str()).collect();
    let cli: Vec<&[String]> = servers.iter().map(|server| server.cli.as_slice()).collect();
    let tasks: Vec<Value> = Task::ALL
        .iter()
        .map(|task| json!({ "token": task.token(), "input": picture::input(*task) }))
        .collect();
    Json(json!({
        "version": env!("CARGO_PKG_VERSION"),
        "servers": names,
        "cli": cli,
        "is_read_only": app.guard.is_read_only,
        "has_password": app.guard.has_password(),
        "tasks": tasks,
    }))
}

/// One server, or all.
#[derive(Debug, Deserialize)]
struct One {
    server: Option<usize>,
}

async fn live(
    State(app): Shared,
    Extension(from): Extension<Peer>,
    headers: HeaderMap,
    Query(one): Query<One>,
) -> Sse<impl Stream<Item = Result<Event, Infallible>>> {
    const EVERY: Duration = Duration::from_secs(1);
    let events = stream::unfold(true, move |is_first| {
        let (app, headers) = (Arc::clone(&app), headers.clone());
        async move {
            if !is_first {
                tokio::time::sleep(EVERY).await;
            }
            // Who has logged out hears no more.
            if !app.guard.is_known(&headers, from).await.unwrap_or_default() {
                return None;
            }
            let overview = view::overview(&app.watch, one.server);
            Some((Ok(Event::default().data(overview.to_string())), false))
        }
    });
    Sse::new(events).keep_alive(KeepAlive::default())
}

async fn history(State(app): Shared, Query(one): Query<One>) -> Json<Value> {
    Json(view::history(&app.watch, one.server))
}

async fn listed(State(app): Shared, Query(wanted): Query<Wanted>) -> Result<Json<List>, Refusal> {
    Ok(Json(list::list(&app.watch, &wanted).await?))
}

async fn job(State(app): Shared, Query(named): Query<Named>) -> Answer {
    Ok(Json(jobs::one(app.watch.server(named.server)?, &named).await?))
}

async fn shown_picture(
    State(app): Shared,
    Query(named): Query<Named>,
) -> Result<Response, Refusal> {
    let (kind, bytes) = picture::kept(app.watch.server(named.server)?, &named).await?;
    Ok(([(CONTENT_TYPE, kind)], bytes).into_response())
}

async fn annotated(State(app): Shared, Query(named): Query<Named>) -> Result<Response, Refusal> {
    let png = picture::annotated(app.watch.server(named.server)?, &named).await?;
    let name = "attachment; filename=\"florence.png\"";
    Ok(([(CONTENT_TYPE, "image/png"), (CONTENT_DISPOSITION, name)], png).into_response())
}

#[derive(Debug, Deserialize)]
struct Several {
    jobs: Vec<Named>,
}

impl Several {
    fn checked(&self) -> Result<&[Named], Refusal> {
        if self.jobs.len() > MOST_NAMED {
            Err(Refusal::bad("too many jobs"))
        } else {
            Ok(&self.jobs)
        }
    }
}

async fn rows(State(app): Shared, Json(several): Json<Several>) -> Answer {
    Ok(Json(json!(jobs::rows(&app.watch, several.checked()?).await?)))
}

async fn tasks(State(app): Shared, Json(several): Json<Several>) -> Answer {
    Ok(Json(json!(celery::tasks(&app.watch, several.checked()?).await?)))
}

async fn act(State(app): Shared, Json(order): Json<Order>) -> Result<Json<jobs::Done>, Refusal> {
    Ok(Json(jobs::act(&app.watch, order).await?))
}

#[derive(Debug, Deserialize)]
struct Pause {
    server: usize,
    paused: bool,
}

async fn pause(State(app): Shared, Json(pause): Json<Pause>) -> Answer {
    let mut command = cmd("CONFIG");
    let value = if pause.paused { "yes" } else { "no" };
    command.arg("SET").arg("florence.paused").arg(value);
    app.watch.server(pause.server)?.call::<()>(&command).await?;
    Ok(Json(json!({ "paused": pause.paused })))
}

/// Refuses a picture that is too large; one that says so, before any of it is read.
async fn sized(request: Request, next: Next) -> Response {
    let length = request.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|length| length.to_str().ok()?.parse::<usize>().ok());
    if length.is_some_and(|length| length > MOST_BYTES) {
        return too_large("picture");
    }
    match next.run(request).await {
        answer if answer.status() == StatusCode::PAYLOAD_TOO_LARGE => too_large("picture"),
        answer => answer,
    }
}

async fn submitted(State(app): Shared, body: Bytes) -> Answer {
    Ok(Json(submit::submit(&app.watch, &body).await?))
}

#[derive(Deserialize)]
struct Login {
    password: String,
}

async fn log_in(
    State(app): Shared,
    Extension(from): Extension<Peer>,
    headers: HeaderMap,
    Json(login): Json<Login>,
) -> Response {
    let is_https = headers.get("x-forwarded-proto").is_some_and(|it| it == "https");
    let cookie = app.guard.log_in(&login.password, from, is_https).await;
    cookie.map(|cookie| ([(SET_COOKIE, cookie)], Json(json!({})))).into_response()
}

async fn log_out(State(app): Shared, headers: HeaderMap) -> Response {
    ([(SET_COOKIE, app.guard.log_out(&headers))], Json(json!({}))).into_response()
}

async fn prometheus(State(app): Shared) -> Response {
    let kind = "text/plain; version=0.0.4; charset=utf-8";
    ([(CONTENT_TYPE, kind)], metrics::text(&app.watch)).into_response()
}

/// Ready is a page whose servers all answer, with models that are loaded.
async fn ready(State(app): Shared) -> Response {
    let is_ready = |index: &usize| {
        let known = app.watch.known(*index);
        let told = known.as_ref().and_then(|known| known.told.as_ref());
        told.is_some_and(|told| told.model.get("state").is_some_and(|state| state == "ready"))
    };
    let all = app.watch.servers.len();
    let ready = (0..all).filter(is_ready).count();
    let status = if ready == all { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, format!("{ready} of {all} servers are ready\n")).into_response()
}
