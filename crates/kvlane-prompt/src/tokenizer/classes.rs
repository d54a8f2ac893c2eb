//! What a tokenizer's class in Python changes about its `tokenizer.json`.
//!
//! Since version 5, `transformers` takes only vocabulary, merges, added tokens and post-processor from the file if the
//! tokenizer has a class of its own, and builds normalizer, pre-tokenizer and model switches as that class has always
//! had them. Mostly that is what the file says too; where it is not (a file from another conversion), the engine's
//! tokens follow the class. Which class it is depends on two names: `tokenizer_class` in `tokenizer_config.json` and
//! `model_type` in `config.json`. Rules and tables: transformers 5.19, `models/auto/tokenization_auto.py`.

use serde_json::{Map, Value as Json, json};

/// A class that builds its own pipeline; any other takes the file as it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Class {
    Llama,
    CodeLlama,
    Gemma,
    Qwen2,
    Qwen35,
    Gpt2,
    GptNeoX,
    Cohere,
}

/// Model types whose tokenizer is loaded from the file as it is, unless the file's class is just this.
const PLAIN_MODEL_TYPES: [&str; 87] = [
    "EvollaModel",
    "arctic",
    "aria",
    "bigbird_pegasus",
    "camembertv2-base",
    "canary",
    "chameleon",
    "chatlm",
    "cohere_asr",
    "deepseek_ocr",
    "deepseek_ocr2",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "deepseek_v4",
    "deepseek_vl",
    "deepseek_vl_hybrid",
    "deepseek_vl_v2",
    "ernie4_5",
    "ernie4_5_moe",
    "flex_olmo",
    "fuyu",
    "glm",
    "glm4",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v",
    "glm4v_moe",
    "glm_image",
    "glmasr",
    "got_ocr2",
    "gpt_bigcode",
    "granite",
    "granitemoe",
    "granitemoehybrid",
    "granitemoeshared",
    "h2ovl_chat",
    "hyperclovax",
    "hyperclovax_vlm",
    "internlm2",
    "jamba",
    "janus",
    "kimi_k25",
    "kimi_linear",
    "kosmos-2",
    "llava",
    "llava_next",
    "mimo_v2_flash",
    "minicpm3",
    "minicpmv",
    "minicpmv4_6",
    "minicpmv4_7",
    "minimax_m2",
    "ministral",
    "ministral3",
    "mistral",
    "mistral3",
    "mixtral",
    "modernbert",
    "modernbert-decoder",
    "molmo",
    "molmo2",
    "nemotron",
    "nvfp4",
    "nystromformer",
    "olmo2",
    "olmo3",
    "olmo_hybrid",
    "opencua",
    "openvla",
    "paddleocr_vl",
    "pegasus_x",
    "persimmon",
    "phi3",
    "phi3_v",
    "phimoe",
    "pix2struct",
    "pixtral",
    "smolvlm",
    "stablelm",
    "step3_vl",
    "step3p5",
    "umt5",
    "vipllava",
    "voxtral",
    "voxtral_realtime",
    "xlm-roberta-xl",
];

/// Model types whose registered class goes before the one that the file names.
const OVERRULED: [(&str, Class); 6] = [
    ("hyperclovax_vision_v2", Class::Gpt2),
    ("qwen2", Class::Qwen2),
    ("qwen3_5", Class::Qwen35),
    ("qwen3_5_moe", Class::Qwen35),
    ("qwen3_5_moe_text", Class::Qwen35),
    ("qwen4_exp", Class::Qwen35),
];

