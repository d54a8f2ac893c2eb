//! What is asked of an engine's `/tokenize` in place of a local tokenizer.

use bytes::Bytes;
use kvlane_prompt::remote::{RemotePrompt, parse_tokenize_response, tokenize_bodies};
use kvlane_prompt::{Endpoint, PromptError, RequestFields, Unroutable};
use serde_json::{Value, json};

fn ask(endpoint: Endpoint, body: &Value) -> Result<Vec<RemotePrompt>, PromptError> {
    tokenize_bodies(&RequestFields::parse(endpoint, Bytes::from(body.to_string()))?)
}

fn bodies(endpoint: Endpoint, body: &Value) -> Vec<Value> {
    let asked = ask(endpoint, body).expect("a routable request").into_iter().map(|prompt| match prompt {
        RemotePrompt::Ask(body) => serde_json::from_slice(&body).expect("a JSON body"),
        RemotePrompt::Tokens(tokens) => json!(tokens),
    });
    asked.collect()
}

#[test]
fn a_chat_keeps_its_messages_and_moves_what_tokenize_does_not_know_into_the_variables() {
    let messages = json!([{"role": "user", "content": "h\u{e9} \"q\"", "odd": 1}]);
    let tools = json!([{"type": "function", "function": {"name": "f"}}]);
    let body = json!({"model": "m", "messages": messages, "tools": tools, "reasoning_effort": "low", "temperature": 1,
                      "documents": [{"text": "d"}], "chat_template_kwargs": {"color": "blue"}});
    assert_eq!(
        bodies(Endpoint::Chat, &body),
        [json!({"model": "m", "messages": messages, "tools": tools, "add_generation_prompt": true,
                "continue_final_message": false, "chat_template_kwargs": {"color": "blue", "documents": [{"text": "d"}],
                "reasoning_effort": "low", "enable_thinking": true}})]
    );
}

#[test]
fn a_batch_asks_once_for_each_text_and_never_for_token_ids() {
    let body = json!({"model": "m", "prompt": ["a", "b"], "add_special_tokens": false});
    let each = |text: &str| json!({"prompt": text, "model": "m", "add_special_tokens": false});
    assert_eq!(bodies(Endpoint::Completions, &body), [each("a"), each("b")]);
    assert_eq!(bodies(Endpoint::Completions, &json!({"prompt": [[1, 2], [3]]})), [json!([1, 2]), json!([3])]);
}

#[test]
fn what_no_tokenizer_can_tell_is_not_asked() {
    let cause = |endpoint, body| match ask(endpoint, &body) {
        Err(PromptError::Unroutable(cause)) => cause,
        other => panic!("{other:?}"),
    };
    assert_eq!(cause(Endpoint::Other, json!({"input": "x"})), Unroutable::NoPrompt);
    assert_eq!(cause(Endpoint::Completions, json!({"prompt": "x", "suffix": "y"})), Unroutable::Suffix);
    assert_eq!(cause(Endpoint::Completions, json!({"prompt_embeds": "x"})), Unroutable::PromptEmbeds);
    assert_eq!(
        cause(Endpoint::Chat, json!({"messages": [], "chat_template": "x"})),
        Unroutable::RequestTemplate
    );
    for part in [
        json!({"type": "image_url", "image_url": {"url": "x"}}),
        json!({"type": "text", "text": "t", "uuid": "u"}),
    ] {
        let messages = json!([{"role": "user", "content": "x"}, {"role": "user", "content": ["x", part]}]);
        assert_eq!(cause(Endpoint::Chat, json!({ "messages": messages })), Unroutable::Media);
    }
}

#[test]
fn answers_are_read_and_nonsense_is_refused() {
    let answer = br#"{"count":2,"max_model_len":512,"tokens":[7,4294967295],"token_strs":null}"#;
    assert_eq!(parse_tokenize_response(answer).unwrap(), [7, u32::MAX]);
    for nonsense in [&b"{}"[..], b"", b"[1]", br#"{"tokens":[-1]}"#, br#"{"tokens":["a"]}"#, b"\xff"] {
        assert!(parse_tokenize_response(nonsense).is_err());
    }
}
