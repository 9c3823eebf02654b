//! Imports point one way: the modules that each module may name.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module with the modules that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("budget", &[]),
    ("qos", &[]),
    ("shares", &[]),
    ("backoff", &[]),
    ("streams", &[]),
    ("time", &[]),
    ("clock", &["time"]),
    ("hashing", &[]),
    ("outbuf", &[]),
    ("topics", &["hashing"]),
    ("telemetry", &["qos", "time"]),
    ("config", &["budget", "topics"]),
    ("store", &["hashing", "time", "topics"]),
    ("mqtt", &["budget", "qos", "time", "topics"]),
    ("flow", &[]),
    (
        "session",
        &[
            "hashing", "streams", "time", "mqtt", "topics", "budget", "flow", "outbuf",
        ],
    ),
    (
        "transport",
        &["backoff", "config", "outbuf", "shares", "streams"],
    ),
    ("auth", &["mqtt", "topics", "config", "telemetry", "shares"]),
    ("supervise", &["backoff", "telemetry"]),
    ("admin", &["backoff", "config", "telemetry"]),
    (
        "router",
        &[
            "hashing",
            "outbuf",
            "streams",
            "time",
            "topics",
            "session",
            "store",
            "mqtt",
            "topics",
            "budget",
            "telemetry",
            "shares",
        ],
    ),
    (
        "embedded",
        &[
            "backoff",
            "budget",
            "hashing",
            "time",
            "mqtt",
            "topics",
            "config",
            "telemetry",
        ],
    ),
    (
        "client",
        &[
            "outbuf",
            "streams",
            "time",
            "topics",
            "router",
            "session",
            "mqtt",
            "topics",
            "auth",
            "transport",
            "config",
            "telemetry",
            "budget",
            "shares",
            "clock",
        ],
    ),
    (
        "upstream",
        &[
            "hashing",
            "time",
            "flow",
            "topics",
            "router",
            "session",
            "embedded",
            "store",
            "mqtt",
            "topics",
            "transport",
            "config",
            "telemetry",
            "backoff",
            "budget",
            "clock",
            "supervise",
        ],
    ),
    ("cli", &["auth", "config"]),
    (
        "runtime",
        &[
            "hashing",
            "time",
            "topics",
            "client",
            "upstream",
            "embedded",
            "router",
            "session",
            "store",
            "mqtt",
            "auth",
            "admin",
            "transport",
            "config",
            "telemetry",
            "budget",
            "clock",
            "supervise",
        ],
    ),
];

