//! The files that we ship, and the messages about wrong ones.

mod wrong;

use std::path::Path;

use super::*;

fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    match Config::parse(text, Path::new("/etc/tidegate/t.toml")) {
        Ok(config) => Ok(config),
        Err(Error::Invalid { problems, .. }) => Err(problems),
        Err(other) => panic!("{other}"),
    }
}

fn shipped(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("config")
        .join(name)
}

#[test]
fn the_documented_file_says_the_defaults() {
    let mut config = Config::load(&shipped("tidegate.toml")).expect("valid");
    let mut builtin = Config::builtin();
    assert_eq!(config.source.take(), Some(shipped("tidegate.toml")));
    builtin.node.data_dir = shipped("data");
    assert_eq!(config, builtin);
}

#[test]
fn an_empty_file_says_the_defaults() {
    let mut config = parse("").expect("valid");
    config.source = None;
    config.node.data_dir = "data".into();
    assert_eq!(config, Config::builtin());
}

/// Asks the parser itself which keys each table knows.
#[test]
fn the_documented_file_names_every_key() {
    let text = std::fs::read_to_string(shipped("tidegate.toml")).expect("file");
    let tables = [
        "",
        "[node]",
        "[[tls]]",
        "[[listeners]]",
        "[upstream]",
        "[upstream.tls]",
        "[session]",
        "[limits]",
        "[memory]",
        "[store]",
        "[auth]",
        "[[acl]]",
        "[admin]",
        "[log]",
        "[drain]",
    ];
    for table in tables {
        let problems = parse(&format!("{table}\nzzzzzzzzzzzz = 1\n")).unwrap_err();
        let (_, known) = problems[0]
            .message
            .split_once("(known here: ")
            .expect("a list");
        for key in known.trim_end_matches(')').split(", ") {
            let section = match table {
                "" => text.as_str(),
                _ => {
                    let at = text.find(table).unwrap_or_else(|| panic!("no {table}"));
                    &text[at..]
                }
            };
            let found = section.lines().any(|line| {
                let line = line.trim_start_matches('#').trim_start_matches('[');
                line.strip_prefix(key)
                    .is_some_and(|rest| rest.starts_with([' ', ']']))
                    || line.starts_with(&format!("{}.{key}]", table.trim_matches(['[', ']'])))
            });
            assert!(found, "{table} {key} is not documented");
        }
    }
}

/// Settings that are commented out are legal too, but for the files that they name.
#[test]
fn the_documented_file_is_right_in_its_comments() {
    let text = std::fs::read_to_string(shipped("tidegate.toml")).expect("file");
    let uncommented: Vec<&str> = text
        .lines()
        .filter(|line| !line.starts_with("acl = "))
        .map(|line| match line.strip_prefix('#') {
            Some(rest) if !rest.starts_with([' ', '#']) && rest.contains(['=', ']']) => rest,
            _ => line,
        })
        .collect();
    let problems = parse(&uncommented.join("\n")).unwrap_err();
    for problem in problems {
        let expected = problem.message.contains("cannot be read")
            || problem.message.contains("in a directory that is there")
            || problem.message.contains("no listener uses it")
            || problem.message.contains("no server is mqtts://");
        assert!(expected, "{problem}");
    }
}

#[test]
fn the_minimal_file() {
    let config = Config::load(&shipped("minimal.toml")).expect("valid");
    assert_eq!(
        config.upstream.servers[0].to_string(),
        "mqtt://127.0.0.1:1883"
    );
    let names: Vec<_> = config.listeners.iter().map(|l| l.name.as_str()).collect();
    assert_eq!(names, ["tcp", "ws"]);
}

#[test]
fn the_brokers_files() {
    let brokers = [
        "mosquitto",
        "rabbitmq",
        "emqx",
        "hivemq",
        "vernemq",
        "aws-iot-core",
    ];
    for broker in brokers {
        let config = Config::load(&shipped(&format!("{broker}.toml"))).expect(broker);
        assert!(!config.upstream.servers.is_empty());
    }
}

