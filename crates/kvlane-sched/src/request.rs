//! What the scheduler knows of a request: sizes, keys and wishes; never its text or tokens.

use kvlane_index::{InstanceId, Worker};

/// Names one request from booking to end; unique among those in flight.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct RequestId(pub u64);

/// Bytes of prompt text in a token, where the prompt was not tokenised: English in current vocabularies.
const BYTES_PER_TOKEN: u64 = 4;

/// Output tokens expected where nothing is known: the mean of public chat traces (343 in Mooncake's, 211 in Azure's) without false precision.
pub const DEFAULT_OUTPUT_TOKENS: u32 = 256;

/// A worker that the client or an operator insists on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pin {
    /// This rank of this instance.
    Worker(Worker),
    /// Any rank of this instance.
    Instance(InstanceId),
    /// This rank of any instance.
    Rank(u32),
}

impl Pin {
    /// Whether `worker` satisfies the pin.
    pub fn admits(self, worker: Worker) -> bool {
        match self {
            Self::Worker(w) => w == worker,
            Self::Instance(i) => i == worker.instance,
            Self::Rank(r) => r == worker.rank,
        }
    }
}

/// Where a request must, may or would rather go.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Wishes<'a> {
    /// Labels (`key=value`) that its worker must have.
    pub required: &'a [Box<str>],
    /// Labels that its worker should have, each with the milliseconds that it is worth; only policies that decide in milliseconds weigh them.
    pub preferred: &'a [(Box<str>, f64)],
    /// Only these workers may serve it; `None` = any.
    pub allowed: Option<&'a [Worker]>,
}

/// One request, as the scheduler sees it.
#[derive(Clone, Copy, Debug)]
pub struct Request<'a> {
    /// Its name.
    pub id: RequestId,
    /// Opaque number of the model (or adapter), for which answer lengths are learnt; 0 if there is only one.
    pub model: u64,
    /// Prompt length in tokens; `None` where the prompt was not tokenised (a policy that is blind to the cache).
    pub prompt_tokens: Option<u32>,
    /// Prompt length in bytes, the fallback estimate when `prompt_tokens` is unknown; 0 if that is unknown too.
    pub prompt_bytes: u64,
    /// Output tokens expected by the caller; `None` = what was learnt, else [`DEFAULT_OUTPUT_TOKENS`].
    pub expected_output_tokens: Option<u32>,
    /// The request's own limit on output tokens; caps every expectation.
    pub max_output_tokens: Option<u32>,
    /// Whether its first token will be seen when it comes. The answer of a request that does not stream comes whole; the end of its prefill is
    /// reckoned, and teaches nothing of the worker's speed.
    pub streams: bool,
    /// Only this worker (or these) may serve it.
    pub pinned: Option<Pin>,
    /// Where it must or would rather go.
    pub wishes: Wishes<'a>,
    /// Greater = sooner, where requests queue. 0 = ordinary.
    pub priority: i32,
    /// Hash of the session (conversation) key that the client sent, if any.
    pub session: Option<u64>,
    /// Opaque prefix ids of the prompt's leading blocks: equal ids mean equal prefixes. May be empty, and may be coarser than an engine's
    /// blocks to save time (see `block_id_tokens`); used to count blocks that running requests share once.
    pub blocks: &'a [u64],
    /// Tokens that each id in `blocks` stands for; ignored when `blocks` is empty.
    pub block_id_tokens: u32,
}

impl Request<'_> {
    /// A request of `prompt_tokens` with no wishes.
    pub const fn new(id: RequestId, prompt_tokens: u32) -> Self {
        Self {
            id,
            model: 0,
            prompt_tokens: Some(prompt_tokens),
            prompt_bytes: 0,
            expected_output_tokens: None,
            max_output_tokens: None,
            streams: true,
            pinned: None,
            wishes: Wishes { required: &[], preferred: &[], allowed: None },
            priority: 0,
            session: None,
            blocks: &[],
            block_id_tokens: 0,
        }
    }

    /// Prompt length in tokens: known, else estimated from its bytes. At least 1.
    pub fn tokens(&self) -> u32 {
        let estimate = || u32::try_from(self.prompt_bytes / BYTES_PER_TOKEN).unwrap_or(u32::MAX);
        self.prompt_tokens.unwrap_or_else(estimate).max(1)
    }

    /// Output tokens to expect, at least 1; `learnt` is what earlier requests of the model gave.
    pub fn output_tokens(&self, learnt: Option<u32>) -> u32 {
        let expected = self.expected_output_tokens.or(learnt).unwrap_or(DEFAULT_OUTPUT_TOKENS);
        expected.min(self.max_output_tokens.unwrap_or(u32::MAX)).max(1)
    }
}
