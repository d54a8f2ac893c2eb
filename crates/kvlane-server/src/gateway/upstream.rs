//! Connections to one engine: kept alive, and driven by the task that uses them.
//!
//! The usual client spawns a task per connection and speaks to it over channels, so that every request and every chunk
//! of a stream costs a wake-up of another task, often on another core. Here the task that serves the client polls the engine's
//! connection itself: it is part of the [`Exchange`] while a request runs and lies unpolled in the [`Pool`] otherwise.
//! Two properties follow: dropping an exchange closes its connection, which is how the engine learns
//! that the client is gone; and a connection that the engine closed while idle is noticed when it is taken out.
//!
//! Engines close idle connections after 5 s (uvicorn's default), so the pool keeps them for less.

use bytes::Bytes;
use http_body::{Body, Frame};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper::header::HeaderValue;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use std::future::{Future, poll_fn};
use std::io;
use std::pin::{Pin, pin};
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
    /// Last in, first out: the warmest is used, the oldest age out. Held for a push or pop only.
    idle: Mutex<Vec<Idle>>,
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
    pub(crate) fn new(authority: &hyper::http::uri::Authority) -> Arc<Self> {
        let host = authority.host();
        Arc::new(Self {
            host: host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host).to_owned(),
            port: authority.port_u16().unwrap_or(80),
            host_header: HeaderValue::from_str(authority.as_str())
                .expect("an authority has no bytes that a header may not have"),
            idle: Mutex::new(Vec::new()),
        })
    }

    /// Sends `request` (whose URI has only path and query) and waits for the head of the response.
    ///
    /// A kept connection that ends before the first byte of a response is replaced by a fresh one, once: engines
    /// close idle connections at any moment.
    pub(crate) async fn send(self: &Arc<Self>, request: Request<Full<Bytes>>) -> Result<Exchange, SendError> {
        let (mut parts, body) = request.into_parts();
        parts.headers.insert(hyper::header::HOST, self.host_header.clone());
        if let Some(link) = self.take() {
            let request = Request::from_parts(parts.clone(), body.clone());
            match self.exchange(link, request).await {
                Err(SendError::NoResponse(error)) if !error.is_parse() => {}
                done => return done,
            }
        }
        let link = self.connect().await?;
        self.exchange(link, Request::from_parts(parts, body)).await
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
        let (sender, connection) = http1::Builder::new()
            .max_header_size(RESPONSE_HEAD_BYTES_MAX)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(SendError::NoResponse)?;
        Ok(Box::new(Link { sender, connection }))
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
        let body = EngineBody { incoming, link: Some(link), open, pool: Arc::clone(self) };
        Ok(Exchange { head, body })
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
    /// `None` once the body ended.
    link: Option<Box<Link>>,
    /// Whether the connection may be polled.
    open: bool,
    pool: Arc<Pool>,
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
