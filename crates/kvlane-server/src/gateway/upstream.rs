//! Connections to one engine: kept alive, and driven by the task that uses them.
//!
//! The usual client spawns a task per connection and speaks to it over channels, so that every request and every chunk
//! of a stream costs a wake-up of another task, often on another core. Here the task that serves the client polls the engine's
//! connection itself: it is part of the [`Exchange`] while a request runs and lies unpolled in the [`Pool`] otherwise.
//! Two properties follow: dropping an exchange closes its connection, which is how the engine learns
//! that the client is gone; and a connection that the engine closed while idle is noticed when it is taken out.
//!
//! Engines close idle connections after 5 s (uvicorn's default), so the pool keeps them for less.
//!
//! To an engine that speaks HTTP/2 ([`HttpVersion::Http2`]) requests share a few connections, each driven by a task of its own because no single
//! request can; a request that is dropped resets its stream, which tells the engine the same as a closed connection.

use crate::config::HttpVersion;
use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper::header::{HOST, HeaderValue};
use hyper::http::uri::{PathAndQuery, Scheme};
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};
use tokio::net::TcpStream;

/// Idle connections are used for this long; engines close them after 5 s.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// Idle connections kept for one engine; more are closed when their request ends.
const IDLE_CONNECTIONS_MAX: usize = 1024;
/// Waiting for an engine to accept a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// A silent peer is asked after this time whether it is still there, then every [`KEEPALIVE_INTERVAL`].
const KEEPALIVE_TIME: Duration = Duration::from_secs(15);
/// Between two keep-alive probes.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
/// Longest response head: headers of engines are short.
const RESPONSE_HEAD_BYTES_MAX: usize = 64 * 1024;

/// Requests that share one HTTP/2 connection before another is opened; servers allow about a hundred.
const STREAMS_MAX: usize = 64;
/// HTTP/2 connections to one engine; beyond, requests crowd on them.
const SHARED_CONNECTIONS_MAX: usize = 64;
/// What an engine may send ahead on one HTTP/2 stream: the bound on what a slow client leaves lying here.
const STREAM_WINDOW_BYTES: u32 = 256 * 1024;
/// The same on one HTTP/2 connection.
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;

/// Why an engine gave no response. No byte of one was read in any case, so another engine may be asked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// No connection.
    #[error("could not connect: {0}")]
    Connect(io::Error),
    /// The engine did not accept the connection in time.
    #[error("no connection within {} s", CONNECT_TIMEOUT.as_secs())]
    ConnectTimeout,
    /// The connection ended, or what came was not HTTP.
    #[error("no response: {0}")]
    NoResponse(hyper::Error),
}

/// The connections to one engine.
#[derive(Debug)]
pub(crate) struct Pool {
    host: String,
    port: u16,
    host_header: HeaderValue,
    authority: hyper::http::uri::Authority,
    http: HttpVersion,
    /// Last in, first out: the warmest is used, the oldest age out. Held for a push or pop only.
    idle: Mutex<Vec<Idle>>,
    /// HTTP/2 connections.
    shared: Mutex<Vec<Shared>>,
}

/// An HTTP/2 connection.
#[derive(Clone, Debug)]
struct Shared {
    sender: http2::SendRequest<Full<Bytes>>,
    streams: Arc<AtomicUsize>,
}

/// A request's place on a shared connection.
#[derive(Debug)]
struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[derive(Debug)]
struct Idle {
    link: Box<Link>,
    since: Instant,
}

/// An open connection and the handle to send on it. Always boxed: it is large, and moves with every request.
#[derive(Debug)]
struct Link {
    sender: http1::SendRequest<Full<Bytes>>,
    connection: http1::Connection<TokioIo<TcpStream>, Full<Bytes>>,
}

/// A response whose head was read.
#[derive(Debug)]
pub(crate) struct Exchange {
    /// Status and headers.
    pub head: hyper::http::response::Parts,
    /// The rest.
    pub body: EngineBody,
}

impl Pool {
    /// Connections to `authority` (`host:port`, port 80 if unsaid). Opens none.
    pub(crate) fn new(authority: &hyper::http::uri::Authority, http: HttpVersion) -> Arc<Self> {
        let host = authority.host();
        Arc::new(Self {
            host: host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            host_header: HeaderValue::from_str(authority.as_str())
                .expect("an authority has no bytes that a header may not have"),
            authority: authority.clone(),
            http,
            idle: Mutex::default(),
            shared: Mutex::default(),
        })
    }

