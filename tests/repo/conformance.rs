//! The tables in `conformance/`: each statement of the standards names existing tests, or a reason
//! why it has none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

/// The fields of a line of CSV.
fn fields(line: &str) -> Vec<String> {
    let (mut all, mut field, mut quoted) = (Vec::new(), String::new(), false);
    let mut letters = line.chars().peekable();
    while let Some(letter) = letters.next() {
        match letter {
            '"' if quoted && letters.peek() == Some(&'"') => {
                letters.next();
                field.push('"');
            }
            '"' => quoted = !quoted,
            ',' if !quoted => all.push(std::mem::take(&mut field)),
            _ => field.push(letter),
        }
    }
    all.push(field);
    all
}

fn judge(table: &str, statements: usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text =
        fs::read_to_string(root.join("conformance").join(table)).expect("the table is there");
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut faults = Vec::new();
    for line in text.lines().skip(1) {
        let fields = fields(line);
        let [id, summary, tests, note] = &fields[..] else {
            panic!("{table}: not four fields: {line}");
        };
        assert!(seen.insert(id.clone()), "{table}: {id} is there twice");
        if summary.is_empty() || tests.is_empty() == note.is_empty() {
            faults.push(format!("{id} has a test or a reason, and just one of them"));
        }
        for test in tests.split("; ").filter(|t| !t.is_empty()) {
            let Some((file, name)) = test.split_once("::") else {
                faults.push(format!("{id}: {test} names no test"));
                continue;
            };
            let source = sources
                .entry(file.to_owned())
                .or_insert_with(|| fs::read_to_string(root.join(file)).unwrap_or_default());
            let known = ["fn ", "def "]
                .iter()
                .any(|f| source.contains(&format!("{f}{name}(")));
            if !known {
                faults.push(format!("{id}: there is no {test}"));
            }
        }
    }
    assert_eq!(seen.len(), statements, "{table}");
    assert!(faults.is_empty(), "{table}:\n{}", faults.join("\n"));
}

#[test]
fn each_statement_of_mqtt_5_has_its_test_or_reason() {
    judge("mqtt5.csv", 251);
}

#[test]
fn each_statement_of_mqtt_3_1_1_has_its_test_or_reason() {
    judge("mqtt311.csv", 141);
}
