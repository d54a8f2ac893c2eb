//! One `--worker` argument: a base URL, and what probing could not learn by itself.
//!
//! `URL[,kv-events=tcp://HOST:PORT|none][,replay=tcp://HOST:PORT|none][,topic=TEXT][,block-size=N][,ranks=N][,http=1|2][,role=prefill|decode][,label=KEY=VALUE]…`
//!
//! A URL alone is the normal case. Every other part overrides what the engine says about itself, and the message
//! of a failed probe names the part that would help.

use super::{Endpoint, EndpointError};
use kvlane_index::BlockSize;
use std::fmt;
use std::str::FromStr;

/// Where events come from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum EventsSetting {
    /// Ask the engine; where it does not say, try the default ports on its host.
    #[default]
    Probe,
    /// Do not subscribe: the worker is served by predicted placements.
    Off,
    /// This endpoint (of rank 0; rank `r` is at port + `r`).
    At(Endpoint),
}

/// A worker as the operator names it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WorkerSpec {
    /// `http://host:port[/prefix]`, without a trailing slash. Requests go to `base` + `/v1/…`.
    pub base: http::Uri,
    /// The event publisher.
    pub kv_events: EventsSetting,
    /// The replay socket beside it; `Off`: never ask.
    pub replay: EventsSetting,
    /// The publisher's topic, compared whole; `None`: as the engine says, else any.
    pub topic: Option<String>,
    /// Tokens in a block, where the engine does not say.
    pub block_size: Option<BlockSize>,
    /// Count of data-parallel ranks, where the engine does not say.
    pub ranks: Option<u32>,
    /// How requests are sent.
    pub http: HttpVersion,
    /// Which part of requests it is for.
    pub role: Role,
    /// What requests may ask for, each `key=value` (zone, rack, GPU kind).
    pub labels: Vec<Box<str>>,
}

/// Which part of requests an engine is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Role {
    /// Whole requests.
    #[default]
    Both,
    /// Prompts, whose blocks another engine fetches; it has to be configured with a KV connector.
    Prefill,
    /// Answers to prompts that were computed elsewhere, and whole requests where that is not worth it; likewise.
    Decode,
}

impl Role {
    /// The name used in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Both => "both",
            Self::Prefill => "prefill",
            Self::Decode => "decode",
        }
    }
}

/// Labels that one worker may have.
const LABELS_MAX: usize = 16;

/// How requests are sent to an engine. Nothing but the operator says so: an engine's usual server (uvicorn) takes the first bytes of HTTP/2 for an
/// error, so it is not tried out.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum HttpVersion {
    /// HTTP/1.1: a connection for each running request, kept for the next one.
    #[default]
    Http1,
    /// HTTP/2 without TLS, from the first byte on (h2c with prior knowledge): requests share connections.
    Http2,
}

/// The most data-parallel ranks that one instance may have.
pub(crate) const RANKS_MAX: u32 = 1024;

