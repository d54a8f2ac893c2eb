//! Writes the state directory: from time to time, and at the end.

use super::{Image, StateDir};
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// A save pauses at least this many times as long as the last one took, so that it never takes more than a twentieth of the time.
const PAUSE_FACTOR: u32 = 20;
/// Images on their way from the ranks to the disk.
const IMAGES_WAITING: usize = 2;

/// Whoever has ranks to be saved.
pub(crate) trait Ranks: Send + Sync + 'static {
    /// Sends an image of each rank to `out`, one after the other.
    fn images(&self, out: mpsc::Sender<Image>) -> impl Future<Output = ()> + Send;
}

/// Saves from time to time until `stop` is cancelled, and then once more. Ends when that is on the disk.
pub(crate) async fn keep(dir: StateDir, ranks: impl Ranks, every: Duration, stop: CancellationToken) {
    let dir = Arc::new(dir);
    let mut pause = every;
    loop {
        let stopping = stop.run_until_cancelled(tokio::time::sleep(pause)).await.is_none();
        let began = Instant::now();
        match save(&dir, &ranks).await {
            Ok((images, bytes)) => {
                tracing::debug!(ranks = images, bytes, took_ms = began.elapsed().as_millis(), "state saved");
            }
            Err(error) => {
                tracing::warn!(%error, "the state could not be saved: a restart begins with the one before");
            }
        }
        if stopping {
            return;
        }
        pause = every.max(began.elapsed() * PAUSE_FACTOR);
    }
}

async fn save(dir: &Arc<StateDir>, ranks: &impl Ranks) -> io::Result<(usize, u64)> {
    let (sender, mut receiver) = mpsc::channel::<Image>(IMAGES_WAITING);
    let dir = Arc::clone(dir);
    let writing = tokio::task::spawn_blocking(move || {
        let mut saving = dir.save()?;
        let mut images = 0;
        while let Some(image) = receiver.blocking_recv() {
            saving.add(&image)?;
            images += 1;
        }
        saving.commit().map(|bytes| (images, bytes))
    });
    ranks.images(sender).await;
    writing.await.map_err(io::Error::other)?
}
