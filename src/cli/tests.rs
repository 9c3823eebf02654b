//! The command that each command line names, and the exit code of a wrong one.

use super::*;

fn parse_words(arguments: &[&str]) -> Result<Option<Command>, Failure> {
    let words = std::iter::once("tidegate").chain(arguments.iter().copied());
    parse(words.map(OsString::from))
}

fn command(arguments: &[&str]) -> Command {
    parse_words(arguments).expect("legal").expect("a command")
}

fn failure(arguments: &[&str]) -> Failure {
    parse_words(arguments).expect_err("wrong")
}

#[test]
fn commands_have_their_arguments_and_defaults() {
    assert_eq!(command(&["run"]), Command::Run { config: None });
    let config = Some(PathBuf::from("t.toml"));
    assert_eq!(
        command(&["check", "--config", "t.toml"]),
        Command::Check { config }
    );
    let certs = |out: &str, names: &[&str]| Command::Certs {
        out: out.into(),
        names: names.iter().map(ToString::to_string).collect(),
    };
    assert_eq!(
        command(&["certs", "--out", "d", "--name", "a", "--name", "b"]),
        certs("d", &["a", "b"])
    );
    assert_eq!(
        command(&["certs"]),
        certs("certs", &["localhost", "127.0.0.1", "::1"])
    );
    assert_eq!(
        command(&["passwd", "users", "alice"]),
        Command::Passwd {
            file: "users".into(),
            user: "alice".into()
        }
    );
    assert_eq!(
        command(&["store", "check", "data"]),
        Command::Store(StoreCommand::Check {
            directory: "data".into()
        })
    );
}

#[test]
fn arguments_of_probe_take_the_place_of_configured_values() {
    let Command::Probe(arguments) = command(&["probe", "mqtt://broker", "--username", "edge"])
    else {
        panic!("not a probe");
    };
    let config = arguments.config().expect("legal");
    assert_eq!(config.upstream.servers[0].to_string(), "mqtt://broker:1883");
    assert_eq!(config.upstream.username.as_deref(), Some("edge"));
}

#[test]
fn help_and_version_succeed_and_name_no_command() {
    for words in [&["--help"][..], &["--version"], &["run", "--help"]] {
        assert_eq!(parse_words(words), Ok(None), "{words:?}");
    }
}

#[test]
fn wrong_usage_has_its_exit_code() {
    for wrong in [
        &[][..],
        &["fly"],
        &["run", "--confg", "x"],
        &["certs", "there"],
        &["probe"],
        &["probe", "http://broker"],
        &["passwd", "file"],
    ] {
        assert_eq!(failure(wrong).code, EXIT_USAGE, "{wrong:?}");
    }
    let missing = load(Some(Path::new("/nonexistent/x.toml"))).expect_err("not there");
    assert_eq!(missing.code, EXIT_USAGE);
}

#[test]
fn a_wrong_file_is_named_with_its_line() {
    let path = std::env::temp_dir().join(format!("tidegate-cli-{}.toml", std::process::id()));
    std::fs::write(&path, "[log]\nlevle = \"info\"\n").expect("written");
    let result = load(Some(&path));
    std::fs::remove_file(&path).expect("removed");
    let failure = result.expect_err("wrong");
    assert_eq!(failure.code, EXIT_USAGE);
    let wanted = format!(
        "{}:2: log.levle: unknown key; did you mean `level`?",
        path.display()
    );
    assert!(failure.message.starts_with(&wanted), "{failure}");
}

#[test]
fn a_usage_error_suggests_the_nearest_command() {
    let failure = failure(&["chek"]);
    assert!(failure.message.contains("'check'"), "{failure}");
}
