//! A model of an inference engine: block pool, eviction, timing, event encoders.
//!
//! One [`Engine`] is one data-parallel rank of a vLLM-like engine: it batches continuously, computes prompts in chunks,
//! caches blocks by prefix, evicts and announces them as vLLM 0.32 does, and takes the time that a real engine was measured
//! to take. It computes no tokens: a request says what it consists of (block hashes) and how long its answer is.
//!
//! Pure and deterministic: time is an argument, nothing is random. The mock engine puts sockets around it, the simulator a
//! fleet, the fault tests a lossy network; all three see the same cache.
//!
//! ```
//! use kvlane_engine::{Engine, EngineConfig, Request, RequestId, StepOutput};
//! use kvlane_index::{BlockHash, BlockSize};
//!
//! let mut engine = Engine::new(EngineConfig { blocks: 1_000, ..EngineConfig::h200_llama_8b() });
//! let prompt = Request {
//!     id: RequestId(1),
//!     prompt_tokens: 40,
//!     output_tokens: 2,
//!     blocks: vec![BlockHash(7), BlockHash(8)], // 16 tokens each
//!     content: None,
//! };
//! engine.submit(0, prompt)?;
//! let mut out = StepOutput::default();
//! while let Some(at_us) = engine.next_step_at() {
//!     engine.step(at_us, &mut out);
//!     for token in &out.tokens {
//!         println!("{} us: token {} of {:?}", out.at_us, token.index, token.request);
//!     }
//! }
//! # Ok::<(), kvlane_engine::SubmitError>(())
//! ```

mod engine;
mod pool;
mod request;
mod timing;
pub mod wire;

pub use engine::{Engine, EngineConfig, Load, StepOutput, SubmitError, Token, Totals};
pub use pool::{BlockId, BlockPool};
pub use request::{CacheEvent, Content, Request, RequestId, StoredContent};
pub use timing::{StepLoad, Timing};
