//! Bodies: the client's read whole within bounds, the engine's passed on.
//!
//! A request's body is needed whole, because routing reads it and a failed attempt sends it again. A body that came in one piece is not copied.

use super::error::ClientError;
use bytes::{Bytes, BytesMut};
use http_body::{Body, Frame, SizeHint};
use hyper::StatusCode;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::mpsc;

/// A client that sends nothing for this long in the middle of a body is not waited for.
const BODY_SILENCE_MAX: Duration = Duration::from_secs(30);
/// Memory set aside for an announced body before its bytes are there: announcing is free.
const ANNOUNCED_BYTES_MAX: u64 = 1 << 20;

/// Reads a request's body of at most `max_bytes`.
pub(crate) async fn read<B>(body: B, max_bytes: u64) -> Result<Bytes, ClientError>
where
    B: Body<Data = Bytes>,
{
    let too_large = || {
        ClientError::new(
            StatusCode::PAYLOAD_TOO_LARGE,
            format!("The body is larger than {max_bytes} bytes; raise --max-body-bytes if this is intended."),
        )
    };
    let announced = body.size_hint().lower();
    if announced > max_bytes {
        return Err(too_large());
    }
    let mut body = pin!(body);
    let mut first = Bytes::new();
    let mut rest = BytesMut::new();
    loop {
        let next = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx));
        let frame = match tokio::time::timeout(BODY_SILENCE_MAX, next).await {
            Ok(None) => break,
            Ok(Some(Ok(frame))) => frame,
            Ok(Some(Err(_))) => return Err(ClientError::bad_request("The body ended early.")),
            Err(_) => {
                return Err(ClientError::new(
                    StatusCode::REQUEST_TIMEOUT,
                    "The rest of the body did not come.",
                ));
            }
        };
        // Trailers are of no use to a JSON body.
        let Ok(data) = frame.into_data() else { continue };
        if (first.len() + rest.len() + data.len()) as u64 > max_bytes {
            return Err(too_large());
        }
        if first.is_empty() && rest.is_empty() {
            first = data;
            continue;
        }
        if rest.is_empty() {
            rest.reserve(announced.min(ANNOUNCED_BYTES_MAX) as usize);
            rest.extend_from_slice(&first);
            first = Bytes::new();
        }
        rest.extend_from_slice(&data);
    }
    Ok(if rest.is_empty() { first } else { rest.freeze() })
}

/// The body of a response: written here, or passed on from an engine.
#[derive(Debug)]
pub(crate) enum ResponseBody<F> {
    /// Whole; `None` once it was taken.
    Own(Option<Bytes>),
    /// Written here as it comes, until the other side ends.
    Lines(mpsc::Receiver<Bytes>),
    /// Passing by. Boxed, because it carries the whole exchange.
    Forwarded(Box<F>),
}

impl<F> ResponseBody<F> {
    /// A body that is there already.
    pub(crate) fn own(bytes: Bytes) -> Self {
        Self::Own((!bytes.is_empty()).then_some(bytes))
    }
}

impl<F> Body for ResponseBody<F>
where
    F: Body<Data = Bytes> + Unpin,
{
    type Data = Bytes;
    type Error = F::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, F::Error>>> {
        match self.get_mut() {
            Self::Own(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Lines(lines) => lines.poll_recv(cx).map(|line| line.map(|line| Ok(Frame::data(line)))),
            Self::Forwarded(body) => Pin::new(&mut **body).poll_frame(cx),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Own(bytes) => bytes.is_none(),
            Self::Lines(_) => false,
            Self::Forwarded(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Own(bytes) => SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Lines(_) => SizeHint::default(),
            Self::Forwarded(body) => body.size_hint(),
        }
    }
}
