//! What is called with what, and how it ends.

use std::cell::RefCell;

use super::*;

/// Dispatches with commands that note how they were called.
fn call(arguments: &[&str]) -> (Result<(), Failure>, Vec<String>) {
    let calls = RefCell::new(Vec::new());
    let note = |text: String| calls.borrow_mut().push(text);
    let commands = Commands {
        run: &|config, connections| {
            note(format!("run {} {}", config.node.id, connections > 0));
            Err(Failure::new(EXIT_TEMPORARY, "taken"))
        },
        check: &|config| {
            note(format!("check {}", config.node.id));
            Ok(Findings::default())
        },
        certs: &|out, names| {
            note(format!("certs {} {}", out.display(), names.join(",")));
            Ok(vec![out.join("edge.pem")])
        },
        probe: &|config| {
            let upstream = &config.upstream;
            let user = upstream.username.as_deref().unwrap_or("nobody");
            note(format!("probe {} {user}", upstream.servers[0]));
            Ok(String::new())
        },
    };
    let words = std::iter::once("tidegate").chain(arguments.iter().copied());
    let result = dispatch(words.map(OsString::from), &commands);
    (result, calls.into_inner())
}

fn code(arguments: &[&str]) -> u8 {
    call(arguments).0.map_or_else(|f| f.code, |()| 0)
}

#[test]
fn commands_get_what_is_said() {
    assert_eq!(call(&["run"]).1, ["run local true"]);
    assert_eq!(call(&["check"]).1, ["check local"]);
    let probe = ["probe", "mqtt://core", "--username", "edge"];
    assert_eq!(call(&probe).1, ["probe mqtt://core:1883 edge"]);
    let (result, calls) = call(&["certs", "--out", "d", "--name", "a", "--name", "b"]);
    assert_eq!((result, calls), (Ok(()), vec!["certs d a,b".to_owned()]));
    let (_, calls) = call(&["certs"]);
    assert_eq!(calls, ["certs certs localhost,127.0.0.1,::1"]);
}

#[test]
fn ends_have_their_codes() {
    for wrong in [
        &[][..],
        &["fly"],
        &["run", "--confg", "x"],
        &["certs", "there"],
        &["probe"],
        &["probe", "http://core"],
        &["passwd", "file"],
        &["check", "--config", "/nonexistent/x.toml"],
    ] {
        assert_eq!(code(wrong), EXIT_USAGE, "{wrong:?}");
    }
    assert_eq!(code(&["run"]), EXIT_TEMPORARY);
    assert_eq!(code(&["--help"]), 0);
    assert_eq!(code(&["--version"]), 0);
    assert_eq!(code(&["run", "--help"]), 0);
}

#[test]
fn a_wrong_file_is_named_with_its_line() {
    let path = std::env::temp_dir().join(format!("tidegate-cli-{}.toml", std::process::id()));
    std::fs::write(&path, "[log]\nlevle = \"info\"\n").expect("written");
    let text = path.to_str().expect("text");
    let (result, calls) = call(&["run", "--config", text]);
    std::fs::remove_file(&path).expect("removed");
    let failure = result.expect_err("wrong");
    assert_eq!(failure.code, EXIT_USAGE);
    let wanted = format!("{text}:2: log.levle: unknown key; did you mean `level`?");
    assert!(failure.message.starts_with(&wanted), "{failure}");
    assert!(calls.is_empty());
}

#[test]
fn a_usage_error_suggests() {
    let failure = call(&["chek"]).0.expect_err("wrong");
    assert!(failure.message.contains("'check'"), "{failure}");
}