/// Why a `--worker` argument was refused; each message says what to write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WorkerSpecError {
    /// Not `http://host:port`.
    Url(String),
    /// TLS to workers is not supported.
    Https(String),
    /// A part that is not `name=value`, or whose name is unknown.
    Part(String),
    /// A part is there twice.
    Repeated(String),
    /// `kv-events=` or `replay=` is not an endpoint.
    Endpoint(&'static str, EndpointError),
    /// `block-size=` or `ranks=` is not a number in range.
    Number(&'static str, String),
    /// `http=` is neither 1 nor 2.
    Http(String),
    /// `role=` is neither prefill nor decode.
    Role(String),
    /// `label=` is not KEY=VALUE, or there are too many.
    Label(String),
}

impl fmt::Display for WorkerSpecError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Url(s) => write!(f, "`{s}` is not a worker's base URL: write http://HOST:PORT"),
            Self::Https(s) => write!(f, "`{s}`: TLS to workers is not supported: write http://HOST:PORT"),
            Self::Part(s) => write!(
                f,
                "`{s}` is not understood: after the URL come kv-events=tcp://HOST:PORT, replay=tcp://HOST:PORT, \
                 topic=TEXT, block-size=TOKENS, ranks=COUNT, http=1|2, role=prefill|decode, label=KEY=VALUE"
            ),
            Self::Repeated(s) => write!(f, "`{s}` is given twice"),
            Self::Endpoint(name, error) => write!(f, "{name}: {error} (or {name}=none)"),
            Self::Http(s) => {
                write!(
                    f,
                    "http: `{s}` is not understood: write http=1, or http=2 where the engine speaks HTTP/2 without TLS"
                )
            }
            Self::Role(s) => write!(
                f,
                "role: `{s}` is not understood: write role=prefill or role=decode, or leave it out for a worker that does both"
            ),
            Self::Label(s) => {
                write!(f, "label: `{s}` is not KEY=VALUE without `@`, or there are more than {LABELS_MAX}")
            }
            Self::Number(name, s) => {
                let max = if *name == "ranks" { RANKS_MAX } else { u32::MAX };
                write!(f, "{name}: `{s}` is not a number from 1 to {max}")
            }
        }
    }
}

impl std::error::Error for WorkerSpecError {}

impl WorkerSpec {
    /// A worker of which only the URL is known.
    pub fn new(url: &str) -> Result<Self, WorkerSpecError> {
        Ok(Self {
            base: base_url(url)?,
            kv_events: EventsSetting::Probe,
            replay: EventsSetting::Probe,
            topic: None,
            block_size: None,
            ranks: None,
            http: HttpVersion::default(),
            role: Role::default(),
            labels: Vec::new(),
        })
    }

    /// The host of the base URL, IPv6 without brackets.
    pub fn host(&self) -> &str {
        let host = self.base.host().expect("base_url lets no URL without a host pass");
        host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
    }
}

fn base_url(text: &str) -> Result<http::Uri, WorkerSpecError> {
    let bad = || WorkerSpecError::Url(text.to_owned());
    if text.starts_with("https://") {
        return Err(WorkerSpecError::Https(text.to_owned()));
    }
    if !text.starts_with("http://") {
        return Err(bad());
    }
    let uri: http::Uri = text.trim_end_matches('/').parse().map_err(|_| bad())?;
    let authority = uri.authority().ok_or_else(bad)?;
    if uri.scheme_str() != Some("http")
        || authority.host().is_empty()
        || authority.as_str().contains('@')
        || uri.query().is_some()
    {
        return Err(bad());
    }
    Ok(uri)
}

impl FromStr for WorkerSpec {
    type Err = WorkerSpecError;

    fn from_str(text: &str) -> Result<Self, WorkerSpecError> {
        let mut parts = text.split(',');
        let mut spec = Self::new(parts.next().unwrap_or_default().trim())?;
        let mut seen = Vec::new();
        for part in parts {
            let (name, value) =
                part.trim().split_once('=').ok_or_else(|| WorkerSpecError::Part(part.to_owned()))?;
            if name != "label" && seen.contains(&name) {
                return Err(WorkerSpecError::Repeated(name.to_owned()));
            }
            seen.push(name);
            match name {
                "kv-events" => spec.kv_events = events_setting("kv-events", value)?,
                "replay" => spec.replay = events_setting("replay", value)?,
                "topic" => spec.topic = Some(value.to_owned()),
                "block-size" => {
                    let size = value.parse().ok().and_then(BlockSize::new);
                    spec.block_size =
                        Some(size.ok_or_else(|| WorkerSpecError::Number("block-size", value.to_owned()))?);
                }
                "ranks" => {
                    let ranks = value.parse().ok().filter(|n| (1..=RANKS_MAX).contains(n));
                    spec.ranks =
                        Some(ranks.ok_or_else(|| WorkerSpecError::Number("ranks", value.to_owned()))?);
                }
                "http" => {
                    spec.http = match value {
                        "1" => HttpVersion::Http1,
                        "2" => HttpVersion::Http2,
                        _ => return Err(WorkerSpecError::Http(value.to_owned())),
                    };
                }
                "role" => {
                    spec.role = match value {
                        "prefill" => Role::Prefill,
                        "decode" => Role::Decode,
                        _ => return Err(WorkerSpecError::Role(value.to_owned())),
                    };
                }
                "label" => {
                    let (key, worth) = value.split_once('=').unwrap_or_default();
                    if key.is_empty()
                        || worth.is_empty()
                        || value.contains('@')
                        || spec.labels.len() == LABELS_MAX
                    {
                        return Err(WorkerSpecError::Label(value.to_owned()));
                    }
                    spec.labels.push(value.into());
                }
                _ => return Err(WorkerSpecError::Part(part.to_owned())),
            }
        }
        Ok(spec)
    }
}

