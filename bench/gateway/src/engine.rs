//! An engine that answers at once and always the same: what is left of a request's time is the router's.
//!
//! One thread, two ports. 16 tokens an answer; a stream has one write a token, as engines send them. Looks like vLLM
//! to whoever asks what it is; publishes no events.

use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpStream};

use crate::http1::Connection;

/// Tokens of an answer.
pub const ANSWER_TOKENS: usize = 16;
/// Each of them.
pub const ANSWER_WORD: &str = " word";
/// The model's name.
pub const MODEL: &str = "mock";

/// What it says, made once.
struct Answers {
    whole: Vec<u8>,
    stream_head: Vec<u8>,
    stream_token: Vec<u8>,
    stream_end: Vec<u8>,
    models: Vec<u8>,
    version: Vec<u8>,
    info: Vec<u8>,
    empty: Vec<u8>,
    unknown: Vec<u8>,
}

fn response(status: &str, kind: &str, body: &str) -> Vec<u8> {
    format!("HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {}\r\n\r\n{body}", body.len())
        .into()
}

fn chunk(body: &str) -> Vec<u8> {
    format!("{:x}\r\n{body}\r\n", body.len()).into()
}

impl Answers {
    fn new() -> Self {
        let json = "application/json";
        let text = ANSWER_WORD.repeat(ANSWER_TOKENS);
        let whole = format!(
            r#"{{"id":"chatcmpl-1","object":"chat.completion","created":1,"model":"{MODEL}","choices":[{{"index":0,"message":{{"role":"assistant","content":"{text}"}},"finish_reason":"length"}}],"usage":{{"prompt_tokens":1,"completion_tokens":{ANSWER_TOKENS},"total_tokens":17}}}}"#
        );
        let event = |delta: &str, finish: &str| {
            format!(
                "data: {{\"id\":\"chatcmpl-1\",\"object\":\"chat.completion.chunk\",\"created\":1,\"model\":\"{MODEL}\",\"choices\":[{{\"index\":0,\"delta\":{delta},\"finish_reason\":{finish}}}]}}\n\n"
            )
        };
        let end = format!("{}data: [DONE]\n\n", event("{}", "\"length\""));
        let models = format!(
            r#"{{"object":"list","data":[{{"id":"{MODEL}","object":"model","created":1,"owned_by":"vllm","root":"{MODEL}","parent":null,"max_model_len":262144}}]}}"#
        );
        let head = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n";
        Self {
            whole: response("200 OK", json, &whole),
            stream_head: head.into(),
            stream_token: chunk(&event(&format!("{{\"content\":\"{ANSWER_WORD}\"}}"), "null")),
            stream_end: [chunk(&end), b"0\r\n\r\n".to_vec()].concat(),
            models: response("200 OK", json, &models),
            version: response("200 OK", json, r#"{"version":"0.32.0"}"#),
            info: response("200 OK", json, &format!(r#"{{"model_path":"{MODEL}","is_generation":true}}"#)),
            empty: response("200 OK", json, ""),
            unknown: response("404 Not Found", json, r#"{"error":"not here"}"#),
        }
    }
}

/// Serves until the process ends. `tokenizes`: answer `POST /tokenize` (vllm-router asks for it with each request).
pub async fn run(ports: &[u16], tokenizes: bool) -> anyhow::Result<()> {
    let answers: &'static Answers = Box::leak(Box::new(Answers::new()));
    let local = tokio::task::LocalSet::new();
    for port in ports {
        let listener = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], *port))).await?;
        println!("{}", listener.local_addr()?.port());
        local.spawn_local(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::task::spawn_local(async move {
                    // A peer that hangs up is no error here.
                    let _ = serve(stream, answers, tokenizes).await;
                });
            }
        });
    }
    println!("ready");
    local.await;
    Ok(())
}

async fn serve(stream: TcpStream, answers: &Answers, tokenizes: bool) -> std::io::Result<()> {
    let mut connection = Connection::new(stream)?;
    while let Some(head) = connection.head().await? {
        if head.expects_continue {
            connection.write(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
        }
        // The bench's bodies end with the stream flag; routers that rewrite bodies may move it.
        let mut streams = false;
        let mut bytes = 0;
        connection
            .body(head.length, |part| {
                bytes += part.len();
                streams |= has_stream_flag(part);
            })
            .await?;
        let path = head.first_line.split(' ').nth(1).unwrap_or_default();
        match path.split('?').next().unwrap_or_default() {
            "/v1/chat/completions" | "/v1/completions" if streams => {
                connection.write(&answers.stream_head).await?;
                for _ in 0..ANSWER_TOKENS {
                    connection.write(&answers.stream_token).await?;
                }
                connection.write(&answers.stream_end).await?;
            }
            "/v1/chat/completions" | "/v1/completions" => connection.write(&answers.whole).await?,
            "/v1/models" => connection.write(&answers.models).await?,
            "/version" => connection.write(&answers.version).await?,
            "/health" | "/health_generate" | "/ping" => connection.write(&answers.empty).await?,
            "/get_model_info" | "/model_info" => connection.write(&answers.info).await?,
            "/tokenize" if tokenizes => connection.write(&tokens(bytes)).await?,
            _ => connection.write(&answers.unknown).await?,
        }
    }
    Ok(())
}

fn has_stream_flag(part: &[u8]) -> bool {
    let tail = &part[part.len().saturating_sub(256)..];
    let head = &part[..part.len().min(256)];
    [head, tail].iter().any(|end| {
        let text = String::from_utf8_lossy(end);
        text.contains("\"stream\":true") || text.contains("\"stream\": true")
    })
}

/// About as many tokens as the text would have.
fn tokens(bytes: usize) -> Vec<u8> {
    let count = bytes / 5;
    let ids: Vec<String> = (0..count).map(|i| (i % 100_000).to_string()).collect();
    let body = format!("{{\"count\":{count},\"max_model_len\":262144,\"tokens\":[{}]}}", ids.join(","));
    response("200 OK", "application/json", &body)
}