#[test]
fn values_are_typed_and_paths_are_resolved() {
    let config = parse(
        "[node]\nid = \"e\"\ndata_dir = \"d\"\n[session]\nqueue_bytes_max = \"2MiB\"\n\
         expiry_v3 = \"90m\"\nqueue_age_max = \"1h\"\nevict_after = \"3d\"\n\
         [memory]\nmax = \"1GiB\"\nqueues = \"50%\"\n\
         [upstream]\nservers = [\"mqtts://core\"]\npublish_links = 3\nprotocol = \"3.1.1\"\n\
         [[listeners]]\ntransport = \"tcp\"\nbind = \"0.0.0.0:1\"\n\
         [[acl]]\nwho = \"*\"\nallow = [\"publish\"]\ntopics = [\"up/%c\"]\n",
    )
    .expect("valid");
    assert_eq!(config.node.data_dir, Path::new("/etc/tidegate/d"));
    assert_eq!(config.session.queue_bytes_max, 2 << 20);
    assert_eq!(config.session.expiry_v3.as_secs(), 5400);
    assert_eq!(
        config.session.queue_age_max.map(|d| d.as_secs()),
        Some(3600)
    );
    assert_eq!(
        config.session.evict_after.map(|d| d.as_secs()),
        Some(3 * 86_400)
    );
    assert_eq!(
        (config.memory.max, config.memory.queues),
        (1 << 30, 536_870_900)
    );
    assert_eq!(config.upstream.publish_links.max, 3);
    assert_eq!(config.upstream.protocol, Protocol::V311);
    assert_eq!(config.auth.acl, AclMode::Rules);
    assert!(config.acl[0].allow.publish && !config.acl[0].allow.subscribe);
}

#[test]
fn webtransport_is_written_and_brings_path_and_origins() {
    let quic = "[[listeners]]\ntransport = \"quic\"\nbind = \"127.0.0.1:1\"\n";
    let config = parse(quic).expect("valid");
    assert!(!config.listeners[0].webtransport);
    let more = "webtransport = true\npath = \"/x\"\norigins = [\"https://a.example\"]\n";
    let config = parse(&format!("{quic}{more}")).expect("valid");
    let listener = &config.listeners[0];
    assert!(listener.webtransport);
    assert_eq!(listener.paths, ["/x"]);
    assert_eq!(listener.origins, ["https://a.example"]);
}

#[test]
fn the_password_of_the_links_has_no_byte_order_mark() {
    let file = std::env::temp_dir().join(format!("tidegate-link-{}", std::process::id()));
    std::fs::write(&file, "\u{feff}secret\r\n").expect("written");
    let mut upstream = Config::builtin().upstream;
    upstream.password_file = Some(file.clone());
    let password = upstream.read_password().expect("read");
    std::fs::remove_file(&file).expect("removed");
    assert_eq!(password.as_deref(), Some(&b"secret"[..]));
}

#[test]
fn relative_paths_start_at_the_directory_of_the_file() {
    let text = "[node]\ndata_dir = \"d\"\n[[tls]]\nname = \"default\"\nkey_log = \"keys.log\"\n";
    for (file, base) in [("t.toml", "."), ("./t.toml", "."), ("src/t.toml", "src")] {
        let config = Config::parse(text, Path::new(file)).expect("valid");
        assert_eq!(config.node.data_dir, Path::new(base).join("d"));
        let key_log = config.tls[0].key_log.clone();
        assert_eq!(key_log, Some(Path::new(base).join("keys.log")));
    }
}

#[test]
fn a_listener_overrides_the_mode_of_authentication() {
    let passwd = std::env::temp_dir().join(format!("tidegate-mode-{}", std::process::id()));
    std::fs::write(&passwd, "").expect("file");
    let config = parse(&format!(
        "[auth]\nmode = \"file\"\nfile = {passwd:?}\n[[listeners]]\ntransport = \"tcp\"\n\
         bind = \"127.0.0.1:1\"\nauth = \"anonymous\"\n[[listeners]]\ntransport = \"ws\"\n\
         bind = \"127.0.0.1:2\"\n"
    ));
    std::fs::remove_file(&passwd).expect("file");
    let config = config.expect("valid");
    let modes: Vec<_> = config.listeners.iter().map(|l| l.auth).collect();
    assert_eq!(modes, [AuthMode::Anonymous, AuthMode::File]);
}

#[test]
fn all_problems_are_said_at_once_in_the_order_of_the_file() {
    let error = Config::parse(
        "[limits]\nreceive_max = 0\n[session]\nqueue_messages_max = 0\n",
        Path::new("a.toml"),
    )
    .unwrap_err();
    let text = error.to_string();
    let lines: Vec<&str> = text.lines().collect();
    assert!(
        lines[0].starts_with("a.toml:2: limits.receive_max: 0 is out of range"),
        "{text}"
    );
    assert!(
        lines[1].starts_with("a.toml:4: session.queue_messages_max: "),
        "{text}"
    );
}

#[test]
fn a_file_that_is_not_there() {
    let error = Config::load(Path::new("/nonexistent/x.toml")).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("/nonexistent/x.toml: cannot be read: ")
    );
}
