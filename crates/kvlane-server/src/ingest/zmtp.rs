//! ZeroMQ's wire protocol, the part that a subscriber needs: one ZMTP 3.x connection with the NULL mechanism, as SUB or
//! DEALER, over TCP.
//!
//! One value is one TCP connection, and its end is an error of [`Connection::recv`] in the order of the bytes. That is why
//! this is not the crate `zeromq` (0.7): there a socket hides its connections, reports their loss on a channel that is
//! not ordered with the messages (an engine's restart would be seen before or after its first batch at random),
//! waits up to 30 s to reconnect with no way to change it, allocates whatever length a frame announces, and closes on any
//! command but READY, a PING among them. Measurements: docs/adr.
//!
//! Deliberately absent: reconnecting (the caller's loop, which must know of it), sending large messages, the security
//! mechanisms CURVE and PLAIN, and the commands of ZMTP 3.1 for subscribing (a publisher of any version takes the message form).
//!
//! Layout (RFC 37/ZMTP, <https://rfc.zeromq.org/spec/37/>):
//!
//! ```text
//! greeting  ff 00*8 7f | 03 01 | "NULL" 00*16 | as-server 00 | 00*31        64 bytes, from both sides
//! frame     flags (1 more, 2 long, 4 command) | length, 1 byte or 8 big-endian | body
//! command   length of name, name, data; READY's data is (1-byte length, name, 4-byte length, value)*
//! ```

mod message;

pub(crate) use message::Message;

use crate::config::Endpoint;
use bytes::{Buf, Bytes, BytesMut};
use message::Front;
use std::fmt;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout, timeout_at};

/// The most bytes of one message; a million-token prompt takes about 10 MB.
pub(crate) const MESSAGE_BYTES_MAX: usize = 128 << 20;
/// The most frames of one message; engines send 3 or 4.
pub(crate) const MESSAGE_FRAMES_MAX: usize = 16;
/// The same with the heads of the frames.
const BYTES_MAX: usize = MESSAGE_BYTES_MAX + 9 * MESSAGE_FRAMES_MAX;
/// Silence after which the peer is asked for a sign of life.
const PING_AFTER: Duration = Duration::from_secs(5);
/// Silence after which the connection is given up, where the peer knows PING.
const SILENCE_MAX: Duration = Duration::from_secs(15);
/// Time to connect and shake hands.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes asked from the socket at once; larger frames grow the buffer by this much as they arrive, so that an announced
/// length alone allocates nothing.
const READ_CHUNK: usize = 256 << 10;

const FLAG_MORE: u8 = 1;
const FLAG_LONG: u8 = 2;
const FLAG_COMMAND: u8 = 4;

/// What this end of the connection is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Role {
    /// Receives what a PUB or XPUB socket publishes.
    Sub,
    /// Asks a ROUTER socket.
    Dealer,
}

impl Role {
    const fn name(self) -> &'static str {
        match self {
            Self::Sub => "SUB",
            Self::Dealer => "DEALER",
        }
    }

    /// Socket types that it may talk to.
    const fn peers(self) -> &'static [&'static str] {
        match self {
            Self::Sub => &["PUB", "XPUB"],
            Self::Dealer => &["ROUTER", "REP", "DEALER"],
        }
    }
}

/// Why a connection could not be made or ended. In each case the remedy is to connect again, later.
#[derive(Debug)]
pub(crate) enum ZmtpError {
    /// The network or the peer ended it.
    Io(io::Error),
    /// The peer does not speak ZMTP 3 with the NULL mechanism, or is of the wrong socket type; says what it is.
    Peer(String),
    /// A message beyond [`MESSAGE_BYTES_MAX`] or [`MESSAGE_FRAMES_MAX`].
    TooLarge,
    /// No handshake, or no sign of life, in time.
    Silent,
}

impl fmt::Display for ZmtpError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                f.write_str("the peer closed it")
            }
            Self::Io(error) => error.fmt(f),
            Self::Peer(what) => f.write_str(what),
            Self::TooLarge => {
                write!(f, "a message of more than {MESSAGE_BYTES_MAX} bytes or {MESSAGE_FRAMES_MAX} frames")
            }
            Self::Silent => f.write_str("no sign of life in time"),
        }
    }
}

impl std::error::Error for ZmtpError {}

impl From<io::Error> for ZmtpError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// A connection after its handshake.
#[derive(Debug)]
pub(crate) struct Connection {
    stream: TcpStream,
    input: BytesMut,
    /// Bytes at the front of `input` that are whole frames of a message whose end is not there yet, and how many.
    begun: usize,
    frames: usize,
    /// Answers to PINGs, not sent yet.
    pongs: Vec<u8>,
    answers_ping: bool,
    heard: Instant,
    pinged: bool,
}

impl Connection {
    /// Connects and shakes hands.
    pub(crate) async fn open(to: &Endpoint, role: Role) -> Result<Self, ZmtpError> {
        timeout(HANDSHAKE_TIMEOUT, async {
            let stream = TcpStream::connect((to.host.as_str(), to.port)).await?;
            Self::shake_hands(stream, role).await
        })
        .await
        .unwrap_or(Err(ZmtpError::Silent))
    }