#[test]
fn imports_point_one_way() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    let mut seen = BTreeSet::new();
    for file in sources(&src) {
        let inside = file.strip_prefix(&src).expect("it was found below it");
        if is_test_file(inside) {
            continue;
        }
        let first = inside.iter().next().expect("a file has a name");
        let module = first.to_string_lossy().replace(".rs", "");
        // The simulation is test code.
        if matches!(&*module, "lib" | "main" | "sim") {
            continue;
        }
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{}: not in the list of modules", inside.display()));
            continue;
        };
        seen.insert(module.clone());
        let text = fs::read_to_string(&file).expect("sources are text");
        for used in named(&without_tests(&text)) {
            if used != module && !allowed.contains(&&*used) {
                wrong.push(format!("{}: {module} uses {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let listed: BTreeSet<String> = MAY_USE.iter().map(|(n, _)| n.to_string()).collect();
    assert_eq!(seen, listed, "the list names modules that do not exist");
}

/// Parts of pure modules that are not pure: the room of the log's producers is a semaphore of tokio's, which
/// needs no runtime, and its thread has a clock.
const NOT_PURE: &[&str] = &["store/log/room.rs", "store/log/thread.rs"];

/// Modules without a clock, a runtime, sockets or randomness: their callers hand time and bytes in.
const PURE: &[&str] = &[
    "budget",
    "streams",
    "time",
    "topics",
    "mqtt",
    "session",
    "store",
    "router",
    "client/machine",
    "client/connect/admit",
    "client/end",
    "upstream/link",
];

#[test]
fn pure_modules_have_neither_clock_nor_runtime_nor_sockets_nor_randomness() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let forbidden = [
        "tokio",
        "TcpListener",
        "TcpStream",
        "UdpSocket",
        "UnixStream",
        "Instant",
        "SystemTime",
        "getrandom",
        "fastrand",
        "rand::",
    ];
    let mut wrong = Vec::new();
    for module in PURE {
        let mut seen = false;
        for file in sources(&src) {
            let inside = file.strip_prefix(&src).expect("it was found below it");
            let of_module =
                inside.starts_with(module) || inside == Path::new(&format!("{module}.rs"));
            let is_pure = NOT_PURE.iter().all(|other| inside != Path::new(other));
            if !of_module || is_test_file(inside) || !is_pure {
                continue;
            }
            seen = true;
            let text = without_tests(&fs::read_to_string(&file).expect("sources are text"));
            for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
                for word in forbidden {
                    if line.contains(word) {
                        wrong.push(format!("{}: {word} in: {}", inside.display(), line.trim()));
                    }
                }
            }
        }
        assert!(seen, "the list names {module}, which does not exist");
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Code that a simulation repeats from its seed.
const REPEATED: &[&str] = &[
    "src/flow",
    "src/topics",
    "src/mqtt",
    "src/session",
    "src/store",
    "src/router",
    "src/client/machine",
    "src/client/connect/admit",
    "src/client/end",
    "src/upstream/link",
    "src/embedded",
    "src/sim",
    "tests/sim",
];

/// `src/hashing.rs` has the hash maps whose order no decision can depend on.
#[test]
fn repeated_code_has_no_map_whose_order_differs_between_runs() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut wrong = Vec::new();
    for module in REPEATED {
        let file = root.join(module).with_extension("rs");
        let folder = root.join(module);
        let mut files = Vec::from_iter(file.is_file().then_some(file));
        if folder.is_dir() {
            files.extend(sources(&folder));
        }
        assert!(
            !files.is_empty(),
            "the list names {module}, which does not exist"
        );
        for file in files {
            let text = fs::read_to_string(&file).expect("sources are text");
            for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
                let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
                let other = [
                    "HashMap",
                    "HashSet",
                    "RandomState",
                    "FixedState",
                    "hash_map",
                ];
                if words.into_iter().any(|word| other.contains(&word)) {
                    let inside = file.strip_prefix(root).expect("it was found below it");
                    wrong.push(format!("{}: {}", inside.display(), line.trim()));
                }
            }
        }
    }
    assert!(
        wrong.is_empty(),
        "use crate::hashing or a BTreeMap:\n{}",
        wrong.join("\n")
    );
}

#[test]
fn sources_include_no_file_from_outside_src() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut wrong = Vec::new();
    for file in sources(&src) {
        let inside = file.strip_prefix(&src).expect("it was found below it");
        let text = fs::read_to_string(&file).expect("sources are text");
        for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
            let includes = ["#[path", "include!(", "include_str!(", "include_bytes!("]
                .iter()
                .any(|word| line.contains(word));
            if includes {
                wrong.push(format!("{}: {}", inside.display(), line.trim()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

/// Whether a file holds the tests of the module beside it.
fn is_test_file(file: &Path) -> bool {
    file.components()
        .any(|part| part.as_os_str().to_string_lossy().trim_end_matches(".rs") == "tests")
}

/// The text without its items for tests: each item behind `#[cfg(test)]`, to the brace that closes
/// it or to its semicolon. `rustfmt` puts a closing brace under the first letter of its item.
fn without_tests(text: &str) -> String {
    let mut kept = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line.trim() != "#[cfg(test)]" {
            kept.push_str(line);
            kept.push('\n');
            continue;
        }
        let indent = line.len() - line.trim_start().len();
        let close = format!("{}}}", " ".repeat(indent));
        for line in lines.by_ref() {
            let ends =
                line.trim_end().ends_with(';') && line.len() - line.trim_start().len() == indent;
            if ends || line == close || line.ends_with("{}") {
                break;
            }
        }
    }
    kept
}

/// The modules that a text names after `crate::`.
fn named(text: &str) -> BTreeSet<String> {
    let code = text
        .lines()
        .filter(|l| !l.trim_start().starts_with("//"))
        .collect::<Vec<_>>()
        .join("\n");
    code.split("crate::")
        .skip(1)
        .map(|rest| {
            rest.chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '_')
                .collect()
        })
        .collect()
}

fn sources(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).expect("the folder is there") {
        let path = entry.expect("it can be read").path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
    found
}
