//! As much HTTP/1.1 as a load generator and a mock engine need: heads, lengths and chunks.
//!
//! By hand, because both share two cores with what is measured: every microsecond here is one that the router cannot have.

use std::io;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const BUFFER_BYTES: usize = 64 * 1024;
/// Longest head that is read.
const HEAD_BYTES_MAX: usize = 32 * 1024;

/// How long a body is.
#[derive(Clone, Copy, Debug)]
pub enum Length {
    /// So many bytes.
    Bytes(usize),
    /// Until the chunk of size 0.
    Chunked,
}

/// A request's or response's head.
#[derive(Debug)]
pub struct Head {
    /// The request line or status line.
    pub first_line: String,
    /// Of the body.
    pub length: Length,
    /// The peer waits for `100 Continue` before it sends the body.
    pub expects_continue: bool,
}

/// A connection and what was read ahead of need.
pub struct Connection {
    stream: TcpStream,
    buffer: Vec<u8>,
    from: usize,
    to: usize,
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Connection {
    /// Over a fresh stream, without Nagle's delay.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, buffer: vec![0; BUFFER_BYTES], from: 0, to: 0 })
    }

    /// Writes all of `bytes`.
    pub async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Reads more behind what is there; 0 at the end.
    async fn fill(&mut self) -> io::Result<usize> {
        if self.from == self.to {
            (self.from, self.to) = (0, 0);
        } else if self.to == self.buffer.len() {
            self.buffer.copy_within(self.from..self.to, 0);
            (self.from, self.to) = (0, self.to - self.from);
        }
        let read = self.stream.read(&mut self.buffer[self.to..]).await?;
        self.to += read;
        Ok(read)
    }

    /// Waits until the peer closes, which it does without a word.
    pub async fn closed(&mut self) -> io::Result<()> {
        match self.fill().await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Err(malformed("a word out of turn")),
        }
    }

    /// The next head; `None` when the peer closed before one.
    pub async fn head(&mut self) -> io::Result<Option<Head>> {
        let end = loop {
            let unread = &self.buffer[self.from..self.to];
            if let Some(end) = unread.windows(4).position(|w| w == b"\r\n\r\n") {
                break self.from + end;
            }
            if unread.len() > HEAD_BYTES_MAX {
                return Err(malformed("head too long"));
            }
            if self.fill().await? == 0 {
                return if self.from == self.to { Ok(None) } else { Err(malformed("cut head")) };
            }
        };
        let text = std::str::from_utf8(&self.buffer[self.from..end]).map_err(|_| malformed("head"))?;
        let mut lines = text.split("\r\n");
        let mut head = Head {
            first_line: lines.next().unwrap_or_default().to_owned(),
            length: Length::Bytes(0),
            expects_continue: false,
        };
        for line in lines {
            let Some((name, value)) = line.split_once(':') else { continue };
            let value = value.trim();
            if name.eq_ignore_ascii_case("content-length") {
                head.length = Length::Bytes(value.parse().map_err(|_| malformed("content-length"))?);
            } else if name.eq_ignore_ascii_case("transfer-encoding") {
                head.length = Length::Chunked;
            } else if name.eq_ignore_ascii_case("expect") {
                head.expects_continue = true;
            }
        }
        self.from = end + 4;
        Ok(Some(head))
    }

    /// Reads a body to its end, showing each piece to `each`.
    pub async fn body(&mut self, length: Length, mut each: impl FnMut(&[u8])) -> io::Result<()> {
        match length {
            Length::Bytes(bytes) => self.pass(bytes, &mut each).await,
            Length::Chunked => loop {
                let size = self.chunk_size().await?;
                self.pass(size, &mut each).await?;
                self.pass(2, &mut |_| {}).await?;
                if size == 0 {
                    return Ok(());
                }
            },
        }
    }

    async fn pass(&mut self, mut bytes: usize, each: &mut impl FnMut(&[u8])) -> io::Result<()> {
        while bytes > 0 {
            if self.from == self.to && self.fill().await? == 0 {
                return Err(malformed("cut body"));
            }
            let take = bytes.min(self.to - self.from);
            each(&self.buffer[self.from..self.from + take]);
            self.from += take;
            bytes -= take;
        }
        Ok(())
    }

    async fn chunk_size(&mut self) -> io::Result<usize> {
        loop {
            let unread = &self.buffer[self.from..self.to];
            if let Some(end) = unread.windows(2).position(|w| w == b"\r\n") {
                let line = std::str::from_utf8(&unread[..end]).map_err(|_| malformed("chunk"))?;
                let digits = line.split(';').next().unwrap_or_default().trim();
                let size = usize::from_str_radix(digits, 16).map_err(|_| malformed("chunk size"))?;
                self.from += end + 2;
                return Ok(size);
            }
            if self.fill().await? == 0 {
                return Err(malformed("cut chunk"));
            }
        }
    }
}
