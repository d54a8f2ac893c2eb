//! From a request to its tokens, without ever holding up another request.
//!
//! A model's files are read once, in the background; until then, and where there are none, its engine's own
//! `/tokenize` is asked. Requests with little new text are tokenized where they are, also when they are long; the others on the blocking
//! pool, as many at a time as there are cores, so that a prompt of a megabyte delays nobody else.

use super::parity::{Blame, Difference, Standing, first_difference};
use super::upstream::SendError;
use super::{Table, Upstream};
use crate::explain::Tokens;
use crate::fleet::Instance;
use arc_swap::ArcSwap;
use bytes::Bytes;
use http_body::Body;
use http_body_util::Full;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Method, Request, StatusCode, Uri};
use kvlane_prompt::remote::{RemotePrompt, parse_tokenize_response, tokenize_bodies};
use kvlane_prompt::{
    BadRequest, Endpoint, ModelPrompt, Prefix, Prompt, PromptConfig, PromptError, RequestFields, Unroutable,
};
use quick_cache::Weighter;
use quick_cache::sync::Cache;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use tokio::sync::Semaphore;
use xxhash_rust::xxh3::xxh3_128;

/// Requests with a longer body go to the blocking pool unseen. Rendering so much and looking it up takes half a millisecond.
const INLINE_BYTES_MAX: usize = 256 * 1024;
/// So do requests with more text that was never seen. At about 15 MB/s this is a millisecond.
const INLINE_NEW_BYTES_MAX: usize = 16 * 1024;
/// Waiting for an engine's `/tokenize`; after it the request is routed by load.
const ENGINE_TIMEOUT: Duration = Duration::from_secs(5);
/// Questions to engines at a time; a request beyond is routed by load.
const ENGINE_QUESTIONS_MAX: usize = 64;
/// Engines that are asked one question, one after another, where the first ones cannot be reached.
const ENGINES_ASKED_MAX: usize = 2;
/// Longest answer of an engine's `/tokenize`: a million tokens are about 7 MB.
const ENGINE_ANSWER_BYTES_MAX: usize = 32 << 20;
/// Memory for the engines' answers, so that a repeated prompt is not asked for again.
const ENGINE_CACHE_BYTES: u64 = 32 << 20;
/// Prompts of one request that an engine is asked about; a larger batch is routed by load.
const ENGINE_BATCH_MAX: usize = 16;
/// Comparisons of local tokens with the engine's at a time; a sample beyond is not compared.
const COMPARISONS_MAX: usize = 2;
/// Texts that tokenizers and templates stumble over, compared before a model's first request.
const FIRST_CHATS: [&str; 2] = [
    r#"[{"role":"user","content":"Hello!"}]"#,
    r#"[{"role":"system","content":" You help.\n"},{"role":"user","content":"Gr\u00fc\u00dfe, \u4f60\u597d \ud83d\udc4b 12345"},{"role":"assistant","content":"Hi."},{"role":"user","content":"  Then\n\tstop . "}]"#,
];
/// The same for completions.
const FIRST_PROMPT: &str = r#""  Once upon\n\n\ta time, na\u00efve 12345 \u4f60\u597d \ud83d\udc4b\ud83c\udffd </s> <|im_end|> it's""#;

/// Where tokens come from.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum TokenizerSetting {
    /// The directory that the engine loaded the model from, if it is on this host too; else the engine's `/tokenize`.
    #[default]
    Auto,
    /// This model directory, or `tokenizer.json` in one.
    Path(PathBuf),
    /// The engine's `/tokenize`.
    Engine,
}

/// One prompt's tokens. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct Known {
    /// As the engine will see them.
    pub tokens: Arc<Vec<u32>>,
    /// Names of some of its beginnings; only a tokenizer of our own gives them.
    pub prefixes: Arc<Vec<Prefix>>,
    /// How many of the leading tokens were seen before.
    pub known_tokens: usize,
}

