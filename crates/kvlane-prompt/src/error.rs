//! Why a prompt is not known, and what the caller does about it.
//!
//! Three kinds, three reactions: a [`BadRequest`] is answered with 400; an [`Unroutable`] request is forwarded by load
//! alone and the explanation shows the cause; a [`LoadError`] is told to the operator at start. None of them ever
//! contains a word of a prompt.

use std::fmt;
use std::path::PathBuf;

/// The body is not what its endpoint takes: answer 400 with this message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum BadRequest {
    /// The body is not UTF-8.
    NotUtf8 {
        /// First offending byte, from 0.
        at_byte: usize,
    },
    /// The body is not a JSON object.
    Malformed {
        /// Line of the error, from 1.
        line: usize,
        /// Column of the error, from 1.
        column: usize,
        /// The body ended too early.
        cut_off: bool,
    },
    /// A field is absent or of the wrong type.
    Field {
        /// Its name.
        field: &'static str,
        /// What it must be.
        expected: Expected,
    },
}

/// What a field must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Expected {
    /// A string.
    String,
    /// An integer.
    Integer,
    /// `true` or `false`.
    Boolean,
    /// A JSON object.
    Object,
    /// A list of JSON objects.
    Objects,
    /// `"left"` or `"right"`.
    Side,
    /// A list of messages, each an object with a `role`.
    Messages,
    /// A string, a list of token ids, or a list of either.
    Prompt,
}

impl BadRequest {
    pub(crate) fn field(field: &'static str, expected: Expected) -> Self {
        Self::Field { field, expected }
    }

    pub(crate) fn malformed(error: &serde_json::Error) -> Self {
        Self::Malformed { line: error.line(), column: error.column(), cut_off: error.is_eof() }
    }

    /// The field at fault, for the error body's `param`.
    pub fn param(&self) -> Option<&'static str> {
        match self {
            Self::Field { field, .. } => Some(field),
            Self::NotUtf8 { .. } | Self::Malformed { .. } => None,
        }
    }
}

impl fmt::Display for BadRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NotUtf8 { at_byte } => {
                write!(f, "the body is not UTF-8 (byte {at_byte}); send JSON encoded as UTF-8")
            }
            Self::Malformed { line, column, cut_off: true } => {
                write!(f, "the body ends inside a JSON value (line {line}, column {column})")
            }
            Self::Malformed { line, column, cut_off: false } => {
                write!(f, "the body is not a JSON object (line {line}, column {column})")
            }
            Self::Field { field, expected } => write!(f, "`{field}` must be {expected}"),
        }
    }
}

impl std::error::Error for BadRequest {}

impl fmt::Display for Expected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::String => "a string",
            Self::Integer => "an integer",
            Self::Boolean => "true or false",
            Self::Object => "an object",
            Self::Objects => "a list of objects",
            Self::Side => "\"left\" or \"right\"",
            Self::Messages => "a list of messages, each an object with a role",
            Self::Prompt => "a string, a list of token ids (0 to 4294967295), or a list of either",
        })
    }
}

/// The engine's tokens cannot be foretold for this request: forward it by load and show the cause.
///
/// The engine may well answer such a request with an error of its own; that is the engine's to say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Unroutable {
    /// The endpoint has no prompt (embeddings, scores, …).
    NoPrompt,
    /// A message contains pictures, sound or other media.
    Media,
    /// The prompt is given as embeddings.
    PromptEmbeds,
    /// Fill-in-the-middle (`suffix`): each model has its own way to build that prompt.
    Suffix,
    /// The request brings its own chat template.
    RequestTemplate,
    /// The model has no chat template.
    NoTemplate,
    /// The template refused the conversation, or uses what this crate lacks.
    TemplateFailed,
    /// The tokenizer refused the text.
    TokenizerFailed,
    /// The prompt is longer than the model's context; the engine will refuse it.
    TooLong,
    /// A part of the request is of a type that the engine will refuse.
    Rejected,
}

impl Unroutable {
    /// A short name, for metric labels and explanations.
    pub fn label(&self) -> &'static str {
        match self {
            Self::NoPrompt => "no-prompt",
            Self::Media => "media",
            Self::PromptEmbeds => "prompt-embeds",
            Self::Suffix => "suffix",
            Self::RequestTemplate => "request-template",
            Self::NoTemplate => "no-template",
            Self::TemplateFailed => "template-failed",
            Self::TokenizerFailed => "tokenizer-failed",
            Self::TooLong => "too-long",
            Self::Rejected => "rejected",
        }
    }
}

impl fmt::Display for Unroutable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoPrompt => "requests of this endpoint have no prompt to route by",
            Self::Media => "a message contains media, whose tokens only the engine knows",
            Self::PromptEmbeds => "the prompt is given as embeddings",
            Self::Suffix => "fill-in-the-middle prompts are built by the engine",
            Self::RequestTemplate => "the request brings its own chat template",
            Self::NoTemplate => "the model has no chat template",
            Self::TemplateFailed => "the chat template failed on these messages",
            Self::TokenizerFailed => "the tokenizer failed on this prompt",
            Self::TooLong => "the prompt is longer than the model's context",
            Self::Rejected => "a message is of a form that the engine refuses",
        })
    }
}

/// Why [`ModelPrompt::tokens`](crate::ModelPrompt::tokens) gave no tokens.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PromptError {
    /// Answer 400.
    BadRequest(BadRequest),
    /// Forward by load alone.
    Unroutable(Unroutable),
}

impl From<BadRequest> for PromptError {
    fn from(e: BadRequest) -> Self {
        Self::BadRequest(e)
    }
}

impl From<Unroutable> for PromptError {
    fn from(e: Unroutable) -> Self {
        Self::Unroutable(e)
    }
}

impl fmt::Display for PromptError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::BadRequest(e) => e.fmt(f),
            Self::Unroutable(e) => e.fmt(f),
        }
    }
}

impl std::error::Error for PromptError {}

/// A model's tokenizer or template cannot be used: tell the operator.
#[derive(Debug)]
pub enum LoadError {
    /// There is no such file or directory, or it cannot be read.
    Unreadable {
        /// What was looked for.
        path: PathBuf,
        /// What the system said.
        error: std::io::Error,
    },
    /// The file is there but is not what its name says.
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unreadable { path, error } => write!(f, "cannot read {}: {error}", path.display()),
            Self::Malformed { path, problem } => write!(f, "{}: {problem}", path.display()),
        }
    }
}

impl std::error::Error for LoadError {}
