//! What a request body may say, and what is refused.

use super::*;

fn parse(endpoint: Endpoint, body: &str) -> Result<RequestFields, BadRequest> {
    RequestFields::parse(endpoint, Bytes::copy_from_slice(body.as_bytes()))
}

#[test]
fn reads_what_routing_needs_and_skips_the_rest() {
    let r = parse(
        Endpoint::Chat,
        r#"{"x":{"y":[1]},"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,
            "stream_options":{"include_usage":true},"max_tokens":5,"max_completion_tokens":7,"n":2,"cache_salt":"s"}"#,
    )
    .unwrap();
    assert_eq!(r.model.as_deref(), Some("m"));
    assert!(r.stream && r.include_usage);
    assert_eq!((r.max_tokens, r.n), (Some(7), 2));
    assert_eq!(r.cache_salt.as_deref(), Some("s"));
    assert_eq!(r.messages_json(), Some(r#"[{"role":"user","content":"hi"}]"#));
}

#[test]
fn null_is_absence_and_the_last_of_a_repeated_field_counts() {
    let r = parse(Endpoint::Completions, r#"{"model":"a","model":"b","prompt":"p","n":null,"stream":null}"#)
        .unwrap();
    assert_eq!(r.model.as_deref(), Some("b"));
    assert_eq!((r.n, r.stream), (1, false));
}

#[test]
fn probabilities_of_the_prompt_keep_an_engine_from_its_cache() {
    let skips = |endpoint, rest: &str| {
        let body = format!(r#"{{"prompt":"p","messages":[]{rest}}}"#);
        parse(endpoint, &body).unwrap().skips_cache
    };
    for (rest, chat, completions) in [
        ("", false, false),
        (r#","prompt_logprobs":0"#, true, true),
        (r#","prompt_logprobs":null,"logprobs":1"#, false, false),
        (r#","echo":true"#, true, false),
        (r#","echo":true,"logprobs":1"#, true, true),
    ] {
        assert_eq!(
            (skips(Endpoint::Chat, rest), skips(Endpoint::Completions, rest)),
            (chat, completions),
            "{rest}"
        );
    }
}

#[test]
fn types_are_as_lenient_as_the_engines() {
    let r =
        parse(Endpoint::Completions, r#"{"prompt":"p","max_tokens":"16","n":2.0,"stream":"yes"}"#).unwrap();
    assert_eq!((r.max_tokens, r.n, r.stream), (Some(16), 2, true));
}

#[test]
fn errors_name_the_field_and_never_its_content() {
    let cases: [(&str, &str); 8] = [
        (r#"{"prompt":"p","max_tokens":"secret"}"#, "`max_tokens` must be an integer"),
        (r#"{"prompt":"p","stream":"secret"}"#, "`stream` must be true or false"),
        (r#"{"prompt":"p","model":["secret"]}"#, "`model` must be a string"),
        (r#"{"prompt":"p","stream_options":"secret"}"#, "`stream_options` must be an object"),
        (
            r#"{"model":"secret"}"#,
            "`prompt` must be a string, a list of token ids (0 to 4294967295), or a list of either",
        ),
        (r#"{"prompt":"secret"#, "the body ends inside a JSON value (line 1, column 17)"),
        (r#"["secret"]"#, "the body is not a JSON object (line 1, column 0)"),
        (r#"{"prompt":"secret"} x"#, "the body is not a JSON object (line 1, column 21)"),
    ];
    for (body, message) in cases {
        let error = parse(Endpoint::Completions, body).unwrap_err();
        assert_eq!(error.to_string(), message, "{body}");
    }
    let error = RequestFields::parse(Endpoint::Chat, Bytes::from_static(b"{\"a\":\"\xff\"}")).unwrap_err();
    assert_eq!(error, BadRequest::NotUtf8 { at_byte: 6 });
}

#[test]
fn prompts_of_all_four_forms() {
    let text = |t: &'static str| PromptInput::Text(t.into());
    assert_eq!(prompt_inputs(r#""a\n""#).unwrap(), [text("a\n")]);
    assert_eq!(prompt_inputs("[1, 2]").unwrap(), [PromptInput::Tokens(vec![1, 2])]);
    assert_eq!(prompt_inputs(r#"["a","b"]"#).unwrap(), [text("a"), text("b")]);
    assert_eq!(
        prompt_inputs("[[1],[2,3]]").unwrap(),
        [PromptInput::Tokens(vec![1]), PromptInput::Tokens(vec![2, 3])]
    );
    for wrong in ["{}", "[-1]", "[1.5]", "3", "[[\"a\"]]", "true"] {
        assert!(prompt_inputs(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_batch_comes_apart_into_its_prompts() {
    let bodies = |body: &str| -> Vec<String> {
        let bodies = parse(Endpoint::Completions, body).unwrap().prompt_bodies().unwrap();
        bodies.iter().map(|body| String::from_utf8(body.to_vec()).unwrap()).collect()
    };
    assert_eq!(
        bodies(r#"{"model":"m","prompt": ["a\n", [1,2]] ,"n":2}"#),
        [r#"{"model":"m","prompt": "a\n" ,"n":2}"#, r#"{"model":"m","prompt": [1,2] ,"n":2}"#]
    );
    for whole in [r#"{"prompt":"a"}"#, r#"{"prompt":[1,2]}"#, r#"{"prompt":[]}"#] {
        assert!(bodies(whole).is_empty(), "{whole}");
    }
}
