//! An engine that does what a test tells it, and remembers what it was asked.

use bytes::Bytes;
use futures_util::stream;
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::header::HeaderMap;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::AbortHandle;

/// What the engine does with a request for a completion or of an unknown path.
#[derive(Clone, Debug)]
pub enum Act {
    /// Answers this JSON.
    Json(u16, String),
    /// Streams these pieces; waits for [`Engine::go_on`] before each but the first.
    Stream(Vec<&'static str>),
    /// Streams these pieces, then cuts the connection.
    StreamThenDie(Vec<&'static str>),
    /// Streams so many events, one every few milliseconds.
    Steady(usize),
    /// Sends the head of a stream and cuts the connection before a byte of the body.
    DieAfterHead,
    /// Cuts the connection without a byte.
    Die,
    /// Cuts the connection without a byte, unless it is the connection's first request.
    DieUnlessFresh,
    /// Never answers.
    Hang,
    /// Waits for [`Engine::go_on`], then answers this JSON.
    Held(String),
}

/// A request as the engine saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub version: Version,
    pub headers: HeaderMap,
    pub body: Bytes,
}

/// The tokens of a body of `/tokenize`.
pub type Tokenize = Arc<dyn Fn(&Bytes) -> Vec<u32> + Send + Sync>;

struct State {
    models: &'static str,
    act: Mutex<Act>,
    seen: Mutex<Vec<Seen>>,
    /// How `/tokenize` answers a body; `None`: as any other path.
    tokenize: Mutex<Option<Tokenize>>,
    go_on: Semaphore,
    /// Requests that run now.
    running: AtomicU64,
    /// Requests that a client or the router left before their end.
    left: watch::Sender<u64>,
    /// Connections on which a completion was asked for.
    connections: AtomicU64,
}

pub struct Engine {
    pub address: SocketAddr,
    state: Arc<State>,
    serving: AbortHandle,
    connections: Arc<Mutex<Vec<AbortHandle>>>,
}

/// One model named `m` that takes 1000 tokens, and an adapter.
pub const MODELS: &str = r#"{"object":"list","data":[
    {"id":"m","object":"model","root":"m","parent":null,"max_model_len":1000},
    {"id":"m-lora","object":"model","root":"x","parent":"m","max_model_len":null}]}"#;

impl Engine {
    pub async fn start(act: Act) -> Self {
        Self::start_with(act, MODELS).await
    }

    pub async fn start_with(act: Act, models: &'static str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State {
            models,
            act: Mutex::new(act),
            seen: Mutex::default(),
            tokenize: Mutex::default(),
            go_on: Semaphore::new(0),
            running: AtomicU64::new(0),
            left: watch::Sender::new(0),
            connections: AtomicU64::new(0),
        });
        let connections = Arc::new(Mutex::new(Vec::new()));
        let (shared, handles) = (Arc::clone(&state), Arc::clone(&connections));
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                stream.set_nodelay(true).unwrap();
                let state = Arc::clone(&shared);
                let served = Arc::new(AtomicU64::new(0));
                let task = tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let (state, served) = (Arc::clone(&state), Arc::clone(&served));
                        async move { handle(&state, &served, request).await }
                    });
                    // Who begins with HTTP/2 gets HTTP/2.
                    let mut start = [0; 3];
                    let _ = stream.peek(&mut start).await;
                    let stream = TokioIo::new(stream);
                    if start == *b"PRI" {
                        let executor = TokioExecutor::new();
                        let _ = http2::Builder::new(executor).serve_connection(stream, service).await;
                    } else {
                        let _ = http1::Builder::new().serve_connection(stream, service).await;
                    }
                });
                let mut handles = handles.lock().unwrap();
                // A handle keeps its task's memory.
                handles.retain(|handle: &AbortHandle| !handle.is_finished());
                handles.push(task.abort_handle());
            }
        });
        Self { address, state, serving: serving.abort_handle(), connections }
    }

    pub fn act(&self, act: Act) {
        *self.state.act.lock().unwrap() = act;
    }

    pub fn tokenize(&self, tokenize: Tokenize) {
        *self.state.tokenize.lock().unwrap() = Some(tokenize);
    }

    /// Lets a stream send one more piece, or a request that is held have its answer.
    pub fn go_on(&self) {
        self.state.go_on.add_permits(1);
    }

    /// What was asked, the probes' questions left out.
    pub fn seen(&self) -> Vec<Seen> {
        self.state.seen.lock().unwrap().clone()
    }

    /// Connections on which more than probes were asked.
    pub fn completion_connections(&self) -> u64 {
        self.state.connections.load(Ordering::Relaxed)
    }

    /// Requests that run now.
    pub fn running(&self) -> u64 {
        self.state.running.load(Ordering::Relaxed)
    }

    /// Waits until so many requests were left before their end.
    pub async fn was_left(&self, times: u64) {
        self.state.left.subscribe().wait_for(|left| *left >= times).await.unwrap();
    }

    /// The process dies: its port refuses, its connections are cut.
    pub fn kill(&self) {
        self.serving.abort();
        self.connections.lock().unwrap().iter().for_each(AbortHandle::abort);
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.kill();
    }
}

