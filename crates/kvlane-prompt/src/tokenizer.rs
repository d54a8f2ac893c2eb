//! Text to token ids, as Python's `tokenizers` does it.
//!
//! The engine's tokenizer is this same library behind a binding, so using it is the shortest way to equal tokens.

use crate::error::{LoadError, Unroutable};
use serde_json::{Map, Value as Json};
use std::path::Path;

/// What a model directory says about its tokenizer, besides `tokenizer.json`.
#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    /// `tokenizer_config.json`; empty if there is none.
    pub(crate) config: Map<String, Json>,
    /// `special_tokens_map.json`; empty if there is none.
    pub(crate) special_tokens: Map<String, Json>,
}

impl TokenizerConfig {
    pub(crate) fn load(dir: &Path) -> Result<Self, LoadError> {
        Ok(Self {
            config: object(&dir.join("tokenizer_config.json"))?,
            special_tokens: object(&dir.join("special_tokens_map.json"))?,
        })
    }
}

fn object(path: &Path) -> Result<Map<String, Json>, LoadError> {
    match read_optional(path)? {
        None => Ok(Map::new()),
        Some(text) => serde_json::from_str(&text)
            .map_err(|e| LoadError::Malformed { path: path.to_path_buf(), problem: e.to_string() }),
    }
}

/// The file's text, or `None` if there is no such file.
pub(crate) fn read_optional(path: &Path) -> Result<Option<String>, LoadError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(LoadError::Unreadable { path: path.to_path_buf(), error }),
    }
}

#[derive(Debug)]
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
}

impl Tokenizer {
    pub(crate) fn load(path: &Path, _settings: &TokenizerConfig) -> Result<Self, LoadError> {
        let text =
            std::fs::read(path).map_err(|error| LoadError::Unreadable { path: path.to_path_buf(), error })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(text)
            .map_err(|e| LoadError::Malformed { path: path.to_path_buf(), problem: e.to_string() })?;
        inner.with_padding(None);
        inner
            .with_truncation(None)
            .map_err(|e| LoadError::Malformed { path: path.to_path_buf(), problem: e.to_string() })?;
        Ok(Self { inner })
    }

    pub(crate) fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, Unroutable> {
        let encoding =
            self.inner.encode_fast(text, add_special_tokens).map_err(|_| Unroutable::TokenizerFailed)?;
        Ok(encoding.get_ids().to_vec())
    }
}