impl Class {
    /// The class that the engine loads, if it is one that builds its own pipeline.
    pub(super) fn of(config: &Map<String, Json>, model_type: Option<&str>) -> Option<Self> {
        let named = config.get("tokenizer_class").and_then(Json::as_str)?;
        let model_type = model_type.unwrap_or_default();
        if PLAIN_MODEL_TYPES.contains(&model_type) {
            return None;
        }
        if let Some((_, class)) = OVERRULED.iter().find(|(name, _)| *name == model_type) {
            return Some(*class);
        }
        match named.strip_suffix("Fast").unwrap_or(named) {
            "LlamaTokenizer" => Some(Self::Llama),
            "CodeLlamaTokenizer" => Some(Self::CodeLlama),
            "GemmaTokenizer" => Some(Self::Gemma),
            "Qwen2Tokenizer" => Some(Self::Qwen2),
            "Qwen3_5Tokenizer" => Some(Self::Qwen35),
            "GPT2Tokenizer" => Some(Self::Gpt2),
            "GPTNeoXTokenizer" => Some(Self::GptNeoX),
            "CohereTokenizer" => Some(Self::Cohere),
            _ => None,
        }
    }

    /// Rebuilds the pipeline in `tokenizer`, the parsed `tokenizer.json`. Only byte-pair models are rebuilt.
    pub(super) fn rebuild(self, tokenizer: &mut Json, config: &Map<String, Json>) {
        let prefix = config.get("add_prefix_space").and_then(Json::as_bool);
        let legacy = config.get("legacy").and_then(Json::as_bool).unwrap_or(false);
        let unk = match config.get("unk_token") {
            Some(Json::String(unk)) => unk.as_str(),
            Some(Json::Object(unk)) => unk.get("content").and_then(Json::as_str).unwrap_or("<unk>"),
            _ => "<unk>",
        };
        let Some(model) = tokenizer.get_mut("model").and_then(Json::as_object_mut) else { return };
        if model.get("type").is_some_and(|t| t != "BPE") {
            return;
        }
        let sentencepiece = matches!(self, Self::Llama | Self::CodeLlama | Self::Gemma);
        for (name, value) in [
            ("dropout", Json::Null),
            ("ignore_merges", Json::Bool(false)),
            ("fuse_unk", Json::Bool(sentencepiece)),
            ("byte_fallback", Json::Bool(sentencepiece)),
            (
                "unk_token",
                if matches!(self, Self::Gemma | Self::CodeLlama) { json!(unk) } else { Json::Null },
            ),
            ("continuing_subword_prefix", if sentencepiece { Json::Null } else { json!("") }),
            ("end_of_word_suffix", if sentencepiece { Json::Null } else { json!("") }),
        ] {
            model.insert(name.into(), value);
        }
        let byte_level = |use_regex: bool| {
            let add_prefix_space = prefix.unwrap_or(false);
            json!({"type": "ByteLevel", "add_prefix_space": add_prefix_space, "trim_offsets": true, "use_regex": use_regex})
        };
        let regex = |pattern: &str| {
            let split = json!({"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false});
            json!({"type": "Sequence", "pretokenizers": [split, byte_level(false)]})
        };
        let metaspace = |scheme: &str| json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": false});
        let nfc = || json!({"type": "NFC"});
        let (normalizer, pre_tokenizer) = match self {
            Self::Llama => (
                Json::Null,
                metaspace(match (prefix.unwrap_or(true), legacy) {
                    (false, _) => "never",
                    (true, true) => "always",
                    (true, false) => "first",
                }),
            ),
            Self::CodeLlama => {
                (Json::Null, metaspace(if prefix.unwrap_or(true) { "first" } else { "never" }))
            }
            Self::Gemma => (
                json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"}),
                json!({"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false}),
            ),
            Self::Qwen2 => (nfc(), regex(QWEN2)),
            Self::Qwen35 => (nfc(), regex(QWEN3_5)),
            Self::Gpt2 => (Json::Null, byte_level(true)),
            Self::GptNeoX => (nfc(), byte_level(true)),
            Self::Cohere => (
                nfc(),
                json!({"type": "Sequence", "pretokenizers": [
                {"type": "Digits", "individual_digits": true}, byte_level(true)]}),
            ),
        };
        tokenizer["normalizer"] = normalizer;
        tokenizer["pre_tokenizer"] = pre_tokenizer;
    }
}

const QWEN2: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
const QWEN3_5: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
