//! Every template of `tests/templates` on every conversation, byte for byte what `transformers` renders.

use super::ChatTemplate;
use crate::chat::ChatInputs;
use crate::tokenizer::TokenizerConfig;
use serde::Deserialize;
use serde_json::{Map, Value as Json};
use std::collections::BTreeMap;
use std::path::Path;

#[derive(Deserialize)]
struct Goldens {
    now: i64,
    special_tokens: Map<String, Json>,
    conversations: BTreeMap<String, Conversation>,
    texts: BTreeMap<String, BTreeMap<String, Option<Text>>>,
}

#[derive(Deserialize)]
struct Conversation {
    messages: Vec<Map<String, Json>>,
    #[serde(default)]
    tools: Json,
    #[serde(default)]
    documents: Json,
    #[serde(default)]
    add_generation_prompt: bool,
    #[serde(default)]
    continue_final_message: bool,
    #[serde(default)]
    variables: Map<String, Json>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Short(String),
    Long { bytes: usize, fnv1a: String },
}

impl Text {
    fn is(&self, text: &str) -> bool {
        match self {
            Self::Short(expected) => text == expected,
            Self::Long { bytes, fnv1a } => text.len() == *bytes && *fnv1a == hash(text),
        }
    }
}

fn hash(text: &str) -> String {
    let hash =
        text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3));
    format!("{hash:016x}")
}

fn inputs(conversation: &Conversation) -> ChatInputs {
    let mut variables = conversation.variables.clone();
    variables.insert("documents".into(), conversation.documents.clone());
    variables.insert("add_generation_prompt".into(), Json::Bool(conversation.add_generation_prompt));
    ChatInputs {
        messages: conversation.messages.clone(),
        tools: conversation.tools.clone(),
        variables,
        continue_final_message: conversation.continue_final_message,
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "a developer's switch of this test")]
fn texts_are_those_of_transformers() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let goldens = std::fs::read_to_string(tests.join("goldens/templates.json")).unwrap();
    let goldens: Goldens = serde_json::from_str(&goldens).unwrap();
    let settings = TokenizerConfig { config: goldens.special_tokens.clone(), ..Default::default() };
    // For `diff` against the generator's full texts.
    let keep = std::env::var_os("OUR_TEXTS").map(std::path::PathBuf::from);
    let (mut equal, mut refused) = (0, 0);
    let mut wrong = Vec::new();
    for (file, texts) in &goldens.texts {
        let source = std::fs::read_to_string(tests.join("templates").join(file)).unwrap();
        let template = match ChatTemplate::compile(source, &settings) {
            Ok(template) => template,
            Err(e) => {
                wrong.push(format!("{file}: {e:#}"));
                continue;
            }
        };
        for (title, expected) in texts {
            let ours = template.render_or_explain(inputs(&goldens.conversations[title]), goldens.now);
            if let (Some(dir), Ok(ours)) = (&keep, &ours) {
                std::fs::write(dir.join(format!("{file}.{title}.txt")), ours).unwrap();
            }
            match (&ours, expected) {
                (Ok(ours), Some(theirs)) if theirs.is(ours) => equal += 1,
                (Err(_), None) => refused += 1,
                (Ok(ours), Some(Text::Short(theirs))) => {
                    wrong.push(format!("{file}: {title}\n  ours   {ours:?}\n  theirs {theirs:?}"));
                }
                (Ok(ours), Some(Text::Long { bytes, .. })) => {
                    wrong.push(format!("{file}: {title}: {} bytes instead of {bytes}\n{ours}", ours.len()));
                }
                (ours, _) => wrong.push(format!("{file}: {title}: {ours:?}")),
            }
        }
    }
    println!("{equal} equal, {refused} refused by both");
    assert!(wrong.is_empty(), "{} differ:\n{}", wrong.len(), wrong.join("\n"));
    assert!(goldens.texts.len() >= 20 && goldens.conversations.len() >= 20, "the goldens are there");
}

#[derive(Deserialize)]
struct Formats {
    templates: BTreeMap<String, String>,
    snippets: Vec<(String, String)>,
}

#[test]
fn content_formats_are_those_that_vllm_detects() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests");
    let formats: Formats =
        serde_json::from_str(&std::fs::read_to_string(tests.join("goldens/formats.json")).unwrap()).unwrap();
    let files = formats
        .templates
        .into_iter()
        .map(|(file, format)| (std::fs::read_to_string(tests.join("templates").join(file)).unwrap(), format));
    for (source, expected) in files.chain(formats.snippets) {
        let ours = match super::detect::content_format(&super::environment::without_generation_tags(&source))
        {
            crate::ContentFormat::String => "string",
            crate::ContentFormat::Parts => "openai",
        };
        assert_eq!(ours, expected, "{source}");
    }
}