    async fn shake_hands(stream: TcpStream, role: Role) -> Result<Self, ZmtpError> {
        stream.set_nodelay(true)?;
        let mut connection = Self {
            stream,
            input: BytesMut::with_capacity(READ_CHUNK),
            begun: 0,
            frames: 0,
            pongs: Vec::new(),
            answers_ping: false,
            heard: Instant::now(),
            pinged: false,
        };
        connection.stream.write_all(&greeting()).await?;
        // The signature alone tells whether this is ZeroMQ: a peer that speaks something else may never send 64 bytes.
        connection.fill(10).await?;
        if connection.input[0] != 0xff || connection.input[9] & 1 != 1 {
            return Err(ZmtpError::Peer("it does not speak ZeroMQ".to_owned()));
        }
        connection.fill(11).await?;
        if connection.input[10] < 3 {
            return Err(ZmtpError::Peer("it speaks a ZeroMQ protocol older than 3.0".to_owned()));
        }
        connection.fill(64).await?;
        let greeting = connection.input.split_to(64);
        connection.answers_ping = (greeting[10], greeting[11]) >= (3, 1);
        let mechanism = greeting[12..32].split(|b| *b == 0).next().unwrap_or_default();
        if mechanism != b"NULL" {
            let name = String::from_utf8_lossy(mechanism);
            return Err(ZmtpError::Peer(format!("it asks for the security mechanism {name}")));
        }

        let mut ready = b"\x05READY".to_vec();
        property(&mut ready, "Socket-Type", role.name().as_bytes());
        if role == Role::Dealer {
            property(&mut ready, "Identity", b"");
        }
        connection.send_frame(FLAG_COMMAND, &ready).await?;
        loop {
            let (flags, body) = connection.frame().await?;
            if flags & FLAG_COMMAND == 0 {
                return Err(ZmtpError::Peer("it sent a message before its READY".to_owned()));
            }
            match command(&body) {
                (b"READY", properties) => {
                    let kind = socket_type(properties).unwrap_or_default();
                    if !role.peers().iter().any(|name| name.as_bytes() == kind) {
                        let kind = String::from_utf8_lossy(kind);
                        let wanted = role.peers()[0];
                        return Err(ZmtpError::Peer(format!("it is a {kind} socket, not {wanted}")));
                    }
                    break;
                }
                (b"ERROR", reason) => {
                    let reason = String::from_utf8_lossy(reason.get(1..).unwrap_or_default());
                    return Err(ZmtpError::Peer(format!("it refused: {reason}")));
                }
                _ => {}
            }
        }
        connection.heard = Instant::now();
        Ok(connection)
    }

    /// Asks a publisher for all messages whose first frame begins with `topic`.
    pub(crate) async fn subscribe(&mut self, topic: &str) -> Result<(), ZmtpError> {
        let mut body = vec![1];
        body.extend_from_slice(topic.as_bytes());
        self.send_frame(0, &body).await
    }

    /// Sends one small message.
    pub(crate) async fn send(&mut self, frames: &[&[u8]]) -> Result<(), ZmtpError> {
        let mut out = Vec::new();
        for (i, body) in frames.iter().enumerate() {
            let more = if i + 1 < frames.len() { FLAG_MORE } else { 0 };
            push_frame(&mut out, more, body);
        }
        Ok(self.stream.write_all(&out).await?)
    }

    /// The next message; after an error the connection is of no more use.
    ///
    /// Answers the peer's PING, and sends its own into silence, while it waits.
    pub(crate) async fn recv(&mut self) -> Result<Message, ZmtpError> {
        loop {
            let message = self.take()?;
            if !self.pongs.is_empty() {
                self.stream.write_all(&self.pongs).await?;
                self.pongs.clear();
            }
            match message {
                Some(message) => return Ok(message),
                None => self.listen().await?,
            }
        }
    }

    /// The next message and those that lie whole behind it already, until they weigh `bytes`.
    pub(crate) async fn recv_many(&mut self, bytes: usize) -> Result<Vec<Message>, ZmtpError> {
        let mut messages = vec![self.recv().await?];
        let mut weight = messages[0].weight();
        // An error stays for the next call, when what came before it is taken care of.
        while weight < bytes
            && let Ok(Some(message)) = self.take()
        {
            weight += message.weight();
            messages.push(message);
        }
        Ok(messages)
    }

