//! Asking a followed rank what it holds.

use super::image::{Header, Image, Mark};
use crate::clock;
use crate::ingest::ImageReply;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// A rank that does not answer holds up the others for so long.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(20);

/// A rank that is followed, and the way to its publisher's task.
#[derive(Clone, Debug)]
pub(crate) struct Followed {
    /// What is said of its images; without a position, which each image brings.
    pub(crate) header: Header,
    pub(crate) images: mpsc::Sender<ImageReply>,
}

impl Followed {
    /// What the rank holds, and up to where of its stream; `None` while that is in question.
    pub(crate) async fn image(self) -> Option<Image> {
        let Self { header, images } = self;
        let (reply, answer) = oneshot::channel();
        images.send(reply).await.ok()?;
        let (position, events) = tokio::time::timeout(IMAGE_TIMEOUT, answer).await.ok()?.ok()?;
        let header =
            Header { position: Some(Mark::from(&position)), taken_unix_s: clock::unix_s(), ..header };
        tokio::task::spawn_blocking(move || Image::new(header, &events)).await.ok()
    }
}
