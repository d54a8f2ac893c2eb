//! The mock's tokenizer and chat template: bytes and three special tokens, in a ChatML-like form.
//!
//! A token is a byte, so encoding is exact, fast and needs no vocabulary file; and because it is also a byte-level BPE without
//! merges, [`model_files`] can say the same in the files of a Hugging Face model directory, from which a router tokenizes
//! exactly as the mock does.

use std::fmt::Write as _;
use std::path::Path;

/// Ends a text; also the padding token.
pub(super) const END_OF_TEXT: u32 = 256;
/// Begins a message.
pub(super) const MESSAGE_START: u32 = 257;
/// Ends a message: what the model generates to stop.
pub(super) const MESSAGE_END: u32 = 258;
/// Ids that a prompt may hold, from 0 to one less: as many as real models have, so that made-up ids may come. No text has those behind the special ones.
pub(super) const VOCABULARY: u32 = 131_072;

const SPECIAL: [(&str, u32); 3] =
    [("<|endoftext|>", END_OF_TEXT), ("<|im_start|>", MESSAGE_START), ("<|im_end|>", MESSAGE_END)];

/// The template of [`render`], as engines and routers read it.
const CHAT_TEMPLATE: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + \
                             (message['content'] or '') + '<|im_end|>' + '\\n' }}{% endfor %}\
                             {% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}";

/// A message of a chat, its content flattened to text.
pub(super) struct Message {
    /// `system`, `user`, `assistant` or any other word.
    pub(super) role: String,
    /// Its text; empty where the request had none.
    pub(super) content: String,
}

/// The text that the model sees of a chat.
pub(super) fn render(messages: &[Message], add_generation_prompt: bool) -> String {
    let mut text = String::new();
    for message in messages {
        let _ = writeln!(text, "<|im_start|>{}\n{}<|im_end|>", message.role, message.content);
    }
    if add_generation_prompt {
        text.push_str("<|im_start|>assistant\n");
    }
    text
}

/// Text to tokens; special tokens are recognised wherever they are spelled out, as tokenizers do.
pub(super) fn encode(text: &str) -> Vec<u32> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        if bytes[at] == b'<'
            && let Some((spelling, token)) = SPECIAL.iter().find(|s| bytes[at..].starts_with(s.0.as_bytes()))
        {
            tokens.push(*token);
            at += spelling.len();
        } else {
            tokens.push(u32::from(bytes[at]));
            at += 1;
        }
    }
    tokens
}

/// Tokens to text; bytes that are no UTF-8 become replacement characters, unknown tokens nothing.
pub(super) fn decode(tokens: &[u32], skip_special: bool) -> String {
    let mut bytes = Vec::with_capacity(tokens.len());
    for token in tokens {
        match u8::try_from(*token) {
            Ok(byte) => bytes.push(byte),
            Err(_) if skip_special => {}
            Err(_) => {
                let spelling =
                    SPECIAL.iter().find(|special| special.1 == *token).map_or("", |special| special.0);
                bytes.extend_from_slice(spelling.as_bytes());
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Writes the files of a model directory that tokenizes and renders as this module does.
pub(super) fn write_model_directory(directory: &Path, max_model_len: u32) -> std::io::Result<()> {
    std::fs::create_dir_all(directory)?;
    for (name, content) in model_files(max_model_len) {
        std::fs::write(directory.join(name), content)?;
    }
    Ok(())
}

/// Name and content of each of those files.
pub(super) fn model_files(max_model_len: u32) -> [(&'static str, String); 4] {
    let vocabulary: serde_json::Map<String, serde_json::Value> =
        (0..=255u8).map(|byte| (byte_letter(byte).to_string(), u32::from(byte).into())).collect();
    let added: Vec<serde_json::Value> = SPECIAL
        .iter()
        .map(|(content, id)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false,
                               "rstrip": false, "normalized": false, "special": true})
        })
        .collect();
    let bytes = serde_json::json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
                                   "use_regex": false});
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": bytes, "post_processor": null, "decoder": bytes,
        "model": {"type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
                  "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
                  "ignore_merges": false, "vocab": vocabulary, "merges": []},
    });
    let tokenizer_config = serde_json::json!({
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": null, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "clean_up_tokenization_spaces": false, "add_bos_token": false,
        "model_max_length": max_model_len, "chat_template": CHAT_TEMPLATE,
    });
    let config = serde_json::json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": VOCABULARY,
        "eos_token_id": MESSAGE_END, "pad_token_id": END_OF_TEXT, "max_position_embeddings": max_model_len,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 1,
    });
    [
        ("tokenizer.json", tokenizer.to_string()),
        ("tokenizer_config.json", tokenizer_config.to_string()),
        ("config.json", config.to_string()),
        ("chat_template.jinja", CHAT_TEMPLATE.to_owned()),
    ]
}

/// The letter that stands for a byte in byte-level vocabularies: printable ones for themselves, the others, in order,
/// for the letters from U+0100 on.
fn byte_letter(byte: u8) -> char {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    if printable(byte) {
        char::from(byte)
    } else {
        let before = (0..byte).filter(|b| !printable(*b)).count() as u32;
        char::from_u32(0x100 + before).expect("at most 68 letters from U+0100 on")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_comes_back_and_special_tokens_are_found() {
        let text = "a<|im_end|>é<|im_";
        let tokens = encode(text);
        assert_eq!(tokens[1], MESSAGE_END);
        assert_eq!(decode(&tokens, false), text);
        assert_eq!(decode(&tokens, true), "aé<|im_");
    }

    #[test]
    fn a_second_turn_begins_with_the_first_and_its_answer() {
        let user = |content: &str| Message { role: "user".into(), content: content.into() };
        let first = encode(&render(&[user("hello")], true));
        let answer = [encode("fine"), vec![MESSAGE_END]].concat();
        let assistant = Message { role: "assistant".into(), content: "fine".into() };
        let second = encode(&render(&[user("hello"), assistant, user("more")], true));
        assert!(second.starts_with(&[first, answer].concat()));
    }

    #[test]
    fn every_byte_has_a_letter_of_its_own() {
        let letters: std::collections::HashSet<char> = (0..=255).map(byte_letter).collect();
        assert_eq!(letters.len(), 256);
        assert_eq!((byte_letter(b' '), byte_letter(b'\n'), byte_letter(0xAD)), ('Ġ', 'Ċ', '\u{143}'));
    }
}
