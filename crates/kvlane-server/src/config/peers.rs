//! Other processes over the same engines, by base URL: where a new one gets its first knowledge from, and whom routers share load with.

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Most peers.
const PEERS_MAX: usize = 256;

/// The peers' base URLs.
#[derive(Debug, Default)]
pub(crate) struct Peers(Mutex<BTreeSet<String>>);

/// Why a peer was not taken.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    /// It is no base URL.
    #[error("that is no base URL: write http://HOST:PORT")]
    NotAUrl,
    /// There is no room for more: leave some out.
    #[error("there are {PEERS_MAX} peers already: leave some out")]
    TooMany,
}

impl Peers {
    fn urls(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a peer; again is no error.
    pub(crate) fn add(&self, url: &str) -> Result<(), PeerError> {
        let url = normal(url).ok_or(PeerError::NotAUrl)?;
        let mut urls = self.urls();
        if urls.len() >= PEERS_MAX && !urls.contains(&url) {
            return Err(PeerError::TooMany);
        }
        urls.insert(url);
        Ok(())
    }

    /// Drops a peer; `false`: it was none.
    pub(crate) fn remove(&self, url: &str) -> bool {
        normal(url).is_some_and(|url| self.urls().remove(&url))
    }

    /// All of them, in order.
    pub(crate) fn all(&self) -> Vec<String> {
        self.urls().iter().cloned().collect()
    }
}

/// `http://host:port` without anything behind it.
fn normal(url: &str) -> Option<String> {
    let uri: http::Uri = url.trim_end_matches('/').parse().ok()?;
    let authority = uri.authority().filter(|a| !a.as_str().contains('@'))?;
    let plain = uri.scheme_str() == Some("http") && matches!(uri.path(), "" | "/") && uri.query().is_none();
    plain.then(|| format!("http://{authority}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_peer_is_a_base_url() {
        let peers = Peers::default();
        for bad in ["", "h:1", "https://h:1", "http://h:1/dump", "http://u@h:1", "http://h:1/?x"] {
            assert_eq!(peers.add(bad), Err(PeerError::NotAUrl), "{bad}");
        }
        peers.add("http://h:1/").unwrap();
        peers.add("http://h:1").unwrap();
        assert_eq!(peers.all(), ["http://h:1"]);
        assert!(peers.remove("http://h:1/"));
        assert!(!peers.remove("http://h:1"));
    }
}
