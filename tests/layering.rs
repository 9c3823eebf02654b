//! Imports point one way: what each module may name of the others.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Each module with the modules that it may use.
const MAY_USE: &[(&str, &[&str])] = &[
    ("limits", &[]),
    ("clock", &[]),
    ("telemetry", &[]),
    ("config", &[]),
    ("store", &[]),
    ("mqtt", &["limits"]),
    ("session", &["mqtt", "limits"]),
    ("transport", &["config"]),
    ("auth", &["mqtt", "config", "telemetry"]),
    ("admin", &["config", "telemetry"]),
    (
        "router",
        &["session", "store", "mqtt", "limits", "telemetry"],
    ),
    (
        "client",
        &[
            "router",
            "session",
            "mqtt",
            "auth",
            "transport",
            "config",
            "telemetry",
            "limits",
            "clock",
        ],
    ),
    (
        "upstream",
        &[
            "router",
            "session",
            "store",
            "mqtt",
            "transport",
            "config",
            "telemetry",
            "limits",
            "clock",
        ],
    ),
    ("cli", &["auth", "config", "telemetry"]),
    (
        "runtime",
        &[
            "client",
            "upstream",
            "router",
            "session",
            "store",
            "mqtt",
            "auth",
            "admin",
            "transport",
            "config",
            "telemetry",
            "limits",
            "clock",
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
        let first = inside.iter().next().expect("a file has a name");
        let module = first.to_string_lossy().replace(".rs", "");
        if matches!(&*module, "lib" | "main") {
            continue;
        }
        let Some((_, allowed)) = MAY_USE.iter().find(|(name, _)| *name == module) else {
            wrong.push(format!("{}: not in the list of modules", inside.display()));
            continue;
        };
        seen.insert(module.clone());
        let text = fs::read_to_string(&file).expect("sources are text");
        let code = text.split("#[cfg(test)]").next().unwrap_or_default();
        for used in named(code) {
            if used != module && !allowed.contains(&&*used) {
                wrong.push(format!("{}: {module} uses {used}", inside.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let listed: BTreeSet<String> = MAY_USE.iter().map(|(n, _)| n.to_string()).collect();
    assert_eq!(seen, listed, "the list names modules that are not there");
}

#[test]
fn the_core_has_neither_clock_nor_runtime_nor_randomness() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let forbidden = ["tokio", "Instant::now", "SystemTime", "getrandom"];
    for module in ["mqtt", "session", "router"] {
        for file in sources(&src) {
            let inside = file.strip_prefix(&src).expect("it was found below it");
            if !inside.starts_with(module) && inside != Path::new(&format!("{module}.rs")) {
                continue;
            }
            let text = fs::read_to_string(&file).expect("sources are text");
            for line in text.lines().filter(|l| !l.trim_start().starts_with("//")) {
                for word in forbidden {
                    assert!(!line.contains(word), "{}: {line}", inside.display());
                }
            }
        }
    }
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