    /// A message that is there whole.
    fn take(&mut self) -> Result<Option<Message>, ZmtpError> {
        loop {
            let (flags, len) = match message::front(&self.input[self.begun..])? {
                Front::Whole(frame) => {
                    if frame.flags & FLAG_COMMAND != 0
                        && let (b"PING", data) = command(frame.body)
                    {
                        // Two bytes of time to live, then a context of at most 16 bytes to send back.
                        let context = data.get(2..).unwrap_or_default();
                        let mut pong = b"\x04PONG".to_vec();
                        pong.extend_from_slice(&context[..context.len().min(16)]);
                        push_frame(&mut self.pongs, FLAG_COMMAND, &pong);
                    }
                    (frame.flags, frame.len)
                }
                Front::Part(len) if self.begun + len > BYTES_MAX => return Err(ZmtpError::TooLarge),
                Front::Part(_) => return Ok(None),
            };
            if self.begun + len > BYTES_MAX {
                return Err(ZmtpError::TooLarge);
            }
            if flags & FLAG_COMMAND != 0 {
                // Between messages it is done with; between the frames of one it stays where it is.
                if self.frames == 0 {
                    self.input.advance(len);
                } else {
                    self.begun += len;
                }
                continue;
            }
            if self.frames == MESSAGE_FRAMES_MAX {
                return Err(ZmtpError::TooLarge);
            }
            self.begun += len;
            self.frames += 1;
            if flags & FLAG_MORE == 0 {
                let bytes = self.input.split_to(self.begun).freeze();
                (self.begun, self.frames) = (0, 0);
                return Ok(Some(Message::new(bytes)));
            }
        }
    }

    /// Waits for bytes; sends a PING into silence and gives up after too much of it.
    async fn listen(&mut self) -> Result<(), ZmtpError> {
        self.input.reserve(READ_CHUNK);
        let wait = if self.pinged { SILENCE_MAX } else { PING_AFTER };
        match timeout_at(self.heard + wait, self.stream.read_buf(&mut self.input)).await {
            Ok(Ok(0)) => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
            Ok(Ok(_)) => {
                self.heard = Instant::now();
                self.pinged = false;
                Ok(())
            }
            Ok(Err(error)) => Err(error.into()),
            Err(_) if !self.answers_ping => {
                self.heard = Instant::now();
                Ok(())
            }
            Err(_) if self.pinged => Err(ZmtpError::Silent),
            Err(_) => {
                self.pinged = true;
                self.send_frame(FLAG_COMMAND, b"\x04PING\x00\x00").await
            }
        }
    }

    /// Waits until `bytes` bytes of input are there.
    async fn fill(&mut self, bytes: usize) -> Result<(), ZmtpError> {
        while self.input.len() < bytes {
            if self.stream.read_buf(&mut self.input).await? == 0 {
                return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
            }
        }
        Ok(())
    }

    /// Waits for a whole frame (only during the handshake).
    async fn frame(&mut self) -> Result<(u8, Bytes), ZmtpError> {
        loop {
            if let Some(frame) = self.parse()? {
                return Ok(frame);
            }
            self.input.reserve(READ_CHUNK);
            let have = self.input.len();
            self.fill(have + 1).await?;
        }
    }

    /// The next frame of the input, if it is there whole.
    fn parse(&mut self) -> Result<Option<(u8, Bytes)>, ZmtpError> {
        let Front::Whole(frame) = message::front(&self.input)? else { return Ok(None) };
        let (flags, len, head) = (frame.flags, frame.len, frame.len - frame.body.len());
        let mut frame = self.input.split_to(len);
        frame.advance(head);
        Ok(Some((flags, frame.freeze())))
    }

    async fn send_frame(&mut self, flags: u8, body: &[u8]) -> Result<(), ZmtpError> {
        let mut out = Vec::with_capacity(body.len() + 9);
        push_frame(&mut out, flags, body);
        Ok(self.stream.write_all(&out).await?)
    }
}

fn greeting() -> [u8; 64] {
    let mut bytes = [0; 64];
    (bytes[0], bytes[9]) = (0xff, 0x7f);
    (bytes[10], bytes[11]) = (3, 1);
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

fn push_frame(out: &mut Vec<u8>, flags: u8, body: &[u8]) {
    if let Ok(len) = u8::try_from(body.len()) {
        out.extend_from_slice(&[flags, len]);
    } else {
        out.push(flags | FLAG_LONG);
        out.extend_from_slice(&(body.len() as u64).to_be_bytes());
    }
    out.extend_from_slice(body);
}

fn property(out: &mut Vec<u8>, name: &str, value: &[u8]) {
    out.push(u8::try_from(name.len()).expect("property names are short literals"));
    out.extend_from_slice(name.as_bytes());
    out.extend_from_slice(
        &u32::try_from(value.len()).expect("property values are short literals").to_be_bytes(),
    );
    out.extend_from_slice(value);
}

/// Name and data of a command; both empty if it is malformed.
fn command(body: &[u8]) -> (&[u8], &[u8]) {
    let Some((&len, rest)) = body.split_first() else { return (&[], &[]) };
    rest.split_at_checked(usize::from(len)).unwrap_or((&[], &[]))
}

fn socket_type(mut properties: &[u8]) -> Option<&[u8]> {
    loop {
        let (&len, rest) = properties.split_first()?;
        let (name, rest) = rest.split_at_checked(usize::from(len))?;
        let (len, rest) = rest.split_at_checked(4)?;
        let len = u32::from_be_bytes(len.try_into().expect("a slice of 4 bytes"));
        let (value, rest) = rest.split_at_checked(usize::try_from(len).ok()?)?;
        if name.eq_ignore_ascii_case(b"Socket-Type") {
            return Some(value);
        }
        properties = rest;
    }
}

#[cfg(test)]
mod tests;
