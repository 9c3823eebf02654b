//! Comments and documents are plain English: the patterns of CONTRIBUTING's table that a program can find.

use std::fs;
use std::path::{Path, PathBuf};

/// Phrases that do not stand in comments, in lower case.
const PHRASES: &[&str] = &[
    "of which",
    "of whom",
    "those that",
    "those who",
    "who has",
    "what came",
    "what comes",
    "what is",
    "what was",
    "is no",
    "are no",
];

/// Sentences that contain a phrase and are plain all the same.
const PLAIN: &[&str] = &["is no longer", "are no longer"];

#[test]
fn comments_and_documents_have_no_relative_clause_as_a_noun() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    let folders = [
        "src", "kit", "tests", "benches", "examples", "fuzz", "scripts", "docs", "clients",
    ];
    let documents = [
        "README.md",
        "ARCHITECTURE.md",
        "CHANGELOG.md",
        "SECURITY.md",
    ];
    let below = folders.iter().flat_map(|folder| files(&root.join(folder)));
    for file in below.chain(documents.iter().map(|name| root.join(name))) {
        // A file of another kind than text has no comments.
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        let inside = file.strip_prefix(root).expect("it was found below it");
        for (at, line) in text.lines().enumerate() {
            if let Some(phrase) = comment(line, &file).and_then(|c| phrase(&c)) {
                let line = line.trim();
                wrong.push(format!(
                    "{}:{}: {phrase:?}: {line}",
                    inside.display(),
                    at + 1
                ));
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "see CONTRIBUTING, Sentences:\n{}",
        wrong.join("\n")
    );
}

/// The comment or the line of a document that a line consists of, in lower case.
fn comment(line: &str, file: &Path) -> Option<String> {
    let sign = match file.extension().and_then(|e| e.to_str()) {
        Some("rs" | "js" | "mjs") => "//",
        Some("py" | "sh") | None => "#",
        Some("md") => "",
        Some(_) => return None,
    };
    let comment = line.trim_start().strip_prefix(sign)?;
    Some(comment.to_lowercase())
}

/// The first phrase of the list in a comment.
fn phrase(comment: &str) -> Option<&'static str> {
    let mut text = comment.to_owned();
    for plain in PLAIN {
        text = text.replace(plain, "");
    }
    let is_part = |c: Option<char>| c.is_some_and(char::is_alphanumeric);
    PHRASES.iter().copied().find(|phrase| {
        text.match_indices(phrase).any(|(at, _)| {
            let before = text[..at].chars().next_back();
            let after = text[at + phrase.len()..].chars().next();
            !is_part(before) && !is_part(after)
        })
    })
}

/// The files below a folder, without builds and installed packages.
fn files(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).expect("the folder is there") {
        let path = entry.expect("it can be read").path();
        let name = path.file_name().unwrap_or_default();
        if path.is_dir() {
            if !["target", "node_modules", "__pycache__"]
                .iter()
                .any(|n| name == *n)
            {
                found.extend(files(&path));
            }
        } else {
            found.push(path);
        }
    }
    found
}

#[test]
fn phrases_are_found_as_words() {
    assert_eq!(
        phrase(" a client of which a stream is unread"),
        Some("of which")
    );
    assert_eq!(phrase(" it has no limit, and is no longer used"), None);
    assert_eq!(phrase(" it is normal, and this is not"), None);
    assert_eq!(phrase(" a ping is no activity"), Some("is no"));
}