    /// Sends what `request` makes (with a URI of path and query alone, and without `host`) and waits for the head of the response.
    ///
    /// A kept connection that ends before the first byte of a response is replaced by a fresh one, once: engines
    /// close idle connections at any moment.
    pub(crate) async fn send(
        self: &Arc<Self>,
        request: impl Fn() -> Request<Full<Bytes>>,
    ) -> Result<Exchange, SendError> {
        if self.http == HttpVersion::Http2 {
            return self.send_shared(request).await;
        }
        let request = || {
            let mut request = request();
            request.headers_mut().insert(HOST, self.host_header.clone());
            request
        };
        if let Some(link) = self.take() {
            match self.exchange(link, request()).await {
                Err(SendError::NoResponse(error)) if !error.is_parse() => {}
                done => return done,
            }
        }
        let link = self.connect().await?;
        self.exchange(link, request()).await
    }

    /// Closes connections that were idle for too long. Call it now and then: nobody else watches them.
    pub(crate) fn sweep(&self) {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = idle.iter().position(|i| i.since.elapsed() < IDLE_MAX).unwrap_or(idle.len());
        let stale: Vec<Idle> = idle.drain(..fresh).collect();
        drop(idle);
        drop(stale);
    }

    /// A kept connection that is still open as far as can be seen.
    fn take(&self) -> Option<Box<Link>> {
        loop {
            let mut kept = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
            if kept.since.elapsed() < IDLE_MAX && kept.link.is_open() {
                return Some(kept.link);
            }
        }
    }

    fn put_back(&self, mut link: Box<Link>) {
        if !link.is_open() || !link.sender.is_ready() {
            return;
        }
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if idle.len() < IDLE_CONNECTIONS_MAX {
            idle.push(Idle { link, since: Instant::now() });
        }
    }

    async fn connect(&self) -> Result<Box<Link>, SendError> {
        let (sender, connection) = http1::Builder::new()
            .max_header_size(RESPONSE_HEAD_BYTES_MAX)
            .handshake(TokioIo::new(self.open().await?))
            .await
            .map_err(SendError::NoResponse)?;
        Ok(Box::new(Link { sender, connection }))
    }

    async fn open(&self) -> Result<TcpStream, SendError> {
        let opening = TcpStream::connect((self.host.as_str(), self.port));
        let stream = tokio::time::timeout(CONNECT_TIMEOUT, opening)
            .await
            .map_err(|_| SendError::ConnectTimeout)?
            .map_err(SendError::Connect)?;
        // Without it a request's second segment waits for the engine's delayed acknowledgement: 40 ms.
        stream.set_nodelay(true).map_err(SendError::Connect)?;
        let keepalive =
            socket2::TcpKeepalive::new().with_time(KEEPALIVE_TIME).with_interval(KEEPALIVE_INTERVAL);
        socket2::SockRef::from(&stream).set_tcp_keepalive(&keepalive).map_err(SendError::Connect)?;
        Ok(stream)
    }

    /// [`Pool::send`] over HTTP/2.
    async fn send_shared(
        self: &Arc<Self>,
        request: impl Fn() -> Request<Full<Bytes>>,
    ) -> Result<Exchange, SendError> {
        let request = || {
            let mut request = request();
            let path = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
            let uri = Uri::builder().scheme(Scheme::HTTP).authority(self.authority.clone());
            *request.uri_mut() =
                uri.path_and_query(path).build().expect("a scheme, an authority and a path make a URI");
            *request.version_mut() = hyper::Version::HTTP_2;
            request.headers_mut().remove(HOST);
            request
        };
        if let Some((shared, place)) = self.take_shared() {
            match self.exchange_shared(shared, place, request()).await {
                Err(SendError::NoResponse(error)) if !error.is_parse() => {}
                done => return done,
            }
        }
        let (shared, place) = self.connect_shared().await?;
        self.exchange_shared(shared, place, request()).await
    }

    /// The open HTTP/2 connection with the fewest requests, if there is one with room or no more may be opened.
    fn take_shared(&self) -> Option<(Shared, Place)> {
        let mut all = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        all.retain(|shared| !shared.sender.is_closed());
        let least = all.iter().min_by_key(|shared| shared.streams.load(Ordering::Relaxed))?;
        let full = least.streams.load(Ordering::Relaxed) >= STREAMS_MAX;
        (!full || all.len() >= SHARED_CONNECTIONS_MAX).then(|| least.place())
    }

