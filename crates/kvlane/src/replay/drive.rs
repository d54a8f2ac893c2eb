//! Sends the requests of a trace when they are due, and keeps what came of each.
//!
//! Open loop: a request with a time of its own is sent then, whatever became of the others. Closed loop: one that follows its session's answer waits for it
//! (and comes at once where that failed, so that a session goes on). How late each was sent is kept: a driver that is late measures itself.

use super::client::{Answer, Client};
use super::prompts::Maker;
use indicatif::ProgressBar;
use kvlane_sim::trace::{Start, Trace};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

/// What came of one request.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    /// Its place in the trace.
    pub(crate) number: usize,
    /// When it was due, since the beginning.
    pub(crate) due: Duration,
    /// How much later it was sent.
    pub(crate) late: Duration,
    /// From sending to the end.
    pub(crate) whole: Duration,
    /// The answer, or why there is none.
    pub(crate) answer: Result<Answer, String>,
}

/// What all requests have in common.
#[derive(Debug)]
pub(crate) struct Drive {
    pub(crate) client: Client,
    pub(crate) trace: Trace,
    pub(crate) maker: Maker,
    /// Requests at a time; more are late.
    pub(crate) most: usize,
    /// After which an answer is given up.
    pub(crate) timeout: Duration,
    pub(crate) progress: ProgressBar,
}

/// Requests of one session, the first with a time of its own and each of the others after the answer to the one before.
struct Chain {
    at: Duration,
    requests: Vec<usize>,
}

fn chains(trace: &Trace) -> Vec<Chain> {
    let mut open: Vec<Option<usize>> = vec![None; trace.sessions() as usize];
    let mut chains: Vec<Chain> = Vec::new();
    for (number, request) in trace.requests.iter().enumerate() {
        let session = &mut open[request.session as usize];
        match (request.start, *session) {
            (Start::AfterMs(_), Some(chain)) => chains[chain].requests.push(number),
            (start, _) => {
                let (Start::AtMs(ms) | Start::AfterMs(ms)) = start;
                *session = Some(chains.len());
                chains.push(Chain { at: Duration::from_secs_f64(ms.max(0.0) / 1e3), requests: vec![number] });
            }
        }
    }
    chains.sort_by_key(|chain| chain.at);
    chains
}

/// Sends everything; `rows` has what came of each as soon as it ended, also when this is dropped before the end.
pub(crate) async fn drive(drive: Arc<Drive>, rows: Arc<Mutex<Vec<Row>>>) {
    let room = Arc::new(Semaphore::new(drive.most));
    let began = Instant::now();
    let mut running = JoinSet::new();
    for chain in chains(&drive.trace) {
        tokio::time::sleep_until((began + chain.at).into()).await;
        let (drive, rows, room) = (Arc::clone(&drive), Arc::clone(&rows), Arc::clone(&room));
        running.spawn(async move {
            let mut due = chain.at;
            for (turn, number) in chain.requests.into_iter().enumerate() {
                if let Start::AfterMs(ms) = drive.trace.requests[number].start
                    && turn > 0
                {
                    // Counted from the end of the answer before.
                    due = began.elapsed() + Duration::from_secs_f64(ms.max(0.0) / 1e3);
                    tokio::time::sleep_until((began + due).into()).await;
                }
                let row = one(&drive, &room, number, began, due).await;
                drive.progress.inc(1);
                rows.lock().unwrap_or_else(PoisonError::into_inner).push(row);
            }
        });
        while running.try_join_next().is_some() {}
    }
    while running.join_next().await.is_some() {}
}

async fn one(drive: &Drive, room: &Semaphore, number: usize, began: Instant, due: Duration) -> Row {
    let request = &drive.trace.requests[number];
    let body = drive.maker.body(&drive.trace, request, number);
    let session = format!("session-{}", request.session);
    let headers = [("x-session-id", session.as_str())];
    let _place = room.acquire().await;
    let sent = began.elapsed();
    let asked = drive.client.stream(drive.maker.form.path(), &headers, body);
    let answer =
        tokio::time::timeout(drive.timeout, asked).await.unwrap_or_else(|_| Err("timed out".to_owned()));
    Row { number, due, late: sent.saturating_sub(due), whole: began.elapsed() - sent, answer }
}

/// The value below which `share` (0 to 1) of `sorted` lies; zero of nothing.
pub(crate) fn quantile(sorted: &[Duration], share: f64) -> Duration {
    let count = sorted.len();
    let at = ((count as f64 * share).ceil() as usize).clamp(1, count.max(1)) - 1;
    sorted.get(at).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_without_a_time_of_its_own_follows_the_one_before() {
        let mut trace = Trace::new("t", 16);
        trace.push(0, Start::AtMs(50.0), 1, 1, &[]);
        trace.push(1, Start::AtMs(10.0), 1, 1, &[]);
        trace.push(0, Start::AfterMs(5.0), 1, 1, &[]);
        trace.push(0, Start::AtMs(70.0), 1, 1, &[]);
        let chains: Vec<_> = chains(&trace).into_iter().map(|c| (c.at.as_millis(), c.requests)).collect();
        assert_eq!(chains, [(10, vec![1]), (50, vec![0, 2]), (70, vec![3])]);
    }

    #[test]
    fn quantiles_are_values_that_occurred() {
        let ms: Vec<Duration> = (1..=100).map(Duration::from_millis).collect();
        assert_eq!([0.0, 0.5, 0.99, 1.0].map(|q| quantile(&ms, q).as_millis()), [1, 50, 99, 100]);
        assert_eq!(quantile(&[], 0.5), Duration::ZERO);
    }
}
