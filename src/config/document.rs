//! A TOML text with the line of each key.

use std::ops::Range;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::config::error::{Problem, reword};

/// A parsed TOML text.
pub(super) struct Document<'a> {
    text: &'a str,
    table: Spanned<DeTable<'a>>,
}

impl<'a> Document<'a> {
    /// Parses the text.
    pub(super) fn parse(text: &'a str) -> Result<Self, Problem> {
        match DeTable::parse(text) {
            Ok(table) => Ok(Self { text, table }),
            Err(error) => Err(Problem {
                line: line_of(text, error.span().map_or(0, |s| s.start)),
                key: None,
                message: format!("not TOML: {}", error.message().trim_end()),
            }),
        }
    }

    /// What serde found, with line and key.
    pub(super) fn problem(&self, error: &toml::de::Error) -> Problem {
        let at = error.span().map_or(0, |span| span.start);
        let mut key = String::new();
        find_key(self.table.get_ref(), at, "", &mut key);
        Problem {
            line: line_of(self.text, at),
            key: Some(key).filter(|key| !key.is_empty()),
            message: reword(error.message()),
        }
    }

    /// The line of a key such as `listeners[1].bind`; where the file does not
    /// write it, of the nearest table that should hold it.
    pub(super) fn line(&self, key: &str) -> usize {
        let mut at = 0;
        let mut table = self.table.get_ref();
        for part in key.split('.') {
            let (name, index) = match part.split_once('[') {
                Some((name, index)) => (name, index.trim_end_matches(']').parse().ok()),
                None => (part, None),
            };
            let Some((found, value)) = table.get_key_value(name) else {
                break;
            };
            at = found.span().start;
            let mut value = value;
            if let (Some(index), Some(array)) = (index, value.get_ref().as_array()) {
                let index: usize = index;
                let Some(item) = array.get(index) else { break };
                at = item.span().start;
                value = item;
            }
            match value.get_ref() {
                DeValue::Table(inner) => table = inner,
                _ => break,
            }
        }
        line_of(self.text, at)
    }

    /// Whether the file writes this key; only for keys outside arrays.
    pub(super) fn has(&self, key: &str) -> bool {
        let mut table = self.table.get_ref();
        let mut parts = key.split('.').peekable();
        while let Some(part) = parts.next() {
            match table.get(part).map(Spanned::get_ref) {
                Some(_) if parts.peek().is_none() => return true,
                Some(DeValue::Table(inner)) => table = inner,
                _ => return false,
            }
        }
        false
    }
}

/// Fills in the path of the innermost key or value that covers the offset.
fn find_key(table: &DeTable<'_>, at: usize, prefix: &str, best: &mut String) {
    for (key, value) in table {
        let path = match prefix {
            "" => key.get_ref().to_string(),
            _ => format!("{prefix}.{}", key.get_ref()),
        };
        if covers(&key.span(), at) {
            best.clone_from(&path);
        }
        find_value(value, at, &path, best);
    }
}

fn find_value(value: &Spanned<DeValue<'_>>, at: usize, path: &str, best: &mut String) {
    if covers(&value.span(), at) {
        path.clone_into(best);
    }
    match value.get_ref() {
        DeValue::Table(table) => find_key(table, at, path, best),
        DeValue::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                find_value(item, at, &format!("{path}[{i}]"), best);
            }
        }
        _ => {}
    }
}

fn covers(span: &Range<usize>, at: usize) -> bool {
    span.contains(&at)
}

fn line_of(text: &str, at: usize) -> usize {
    let before = text.as_bytes().get(..at).unwrap_or(text.as_bytes());
    before.iter().filter(|b| **b == b'\n').count() + 1
}