impl From<Vec<u32>> for Known {
    fn from(tokens: Vec<u32>) -> Self {
        Self { tokens: Arc::new(tokens), ..Self::default() }
    }
}

impl From<Prompt> for Known {
    fn from(Prompt { tokens, known_tokens, prefixes }: Prompt) -> Self {
        Self { tokens: Arc::new(tokens), prefixes: Arc::new(prefixes), known_tokens }
    }
}

/// The tokens of a request.
#[derive(Debug)]
pub(crate) struct Tokenized {
    /// One for each prompt of a batch; empty where they are not known.
    pub prompts: Vec<Known>,
    /// Where they came from.
    pub from: Tokens,
}

impl Tokenized {
    /// Not known.
    pub(crate) fn unknown(why: &'static str) -> Self {
        Self { prompts: Vec::new(), from: Tokens::Unknown(why) }
    }
}

/// Why a request goes no further.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Its body is wrong.
    Bad(BadRequest),
    /// It is longer than the model's context.
    TooLong,
}

/// How one model's prompts are tokenized.
#[derive(Clone, Debug)]
enum Source {
    Local(Arc<Local>),
    Engine,
}

/// A model's own files, and how they stand against its engine.
#[derive(Debug)]
struct Local {
    /// The base model's name.
    name: String,
    model: ModelPrompt,
    standing: Standing,
}

/// How a model's tokens are made, and how often that was compared.
#[derive(Clone, Debug)]
pub(crate) struct TokensFrom {
    /// `local` or `engine`.
    pub source: &'static str,
    /// What differs, where the engine is asked because of it.
    pub difference: Option<String>,
    /// Comparisons that were equal.
    pub equal: u64,
    /// Comparisons that were not.
    pub different: u64,
    /// Comparisons that the engine did not answer.
    pub impossible: u64,
}

/// The tokenizers of all models.
#[derive(Debug)]
pub(crate) struct Prompts {
    setting: TokenizerSetting,
    /// By base model.
    sources: ArcSwap<HashMap<String, Source>>,
    /// Long requests that are tokenized now.
    working: Semaphore,
    /// Questions to engines.
    asking: Semaphore,
    /// Comparisons that run now.
    comparing: Arc<Semaphore>,
    answers: Cache<u128, Arc<Vec<u32>>, ByBytes>,
    turn: AtomicUsize,
}

#[derive(Clone, Debug)]
struct ByBytes;

impl Weighter<u128, Arc<Vec<u32>>> for ByBytes {
    fn weight(&self, _key: &u128, tokens: &Arc<Vec<u32>>) -> u64 {
        64 + (tokens.capacity() * size_of::<u32>()) as u64
    }
}