    async fn connect_shared(&self) -> Result<(Shared, Place), SendError> {
        let (sender, connection) = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_header_list_size(RESPONSE_HEAD_BYTES_MAX as u32)
            .keep_alive_interval(KEEPALIVE_TIME)
            .keep_alive_timeout(KEEPALIVE_INTERVAL)
            .handshake(TokioIo::new(self.open().await?))
            .await
            .map_err(SendError::NoResponse)?;
        tokio::spawn(connection);
        let shared = Shared { sender, streams: Arc::default() };
        let taken = shared.place();
        self.shared.lock().unwrap_or_else(PoisonError::into_inner).push(shared);
        Ok(taken)
    }

    async fn exchange_shared(
        self: &Arc<Self>,
        mut shared: Shared,
        place: Place,
        request: Request<Full<Bytes>>,
    ) -> Result<Exchange, SendError> {
        shared.sender.ready().await.map_err(SendError::NoResponse)?;
        let answer = shared.sender.send_request(request).await.map_err(SendError::NoResponse)?;
        let (head, incoming) = answer.into_parts();
        let body =
            EngineBody { incoming, link: None, open: false, pool: Arc::clone(self), _place: Some(place) };
        Ok(Exchange { head, body })
    }

    async fn exchange(
        self: &Arc<Self>,
        mut link: Box<Link>,
        request: Request<Full<Bytes>>,
    ) -> Result<Exchange, SendError> {
        let mut response = pin!(link.sender.send_request(request));
        let mut connection = Some(&mut link.connection);
        let answer: Result<Response<Incoming>, _> = poll_fn(|cx| {
            // The response comes out of polling the connection, and an ended connection must not be polled again.
            if let Some(open) = connection.as_mut()
                && Pin::new(open).poll(cx).is_ready()
            {
                connection = None;
            }
            response.as_mut().poll(cx)
        })
        .await;
        let open = connection.is_some();
        let (head, incoming) = answer.map_err(SendError::NoResponse)?.into_parts();
        let body = EngineBody { incoming, link: Some(link), open, pool: Arc::clone(self), _place: None };
        Ok(Exchange { head, body })
    }
}

impl Shared {
    fn place(&self) -> (Self, Place) {
        self.streams.fetch_add(1, Ordering::Relaxed);
        (self.clone(), Place(Arc::clone(&self.streams)))
    }
}

impl Link {
    /// Lets the connection look at its socket, without waiting.
    fn is_open(&mut self) -> bool {
        Pin::new(&mut self.connection).poll(&mut Context::from_waker(Waker::noop())).is_pending()
            && !self.sender.is_closed()
    }
}

/// The body of an engine's response. Dropped before its end, it closes the connection; at its end the connection
/// goes back to the pool.
#[derive(Debug)]
pub(crate) struct EngineBody {
    incoming: Incoming,
    /// `None` once the body ended, and over HTTP/2.
    link: Option<Box<Link>>,
    /// Whether the connection may be polled.
    open: bool,
    pool: Arc<Pool>,
    /// Over HTTP/2; held until the body is dropped.
    _place: Option<Place>,
}

impl EngineBody {
    fn end(&mut self) {
        if let Some(link) = self.link.take()
            && self.open
        {
            self.pool.put_back(link);
        }
    }

    fn drive(&mut self, cx: &mut Context<'_>) {
        if self.open
            && let Some(link) = &mut self.link
        {
            self.open = Pin::new(&mut link.connection).poll(cx).is_pending();
        }
    }
}

impl Drop for EngineBody {
    fn drop(&mut self) {
        // Whoever serves a body of known length does not ask for the end after its last byte.
        if self.incoming.is_end_stream() {
            self.end();
        }
    }
}

impl Body for EngineBody {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        // Asking first tells the connection that a chunk is wanted; it reads none unasked.
        let mut frame = Pin::new(&mut self.incoming).poll_frame(cx);
        if frame.is_pending() {
            self.drive(cx);
            frame = Pin::new(&mut self.incoming).poll_frame(cx);
        }
        match &frame {
            Poll::Ready(None) => self.end(),
            Poll::Ready(Some(Ok(_))) if self.incoming.is_end_stream() => self.end(),
            Poll::Ready(Some(Err(_))) => self.link = None,
            _ => {}
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.incoming.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.incoming.size_hint()
    }
}
