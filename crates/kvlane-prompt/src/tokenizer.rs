//! Text to token ids, as Python's `tokenizers` does it.
//!
//! The engine's tokenizer is this same library behind a binding, so using it is the shortest way to equal tokens. The family that
//! nearly all models are of is encoded by [`byte_level`], to the same ids at a fraction of the cost.

mod byte_level;
mod classes;
mod tiktoken;

use crate::error::{LoadError, Unroutable};
use crate::prefix_cache::{CacheStats, Cuts, Known, PrefixCache};
use byte_level::ByteLevel;
use classes::Class;
use serde_json::{Map, Value as Json};
use std::path::Path;

/// What a model directory says about its tokenizer, besides `tokenizer.json`.
#[derive(Debug, Default)]
pub(crate) struct TokenizerConfig {
    /// `tokenizer_config.json`; empty if there is none.
    pub(crate) config: Map<String, Json>,
    /// `special_tokens_map.json`; empty if there is none.
    pub(crate) special_tokens: Map<String, Json>,
    /// `model_type` of `config.json`.
    pub(crate) model_type: Option<String>,
}

impl TokenizerConfig {
    pub(crate) fn load(dir: &Path) -> Result<Self, LoadError> {
        let config = object(&dir.join("tokenizer_config.json"))?;
        // The map is of an older format than the decoder; the engine reads it only in its absence.
        let special_tokens = match config.contains_key("added_tokens_decoder") {
            true => Map::new(),
            false => object(&dir.join("special_tokens_map.json"))?,
        };
        let model = object(&dir.join("config.json"))?;
        let model_type = model.get("model_type").and_then(Json::as_str).map(str::to_owned);
        Ok(Self { config, special_tokens, model_type })
    }
}

/// Names of the special tokens that templates may print.
const SPECIAL_TOKENS: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

impl TokenizerConfig {
    /// The text of each special token that the model has, by its name.
    pub(crate) fn special_tokens(&self) -> Map<String, Json> {
        let mut out = Map::new();
        for name in SPECIAL_TOKENS {
            let text = match self.special_tokens.get(name).or_else(|| self.config.get(name)) {
                Some(Json::String(text)) => text,
                Some(Json::Object(token)) => match token.get("content") {
                    Some(Json::String(text)) => text,
                    _ => continue,
                },
                _ => continue,
            };
            out.insert(name.into(), Json::String(text.clone()));
        }
        out
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

/// A model's tokenizer.
#[derive(Debug)]
pub(crate) struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// The same tokenizer taken apart, where it is of that family.
    byte_level: Option<ByteLevel>,
    /// What the post-processor puts before a text's own tokens, such as the beginning-of-sequence token.
    before: Vec<u32>,
    /// What it puts after them.
    after: Vec<u32>,
    /// Characters of the vocabulary's longest entry.
    max_chars_per_token: usize,
    cuts: Cuts,
    cache: Option<PrefixCache>,
}

impl Tokenizer {
    /// Reads a `tokenizer.json` or a tiktoken file; what it has tokenized is kept in at most `cache_bytes` (0 = not at all).
    pub(crate) fn load(
        path: &Path,
        settings: &TokenizerConfig,
        cache_bytes: usize,
    ) -> Result<Self, LoadError> {
        let malformed =
            |e: tokenizers::Error| LoadError::Malformed { path: path.to_path_buf(), problem: e.to_string() };
        let bytes =
            std::fs::read(path).map_err(|error| LoadError::Unreadable { path: path.to_path_buf(), error })?;
        let class = Class::of(&settings.config, settings.model_type.as_deref());
        let mut inner = if path.extension().is_some_and(|e| e == "model" || e == "tiktoken") {
            tiktoken::tokenizer(&bytes, &settings.config, &settings.special_tokens()).map_err(malformed)?
        } else if let Some(class) = class {
            let mut json = serde_json::from_slice(&bytes).map_err(|e| malformed(e.into()))?;
            class.rebuild(&mut json, &settings.config);
            serde_json::from_value(json).map_err(|e| malformed(e.into()))?
        } else {
            tokenizers::Tokenizer::from_bytes(bytes).map_err(malformed)?
        };
        // The engine sets its own for each request.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(malformed)?;
        let (before, after) = frame(&inner).map_err(malformed)?;
        let max_chars_per_token = inner.get_vocab(true).keys().map(|t| t.chars().count()).max().unwrap_or(1);
        let added: Vec<_> = inner.get_added_tokens_decoder().into_iter().collect();
        let byte_level = ByteLevel::of(&inner);
        let cuts = Cuts::new(&added, byte_level.as_ref().is_some_and(ByteLevel::has_seams));
        let cache = (cache_bytes > 0).then(|| PrefixCache::new(cache_bytes));
        Ok(Self { inner, byte_level, before, after, max_chars_per_token, cuts, cache })
    }