fn events_setting(name: &'static str, value: &str) -> Result<EventsSetting, WorkerSpecError> {
    if value == "none" {
        return Ok(EventsSetting::Off);
    }
    let endpoint: Endpoint = value.parse().map_err(|e| WorkerSpecError::Endpoint(name, e))?;
    if endpoint.port == 0 {
        return Err(WorkerSpecError::Endpoint(name, EndpointError::Port(value.to_owned())));
    }
    Ok(EventsSetting::At(endpoint))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(s: &str) -> Result<WorkerSpec, WorkerSpecError> {
        s.parse()
    }

    #[test]
    fn a_url_alone_is_enough() {
        let spec = parse("http://10.0.0.1:8000/").unwrap();
        assert_eq!(spec, WorkerSpec::new("http://10.0.0.1:8000").unwrap());
        assert_eq!(spec.host(), "10.0.0.1");
        assert_eq!(spec.kv_events, EventsSetting::Probe);
        assert_eq!(parse("http://[::1]:8000").unwrap().host(), "::1");
    }

    #[test]
    fn every_part_can_be_given() {
        let spec =
            parse("http://h:1,kv-events=tcp://*:5557,replay=none,topic=kv@x,block-size=32,ranks=2,http=2")
                .unwrap();
        assert_eq!(spec.kv_events, EventsSetting::At(Endpoint::new("*", 5557)));
        assert_eq!(spec.replay, EventsSetting::Off);
        assert_eq!(spec.topic.as_deref(), Some("kv@x"));
        assert_eq!(spec.block_size, BlockSize::new(32));
        assert_eq!(spec.ranks, Some(2));
        assert_eq!(spec.http, HttpVersion::Http2);
        let spec = parse("http://h:1,label=zone=a,role=prefill,label=gpu=h100").unwrap();
        assert_eq!(spec.role, Role::Prefill);
        assert_eq!(spec.labels.iter().map(|l| &**l).collect::<Vec<_>>(), ["zone=a", "gpu=h100"]);
    }

    #[test]
    fn each_error_says_what_to_write() {
        for (text, hint) in [
            ("", "http://HOST:PORT"),
            ("10.0.0.1:8000", "http://HOST:PORT"),
            ("https://h:1", "TLS"),
            ("http://", "http://HOST:PORT"),
            ("http://user:secret@h:1", "http://HOST:PORT"),
            ("http://h:1,kv-event=tcp://h:1", "kv-events="),
            ("http://h:1,replay", "replay="),
            ("http://h:1,replay=ipc:///x", "tcp://HOST:PORT"),
            ("http://h:1,kv-events=tcp://h:0", "tcp://HOST:PORT"),
            ("http://h:1,block-size=0", "from 1"),
            ("http://h:1,ranks=5000", "1024"),
            ("http://h:1,ranks=1,ranks=1", "twice"),
            ("http://h:1,http=3", "http=2"),
            ("http://h:1,role=both", "role=decode"),
            ("http://h:1,label=zone", "KEY=VALUE"),
            ("http://h:1,label==a", "KEY=VALUE"),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(hint), "{text}: {error}");
        }
    }
}
