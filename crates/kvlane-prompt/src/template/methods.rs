//! Python's methods of strings, dicts and lists, which templates call.
//!
//! Offsets and widths count code points, whitespace is Python's. Methods that would change their object are errors, as in
//! the engine's sandbox.

use super::python;
use minijinja::formatting::{FormatStyle, format};
use minijinja::value::{Kwargs, Tuple, ValueKind, from_args};
use minijinja::{Error, ErrorKind, State, Value};

/// Called for each method that a value does not have by itself.
pub(super) fn call(
    _: &mut State<'_, '_>,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    match value.kind() {
        ValueKind::String => string(value.as_str().unwrap_or_default(), method, args),
        ValueKind::Map => dict(value, method, args),
        ValueKind::Seq | ValueKind::Iterable => list(value, method, args),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn string(s: &str, method: &str, args: &[Value]) -> Result<Value, Error> {
    let text = |s: String| Ok(Value::from(s));
    let truth = |b: bool| Ok(Value::from(b));
    let every = |test: fn(char) -> bool| Ok(Value::from(!s.is_empty() && s.chars().all(test)));
    match method {
        "upper" => none(args).and_then(|()| text(s.to_uppercase())),
        "lower" => none(args).and_then(|()| text(s.to_lowercase())),
        "casefold" => none(args).and_then(|()| text(s.to_lowercase().replace('ß', "ss"))),
        "swapcase" => none(args).and_then(|()| text(swapcase(s))),
        "capitalize" => none(args).and_then(|()| text(capitalize(s))),
        "title" => none(args).and_then(|()| text(title(s))),
        "strip" | "lstrip" | "rstrip" => {
            let (chars,): (Option<&Value>,) = from_args(args)?;
            let chars = chars.filter(|c| !c.is_none()).map(|c| c.as_str().unwrap_or_default());
            let cut = |c: char| chars.map_or_else(|| python::is_space(c), |set| set.contains(c));
            let s = if method == "rstrip" { s } else { s.trim_start_matches(cut) };
            Ok(Value::from(if method == "lstrip" { s } else { s.trim_end_matches(cut) }))
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(s.strip_prefix(prefix).unwrap_or(s)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(s.strip_suffix(suffix).unwrap_or(s)))
        }
        "replace" => {
            let (old, new, count): (&str, &str, Option<i64>) = from_args(args)?;
            match usize::try_from(count.unwrap_or(-1)) {
                Ok(count) => text(s.replacen(old, new, count)),
                Err(_) => text(s.replace(old, new)),
            }
        }
        "split" | "rsplit" => {
            let (sep, limit, kwargs): (Option<&Value>, Option<i64>, Kwargs) = from_args(args)?;
            let named: Option<Value> = kwargs.get("sep")?;
            let limit = limit.or(kwargs.get("maxsplit")?);
            kwargs.assert_all_used()?;
            let sep = sep.cloned().or(named).filter(|sep| !sep.is_none());
            let limit = usize::try_from(limit.unwrap_or(-1)).unwrap_or(usize::MAX);
            split(s, sep.as_ref().and_then(Value::as_str), limit, method == "rsplit")
        }
        "splitlines" => {
            let (keep, kwargs): (Option<bool>, Kwargs) = from_args(args)?;
            let keep = keep.or(kwargs.get("keepends")?).unwrap_or(false);
            Ok(python::list(lines(s, keep).map(Value::from).collect()))
        }
        "partition" | "rpartition" => {
            let (sep,): (&str,) = from_args(args)?;
            let parts = match if method == "partition" { s.split_once(sep) } else { s.rsplit_once(sep) } {
                Some((before, after)) => [before, sep, after],
                None if method == "partition" => [s, "", ""],
                None => ["", "", s],
            };
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        "startswith" | "endswith" => {
            let (what, start, end): (&Value, Option<i64>, Option<i64>) = from_args(args)?;
            let s = slice(s, start, end);
            let test =
                |what: &str| if method == "startswith" { s.starts_with(what) } else { s.ends_with(what) };
            match what.as_str() {
                Some(what) => truth(test(what)),
                None if what.is_tuple() => truth(what.try_iter()?.any(|w| w.as_str().is_some_and(&test))),
                None => Err(wrong("a string or a tuple of strings")),
            }
        }
        "find" | "rfind" | "index" | "rindex" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let part = slice(s, start, end);
            let at = if method.starts_with('r') { part.rfind(what) } else { part.find(what) };
            let skipped = (part.as_ptr() as usize) - (s.as_ptr() as usize);
            match at {
                Some(at) => Ok(Value::from(s[..skipped + at].chars().count())),
                None if method.ends_with("find") => Ok(Value::from(-1)),
                None => Err(Error::new(ErrorKind::InvalidOperation, "substring not found")),
            }
        }
        "count" => {
            let (what, start, end): (&str, Option<i64>, Option<i64>) = from_args(args)?;
            let part = slice(s, start, end);
            Ok(Value::from(if what.is_empty() {
                part.chars().count() + 1
            } else {
                part.matches(what).count()
            }))
        }
        "join" => {
            let (values,): (&Value,) = from_args(args)?;
            let mut out = String::new();
            for (i, value) in values.try_iter()?.enumerate() {
                if i > 0 {
                    out.push_str(s);
                }
                out.push_str(value.as_str().ok_or_else(|| wrong("a list of strings"))?);
            }
            text(out)
        }
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            let (sign, digits) = s.split_at(usize::from(s.starts_with(['+', '-'])));
            let zeros = width.min(MAX_WIDTH).saturating_sub(s.chars().count());
            text(format!("{sign}{}{digits}", "0".repeat(zeros)))
        }
        "ljust" | "rjust" | "center" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let (length, width) = (s.chars().count(), width.min(MAX_WIDTH));
            let pad = width.saturating_sub(length);
            let left = match method {
                "ljust" => 0,
                "rjust" => pad,
                _ => pad / 2 + (pad & width & 1),
            };
            let fill = |n: usize| fill.unwrap_or(' ').to_string().repeat(n);
            text(format!("{}{s}{}", fill(left), fill(pad - left)))
        }
        "expandtabs" => {
            let (size,): (Option<usize>,) = from_args(args)?;
            text(expandtabs(s, size.unwrap_or(8).min(MAX_WIDTH)))
        }
        "isspace" => every(python::is_space),
        "isdigit" | "isdecimal" | "isnumeric" => every(char::is_numeric),
        "isalpha" => every(char::is_alphabetic),
        "isalnum" => every(char::is_alphanumeric),
        "isascii" => truth(s.is_ascii()),
        "isupper" => truth(s.chars().any(char::is_uppercase) && !s.chars().any(char::is_lowercase)),
        "islower" => truth(s.chars().any(char::is_lowercase) && !s.chars().any(char::is_uppercase)),
        "istitle" => truth(s.chars().any(char::is_alphabetic) && title(s) == s),
        "format" => format(FormatStyle::StrFormat, s, args).map(Value::from),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

/// Longest padding that a template may ask for, in code points: keeps a bad template from filling the memory.
const MAX_WIDTH: usize = 1 << 16;

fn wrong(expected: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("expected {expected}"))
}

fn none(args: &[Value]) -> Result<(), Error> {
    from_args(args)
}

fn capitalize(s: &str) -> String {
    let mut chars = s.chars();
    match chars.next() {
        None => String::new(),
        Some(first) => first.to_uppercase().chain(chars.as_str().to_lowercase().chars()).collect(),
    }
}

fn title(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    let mut inside = false;
    for c in s.chars() {
        if !c.is_alphabetic() {
            out.push(c);
        } else if inside {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
        inside = c.is_alphabetic();
    }
    out
}

fn swapcase(s: &str) -> String {
    let mut out = String::with_capacity(s.len());
    for c in s.chars() {
        if c.is_uppercase() {
            out.extend(c.to_lowercase());
        } else {
            out.extend(c.to_uppercase());
        }
    }
    out
}

fn expandtabs(s: &str, size: usize) -> String {
    let mut out = String::with_capacity(s.len());
    let mut column = 0;
    for c in s.chars() {
        match c {
            '\t' if size > 0 => {
                let n = size - column % size;
                out.extend(std::iter::repeat_n(' ', n));
                column += n;
            }
            '\t' => {}
            '\n' | '\r' => {
                out.push(c);
                column = 0;
            }
            c => {
                out.push(c);
                column += 1;
            }
        }
    }
    out
}

/// `s[start:end]` in code points, negative ones from the end.
fn slice(s: &str, start: Option<i64>, end: Option<i64>) -> &str {
    if start.is_none() && end.is_none() {
        return s;
    }
    let length = s.chars().count();
    let place = |i: i64| match usize::try_from(i) {
        Ok(i) => i.min(length),
        Err(_) => length.saturating_sub(usize::try_from(i.unsigned_abs()).unwrap_or(usize::MAX)),
    };
    let (start, end) = (start.map_or(0, place), end.map_or(length, place));
    let byte = |i: usize| s.char_indices().nth(i).map_or(s.len(), |(at, _)| at);
    if start >= end { &s[byte(start)..byte(start)] } else { &s[byte(start)..byte(end)] }
}

fn split(s: &str, sep: Option<&str>, limit: usize, from_right: bool) -> Result<Value, Error> {
    let limit_plus = limit.saturating_add(1);
    let mut parts: Vec<&str> = match (sep, from_right) {
        (Some(""), _) => return Err(wrong("a separator that is not empty")),
        (Some(sep), false) => s.splitn(limit_plus, sep).collect(),
        (Some(sep), true) => s.rsplitn(limit_plus, sep).collect(),
        (None, false) => {
            let mut parts = Vec::new();
            let mut rest = s.trim_start_matches(python::is_space);
            while !rest.is_empty() {
                match rest.find(python::is_space) {
                    Some(at) if parts.len() < limit => {
                        parts.push(&rest[..at]);
                        rest = rest[at..].trim_start_matches(python::is_space);
                    }
                    _ if parts.len() < limit => {
                        parts.push(rest);
                        rest = "";
                    }
                    _ => {
                        parts.push(rest.trim_end_matches(python::is_space));
                        rest = "";
                    }
                }
            }
            parts
        }
        (None, true) => {
            let mut parts = Vec::new();
            let mut rest = s.trim_end_matches(python::is_space);
            while !rest.is_empty() {
                match rest.rfind(python::is_space) {
                    Some(at) if parts.len() < limit => {
                        let width = rest[at..].chars().next().map_or(1, char::len_utf8);
                        parts.push(&rest[at + width..]);
                        rest = rest[..at].trim_end_matches(python::is_space);
                    }
                    _ => {
                        parts.push(rest.trim_start_matches(python::is_space));
                        rest = "";
                    }
                }
            }
            parts
        }
    };
    if from_right {
        parts.reverse();
    }
    Ok(python::list(parts.into_iter().map(Value::from).collect()))
}

/// Lines by every line boundary that Python knows.
fn lines(s: &str, keep: bool) -> impl Iterator<Item = &str> {
    let mut rest = s;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let boundary = |c| {
            matches!(
                c,
                '\n' | '\r' | '\u{b}' | '\u{c}' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}'
            )
        };
        let end = rest.find(boundary).unwrap_or(rest.len());
        let width = if rest[end..].starts_with("\r\n") {
            2
        } else {
            rest[end..].chars().next().map_or(0, char::len_utf8)
        };
        let line = &rest[..if keep { end + width } else { end }];
        rest = &rest[end + width..];
        Some(line)
    })
}

