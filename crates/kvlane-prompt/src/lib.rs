//! OpenAI requests to exactly the tokens that the engine sees.
//!
//! A router that routes by cached blocks must know a prompt's tokens before the engine does, and to the last one: a
//! single different token changes every block after it, and the hits vanish without a word. So this crate follows the
//! engine's own way from body to tokens, step by step:
//!
//! 1. [`RequestFields`]: the fields that matter, read as leniently as the engine reads them;
//! 2. messages normalised as the engine does before it renders them;
//! 3. the model's chat template, in an environment that behaves like the one of Python's `transformers`;
//! 4. the model's tokenizer.
//!
//! Where the tokens cannot be known here (media, an unknown template feature) the answer is an
//! [`Unroutable`] cause, not a guess. A model without files on this side is tokenized by its engine: [`remote`].
//!
//! Pure: no clock, no sockets, no logging, no threads of its own. Files are read only by [`ModelPrompt::load`].

mod chat;
mod error;
mod model;
mod prefix_cache;
pub mod remote;
mod request;
mod template;
mod tokenizer;

pub use error::{BadRequest, Expected, LoadError, PromptError, Unroutable};
pub use model::{ContentFormat, ModelPrompt, Prompt, PromptConfig};
pub use prefix_cache::{CacheStats, Prefix};
pub use request::{Endpoint, RequestFields};