impl Prompts {
    /// No model is known yet.
    pub(crate) fn new(setting: TokenizerSetting) -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            setting,
            sources: ArcSwap::default(),
            working: Semaphore::new(cores),
            asking: Semaphore::new(ENGINE_QUESTIONS_MAX),
            comparing: Arc::new(Semaphore::new(COMPARISONS_MAX)),
            answers: Cache::with_weighter(4096, ENGINE_CACHE_BYTES, ByBytes),
            turn: AtomicUsize::new(0),
        }
    }

    /// Whether it is settled how the prompts of `base_model` are tokenized.
    pub(crate) fn knows(&self, base_model: &str) -> bool {
        self.sources.load().contains_key(base_model)
    }

    /// Where the tokens of each model come from, by name.
    pub(crate) fn standings(&self) -> Vec<(String, TokensFrom)> {
        let sources = self.sources.load();
        let mut all: Vec<(String, TokensFrom)> = sources
            .iter()
            .map(|(name, source)| {
                let from = match source {
                    Source::Engine => TokensFrom {
                        source: Tokens::Engine.name(),
                        difference: None,
                        equal: 0,
                        different: 0,
                        impossible: 0,
                    },
                    Source::Local(local) => {
                        let difference = local.standing.difference().map(|d| d.to_string());
                        let (equal, different, impossible) = local.standing.counts();
                        let from = if difference.is_some() { Tokens::Engine } else { Tokens::Local };
                        TokensFrom { source: from.name(), difference, equal, different, impossible }
                    }
                };
                (name.clone(), from)
            })
            .collect();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        all
    }

    /// Something speaks against the local tokens of `base_model`: the next requests are compared.
    pub(crate) fn suspect(&self, base_model: &str) {
        if let Some(Source::Local(local)) = self.sources.load().get(base_model) {
            local.standing.suspect();
        }
    }

    /// Finds the tokenizers of models that were not there before, and compares them with their engine. Reads files; one call at a time.
    pub(crate) async fn learn(&self, table: &Table) {
        for instance in &table.view.instances {
            let Some(facts) = instance.facts.as_ref().filter(|_| instance.health.is_healthy()) else {
                continue;
            };
            let base = facts.base_model();
            if base.is_empty() || self.knows(base) {
                continue;
            }
            let source = self.find(instance, base).await;
            if let (Source::Local(local), Some(upstream)) = (&source, table.upstream(instance.id)) {
                for request in first_requests(base) {
                    let Ok(here) = local.model.tokens(&request, unix_s()) else { continue };
                    let Some(here) = here.into_iter().next() else { continue };
                    compare(local, &request, &here.tokens, upstream, None).await;
                }
            }
            let mut sources = HashMap::clone(&self.sources.load());
            sources.insert(base.to_owned(), source);
            self.sources.store(Arc::new(sources));
        }
    }

    async fn find(&self, instance: &Instance, base: &str) -> Source {
        let model = instance.model(base);
        let (path, asked_for) = match &self.setting {
            TokenizerSetting::Engine => return Source::Engine,
            TokenizerSetting::Path(path) => (path.clone(), true),
            TokenizerSetting::Auto => match model.and_then(|m| m.root.as_deref()) {
                Some(root) if Path::new(root).is_absolute() => (PathBuf::from(root), false),
                _ => return Source::Engine,
            },
        };
        let max_model_len = model.and_then(|m| m.max_model_len).and_then(|n| u32::try_from(n).ok());
        let config = PromptConfig { max_model_len, ..PromptConfig::default() };
        let shown = path.display().to_string();
        match tokio::task::spawn_blocking(move || ModelPrompt::load(&path, config)).await {
            Ok(Ok(model)) => {
                tracing::info!(model = base, path = shown, "tokenizing here");
                Source::Local(Arc::new(Local { name: base.to_owned(), model, standing: Standing::default() }))
            }
            Ok(Err(error)) if asked_for => {
                tracing::error!(model = base, %error, "the given tokenizer cannot be used; asking the engine instead");
                Source::Engine
            }
            Ok(Err(error)) => {
                tracing::info!(model = base, %error, "no tokenizer on this host; asking the engine");
                Source::Engine
            }
            Err(_) => {
                tracing::error!(
                    model = base,
                    path = shown,
                    "reading the tokenizer failed; asking the engine instead"
                );
                Source::Engine
            }
        }
    }

    /// The tokens of `request`, which `serving` (not empty) can serve. `headers` are the client's.
    pub(crate) async fn tokens(
        &self,
        request: &Arc<RequestFields>,
        serving: &[Arc<Instance>],
        table: &Table,
        headers: &HeaderMap,
    ) -> Result<Tokenized, Refused> {
        let base = serving.first().and_then(|i| i.facts.as_ref()).map_or("", |f| f.base_model());
        let local = match self.sources.load().get(base) {
            None => return Ok(Tokenized::unknown("tokenizer-loading")),
            Some(Source::Engine) => None,
            Some(Source::Local(local)) => Some(Arc::clone(local)),
        };
        let Some(local) = local else { return self.ask(request, serving, table, headers).await };
        let due = local.standing.is_due();
        let up = local.standing.is_up();
        let here = if up || due { Some(self.tokenize(&local, request).await) } else { None };
        if let (true, Some(Ok(Tokenized { prompts, .. }))) = (due, &here)
            && let [prompt] = prompts.as_slice()
        {
            self.compare_aside(&local, request, &prompt.tokens, serving, table, headers);
        }
        match here {
            Some(here) if up => here,
            _ => self.ask(request, serving, table, headers).await,
        }
    }

    async fn tokenize(&self, local: &Arc<Local>, request: &Arc<RequestFields>) -> Result<Tokenized, Refused> {
        let now = unix_s();
        let here = if request.body().len() <= INLINE_BYTES_MAX {
            local.model.tokens_within(request, now, INLINE_NEW_BYTES_MAX).transpose()
        } else {
            None
        };
        let found = match here {
            Some(found) => found,
            None => {
                let _turn = self.working.acquire().await.expect("this semaphore is never closed");
                let (local, request) = (Arc::clone(local), Arc::clone(request));
                tokio::task::spawn_blocking(move || local.model.tokens(&request, now))
                    .await
                    .unwrap_or(Err(PromptError::Unroutable(Unroutable::TokenizerFailed)))
            }
        };
        match found {
            Ok(prompts) => {
                let prompts = prompts.into_iter().map(Known::from).collect();
                Ok(Tokenized { prompts, from: Tokens::Local })
            }
            Err(error) => refused(error),
        }
    }

    /// Compares in a task of its own, if there is room for one.
    fn compare_aside(
        &self,
        local: &Arc<Local>,
        request: &Arc<RequestFields>,
        here: &Arc<Vec<u32>>,
        serving: &[Arc<Instance>],
        table: &Table,
        headers: &HeaderMap,
    ) {
        let Ok(room) = Arc::clone(&self.comparing).try_acquire_owned() else { return };
        let Some(upstream) = self.next(serving, table) else { return };
        let (local, request, here) = (Arc::clone(local), Arc::clone(request), Arc::clone(here));
        let key = headers.get(AUTHORIZATION).cloned();
        tokio::spawn(async move {
            compare(&local, &request, &here, &upstream, key.as_ref()).await;
            drop(room);
        });
    }

    /// The engine whose turn it is to be asked.
    fn next(&self, serving: &[Arc<Instance>], table: &Table) -> Option<Arc<Upstream>> {
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        serving.get(turn % serving.len().max(1)).and_then(|i| table.upstream(i.id)).map(Arc::clone)
    }

    async fn ask(
        &self,
        request: &RequestFields,
        serving: &[Arc<Instance>],
        table: &Table,
        headers: &HeaderMap,
    ) -> Result<Tokenized, Refused> {
        let questions = match tokenize_bodies(request) {
            Ok(questions) => questions,
            Err(error) => return refused(error),
        };
        if questions.len() > ENGINE_BATCH_MAX {
            return Ok(Tokenized::unknown("batch-too-large"));
        }
        let mut prompts = Vec::with_capacity(questions.len());
        let mut from = Tokens::Local;
        for question in questions {
            match question {
                RemotePrompt::Tokens(tokens) => prompts.push(tokens.into()),
                RemotePrompt::Ask(body) => {
                    from = Tokens::Engine;
                    match self.ask_one(body.into(), serving, table, headers).await {
                        Ok(tokens) => prompts.push(Known { tokens, ..Known::default() }),
                        Err(why) => return Ok(Tokenized::unknown(why)),
                    }
                }
            }
        }
        Ok(Tokenized { prompts, from })
    }

    async fn ask_one(
        &self,
        body: Bytes,
        serving: &[Arc<Instance>],
        table: &Table,
        headers: &HeaderMap,
    ) -> Result<Arc<Vec<u32>>, &'static str> {
        let key = xxh3_128(&body);
        if let Some(tokens) = self.answers.get(&key) {
            return Ok(tokens);
        }
        let Ok(_question) = self.asking.try_acquire() else { return Err("tokenize-busy") };
        let mut answer = Err("no-worker");
        // An engine that just died may still be listed: the next one knows as well.
        for _ in 0..serving.len().min(ENGINES_ASKED_MAX) {
            let Some(upstream) = self.next(serving, table) else { continue };
            answer = question(body.clone(), &upstream, headers.get(AUTHORIZATION)).await;
            if !matches!(answer, Err("tokenize-unreachable" | "tokenize-failed")) {
                break;
            }
        }
        let tokens = Arc::new(answer?);
        self.answers.insert(key, Arc::clone(&tokens));
        Ok(tokens)
    }
}

