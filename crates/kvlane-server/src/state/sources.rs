//! Where a stream's beginning may come from: the state directory, then peers.

use super::image::{Image, Origin};
use crate::fleet::probe::get_large;
use kvlane_index::hash::Scheme;
use std::collections::{HashMap, HashSet};
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// Images that are fetched at a time: each may take as much memory as a rank's blocks.
const FETCHES: usize = 4;
/// One peer's image of one rank must be here after this long.
const FETCH_TIMEOUT: Duration = Duration::from_secs(60);
/// Most bytes of one rank's image.
const IMAGE_BYTES_MAX: usize = 4 << 30;
/// Images from disk that nobody asked for are dropped after this long: their engines are gone.
const DISK_FOR: Duration = Duration::from_secs(600);

/// Who an image came from.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(crate) enum From {
    /// This process's state directory.
    Disk,
    /// Another process.
    Peer,
}

impl From {
    /// The name used in logs.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Peer => "peer",
        }
    }
}

/// Finds images. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Sources {
    shared: Arc<Shared>,
}

struct Shared {
    disk: Mutex<HashMap<Origin, Image>>,
    loaded: Instant,
    /// Base URLs of the peers now.
    peers: Box<dyn Fn() -> Vec<String> + Send + Sync>,
    fetches: Semaphore,
    /// This process among the peers, to skip it.
    boot: u64,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sources").field("peers", &(self.peers)()).finish_non_exhaustive()
    }
}

impl Sources {
    /// From what was on disk and from whoever `peers` lists at the time.
    pub(crate) fn new(
        disk: Vec<Image>,
        boot: u64,
        peers: impl Fn() -> Vec<String> + Send + Sync + 'static,
    ) -> Self {
        let disk = disk
            .into_iter()
            .filter(|image| image.header.position.is_some())
            .map(|image| (image.header.origin.clone(), image))
            .collect();
        Self {
            shared: Arc::new(Shared {
                disk: Mutex::new(disk),
                loaded: Instant::now(),
                peers: Box::new(peers),
                fetches: Semaphore::new(FETCHES),
                boot,
            }),
        }
    }

    /// An image of this stream: the state directory's the first time, then a peer's. `None`: nobody has one.
    pub(crate) async fn find(&self, origin: &Origin) -> Option<(From, Image)> {
        if let Some(image) = self.claim(origin) {
            return Some((From::Disk, image));
        }
        let peers = (self.shared.peers)();
        if peers.is_empty() {
            return None;
        }
        let _turn = self.shared.fetches.acquire().await.ok()?;
        for peer in peers {
            for address in addresses(&peer).await {
                let Ok(base) = format!("http://{address}").parse() else { continue };
                match self.fetch(&base, origin).await {
                    Ok(Some(image)) => return Some((From::Peer, image)),
                    Ok(None) => {}
                    Err(error) => tracing::debug!(peer, rank = origin.rank, error, "no image from this peer"),
                }
            }
        }
        None
    }

    /// The state directory's image of this stream, if its stream has not asked for it yet: what is saved for it until it does.
    pub(crate) fn unclaimed(&self, origin: &Origin) -> Option<Image> {
        self.shared.disk.lock().unwrap_or_else(PoisonError::into_inner).get(origin).cloned()
    }

    /// All such images but these streams'.
    pub(crate) fn unclaimed_but(&self, streams: &HashSet<Origin>) -> Vec<Image> {
        let disk = self.shared.disk.lock().unwrap_or_else(PoisonError::into_inner);
        disk.values().filter(|image| !streams.contains(&image.header.origin)).cloned().collect()
    }

    /// What this process is called among its peers.
    pub(crate) fn boot(&self) -> u64 {
        self.shared.boot
    }

    fn claim(&self, origin: &Origin) -> Option<Image> {
        let mut disk = self.shared.disk.lock().unwrap_or_else(PoisonError::into_inner);
        if self.shared.loaded.elapsed() > DISK_FOR {
            *disk = HashMap::new();
        }
        disk.remove(origin)
    }

    async fn fetch(&self, base: &http::Uri, origin: &Origin) -> Result<Option<Image>, String> {
        let path = path(origin, self.shared.boot);
        let answer = get_large(base, &path, FETCH_TIMEOUT, IMAGE_BYTES_MAX).await;
        let answer = answer.map_err(|error| error.to_string())?;
        match answer.status.as_u16() {
            200 => {}
            // It does not know the stream, or this process asked itself.
            204 | 404 => return Ok(None),
            status => return Err(format!("it says {status}")),
        }
        let image = Image::read(&mut &answer.body[..]).map_err(|error| error.to_string())?;
        Ok(image.filter(|image| image.header.origin == *origin))
    }
}

/// The call that asks a peer for one rank's image.
pub(crate) fn path(origin: &Origin, boot: u64) -> String {
    let Origin { endpoint, rank, model, group, block_size, scheme } = origin;
    let scheme = Scheme::from_id(*scheme).map_or("", Scheme::name);
    format!(
        "/kvlane/snapshot?endpoint={}&dp_rank={rank}&model_name={}&routing_group={}&block_size={block_size}&scheme={scheme}&asker={boot:016x}",
        encoded(endpoint),
        encoded(model),
        encoded(group)
    )
}

/// Percent-encoded for a query.
fn encoded(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

/// Every address behind a peer's name: a name may stand for all replicas.
pub(crate) async fn addresses(peer: &str) -> Vec<SocketAddr> {
    let Ok(base) = peer.parse::<http::Uri>() else { return Vec::new() };
    let host = base.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_owned();
    let port = base.port_u16().unwrap_or(80);
    let Ok(found) = tokio::net::lookup_host((host.as_str(), port)).await else { return Vec::new() };
    let mut found: Vec<SocketAddr> = found.collect();
    found.sort_unstable();
    found.dedup();
    found
}