type Body = BoxBody<Bytes, io::Error>;

fn whole(status: u16, text: &str) -> Response<Body> {
    let body = Full::new(Bytes::copy_from_slice(text.as_bytes())).map_err(|never| match never {}).boxed();
    Response::builder().status(status).header("content-type", "application/json").body(body).unwrap()
}

/// Counts a request that is dropped before it was told to be done.
struct Leaves(Arc<State>, bool);

impl Leaves {
    fn new(state: &Arc<State>) -> Self {
        state.running.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(state), false)
    }

    fn done(&mut self) {
        self.1 = true;
    }
}

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.running.fetch_sub(1, Ordering::Relaxed);
        if !self.1 {
            self.0.left.send_modify(|left| *left += 1);
        }
    }
}

async fn handle(
    state: &Arc<State>,
    served: &AtomicU64,
    request: Request<Incoming>,
) -> Result<Response<Body>, io::Error> {
    let path = request.uri().path().to_owned();
    match (request.method(), path.as_str()) {
        (&Method::GET, "/health") => {
            return Ok(whole(200, ""));
        }
        (&Method::GET, "/v1/models") => return Ok(whole(200, state.models)),
        (&Method::GET, _) => return Ok(whole(404, "{}")),
        _ => {}
    }
    let fresh = served.fetch_add(1, Ordering::Relaxed) == 0;
    if fresh {
        state.connections.fetch_add(1, Ordering::Relaxed);
    }
    let (head, body) = request.into_parts();
    let path = head.uri.path_and_query().unwrap().to_string();
    let body = body.collect().await.unwrap().to_bytes();
    let tokenize = state.tokenize.lock().unwrap().clone().filter(|_| path == "/tokenize");
    if let Some(tokenize) = tokenize {
        let tokens = tokenize(&body);
        return Ok(whole(200, &serde_json::json!({ "count": tokens.len(), "tokens": tokens }).to_string()));
    }
    let act = state.act.lock().unwrap().clone();
    if !matches!(act, Act::Steady(_)) {
        state.seen.lock().unwrap().push(Seen { path, version: head.version, headers: head.headers, body });
    }
    let cut = || Err(io::Error::other("told to"));
    let steady = matches!(act, Act::Steady(_));
    let (pieces, dies) = match act {
        Act::Json(status, text) => return Ok(whole(status, &text)),
        Act::Die => return cut(),
        Act::DieUnlessFresh if !fresh => return cut(),
        Act::DieUnlessFresh => return Ok(whole(200, "{}")),
        Act::Hang => {
            let _leaves = Leaves::new(state);
            return std::future::pending().await;
        }
        Act::Held(text) => {
            let mut leaves = Leaves::new(state);
            state.go_on.acquire().await.unwrap().forget();
            leaves.done();
            return Ok(whole(200, &text));
        }
        Act::Stream(pieces) => (pieces, false),
        Act::Steady(count) => (vec!["data: {\"choices\":[]}\n\n"; count], false),
        Act::StreamThenDie(pieces) => (pieces, true),
        Act::DieAfterHead => (vec![], true),
    };
    let leaves = Leaves::new(state);
    let stream =
        stream::unfold((pieces.into_iter(), 0, leaves), move |(mut pieces, sent, mut leaves)| async move {
            if steady {
                tokio::time::sleep(std::time::Duration::from_millis(5)).await;
            } else if sent > 0 {
                leaves.0.go_on.acquire().await.unwrap().forget();
            }
            match pieces.next() {
                Some(piece) => Some((Ok(Frame::data(Bytes::from(piece))), (pieces, sent + 1, leaves))),
                None if dies => {
                    leaves.done();
                    // Let the head reach the wire before the cut.
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    Some((Err(io::Error::other("told to")), (pieces, sent + 1, leaves)))
                }
                None => {
                    leaves.done();
                    None
                }
            }
        });
    let body = BodyExt::boxed(StreamBody::new(SyncStream(Box::pin(stream).into())));
    Ok(Response::builder()
        .status(StatusCode::OK)
        .header("content-type", "text/event-stream; charset=utf-8")
        .header("x-engine", "kept")
        .body(body)
        .unwrap())
}

/// A boxed body must be `Sync`; a stream that is only ever polled is, behind a lock that nobody contends for.
struct SyncStream<S>(Mutex<S>);

impl<S: futures_util::Stream + Unpin> futures_util::Stream for SyncStream<S> {
    type Item = S::Item;
    fn poll_next(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<S::Item>> {
        let mut inner = self.0.lock().unwrap();
        std::pin::Pin::new(&mut *inner).poll_next(cx)
    }
}
