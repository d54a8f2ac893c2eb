//! The few lines that a probe reads out of Prometheus' text format.

/// One sample: name, labels in order, value.
#[derive(Debug, PartialEq)]
pub(crate) struct Sample<'a> {
    pub(crate) name: &'a str,
    labels: &'a str,
    pub(crate) value: f64,
}

impl<'a> Sample<'a> {
    /// The label's value as written (escapes are not resolved: no label read here has any).
    pub(crate) fn label(&self, name: &str) -> Option<&'a str> {
        let mut rest = self.labels;
        loop {
            let (key, after) = rest.split_once("=\"")?;
            let end = end_of_quoted(after)?;
            if key.trim_start_matches([',', ' ']) == name {
                return Some(&after[..end]);
            }
            rest = &after[end + 1..];
        }
    }
}

/// Position of the closing quote in what follows an opening one.
fn end_of_quoted(text: &str) -> Option<usize> {
    let mut escaped = false;
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            b'"' if !escaped => return Some(at),
            b'\\' => escaped = !escaped,
            _ => escaped = false,
        }
    }
    None
}

/// All samples; lines that are none are skipped.
pub(crate) fn samples(text: &str) -> impl Iterator<Item = Sample<'_>> {
    text.lines().filter(|line| !line.starts_with('#')).filter_map(|line| {
        let (head, labels, rest) = match line.find('{') {
            None => {
                let (head, rest) = line.split_once(' ')?;
                (head, "", rest)
            }
            Some(open) => {
                let close = line.rfind('}').filter(|close| *close > open)?;
                (&line[..open], &line[open + 1..close], &line[close + 1..])
            }
        };
        let value = rest.split_whitespace().next()?.parse().ok()?;
        Some(Sample { name: head, labels, value })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_labels_with_commas_braces_and_escapes() {
        let text = "# HELP a b\nup 1\na:b{x=\"1,2}\",y=\"q\\\"z\",engine=\"3\"} 2.5 1700\nbroken{ 1\n";
        let all: Vec<_> = samples(text).collect();
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].name, all[0].value), ("up", 1.0));
        assert_eq!(all[1].label("x"), Some("1,2}"));
        assert_eq!(all[1].label("y"), Some("q\\\"z"));
        assert_eq!(all[1].label("engine"), Some("3"));
        assert_eq!(all[1].label("none"), None);
        assert_eq!(all[1].value, 2.5);
    }
}