fn dict(value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    let entries = || -> Result<Vec<(Value, Value)>, Error> {
        value.try_iter()?.map(|key| value.get_item(&key).map(|item| (key, item))).collect()
    };
    match method {
        "items" => {
            none(args)?;
            Ok(python::list(entries()?.into_iter().map(|(k, v)| Value::from(Tuple::from([k, v]))).collect()))
        }
        "keys" => none(args).and_then(|()| Ok(python::list(value.try_iter()?.collect()))),
        "values" => {
            none(args).and_then(|()| Ok(python::list(entries()?.into_iter().map(|(_, v)| v).collect())))
        }
        "get" => {
            let (key, default): (&Value, Option<&Value>) = from_args(args)?;
            let found = value.get_item(key)?;
            Ok(if found.is_undefined() { default.cloned().unwrap_or(Value::from(())) } else { found })
        }
        "copy" => none(args).map(|()| value.clone()),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}

fn list(value: &Value, method: &str, args: &[Value]) -> Result<Value, Error> {
    match method {
        "count" => {
            let (what,): (&Value,) = from_args(args)?;
            Ok(Value::from(value.try_iter()?.filter(|item| item == what).count()))
        }
        "index" => {
            let (what,): (&Value,) = from_args(args)?;
            match value.try_iter()?.position(|item| item == *what) {
                Some(at) => Ok(Value::from(at)),
                None => Err(Error::new(ErrorKind::InvalidOperation, "value is not in the list")),
            }
        }
        "copy" => none(args).map(|()| value.clone()),
        _ => Err(Error::from(ErrorKind::UnknownMethod)),
    }
}
