//! A ZeroMQ endpoint over TCP, as engines print them and operators type them: `tcp://host:port`.
//!
//! Engines print the address that they *bind* (`tcp://*:5557`); whoever connects must put the worker's host in
//! place of the wildcard. Rank `r` of a data-parallel engine listens on port `p + r`.

use std::fmt;
use std::str::FromStr;

/// `tcp://host:port`, where the host may be a wildcard (see [`Endpoint::on`]).
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Endpoint {
    /// Name or address, IPv6 without brackets; `*`, `0.0.0.0` or `::` where the engine listens on every interface.
    pub host: String,
    /// TCP port, 0 only as "the engine chooses".
    pub port: u16,
}

/// Why a string is not an [`Endpoint`]; says what to write instead.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum EndpointError {
    /// Another transport than TCP, e.g. `ipc://` or `inproc://`.
    Transport(String),
    /// No `:port`, or not a number below 65536.
    Port(String),
    /// Nothing before the port.
    Host(String),
    /// Adding the rank to the port leaves the range of ports.
    RankOutOfRange(u16, u32),
}

impl fmt::Display for EndpointError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Transport(s) => write!(f, "`{s}` is not reachable over the network: write tcp://HOST:PORT"),
            Self::Port(s) => write!(f, "`{s}` has no valid port: write tcp://HOST:PORT"),
            Self::Host(s) => write!(f, "`{s}` has no host: write tcp://HOST:PORT"),
            Self::RankOutOfRange(port, rank) => write!(f, "port {port} + rank {rank} is not a port"),
        }
    }
}

impl std::error::Error for EndpointError {}

impl Endpoint {
    /// An endpoint from its parts.
    pub fn new(host: impl Into<String>, port: u16) -> Self {
        Self { host: host.into(), port }
    }

    /// Whether the host stands for "every interface of the machine that prints this".
    pub fn is_wildcard(&self) -> bool {
        matches!(self.host.as_str(), "*" | "0.0.0.0" | "::")
    }

    /// The endpoint as seen from outside: a wildcard is replaced by `host`, a real host is kept.
    #[must_use]
    pub fn on(&self, host: &str) -> Self {
        if self.is_wildcard() { Self::new(host, self.port) } else { self.clone() }
    }

    /// The endpoint of data-parallel rank `rank`, where `self` is that of rank 0.
    pub fn rank(&self, rank: u32) -> Result<Self, EndpointError> {
        u16::try_from(u32::from(self.port).saturating_add(rank))
            .map(|port| Self::new(self.host.clone(), port))
            .map_err(|_| EndpointError::RankOutOfRange(self.port, rank))
    }
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(s: &str) -> Result<Self, EndpointError> {
        let rest = match s.split_once("://") {
            Some(("tcp", rest)) => rest,
            Some(_) => return Err(EndpointError::Transport(s.to_owned())),
            None => s,
        };
        let (host, port) = rest.rsplit_once(':').ok_or_else(|| EndpointError::Port(s.to_owned()))?;
        let port = port.parse().map_err(|_| EndpointError::Port(s.to_owned()))?;
        let host = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host);
        if host.is_empty() || host.contains(['/', ' ', '@']) {
            return Err(EndpointError::Host(s.to_owned()));
        }
        Ok(Self::new(host, port))
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host.contains(':') {
            write!(f, "tcp://[{}]:{}", self.host, self.port)
        } else {
            write!(f, "tcp://{}:{}", self.host, self.port)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(s: &str) -> Result<Endpoint, EndpointError> {
        s.parse()
    }

    #[test]
    fn reads_what_engines_print() {
        assert_eq!(parse("tcp://*:5557"), Ok(Endpoint::new("*", 5557)));
        assert_eq!(parse("tcp://10.0.0.1:5557"), Ok(Endpoint::new("10.0.0.1", 5557)));
        assert_eq!(parse("tcp://[::]:5557"), Ok(Endpoint::new("::", 5557)));
        assert_eq!(parse("engine-0.pods:1"), Ok(Endpoint::new("engine-0.pods", 1)));
        assert_eq!(parse("tcp://[::1]:9").unwrap().to_string(), "tcp://[::1]:9");
    }

    #[test]
    fn refuses_with_the_form_to_write() {
        for s in ["ipc:///tmp/x", "inproc://x", "tcp://host", "tcp://:5", "tcp://h:70000", "http://h:1"] {
            let error = parse(s).unwrap_err().to_string();
            assert!(error.contains("write tcp://HOST:PORT"), "{s}: {error}");
        }
    }

    #[test]
    fn a_wildcard_takes_the_workers_host_and_a_rank_adds_to_the_port() {
        assert_eq!(Endpoint::new("*", 5).on("10.1.1.1"), Endpoint::new("10.1.1.1", 5));
        assert_eq!(Endpoint::new("::", 5).on("h"), Endpoint::new("h", 5));
        assert_eq!(Endpoint::new("real", 5).on("h"), Endpoint::new("real", 5));
        assert_eq!(Endpoint::new("h", 5).rank(2), Ok(Endpoint::new("h", 7)));
        assert!(Endpoint::new("h", 65535).rank(1).is_err());
    }
}
