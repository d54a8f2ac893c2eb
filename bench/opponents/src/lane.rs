//! One contender under measurement, with its type erased so that rounds of several can interleave.
//!
//! The timed loops are inside, compiled for the contender's own types; nothing between two clock readings goes through the
//! erased interface.

use std::hint::black_box;
use std::sync::Barrier;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvlane_index::{BlockHash, KvEvent, Worker};

use crate::clock::{process_cpu_ns, thread_cpu_ns};
use crate::contender::{Answer, Contender, Event, Setup, Tally};
use crate::exactness::Wrong;
use crate::spread::quantile;
use crate::trace::Step;

/// Time that something took, in ns.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// CPU time of all threads.
    pub cpu_ns: f64,
    /// Elapsed time.
    pub wall_ns: f64,
}

/// What queries cost, in ns each.
#[derive(Clone, Copy, Debug, Default)]
pub struct AskCost {
    /// Mean CPU time, clocks read only around the whole loop.
    pub cpu_ns: f64,
    /// Median elapsed time, clock readings included.
    pub p50_ns: f64,
    /// 99th percentile.
    pub p99_ns: f64,
}

/// Readers beside a writer.
#[derive(Clone, Copy, Debug, Default)]
pub struct MixedCost {
    /// Blocks stored and removed per second of elapsed time, in millions.
    pub ingest_mblocks_s: f64,
    /// CPU time per block of everything but the readers, in ns.
    pub ingest_cpu_ns: f64,
    /// Queries per second of elapsed time, all readers.
    pub queries_s: f64,
    /// Queries per second of readers' CPU time.
    pub queries_cpu_s: f64,
    /// Median elapsed ns of a query.
    pub p50_ns: f64,
    /// 99th percentile.
    pub p99_ns: f64,
    /// Answers during the run against the quiet ones (the written prompts are others).
    pub wrong: Wrong,
}

/// A replayed trace.
#[derive(Clone, Copy, Debug, Default)]
pub struct ReplayCost {
    /// Everything, the drain included.
    pub total: Cost,
    /// Answers at full speed, against what had been handed over.
    pub wrong: Wrong,
}

/// A contender of any type.
pub trait Lane {
    /// Names in tables of the ways to ask it; the first names the index.
    fn ways(&self) -> &'static [&'static str];
    /// Drops what it holds and makes an empty index.
    fn start(&mut self, setup: Setup);
    /// Drops the index and all that was prepared.
    fn stop(&mut self);
    /// Applies events outside of any timing.
    fn load(&mut self, events: &[Event]);
    /// Waits until all events are visible.
    fn settle(&mut self);
    /// Converts events for [`Lane::apply_staged`].
    fn stage(&mut self, events: &[Event]);
    /// Applies what was staged from `publishers` threads, each worker's events on one of them; drain included.
    fn apply_staged(&mut self, publishers: usize) -> Cost;
    /// Converts prompts for [`Lane::ask`] and [`Lane::wrong`].
    fn pose(&mut self, prompts: &[Vec<BlockHash>]);
    /// Asks all posed prompts over and over for about `budget`.
    fn ask(&self, way: usize, budget: Duration) -> AskCost;
    /// Compares the answers to the first posed prompts with the right ones.
    fn wrong(&self, right: &[Answer]) -> Wrong;
    /// Forgets one worker.
    fn remove(&mut self, worker: Worker) -> Cost;
    /// Asks from `readers` threads while one more applies what was staged.
    fn mixed(&mut self, way: usize, readers: usize) -> MixedCost;
    /// Events and queries one at a time, as fast as they go; `right` has the tally for each query.
    fn replay(&mut self, way: usize, steps: &[Step], right: &[Tally]) -> ReplayCost;
    /// One event, applied and settled.
    fn step(&mut self, event: &Event);
    /// One answer.
    fn answer(&self, prompt: &[BlockHash]) -> Answer;
    /// Bytes that the counting allocator does not see.
    fn unseen_bytes(&self) -> usize;
}

/// The lane of `C`.
pub struct Of<C: Contender> {
    index: Option<C>,
    staged: Vec<(Worker, C::Batch)>,
    posed: Vec<C::Prompt>,
}

/// A lane for `C`.
pub fn of<C: Contender>() -> Box<dyn Lane> {
    Box::new(Of::<C> { index: None, staged: Vec::new(), posed: Vec::new() })
}

