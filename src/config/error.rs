//! Mistakes in a configuration file, with the remedy.

use std::fmt;
use std::path::PathBuf;

/// Why a configuration was not accepted.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The file cannot be read.
    #[error("{}: cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// The file has mistakes.
    #[error("{}", lines(path, problems))]
    Invalid {
        /// The file.
        path: PathBuf,
        /// All mistakes, in the order of the file; at least one.
        problems: Vec<Problem>,
    },
}

/// One mistake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Line in the file, from 1.
    pub line: usize,
    /// The key with its tables, such as `listeners[0].bind`. `None`: the whole file is meant.
    pub key: Option<String>,
    /// The mistake, and the allowed values.
    pub message: String,
}

fn lines(path: &std::path::Path, problems: &[Problem]) -> String {
    let path = path.display();
    let each = problems.iter().map(|p| format!("{path}:{p}"));
    each.collect::<Vec<_>>().join("\n")
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { line, key, message } = self;
        match key {
            None => write!(f, "{line}: {message}"),
            Some(key) => write!(f, "{line}: {key}: {message}"),
        }
    }
}

/// Turns serde's `unknown field` into a suggestion. Other messages stay as they are.
pub(super) fn reword(message: &str) -> String {
    let Some(rest) = message.strip_prefix("unknown field `") else {
        return message.trim_end().to_owned();
    };
    let (name, expected) = rest.split_once('`').unwrap_or((rest, ""));
    let known: Vec<&str> = expected.split('`').skip(1).step_by(2).collect();
    let mut out = "unknown key".to_owned();
    if let Some(near) = nearest(name, known.iter().copied()) {
        out.push_str(&format!("; did you mean `{near}`?"));
    }
    out.push_str(&format!(" (known here: {})", known.join(", ")));
    out
}

/// The candidate that was most likely meant, if one is near enough.
pub(super) fn nearest<'a>(
    word: &str,
    candidates: impl Iterator<Item = &'a str>,
) -> Option<&'a str> {
    let limit = (word.chars().count() / 3).clamp(1, 4);
    candidates
        .map(|c| (strsim::osa_distance(word, c), c))
        .filter(|(d, _)| *d <= limit)
        .min_by_key(|(d, _)| *d)
        .map(|(_, c)| c)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_keys_are_answered_with_the_nearest() {
        let text = "unknown field `queue_ful`, expected one of `queue_full`, `queue_qos0`";
        assert_eq!(
            reword(text),
            "unknown key; did you mean `queue_full`? (known here: queue_full, queue_qos0)"
        );
        let text = "unknown field `zzz`, expected `a` or `b`";
        assert_eq!(reword(text), "unknown key (known here: a, b)");
    }

    #[test]
    fn the_nearest_word_is_one_edit_or_one_swap_away() {
        assert_eq!(nearest("bnid", ["bind", "name"].into_iter()), Some("bind"));
        assert_eq!(nearest("kind", ["path", "name"].into_iter()), None);
        assert_eq!(nearest("bin", ["bind", "name"].into_iter()), Some("bind"));
    }
}
