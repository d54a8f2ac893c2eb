//! A tokenizer from a tiktoken file: lines of a base64 token and its rank.
//!
//! The engine converts such a file to the same pipeline that a `tokenizer.json` describes (`TikTokenConverter` of
//! transformers 5.19), so this does too: byte-level pairs whose merges are every way to put a token together from two others,
//! in the order of rank; one regular expression for words; the special tokens of `tokenizer_config.json` after them.

use serde_json::{Map, Value as Json, json};
use std::collections::HashMap;
use tokenizers::AddedToken;

/// The words of GPT-4 and Llama 3, which the converter takes for all.
const WORDS: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Builds the tokenizer of `file`, with the special tokens that `config` names.
pub(super) fn tokenizer(
    file: &[u8],
    config: &Map<String, Json>,
    special_tokens: &Map<String, Json>,
) -> tokenizers::Result<tokenizers::Tokenizer> {
    let ranks = ranks(file).ok_or("not a tiktoken file: lines of a base64 token and its rank")?;
    let letters = letters();
    let text = |token: &[u8]| -> String { token.iter().map(|&b| letters[usize::from(b)]).collect() };
    let mut merges: Vec<(u32, u32, u32)> = Vec::new();
    let mut by_rank: Vec<(&[u8], u32)> =
        ranks.iter().map(|(token, &rank)| (token.as_slice(), rank)).collect();
    by_rank.sort_unstable_by_key(|&(_, rank)| rank);
    for &(token, rank) in &by_rank {
        for i in 1..token.len() {
            if let (Some(&left), Some(&right)) = (ranks.get(&token[..i]), ranks.get(&token[i..])) {
                merges.push((rank, left, right));
            }
        }
    }
    merges.sort_unstable();
    let texts: HashMap<u32, String> = by_rank.iter().map(|&(token, rank)| (rank, text(token))).collect();
    let vocab: Map<String, Json> =
        by_rank.iter().map(|&(_, rank)| (texts[&rank].clone(), json!(rank))).collect();
    let merges: Vec<Json> =
        merges.iter().map(|(_, left, right)| json!([texts[left], texts[right]])).collect();
    let byte_level =
        json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false});
    let mut tokenizer: tokenizers::Tokenizer = serde_json::from_value(json!({
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": true,
                  "vocab": vocab, "merges": merges},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": WORDS}, "behavior": "Isolated", "invert": false}, byte_level]},
    }))?;
    add_special_tokens(&mut tokenizer, by_rank.len(), config, special_tokens)?;
    Ok(tokenizer)
}

fn add_special_tokens(
    tokenizer: &mut tokenizers::Tokenizer,
    base: usize,
    config: &Map<String, Json>,
    special_tokens: &Map<String, Json>,
) -> tokenizers::Result<()> {
    let mut decoder: Vec<(usize, AddedToken)> = config
        .get("added_tokens_decoder")
        .and_then(Json::as_object)
        .into_iter()
        .flatten()
        .filter_map(|(id, token)| Some((id.parse().ok()?, added_token(token)?)))
        .collect();
    decoder.sort_by_key(|(id, _)| *id);
    // Ids between the named ones are reserved, so that each named one gets its own.
    let last = decoder.last().map_or(0, |(id, _)| *id);
    for id in base..=last {
        let named = decoder.iter().find(|(named, _)| *named == id);
        let text =
            named.map_or_else(|| format!("<|reserved_token_{id}|>"), |(_, token)| token.content.clone());
        tokenizer.add_special_tokens([AddedToken::from(text, true).normalized(false)])?;
    }
    for (_, token) in decoder {
        tokenizer.add_tokens([token])?;
    }
    for text in special_tokens.values().filter_map(Json::as_str) {
        if tokenizer.get_added_vocabulary().get_vocab().get(text).is_none() {
            tokenizer.add_special_tokens([AddedToken::from(text, true)])?;
        }
    }
    let flag = |name| config.get(name).and_then(Json::as_bool).unwrap_or(false);
    let token = |name: &str| special_tokens.get(name).and_then(Json::as_str);
    let (bos, eos) = (
        token("bos_token").filter(|_| flag("add_bos_token")),
        token("eos_token").filter(|_| flag("add_eos_token")),
    );
    let mut single: Vec<Json> = vec![json!({"Sequence": {"id": "A", "type_id": 0}})];
    let mut special = Map::new();
    for (text, at) in [(bos, 0), (eos, usize::MAX)] {
        let Some(text) = text else { continue };
        let id = tokenizer.token_to_id(text).ok_or("a special token without an id")?;
        single.insert(at.min(single.len()), json!({"SpecialToken": {"id": text, "type_id": 0}}));
        special.insert(text.to_owned(), json!({"id": text, "ids": [id], "tokens": [text]}));
    }
    if !special.is_empty() {
        let pair = json!([{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]);
        let template =
            json!({"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": special});
        let processor: tokenizers::PostProcessorWrapper = serde_json::from_value(template)?;
        tokenizer.with_post_processor(Some(processor));
    }
    Ok(())
}

fn added_token(token: &Json) -> Option<AddedToken> {
    let flag = |name| token.get(name).and_then(Json::as_bool);
    let special = flag("special").unwrap_or(false);
    Some(
        AddedToken::from(token.get("content")?.as_str()?, special)
            .lstrip(flag("lstrip").unwrap_or(false))
            .rstrip(flag("rstrip").unwrap_or(false))
            .single_word(flag("single_word").unwrap_or(false))
            .normalized(flag("normalized").unwrap_or(!special)),
    )
}

/// The rank of each token, or `None` if the file is something else.
fn ranks(file: &[u8]) -> Option<HashMap<Vec<u8>, u32>> {
    let text = std::str::from_utf8(file).ok()?;
    let mut ranks = HashMap::new();
    for line in text.lines().filter(|line| !line.is_empty()) {
        let (token, rank) = line.split_once(' ')?;
        ranks.insert(base64(token)?, rank.parse().ok()?);
    }
    (!ranks.is_empty()).then_some(ranks)
}

/// Standard base64 with padding.
fn base64(text: &str) -> Option<Vec<u8>> {
    let mut out = Vec::with_capacity(text.len() * 3 / 4);
    let (mut bits, mut count) = (0u32, 0);
    for c in text.trim_end_matches('=').bytes() {
        let value = match c {
            b'A'..=b'Z' => c - b'A',
            b'a'..=b'z' => c - b'a' + 26,
            b'0'..=b'9' => c - b'0' + 52,
            b'+' => 62,
            b'/' => 63,
            _ => return None,
        };
        bits = bits << 6 | u32::from(value);
        count += 6;
        if count >= 8 {
            count -= 8;
            out.push((bits >> count) as u8);
        }
    }
    Some(out)
}

/// The letter by which byte-level vocabularies write each byte: printable Latin-1 as itself, the others from U+0100 on.
pub(super) fn letters() -> [char; 256] {
    let mut next = 0x100;
    std::array::from_fn(|byte| {
        let byte = u8::try_from(byte).expect("an array of 256");
        match byte {
            b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff => char::from(byte),
            _ => {
                next += 1;
                char::from_u32(next - 1).expect("68 code points from U+0100 on are letters")
            }
        }
    })
}
