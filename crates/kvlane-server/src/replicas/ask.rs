//! Asking one router again and again what it has in flight, over one connection that is kept.

use super::wire::Loads;
use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use prost::Message;
use std::net::SocketAddr;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_util::task::AbortOnDropHandle;

/// An answer comes after [`super::told::HEARTBEAT`] at the latest; later than this the connection is given up.
const ANSWER_LIMIT: Duration = Duration::from_millis(750);
/// Most bytes of an answer: some 100 000 ranks.
const ANSWER_BYTES_MAX: usize = 8 << 20;

/// A connection to a router, made when it is needed.
#[derive(Debug)]
pub(super) struct Asker {
    address: SocketAddr,
    connection: Option<(SendRequest<Empty<Bytes>>, AbortOnDropHandle<()>)>,
}

impl Asker {
    pub(super) fn new(address: SocketAddr) -> Self {
        Self { address, connection: None }
    }

    /// What changed there after `after` of the life `boot`; why that is not known.
    pub(super) async fn ask(&mut self, boot: u64, after: u64) -> Result<Loads, String> {
        let answer = tokio::time::timeout(ANSWER_LIMIT, self.exchange(boot, after)).await;
        let answer = answer.unwrap_or_else(|_| Err("it does not answer in time".to_owned()));
        if answer.is_err() {
            self.connection = None;
        }
        answer
    }

    async fn exchange(&mut self, boot: u64, after: u64) -> Result<Loads, String> {
        let sender = match &mut self.connection {
            Some((sender, _)) if !sender.is_closed() => sender,
            connection => &mut connection.insert(connect(self.address).await?).0,
        };
        let request = hyper::Request::get(format!("/kvlane/loads?boot={boot:016x}&after={after}"))
            .header(hyper::header::HOST, self.address.to_string())
            .header(hyper::header::USER_AGENT, "kvlane")
            .body(Empty::new())
            .map_err(|error| error.to_string())?;
        let response = sender.send_request(request).await.map_err(|error| error.to_string())?;
        let status = response.status().as_u16();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect();
        let body = body.await.map_err(|error| error.to_string())?.to_bytes();
        match status {
            200 => Loads::decode(body).map_err(|error| format!("what it says is no message: {error}")),
            404 => Err("it shares no load: name its peers there too (--peer)".to_owned()),
            status => Err(format!("it says {status}")),
        }
    }
}

async fn connect(to: SocketAddr) -> Result<(SendRequest<Empty<Bytes>>, AbortOnDropHandle<()>), String> {
    let stream = TcpStream::connect(to).await.map_err(|error| format!("cannot connect: {error}"))?;
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let (sender, driver) = handshake(TokioIo::new(stream)).await.map_err(|error| error.to_string())?;
    // Its end shows at the next question.
    let driver = tokio::spawn(async move { drop(driver.await) });
    Ok((sender, AbortOnDropHandle::new(driver)))
}
