//! The tables in `conformance/`: each statement of the standards names existing tests, or a reason
//! why it has none.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

fn judge(table: &str, statements: usize) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut rows = csv::Reader::from_path(root.join("conformance").join(table))
        .unwrap_or_else(|e| panic!("{table}: {e}"));
    let mut sources: BTreeMap<String, String> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut faults = Vec::new();
    for row in rows.deserialize::<[String; 4]>() {
        let [id, summary, tests, note] = row.unwrap_or_else(|e| panic!("{table}: {e}"));
        assert!(seen.insert(id.clone()), "{table}: {id} has two rows");
        if summary.is_empty() || tests.is_empty() == note.is_empty() {
            faults.push(format!(
                "{id} must have a summary, and either tests or a reason"
            ));
        }
        for test in tests.split("; ").filter(|t| !t.is_empty()) {
            let Some((file, name)) = test.split_once("::") else {
                faults.push(format!("{id}: {test} is not of the form file::name"));
                continue;
            };
            let source = sources
                .entry(file.to_owned())
                .or_insert_with(|| fs::read_to_string(root.join(file)).unwrap_or_default());
            let known = ["fn ", "def "]
                .iter()
                .any(|f| source.contains(&format!("{f}{name}(")));
            if !known {
                faults.push(format!("{id}: the test {test} does not exist"));
            }
        }
    }
    assert_eq!(
        seen.len(),
        statements,
        "{table}: rows are missing or superfluous"
    );
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
