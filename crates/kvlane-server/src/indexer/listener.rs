//! One registered publisher and how well it is heard.

use super::partition::Partition;
use crate::config::Endpoint;
use crate::fleet::{Publisher, Source, Trust};
use crate::ingest::{Beginnings, Following, ImageReply, RankCounters, Report, follow};
use crate::state::{Followed, Header, IMAGE_WAIT_MS, Image, Origin, Sources};
use kvlane_events::stream::{Limits, StreamConfig};
use kvlane_events::wire::EngineKind;
use kvlane_index::Worker;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

/// How a listener is, in the reference's words.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(crate) enum Status {
    /// Connecting for the first time.
    Pending,
    /// Heard.
    Active,
    /// Told not to listen.
    Paused,
    /// The connection is lost.
    Failed,
}

impl Status {
    pub(crate) const ALL: [Self; 4] = [Self::Pending, Self::Active, Self::Paused, Self::Failed];

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Paused => "paused",
            Self::Failed => "failed",
        }
    }
}

/// A publisher that is followed.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) worker: Worker,
    /// As it was registered.
    pub(crate) endpoint: Endpoint,
    pub(crate) replay: Option<Endpoint>,
    pub(crate) counters: Arc<RankCounters>,
    trust: Arc<Mutex<Trust>>,
    /// What is said of its images.
    header: Header,
    sources: Sources,
    /// `None` while paused.
    task: Mutex<Option<Task>>,
}

#[derive(Debug)]
struct Task {
    following: JoinHandle<()>,
    /// Its end tells the task that nobody wants it any more.
    #[expect(dead_code, reason = "kept open for the task's life")]
    signs: (watch::Sender<Option<f64>>, watch::Sender<u64>),
    images: mpsc::Sender<ImageReply>,
}

impl Listener {
    /// Begins to follow a publisher.
    pub(crate) fn start(
        partition: &Partition,
        worker: Worker,
        endpoint: Endpoint,
        replay: Option<Endpoint>,
        sources: &Sources,
    ) -> Self {
        let origin = Origin {
            endpoint: endpoint.to_string(),
            rank: worker.rank,
            model: partition.key.model.clone(),
            group: partition.key.group.clone(),
            block_size: partition.block_size.tokens(),
            scheme: partition.scheme.id(),
        };
        let header = Header {
            origin,
            instance: worker.instance.0,
            replay: replay.as_ref().map(ToString::to_string),
            position: None,
            taken_unix_s: 0.0,
        };
        let connecting = Trust::Blind(format!("connecting to {endpoint}"));
        let listener = Self {
            worker,
            endpoint,
            replay,
            counters: Arc::default(),
            trust: Arc::new(Mutex::new(connecting)),
            header,
            sources: sources.clone(),
            task: Mutex::default(),
        };
        listener.follow(partition);
        listener
    }

    fn task(&self) -> MutexGuard<'_, Option<Task>> {
        self.task.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn follow(&self, partition: &Partition) {
        let publisher = Publisher {
            rank: self.worker.rank,
            events: self.endpoint.clone(),
            replay: self.replay.clone(),
            topic: None,
            source: Source::Operator,
        };
        // One question at a time is enough: whoever asks waits for the answer.
        let (images, asked) = mpsc::channel(1);
        let (process_start, relearn) = (watch::Sender::new(None), watch::Sender::new(0));
        let following = Following {
            worker: self.worker,
            config: StreamConfig {
                engine: EngineKind::Vllm,
                block_size: partition.block_size,
                topic: None,
                replay: publisher.replay.is_some(),
                snapshots: true,
                limits: Limits { snapshot_ms: IMAGE_WAIT_MS, ..Limits::default() },
            },
            scheme: partition.scheme,
            publisher,
            lane: partition.lane.clone(),
            counters: Arc::clone(&self.counters),
            process_start: process_start.subscribe(),
            relearn: relearn.subscribe(),
            beginnings: Some(Beginnings {
                sources: self.sources.clone(),
                origin: self.header.origin.clone(),
            }),
            images: asked,
        };
        let report = Reporter(Arc::clone(&self.trust));
        *self.task() = Some(Task {
            following: tokio::spawn(follow(following, report)),
            signs: (process_start, relearn),
            images,
        });
    }

    /// Ends the following; what it heard is in the lane when this returns, and nothing comes after. `false`: it was paused.
    pub(crate) async fn end(&self) -> bool {
        let Some(task) = self.task().take() else { return false };
        task.following.abort();
        let _cancelled = task.following.await;
        self.counters.update(|stats| stats.connected = false);
        true
    }

    /// What the rank holds, and up to where of its stream; `None` while that is in question.
    pub(crate) async fn image(&self) -> Option<Image> {
        let images = self.task().as_ref()?.images.clone();
        Followed { header: self.header.clone(), images }.image().await
    }

    /// What is saved for the rank: what it holds; what it held when the process began, as long as its stream has not asked for that; at
    /// least that it is followed.
    pub(crate) async fn image_to_save(&self) -> Image {
        let image = self.image().await.or_else(|| self.sources.unclaimed(&self.header.origin));
        image.unwrap_or_else(|| Image::new(self.header.clone(), &[]))
    }

    pub(crate) fn is_paused(&self) -> bool {
        self.task().is_none()
    }

    /// How far what is known of the rank can be trusted.
    pub(crate) fn trust(&self) -> Trust {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(crate) fn status(&self) -> Status {
        if self.is_paused() {
            return Status::Paused;
        }
        let (connected, ever) = self.counters.look(|stats| (stats.connected, stats.connects > 0));
        match (connected, ever) {
            (true, _) => Status::Active,
            (false, true) => Status::Failed,
            (false, false) => Status::Pending,
        }
    }

    /// Why it is not heard as it should be.
    pub(crate) fn last_error(&self) -> Option<String> {
        let error = self.counters.look(|stats| stats.connect_error.clone().filter(|_| !stats.connected));
        error.or_else(|| match self.trust() {
            Trust::Degraded(why) => Some(why),
            _ => None,
        })
    }
}

struct Reporter(Arc<Mutex<Trust>>);

impl Report for Reporter {
    fn trust(&self, worker: Worker, trust: Trust) {
        let mut current = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if *current == trust {
            return;
        }
        if matches!(trust, Trust::Degraded(_)) {
            tracing::warn!(%worker, was = %*current, "cache knowledge is now {trust}");
        } else {
            tracing::info!(%worker, was = %*current, "cache knowledge is now {trust}");
        }
        *current = trust;
    }

    fn connection_changed(&self) {}
}