    /// The most characters that `tokens` tokens can stand for, as the engine reckons.
    pub(crate) fn max_chars(&self, tokens: usize) -> usize {
        tokens.saturating_mul(self.max_chars_per_token)
    }

    /// The token ids of `text`; with the special tokens around it if asked for. Of a text longer than `limit` the last
    /// tokens are kept, the special ones and they together at most `limit`. `None`: more than `new_bytes_max` of it were never tokenized before.
    pub(crate) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
        limit: Option<usize>,
        new_bytes_max: usize,
    ) -> Result<Option<Known>, Unroutable> {
        let (before, after): (&[u32], &[u32]) =
            if add_special_tokens { (&self.before, &self.after) } else { (&[], &[]) };
        let encoded = match &self.cache {
            Some(cache) => {
                cache.tokens(&self.cuts, text, before, new_bytes_max, |text| self.encode_content(text))?
            }
            None if text.len() > new_bytes_max => None,
            None => {
                let tokens = [before, &self.encode_content(text)?].concat();
                Some(Known { tokens, ..Known::default() })
            }
        };
        let Some(mut encoded) = encoded else { return Ok(None) };
        let room = limit.and_then(|limit| limit.checked_sub(before.len() + after.len()));
        let content = encoded.tokens.len() - before.len();
        if let Some(surplus) = room.and_then(|room| content.checked_sub(room)).filter(|&n| n > 0) {
            encoded.tokens.drain(before.len()..before.len() + surplus);
            encoded = Known { tokens: encoded.tokens, ..Known::default() };
        }
        encoded.tokens.extend_from_slice(after);
        Ok(Some(encoded))
    }

    /// The token ids of `text` alone, tokenized afresh.
    pub(crate) fn encode_content(&self, text: &str) -> Result<Vec<u32>, Unroutable> {
        match self.byte_level.as_ref().and_then(|fast| fast.encode(text)) {
            Some(ids) => Ok(ids),
            None => self.encode_by_library(text),
        }
    }

    pub(crate) fn encode_by_library(&self, text: &str) -> Result<Vec<u32>, Unroutable> {
        let encoding = self.inner.encode_fast(text, false).map_err(|_| Unroutable::TokenizerFailed)?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Counts of the cache; all zero without one.
    pub(crate) fn cache_stats(&self) -> CacheStats {
        self.cache.as_ref().map(PrefixCache::stats).unwrap_or_default()
    }

    #[cfg(test)]
    pub(crate) fn cuts(&self) -> &Cuts {
        &self.cuts
    }
}

/// What the post-processor puts around a text: found by handing it one token that no vocabulary has.
fn frame(tokenizer: &tokenizers::Tokenizer) -> tokenizers::Result<(Vec<u32>, Vec<u32>)> {
    const CONTENT: u32 = u32::MAX;
    let token = tokenizers::Token::new(CONTENT, String::new(), (0, 0));
    let framed = tokenizer.post_process(tokenizers::Encoding::from_tokens(vec![token], 0), None, true)?;
    let ids = framed.get_ids();
    let at = ids.iter().position(|&id| id == CONTENT).ok_or("the post-processor drops the text")?;
    Ok((ids[..at].to_vec(), ids[at + 1..].to_vec()))
}
