//! Load shared with other routers: what the ledger holds is told, and what they tell goes to the scheduler ([`crate::replicas`]).

use super::error::ClientError;
use super::{Gateway, Response, own};
use crate::replicas::Replicas;
use hyper::StatusCode;
use kvlane_index::Worker;
use kvlane_sched::Load;
use std::time::{Duration, Instant};

/// The least pause between two rounds of telling, and of hearing.
const PAUSE: Duration = Duration::from_millis(5);
/// A round may take this share of a core at most: the pause after it is so many times as long as it took.
const PAUSE_PER_WORK: u32 = 10;
/// Loads are noted so often even where nothing seems to have changed.
const TELL_EVERY: Duration = Duration::from_millis(100);

/// Rests after a round of work.
async fn rest(began: Instant) {
    tokio::time::sleep(PAUSE.max(began.elapsed() * PAUSE_PER_WORK)).await;
}

impl Gateway {
    /// Tells what is in flight here whenever that changes.
    pub(super) async fn tell_loads(&self, replicas: &Replicas) {
        loop {
            let _ = tokio::time::timeout(TELL_EVERY, self.desk.stirred.notified()).await;
            let began = Instant::now();
            let (loads, busy, now_ms) = self.desk.with(|books, now_ms| {
                let loads: Vec<(Worker, Load)> = books.scheduler.ledger().loads().collect();
                (loads, books.scheduler.busy(now_ms), now_ms)
            });
            let table = self.table.load();
            let name = |worker: Worker| Some(table.upstream(worker.instance)?.name.clone());
            replicas.note(loads, name, busy, now_ms);
            drop(table);
            rest(began).await;
        }
    }

    /// Takes note of what others have in flight whenever they say so.
    pub(super) async fn hear_loads(&self, replicas: &Replicas) {
        loop {
            replicas.news().await;
            let began = Instant::now();
            let table = self.table.load_full();
            let known = table
                .upstreams()
                .iter()
                .flat_map(|upstream| upstream.ranks.iter().map(|rank| (rank.worker, upstream.name.as_str())));
            let (loads, busy) = replicas.sums(self.desk.now_ms(), known);
            self.desk.with(|books, _| books.scheduler.hear(loads, busy));
            self.admission.room_may_be();
            rest(began).await;
        }
    }

    /// `GET /kvlane/loads`: what is in flight here, for another router; answered when there is something to say.
    pub(super) async fn loads(&self, query: &str) -> Result<Response, ClientError> {
        let replicas = self.replicas.as_ref().ok_or_else(|| {
            ClientError::new(
                StatusCode::NOT_FOUND,
                "This router shares no load: it was started without --peer.",
            )
        })?;
        let answer = replicas.answer(query, || self.desk.now_ms()).await;
        let answer =
            answer.ok_or_else(|| ClientError::bad_request("boot (hexadecimal) and after are needed."))?;
        Ok(Response::new(own(answer)))
    }
}
