//! One data-parallel rank in real time: a task that steps its engine when a step is due.

use super::faults::Faults;
use kvlane_engine::{
    CacheEvent, Engine, EngineConfig, Load, Request, RequestId, StepOutput, SubmitError, Timing, Token,
    Totals,
};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// Steps computed in a row before commands are looked at again.
const STEPS_AT_ONCE: usize = 32;

enum Command {
    Submit(Request, mpsc::UnboundedSender<Token>, oneshot::Sender<Result<(), SubmitError>>),
    Cancel(RequestId),
    Reset(oneshot::Sender<bool>),
}

/// What a rank did and does, for `/metrics` and for choosing a rank.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Snapshot {
    pub(crate) load: Load,
    pub(crate) totals: Totals,
}

/// A running rank. Dropping it ends its task and every request in it.
pub(super) struct Rank {
    commands: mpsc::UnboundedSender<Command>,
    snapshot: Arc<Mutex<Snapshot>>,
    next_id: AtomicU64,
    task: JoinHandle<()>,
}

/// A request inside a rank. Dropping it before its last token cancels it.
pub(super) struct Ticket {
    id: RequestId,
    commands: mpsc::UnboundedSender<Command>,
    tokens: mpsc::UnboundedReceiver<Token>,
    done: bool,
}

impl Drop for Rank {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        if !self.done {
            let _ = self.commands.send(Command::Cancel(self.id));
        }
    }
}

impl Ticket {
    /// The next token; `None` when the engine died under the request.
    pub(super) async fn next(&mut self) -> Option<Token> {
        let token = self.tokens.recv().await;
        if token.is_none_or(|token| token.last) {
            self.done = true;
        }
        token
    }
}

impl Rank {
    /// Starts a rank that hands the events of its steps to `batches`, if anybody listens.
    pub(super) fn start(
        config: EngineConfig,
        batches: Option<mpsc::Sender<Vec<CacheEvent>>>,
        faults: watch::Receiver<Faults>,
    ) -> Self {
        let (commands, receiver) = mpsc::unbounded_channel();
        let snapshot = Arc::new(Mutex::new(Snapshot::default()));
        let timing = config.timing.clone();
        let rank = Running {
            engine: Engine::new(config),
            timing,
            commands: receiver,
            batches,
            faults,
            snapshot: Arc::clone(&snapshot),
            askers: std::collections::HashMap::new(),
            origin: Instant::now(),
        };
        Self { commands, snapshot, next_id: AtomicU64::new(0), task: tokio::spawn(rank.run()) }
    }

    /// Gives the rank a request; `Err(None)` if the rank is dying.
    pub(super) async fn submit(
        &self,
        make: impl FnOnce(RequestId) -> Request,
    ) -> Result<Ticket, Option<SubmitError>> {
        let id = RequestId(self.next_id.fetch_add(1, Ordering::Relaxed));
        let (sender, tokens) = mpsc::unbounded_channel();
        let (answer, taken) = oneshot::channel();
        self.commands.send(Command::Submit(make(id), sender, answer)).map_err(|_| None)?;
        // The ticket exists before the answer, so that a client who leaves meanwhile still cancels.
        let mut ticket = Ticket { id, commands: self.commands.clone(), tokens, done: false };
        match taken.await {
            Ok(Ok(())) => Ok(ticket),
            Ok(Err(error)) => {
                ticket.done = true;
                Err(Some(error))
            }
            Err(_) => Err(None),
        }
    }

    /// Empties the cache; `false` while requests hold blocks.
    pub(super) async fn reset(&self) -> bool {
        let (answer, done) = oneshot::channel();
        self.commands.send(Command::Reset(answer)).is_ok() && done.await.unwrap_or(false)
    }

    /// What it does, as of its last step or command.
    pub(super) fn snapshot(&self) -> Snapshot {
        *self.snapshot.lock().expect("no holder of this lock panics")
    }
}

struct Running {
    engine: Engine,
    timing: Timing,
    commands: mpsc::UnboundedReceiver<Command>,
    batches: Option<mpsc::Sender<Vec<CacheEvent>>>,
    faults: watch::Receiver<Faults>,
    snapshot: Arc<Mutex<Snapshot>>,
    askers: std::collections::HashMap<RequestId, mpsc::UnboundedSender<Token>>,
    origin: Instant,
}

impl Running {
    async fn run(mut self) {
        let mut out = StepOutput::default();
        self.slow_down();
        loop {
            let due = self.engine.next_step_at().map(|at| self.origin + Duration::from_micros(at));
            let due_now = async {
                match due {
                    Some(due) => tokio::time::sleep_until(due).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                command = self.commands.recv() => match command {
                    Some(command) => {
                        self.obey(command);
                        while let Ok(command) = self.commands.try_recv() {
                            self.obey(command);
                        }
                    }
                    None => return,
                },
                changed = self.faults.changed() => match changed {
                    Ok(()) => self.slow_down(),
                    Err(_) => return,
                },
                () = due_now => {
                    for _ in 0..STEPS_AT_ONCE {
                        let now = self.now_us();
                        if self.engine.next_step_at().is_none_or(|at| at > now) {
                            break;
                        }
                        self.engine.step(now, &mut out);
                        if !self.hand_over(&mut out).await {
                            return;
                        }
                    }
                    tokio::task::yield_now().await;
                }
            }
            *self.snapshot.lock().expect("no holder of this lock panics") =
                Snapshot { load: self.engine.load(), totals: self.engine.totals() };
        }
    }

    fn now_us(&self) -> u64 {
        self.origin.elapsed().as_micros() as u64
    }

    fn slow_down(&mut self) {
        let factor = self.faults.borrow_and_update().slow;
        let slowed =
            if factor > 0.0 { self.timing.clone().faster(1.0 / factor) } else { self.timing.clone() };
        self.engine.set_timing(slowed);
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Submit(request, sender, answer) => {
                let id = request.id;
                let taken = self.engine.submit(self.now_us(), request);
                if taken.is_ok() {
                    self.askers.insert(id, sender);
                }
                // An asker who left already drops its ticket, which cancels.
                let _ = answer.send(taken);
            }
            Command::Cancel(id) => {
                self.engine.cancel(id);
                self.askers.remove(&id);
            }
            Command::Reset(answer) => {
                let _ = answer.send(self.engine.reset_prefix_cache());
            }
        }
    }

    /// `false` if the publisher is gone: the engine is dying.
    async fn hand_over(&mut self, out: &mut StepOutput) -> bool {
        // Tokens first: in vLLM the events of a step leave while its tokens are on their way out.
        for token in &out.tokens {
            if token.last {
                if let Some(asker) = self.askers.remove(&token.request) {
                    let _ = asker.send(*token);
                }
            } else if let Some(asker) = self.askers.get(&token.request) {
                let _ = asker.send(*token);
            }
        }
        match &self.batches {
            Some(batches) if !out.events.is_empty() => {
                batches.send(std::mem::take(&mut out.events)).await.is_ok()
            }
            Some(_) | None => true,
        }
    }
}
