//! The environment that `transformers` renders chat templates in.

use super::python::{self, Dumps};
use super::{methods, strftime};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, ValueKind, ValueOrKwargs};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State, Value};

/// The variable that carries the time into a rendering; no template can name it.
pub(super) const NOW: &str = "local unix s";

/// Most blocks and calls inside each other; Python's own limit is of this order.
const RECURSION_LIMIT: usize = 200;

/// Most steps of one rendering, so that no template runs for ever. A conversation of a thousand messages takes some
/// hundred thousand.
const FUEL: u64 = 200_000_000;

/// Most blanks that `tojson` indents a level by.
const MAX_INDENT: usize = 64;

/// An environment without templates.
pub(super) fn new() -> Result<Environment<'static>, Error> {
    let mut env = Environment::new();
    env.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_recursion_limit(RECURSION_LIMIT);
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(methods::call);
    env.set_formatter(|out, _, value| {
        match value.as_str() {
            Some(text) => out.write_str(text),
            None => {
                let mut text = String::new();
                python::str(value, &mut text);
                out.write_str(&text)
            }
        }
        .map_err(Error::from)
    });
    env.add_function("raise_exception", |message: &Value| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message.to_string()))
    });
    env.add_function("strftime_now", |state: &State<'_, '_>, format: &str| -> Result<String, Error> {
        let now = state.lookup(NOW).and_then(|now| now.as_i64()).unwrap_or(0);
        Ok(strftime::strftime(format, now))
    });
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| {
        let mut text = String::new();
        python::str(value, &mut text);
        text
    });
    env.add_filter("trim", |value: &Value, chars: Option<&str>| {
        let mut text = String::new();
        python::str(value, &mut text);
        let cut = |c: char| chars.map_or_else(|| python::is_space(c), |set| set.contains(c));
        text.trim_matches(cut).to_owned()
    });
    env.add_filter("join", join);
    env.add_test("sequence", |value: &Value| {
        matches!(value.kind(), ValueKind::Seq | ValueKind::Map | ValueKind::String | ValueKind::Undefined)
    });
    env.add_test("iterable", |value: &Value| match value.kind() {
        ValueKind::String | ValueKind::Undefined => true,
        ValueKind::None => false,
        _ => value.try_iter().is_ok(),
    });
    env.add_test("integer", |value: &Value| value.kind() == ValueKind::Number && value.is_integer());
    env.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
    Ok(env)
}

/// `json.dumps(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: &Value, args: Rest<ValueOrKwargs>) -> Result<Value, Error> {
    let mut positional = args.into_values();
    let kwargs = match positional.pop_if(|last| last.is_kwargs()) {
        Some(kwargs) => Kwargs::try_from(kwargs)?,
        None => Kwargs::from_iter(Vec::<(String, Value)>::new()),
    };
    let argument = |i: usize, name: &str| -> Result<Option<Value>, Error> {
        let value = match positional.get(i) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(value.filter(|v| !v.is_none()))
    };
    let ensure_ascii = argument(0, "ensure_ascii")?.is_some_and(|v| v.is_true());
    let indent = argument(1, "indent")?.map(|indent| match indent.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(indent.as_usize().unwrap_or(0).min(MAX_INDENT)),
    });
    let separators = argument(2, "separators")?;
    let sort_keys = argument(3, "sort_keys")?.is_some_and(|v| v.is_true());
    kwargs.assert_all_used()?;
    let (item_separator, key_separator) = match separators {
        Some(pair) => {
            let text = |i| pair.get_item_by_index(i).map(|v| v.as_str().unwrap_or_default().to_owned());
            (text(0)?, text(1)?)
        }
        None => (if indent.is_some() { "," } else { ", " }.to_owned(), ": ".to_owned()),
    };
    let mut out = String::new();
    Dumps { ensure_ascii, sort_keys, indent, item_separator, key_separator }.write(value, 0, &mut out)?;
    Ok(Value::from(out))
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the signature that the engine's argument conversion needs"
)]
fn join(
    value: &Value,
    separator: Option<&Value>,
    attribute: Option<&Value>,
    kwargs: Kwargs,
) -> Result<String, Error> {
    let named: Option<Value> = kwargs.get("attribute")?;
    let attribute = attribute.cloned().or(named);
    kwargs.assert_all_used()?;
    let mut out = String::new();
    let items: Vec<Value> = match value.as_str() {
        Some(text) => text.chars().map(Value::from).collect(),
        None => value.try_iter()?.collect(),
    };
    for (i, item) in items.iter().enumerate() {
        if let (true, Some(separator)) = (i > 0, separator) {
            python::str(separator, &mut out);
        }
        match &attribute {
            None => python::str(item, &mut out),
            Some(name) => python::str(&item.get_item(name)?, &mut out),
        }
    }
    Ok(out)
}

/// `{% generation %}` marks what the model wrote, for training; to the text it is a scope and nothing else.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let end = tag.find("%}").map_or(tag.len(), |end| end + 2);
        let (tag, after) = tag.split_at(end);
        let word = tag.trim_start_matches("{%").trim_end_matches("%}").trim_matches(['-', '+']).trim();
        match word {
            "generation" => out.push_str(&tag.replace("generation", "with")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endwith")),
            _ => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}