fn refused(error: PromptError) -> Result<Tokenized, Refused> {
    match error {
        PromptError::BadRequest(bad) => Err(Refused::Bad(bad)),
        PromptError::Unroutable(Unroutable::TooLong) => Err(Refused::TooLong),
        PromptError::Unroutable(why) => Ok(Tokenized::unknown(why.label())),
    }
}

/// The requests that are compared before a model's first one.
fn first_requests(model: &str) -> impl Iterator<Item = RequestFields> {
    let model = serde_json::Value::from(model).to_string();
    let chats =
        FIRST_CHATS.map(|messages| (Endpoint::Chat, format!(r#"{{"model":{model},"messages":{messages}}}"#)));
    let prompt = (Endpoint::Completions, format!(r#"{{"model":{model},"prompt":{FIRST_PROMPT}}}"#));
    chats
        .into_iter()
        .chain([prompt])
        .filter_map(|(endpoint, body)| RequestFields::parse(endpoint, body.into()).ok())
}

/// Compares the tokens of `request` with what the engine makes of it, and notes the result.
async fn compare(
    local: &Local,
    request: &RequestFields,
    here: &[u32],
    upstream: &Upstream,
    key: Option<&HeaderValue>,
) {
    let Local { name, model, standing } = local;
    // A prompt of token ids, or one that cannot be asked about, says nothing.
    let Ok(mut questions) = tokenize_bodies(request) else { return };
    let Some(RemotePrompt::Ask(body)) = questions.pop() else { return };
    let engine = match question(body.into(), upstream, key).await {
        Ok(engine) => engine,
        Err(reason) => {
            standing.could_not();
            tracing::debug!(model = name, reason, "could not compare tokens with the engine's");
            return;
        }
    };
    let Some(first_token) = first_difference(here, &engine) else {
        if standing.passed() {
            tracing::info!(model = name, "tokens are equal again: tokenizing here");
        }
        return;
    };
    let rendered = match request.endpoint() {
        Endpoint::Chat => model.render(request, unix_s()).ok(),
        Endpoint::Completions | Endpoint::Other => None,
    };
    let blame = match &rendered {
        None => Blame::Tokenizer,
        Some(text) => {
            let body = serde_json::json!({ "model": name, "prompt": text, "add_special_tokens": false });
            match question(body.to_string().into(), upstream, key).await {
                Ok(of_text) if of_text == here => Blame::Template,
                Ok(_) => Blame::Tokenizer,
                Err(_) => Blame::Unknown,
            }
        }
    };
    let difference = Difference {
        blame,
        first_token,
        here: here.len(),
        engine: engine.len(),
        rendered_chars: rendered.map(|text| text.chars().count()),
    };
    let shown = difference.to_string();
    if standing.failed(difference) {
        tracing::warn!(
            model = name,
            difference = shown,
            "tokens differ from the engine's: asking the engine from now on"
        );
    }
}

/// One question to one engine.
async fn question(
    body: Bytes,
    upstream: &Upstream,
    key: Option<&HeaderValue>,
) -> Result<Vec<u32>, &'static str> {
    tokio::time::timeout(ENGINE_TIMEOUT, ask_engine(body, upstream, key))
        .await
        .unwrap_or(Err("tokenize-timeout"))
}

async fn ask_engine(
    body: Bytes,
    upstream: &Upstream,
    key: Option<&HeaderValue>,
) -> Result<Vec<u32>, &'static str> {
    let uri: Uri = format!("{}/tokenize", upstream.prefix).parse().map_err(|_| "tokenize-failed")?;
    let request = || {
        let mut request = Request::new(Full::new(body.clone()));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = uri.clone();
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(key) = key {
            request.headers_mut().insert(AUTHORIZATION, key.clone());
        }
        request
    };
    let exchange = upstream.pool.send(request).await.map_err(|error| match error {
        SendError::Connect(_) | SendError::ConnectTimeout => "tokenize-unreachable",
        SendError::NoResponse(_) => "tokenize-failed",
    })?;
    if exchange.head.status != StatusCode::OK {
        return Err("tokenize-refused");
    }
    let mut answer = Vec::new();
    let mut body = pin!(exchange.body);
    while let Some(frame) = std::future::poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
        let Ok(data) = frame.map_err(|_| "tokenize-failed")?.into_data() else { continue };
        if answer.len() + data.len() > ENGINE_ANSWER_BYTES_MAX {
            return Err("tokenize-too-long");
        }
        answer.extend_from_slice(&data);
    }
    parse_tokenize_response(&answer).map_err(|_| "tokenize-not-understood")
}

/// Now, as templates print it: engines' containers run in UTC.
fn unix_s() -> i64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |d| d.as_secs() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::task::Poll;

    fn chat(text: &str) -> Arc<RequestFields> {
        let body = serde_json::json!({ "model": "m", "messages": [{ "role": "user", "content": text }] })
            .to_string();
        Arc::new(RequestFields::parse(Endpoint::Chat, body.into()).expect("a chat"))
    }

    async fn at_once<F: Future>(future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| match future.as_mut().poll(cx) {
            Poll::Ready(output) => Poll::Ready(Some(output)),
            Poll::Pending => Poll::Ready(None),
        })
        .await
    }

    #[tokio::test]
    async fn a_long_prompt_waits_for_its_turn_and_nobody_waits_for_it() {
        let files = Path::new(env!("CARGO_MANIFEST_DIR")).join("../kvlane-prompt/tests/models/llama3-like");
        let model = ModelPrompt::load(&files, PromptConfig::default()).expect("a model's files");
        let local = Arc::new(Local { name: "m".into(), model, standing: Standing::default() });
        let prompts = Prompts::new(TokenizerSetting::Auto);
        // Text that does not repeat itself: a stretch that was seen is known wherever it comes again.
        let text = |what: &str, words: u32| (0..words).map(|i| format!("{what} {i} ")).collect::<String>();
        let (known, long) = (chat(&text("known", 6_000)), chat(&text("other", 90_000)));
        assert!(at_once(prompts.tokenize(&local, &known)).await.is_none(), "60 kB of new text: on the pool");
        prompts.tokenize(&local, &known).await.expect("tokens");

        let turns = u32::try_from(prompts.working.available_permits()).expect("few");
        let all_taken = prompts.working.acquire_many(turns).await.expect("open");
        {
            let mut waiting = pin!(prompts.tokenize(&local, &long));
            assert!(at_once(waiting.as_mut()).await.is_none(), "a megabyte of new text");
            for request in [&chat("short"), &known] {
                let found = at_once(prompts.tokenize(&local, request)).await;
                assert!(matches!(found, Some(Ok(Tokenized { from: Tokens::Local, .. }))));
            }
            assert!(at_once(waiting.as_mut()).await.is_none(), "no more at a time than there are turns");
            drop(all_taken);
            let found = waiting.await.expect("tokens");
            assert!(found.prompts[0].tokens.len() > 90_000);
        }
        assert_eq!(prompts.working.available_permits(), turns as usize);
    }
}
