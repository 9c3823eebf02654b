//! A table of files that are wrong.

use crate::config::tests::parse;

/// Text, line, key, a part of the message.
const WRONG: &[(&str, usize, &str, &str)] = &[
    ("version = 2\n", 1, "version", "allowed: 1"),
    ("\n[node\nid = 1", 2, "", "not TOML"),
    (
        "[session]\nqueue_ful = \"oldest\"\n",
        2,
        "session.queue_ful",
        "did you mean `queue_full`?",
    ),
    ("[sesion]\n", 1, "sesion", "did you mean `session`?"),
    (
        "[node]\nid = 7\n",
        2,
        "node.id",
        "invalid type: integer `7`, expected a string",
    ),
    ("[node]\nid = \"a b\"\n", 2, "node.id", "is no name"),
    (
        "[session]\n\nexpiry_v3 = \"soon\"\n",
        3,
        "session.expiry_v3",
        "\"2h\"",
    ),
    (
        "[session]\nexpiry_v3 = 30\n",
        2,
        "session.expiry_v3",
        "30 has no unit",
    ),
    (
        "[session]\nevict_after = \"7d\"\n",
        2,
        "session.evict_after",
        "not shorter than session.expiry_max",
    ),
    (
        "[session]\nevict_after = \"10ms\"\n",
        2,
        "session.evict_after",
        "out of range",
    ),
    (
        "[session]\nexpiry_v3 = \"8d\"\n",
        2,
        "session.expiry_v3",
        "longer than session.expiry_max",
    ),
    (
        "[session]\nexpiry_max = \"1500ms\"\nexpiry_v3 = \"1s\"",
        2,
        "session.expiry_max",
        "whole seconds",
    ),
    (
        "[session]\nqueue_bytes_max = \"1 Mib\"\n",
        2,
        "session.queue_bytes_max",
        "is not a size",
    ),
    (
        "[session]\nqueue_full = \"oldst\"\n",
        2,
        "session.queue_full",
        "did you mean \"oldest\"?",
    ),
    (
        "[session]\nkeepalive_max = \"0s\"\n",
        2,
        "session.keepalive_max",
        "out of range",
    ),
    (
        "[session]\nqueue_messages_max = 0\n",
        2,
        "session.queue_messages_max",
        "allowed: 1 to",
    ),
    (
        "[limits]\nreceive_max = 70000\n",
        2,
        "limits.receive_max",
        "expected u16",
    ),
    (
        "[limits]\nreceive_max = 0\n",
        2,
        "limits.receive_max",
        "allowed: 1 to 65535",
    ),
    (
        "[limits]\npacket_max = \"5GiB\"\n",
        2,
        "limits.packet_max",
        "below 4GiB",
    ),
    (
        "[limits]\npacket_max = \"1GiB\"\n",
        2,
        "limits.packet_max",
        "out of range",
    ),
    (
        "[limits]\npacket_max = \"8MiB\"\n",
        1,
        "upstream.publishes_waiting_per_client",
        "smaller than",
    ),
    (
        "[memory]\nmax = \"120%\"\n",
        2,
        "memory.max",
        "from \"1%\" to \"100%\"",
    ),
    (
        "[memory]\nmax = \"64MiB\"\nqueues = \"65MiB\"\n",
        3,
        "memory.queues",
        "larger than memory.max",
    ),
    (
        "[store]\ndurability = \"tape\"\n",
        2,
        "store.durability",
        "disk",
    ),
    (
        "[session]\nrestart_grace = \"0s\"\n",
        2,
        "session.restart_grace",
        "allowed: 1s to 1h",
    ),
    (
        "[upstream]\nack = \"local\"\n",
        2,
        "upstream.ack",
        "not supported",
    ),
    (
        "[upstream]\nroots = [\"a/#/b\"]\n",
        2,
        "upstream.roots[0]",
        "# stands alone and last",
    ),
    (
        "[upstream]\nservers = [\"wss://a b\"]\n",
        2,
        "upstream.servers[0]",
        "wss://host:port/path",
    ),
    (
        "[upstream]\nservers = [\"embedded:no-id\"]\n",
        2,
        "upstream.servers[0]",
        "did you mean \"no-ids\"",
    ),
    (
        "[upstream]\nprobe_topic = \"a/#\"\n",
        2,
        "upstream.probe_topic",
        "without wildcards",
    ),
    (
        "[upstream]\nservers = []\n",
        2,
        "upstream.servers",
        "at least one",
    ),
    (
        "[upstream]\nservers = [\"embedded:\", \"mqtt://a\"]\n",
        2,
        "upstream.servers",
        "stands alone",
    ),
    (
        "[upstream]\nservers = [\"mqtt://a\"]\n",
        1,
        "node.id",
        "required",
    ),
    (
        "[upstream]\npublish_links = 9\n",
        2,
        "upstream.publish_links",
        "from 1 to 8",
    ),
    (
        "[upstream]\ndata_links = 0\n",
        2,
        "upstream.data_links",
        "from 1 to 8",
    ),
    (
        "[upstream]\nprotocol = \"3.1\"\n",
        2,
        "upstream.protocol",
        "allowed",
    ),
    (
        "[upstream]\nlinger = \"1s\"\n",
        1,
        "upstream.linger_busy_min",
        "longer than upstream.linger",
    ),
    (
        "[upstream]\nusername = \"u\"\npassword_file = \"no\"\n",
        3,
        "upstream.password_file",
        "/etc/tidegate/no cannot be read",
    ),
    (
        "[upstream.tls]\nserver_name = \"a\"\n",
        1,
        "upstream.tls",
        "no server is mqtts",
    ),
    (
        "[[tls]]\nname = \"a\"\nclient_ca = \"b\"\ncrl = [\"c\", \"d\"]\n[[tls]]\nname = \"default\"\n",
        4,
        "tls[0].crl",
        "/etc/tidegate/d cannot be read",
    ),
    (
        "[[tls]]\nname = \"default\"\nclient_ca = \"b\"\n",
        3,
        "tls[0].client_ca",
        "/etc/tidegate/b cannot be read",
    ),
    (
        "[[tls]]\nname = \"default\"\ncrl = \"c\"\n",
        3,
        "tls[0].crl",
        "needs client_ca",
    ),
    (
        "[[tls]]\nname = \"default\"\nidentity = \"cn\"\n",
        3,
        "tls[0].identity",
        "needs client_ca",
    ),
    (
        "[[tls]]\nname = \"default\"\nidentity = \"email\"\n",
        3,
        "tls[0].identity",
        "allowed: \"cn\", \"san_dns\", \"san_uri\"",
    ),
    (
        "[[tls]]\nname = \"default\"\nclient_auth = \"optonal\"\n",
        3,
        "tls[0].client_auth",
        "did you mean \"optional\"?",
    ),
    (
        "[[tls]]\nname = \"default\"\nkey_log = \"/nonexistent/keys\"\n",
        3,
        "tls[0].key_log",
        "is no file in a directory",
    ),
    (
        "[[tls]]\nname = \"default\"\ncrl = 7\n",
        3,
        "tls[0].crl",
        "a text, or a list of texts",
    ),
    (
        "[[tls]]\nname = \"default\"\ncert = \"b\"\n",
        1,
        "tls[0]",
        "belong together",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\n",
        1,
        "listeners[0]",
        "missing field `bind`",
    ),
    (
        "[[listeners]]\ntransport = \"tpc\"\nbind = \"127.0.0.1:1\"\n",
        2,
        "listeners[0].transport",
        "did you mean \"tcp\"?",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"localhost\"\n",
        3,
        "listeners[0].bind",
        "invalid socket address",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:1\"\npath = \"/x\"\n",
        4,
        "listeners[0].path",
        "not used by transport \"tcp\"",
    ),
    (
        "[[listeners]]\ntransport = \"wss\"\nbind = \"127.0.0.1:1\"\nwebtransport = true\n",
        4,
        "listeners[0].webtransport",
        "not used by transport \"wss\"; only quic listeners use it",
    ),
    (
        "[[listeners]]\ntransport = \"tls\"\nbind = \"127.0.0.1:1\"\nearly_data = true\n",
        4,
        "listeners[0].early_data",
        "not used by transport \"tls\"; only quic listeners use it",
    ),
    (
        "[[listeners]]\ntransport = \"quic\"\nbind = \"127.0.0.1:1\"\norigins = [\"https://a.example\"]\n",
        4,
        "listeners[0].origins",
        "quic with webtransport = true",
    ),
    (
        "[[listeners]]\ntransport = \"tls\"\nbind = \"127.0.0.1:1\"\ntls = \"x\"\n",
        4,
        "listeners[0].tls",
        "no [[tls]] is named",
    ),
    (
        "[[tls]]\nname = \"a\"\n[[listeners]]\ntransport = \"tls\"\nbind = \"127.0.0.1:1\"\ntls = [\"a\", \"x\"]\n",
        6,
        "listeners[0].tls",
        "no [[tls]] is named \"x\"",
    ),
    (
        "[[tls]]\nname = \"a\"\n[[listeners]]\ntransport = \"tls\"\nbind = \"127.0.0.1:1\"\ntls = [\"a\", \"a\"]\n",
        6,
        "listeners[0].tls",
        "named twice",
    ),
    (
        "[[listeners]]\ntransport = \"tls\"\nbind = \"127.0.0.1:1\"\ntls = []\n",
        4,
        "listeners[0].tls",
        "empty",
    ),
    (
        "[[tls]]\nname = \"a\"\n[[tls]]\nname = \"b\"\nclient_ca = \"c\"\n[[listeners]]\n\
         transport = \"tls\"\nbind = \"127.0.0.1:1\"\ntls = [\"a\", \"b\"]\n",
        9,
        "listeners[0].tls",
        "\"b\" must have the same, or none",
    ),
    (
        "[[listeners]]\ntransport = \"tls\"\nbind = \"127.0.0.1:1\"\nauth = \"mtls\"\n",
        4,
        "listeners[0].auth",
        "needs client_ca",
    ),
    (
        "[auth]\nmode = \"mtls\"\n[[listeners]]\ntransport = \"ws\"\nbind = \"127.0.0.1:1\"\n",
        2,
        "auth.mode",
        "listener \"ws\" is ws",
    ),
    (
        "[auth]\nacl = \"open\"\n[[listeners]]\ntransport = \"tls\"\nbind = \"0.0.0.0:1\"\n",
        3,
        "listeners[0].tls",
        "needs a certificate",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:1\"\nauth = \"jwt\"\n",
        4,
        "listeners[0].auth",
        "not supported",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:1\"\nauth = \"file\"\n",
        4,
        "listeners[0].auth",
        "needs auth.file",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:1\"\n[[listeners]]\ntransport = \"ws\"\nbind = \"127.0.0.1:1\"\n",
        6,
        "listeners[1].bind",
        "already bound by \"tcp\"",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:1\"\n[[listeners]]\ntransport = \"tcp\"\nbind = \"127.0.0.1:2\"\n",
        4,
        "listeners[1].name",
        "already the name",
    ),
    (
        "[[listeners]]\ntransport = \"tcp\"\nbind = \"0.0.0.0:1\"\n",
        3,
        "listeners[0].bind",
        "acl = \"open\"",
    ),
    ("listeners = []\n", 1, "listeners", "at least one"),
    (
        "[auth]\nmode = \"delegate\"\n",
        2,
        "auth.mode",
        "not supported",
    ),
    (
        "[auth]\nmode = \"file\"\n",
        2,
        "auth.mode",
        "needs auth.file",
    ),
    (
        "[auth]\nacl = \"rules\"\n",
        2,
        "auth.acl",
        "at least one [[acl]]",
    ),
    (
        "[auth]\nclient_id = \"username\"\n",
        2,
        "auth.client_id",
        "is anonymous",
    ),
    (
        "[auth]\nacl = \"open\"\n[[acl]]\nwho = \"*\"\nallow = []\ntopics = [\"#\"]\n",
        2,
        "auth.acl",
        "exclude each other",
    ),
    (
        "[[acl]]\nwho = \"\"\nallow = []\ntopics = [\"#\"]\n",
        2,
        "acl[0].who",
        "empty",
    ),
    (
        "[[acl]]\nwho = \"*\"\nallow = [\"read\"]\ntopics = [\"#\"]\n",
        3,
        "acl[0].allow",
        "\"publish\", \"subscribe\"",
    ),
    (
        "[[acl]]\nwho = \"*\"\nallow = []\ntopics = [\"a\", \"#/b\"]\n",
        4,
        "acl[0].topics",
        "stands alone and last",
    ),
    (
        "[[acl]]\nwho = \"*\"\nallow = []\ntopics = [\"a/%x\"]\n",
        4,
        "acl[0].topics",
        "after % comes",
    ),
    (
        "[log]\nlevel = \"info,tidegate=loud\"\n",
        2,
        "log.level",
        "\"loud\" is not allowed",
    ),
    ("[admin]\nbind = 9883\n", 2, "admin.bind", "expected"),
];

#[test]
fn what_is_wrong_is_named_with_line_key_and_remedy() {
    for (text, line, key, part) in WRONG {
        let Err(problems) = parse(text) else {
            panic!("accepted:\n{text}");
        };
        let found = problems.iter().any(|p| {
            p.line == *line
                && p.key.as_deref().unwrap_or_default() == *key
                && p.message.contains(part)
        });
        assert!(
            found,
            "{text}\nwanted {line}: {key}: {part}\ngot {problems:#?}"
        );
    }
}
