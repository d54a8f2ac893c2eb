//! A small server of HTTP/1.1, and of HTTP/2 for gRPC, around an axum router, with a bound on everything that a client decides.
//!
//! Which of the two a client speaks shows in its first bytes: HTTP/2 begins with a method that HTTP/1.1 does not have.
//!
//! `axum::serve` has neither a limit of connections nor a time in which a request head must have come, so a few idle sockets would
//! hold it up. The gateway has a loop of its own, because it drains streams.

use axum::Router;
use hyper::server::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::graceful::GracefulConnection;
use hyper_util::service::TowerToHyperService;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Pause after a failed `accept`: out of file descriptors is the usual reason, and it passes.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Connections that wait to be accepted.
const BACKLOG: i32 = 4096;
/// Running requests get this long to end after the shutdown began.
const DRAIN: Duration = Duration::from_secs(5);

/// What an HTTP/2 connection begins with, in part (RFC 9113, section 3.4): no method of HTTP/1.1 begins so.
const HTTP2_BEGINS: &[u8] = b"PRI ";
/// Requests that one HTTP/2 connection may have open.
const STREAMS_MAX: u32 = 1_024;
/// An HTTP/2 connection is asked so often whether it is alive, and closed if it does not answer for as long.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// Bytes of requests that an HTTP/2 client may send ahead: in one request, and in all of a connection.
const WINDOW_BYTES: (u32, u32) = (1 << 20, 4 << 20);
/// Between two looks at a connection that has sent too little to tell what it speaks.
const PEEK_PAUSE: Duration = Duration::from_millis(20);

/// What one client may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Limits {
    /// Connections at a time; more wait to be accepted.
    pub(crate) connections: usize,
    /// Longest request head, in bytes.
    pub(crate) head_bytes: usize,
    /// A client that sends no (whole) request head for this long is hung up on.
    pub(crate) head_timeout: Duration,
    /// A client that acknowledges nothing for this long, while there is something for it, is given up.
    pub(crate) stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4_096,
            head_bytes: 64 * 1024,
            head_timeout: Duration::from_secs(75),
            stall: Duration::from_secs(60),
        }
    }
}

/// Listens on an address.
pub(crate) fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let domain = socket2::Domain::for_address(address);
    let socket = socket2::Socket::new(domain, socket2::Type::STREAM, Some(socket2::Protocol::TCP))?;
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    TcpListener::from_std(socket.into())
}

/// Serves until `shutdown` is cancelled and what runs then has ended, or was cut off.
pub(crate) async fn serve(
    listener: TcpListener,
    router: Router,
    limits: Limits,
    shutdown: CancellationToken,
) {
    let connections = TaskTracker::new();
    let cut = CancellationToken::new();
    let room = Arc::new(Semaphore::new(limits.connections));
    let accepting = async {
        loop {
            let place = Arc::clone(&room).acquire_owned().await.expect("this semaphore is never closed");
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            if let Err(error) = prepare(&stream, limits.stall) {
                tracing::debug!(%error, "a connection ended before it began");
                continue;
            }
            let serving = connection(stream, router.clone(), limits, shutdown.clone());
            connections.spawn(cut.clone().run_until_cancelled_owned(async move {
                serving.await;
                drop(place);
            }));
        }
    };
    shutdown.run_until_cancelled(accepting).await;
    connections.close();
    if tokio::time::timeout(DRAIN, connections.wait()).await.is_err() {
        cut.cancel();
        connections.wait().await;
    }
}

fn prepare(stream: &TcpStream, stall: Duration) -> io::Result<()> {
    stream.set_nodelay(true)?;
    #[cfg(target_os = "linux")]
    socket2::SockRef::from(stream).set_tcp_user_timeout(Some(stall))?;
    Ok(())
}

async fn connection(stream: TcpStream, router: Router, limits: Limits, closing: CancellationToken) {
    let spoken = tokio::select! {
        spoken = tokio::time::timeout(limits.head_timeout, is_http2(&stream)) => spoken,
        // Nothing was asked yet.
        () = closing.cancelled() => return,
    };
    let Ok(Ok(http2)) = spoken else { return };
    let (stream, service) = (TokioIo::new(stream), TowerToHyperService::new(router));
    let ended = if http2 {
        let serving = http2::Builder::new(TokioExecutor::new())
            .timer(TokioTimer::new())
            .max_header_list_size(u32::try_from(limits.head_bytes).unwrap_or(u32::MAX))
            .max_concurrent_streams(STREAMS_MAX)
            .initial_stream_window_size(WINDOW_BYTES.0)
            .initial_connection_window_size(WINDOW_BYTES.1)
            .keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .serve_connection(stream, service);
        to_its_end(serving, &closing).await
    } else {
        let serving = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(limits.head_timeout)
            .max_buf_size(limits.head_bytes)
            .serve_connection(stream, service);
        to_its_end(serving, &closing).await
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Serves a connection to its end; once the server closes, what was asked is answered and nothing more is taken.
async fn to_its_end<C: GracefulConnection>(
    connection: C,
    closing: &CancellationToken,
) -> Result<(), C::Error> {
    let mut connection = pin!(connection);
    tokio::select! {
        ended = &mut connection => ended,
        () = closing.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    }
}

/// Whether a client speaks HTTP/2, once it has said enough; nothing is taken from the stream.
async fn is_http2(stream: &TcpStream) -> io::Result<bool> {
    let mut seen = [0; HTTP2_BEGINS.len()];
    loop {
        match stream.peek(&mut seen).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n if n == seen.len() || seen[..n] != HTTP2_BEGINS[..n] => return Ok(seen == HTTP2_BEGINS),
            _ => tokio::time::sleep(PEEK_PAUSE).await,
        }
    }
}