impl<C: Contender> Of<C> {
    fn index(&self) -> &C {
        self.index.as_ref().expect("started before it is used")
    }
}

/// Events of one worker that follow each other go over as one batch.
fn by_worker(events: &[Event]) -> impl Iterator<Item = &[Event]> {
    events.chunk_by(|a, b| a.0 == b.0)
}

impl<C: Contender> Lane for Of<C> {
    fn ways(&self) -> &'static [&'static str] {
        C::WAYS
    }

    fn start(&mut self, setup: Setup) {
        self.stop();
        self.index = Some(C::new(setup));
    }

    fn stop(&mut self) {
        self.staged.clear();
        self.posed.clear();
        self.index = None;
    }

    fn load(&mut self, events: &[Event]) {
        for group in by_worker(events) {
            let batch = self.index().batch(group);
            self.index().apply(batch);
        }
    }

    fn settle(&mut self) {
        self.index().settle();
    }

    fn stage(&mut self, events: &[Event]) {
        for group in by_worker(events) {
            let batch = self.index().batch(group);
            self.staged.push((group[0].0, batch));
        }
    }

    fn apply_staged(&mut self, publishers: usize) -> Cost {
        let staged = std::mem::take(&mut self.staged);
        let index = self.index();
        if publishers == 1 {
            let (wall, cpu) = (Instant::now(), process_cpu_ns());
            for (_, batch) in staged {
                index.apply(batch);
            }
            index.settle();
            return Cost {
                cpu_ns: (process_cpu_ns() - cpu) as f64,
                wall_ns: wall.elapsed().as_nanos() as f64,
            };
        }
        let mut shares: Vec<Vec<C::Batch>> = (0..publishers).map(|_| Vec::new()).collect();
        for (worker, batch) in staged {
            shares[worker.instance.0 as usize % publishers].push(batch);
        }
        let gate = Barrier::new(publishers + 1);
        let (wall, cpu) = std::thread::scope(|scope| {
            for share in shares {
                let gate = &gate;
                scope.spawn(move || {
                    gate.wait();
                    for batch in share {
                        index.apply(batch);
                    }
                });
            }
            let cpu = process_cpu_ns();
            gate.wait();
            (Instant::now(), cpu)
        });
        index.settle();
        Cost { cpu_ns: (process_cpu_ns() - cpu) as f64, wall_ns: wall.elapsed().as_nanos() as f64 }
    }

    fn pose(&mut self, prompts: &[Vec<BlockHash>]) {
        self.posed = prompts.iter().map(|p| self.index().prompt(p)).collect();
    }

    fn ask(&self, way: usize, budget: Duration) -> AskCost {
        let index = self.index();
        let (mut asked, mut cpu_ns, mut wall) = (0u64, 0, Duration::ZERO);
        while wall < budget {
            let (start, cpu) = (Instant::now(), thread_cpu_ns());
            for prompt in &self.posed {
                black_box(index.ask(way, black_box(prompt)));
            }
            cpu_ns += thread_cpu_ns() - cpu;
            wall += start.elapsed();
            asked += self.posed.len() as u64;
        }
        let mut latencies = Vec::with_capacity(1 << 16);
        let start = Instant::now();
        while start.elapsed() < budget && latencies.len() < 1_000_000 {
            for prompt in &self.posed {
                let start = Instant::now();
                black_box(index.ask(way, black_box(prompt)));
                latencies.push(start.elapsed().as_nanos() as u32);
            }
        }
        latencies.sort_unstable();
        AskCost {
            cpu_ns: cpu_ns as f64 / asked as f64,
            p50_ns: quantile(&latencies, 0.5),
            p99_ns: quantile(&latencies, 0.99),
        }
    }

    fn wrong(&self, right: &[Answer]) -> Wrong {
        let mut wrong = Wrong::default();
        for (prompt, right) in self.posed.iter().zip(right) {
            wrong.compare(right, &self.index().answer(prompt));
        }
        wrong
    }

    fn remove(&mut self, worker: Worker) -> Cost {
        let (wall, cpu) = (Instant::now(), process_cpu_ns());
        self.index().remove(worker);
        Cost { cpu_ns: (process_cpu_ns() - cpu) as f64, wall_ns: wall.elapsed().as_nanos() as f64 }
    }

    fn mixed(&mut self, way: usize, readers: usize) -> MixedCost {
        let staged = std::mem::take(&mut self.staged);
        let index = self.index();
        let quiet: Vec<Tally> = self.posed.iter().map(|p| index.ask(way, p)).collect();
        let posed = &self.posed;
        let done = AtomicBool::new(false);
        let gate = Barrier::new(readers + 1);
        let cpu = process_cpu_ns();
        let (elapsed, read) = std::thread::scope(|scope| {
            let (done, gate, quiet) = (&done, &gate, &quiet);
            let read: Vec<_> = (0..readers)
                .map(|reader| {
                    scope.spawn(move || {
                        let mut latencies = Vec::with_capacity(1 << 22);
                        let mut wrong = Wrong::default();
                        let mut at = reader * posed.len() / readers;
                        gate.wait();
                        let (start, cpu) = (Instant::now(), thread_cpu_ns());
                        while !done.load(Ordering::Relaxed) {
                            let asked = Instant::now();
                            let tally = index.ask(way, &posed[at]);
                            latencies.push(asked.elapsed().as_nanos() as u32);
                            wrong.tally(quiet[at], tally);
                            at = (at + 1) % posed.len();
                        }
                        let cpu = (thread_cpu_ns() - cpu) as f64;
                        (latencies, wrong, start.elapsed().as_secs_f64(), cpu)
                    })
                })
                .collect();
            gate.wait();
            let start = Instant::now();
            for (_, batch) in staged {
                index.apply(batch);
            }
            index.settle();
            let elapsed = start.elapsed().as_secs_f64();
            done.store(true, Ordering::Relaxed);
            let read: Vec<_> = read.into_iter().map(|r| r.join().expect("a reader only asks")).collect();
            (elapsed, read)
        });
        let all_cpu_ns = (process_cpu_ns() - cpu) as f64;
        let reader_cpu_ns: f64 = read.iter().map(|r| r.3).sum();
        let asked: usize = read.iter().map(|r| r.0.len()).sum();
        let mut cost = MixedCost {
            // The caller divides by the blocks that it staged.
            ingest_mblocks_s: 1e-6 / elapsed,
            ingest_cpu_ns: all_cpu_ns - reader_cpu_ns,
            queries_s: read.iter().map(|r| r.0.len() as f64 / r.2).sum(),
            queries_cpu_s: asked as f64 * 1e9 / reader_cpu_ns,
            ..MixedCost::default()
        };
        let mut latencies: Vec<u32> = Vec::with_capacity(asked);
        for (latency, wrong, _, _) in read {
            latencies.extend(latency);
            cost.wrong += wrong;
        }
        latencies.sort_unstable();
        cost.p50_ns = quantile(&latencies, 0.5);
        cost.p99_ns = quantile(&latencies, 0.99);
        cost
    }

    fn replay(&mut self, way: usize, steps: &[Step], right: &[Tally]) -> ReplayCost {
        enum Ready<B, P> {
            Apply(B),
            Ask(P),
        }
        let index = self.index();
        let ready: Vec<_> = steps
            .iter()
            .map(|step| match step {
                Step::Ask(prompt) => Ready::Ask(index.prompt(prompt)),
                Step::Apply(event) => Ready::Apply(index.batch(std::slice::from_ref(event))),
            })
            .collect();
        let mut tallies = Vec::with_capacity(right.len());
        let (wall, cpu) = (Instant::now(), process_cpu_ns());
        for step in ready {
            match step {
                Ready::Apply(batch) => index.apply(batch),
                Ready::Ask(prompt) => tallies.push(index.ask(way, &prompt)),
            }
        }
        index.settle();
        let total =
            Cost { cpu_ns: (process_cpu_ns() - cpu) as f64, wall_ns: wall.elapsed().as_nanos() as f64 };
        let mut wrong = Wrong::default();
        for (right, tally) in right.iter().zip(tallies) {
            wrong.tally(*right, tally);
        }
        ReplayCost { total, wrong }
    }

    fn step(&mut self, event: &Event) {
        self.load(std::slice::from_ref(event));
        self.settle();
    }

    fn answer(&self, prompt: &[BlockHash]) -> Answer {
        self.index().answer(&self.index().prompt(prompt))
    }

    fn unseen_bytes(&self) -> usize {
        self.index().unseen_bytes()
    }
}

/// Blocks that events name.
pub fn blocks<'e>(events: impl IntoIterator<Item = &'e Event>) -> usize {
    events.into_iter().map(|(_, event): &(Worker, KvEvent)| crate::workload::blocks_of(event)).sum()
}
