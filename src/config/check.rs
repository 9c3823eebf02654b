//! Rules that hold between values, and the ranges of each.

mod listeners;
mod tls;

use std::fmt::Display;
use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::Path;
use std::time::Duration;

use crate::config::choices::{AclMode, AuthMode, ClientIdRule, Transport};
use crate::config::document::Document;
use crate::config::error::Problem;
use crate::config::types::Config;
use crate::config::upstream::Server;

/// Largest MQTT packet: the largest remaining length and its header.
const MQTT_PACKET_MAX: u32 = 268_435_455 + 5;
/// Answered by WebSocket listeners beside their own paths.
pub(crate) const HEALTH_PATH: &str = "/healthz";
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);
const YEAR: Duration = Duration::from_secs(366 * 24 * 3600);
const KEEPALIVE: RangeInclusive<Duration> = SECOND..=Duration::from_secs(65535);

/// Adds all that is wrong.
pub(super) fn check(config: &Config, doc: &Document<'_>, problems: &mut Vec<Problem>) {
    let mut check = Check { doc, problems };
    check.node(config);
    check.tls(config);
    check.listeners(config);
    check.upstream(config);
    check.session(config);
    check.limits(config);
    check.memory(config);
    check.auth(config);
    check.acl(config);
    check.log(config);
    check.range_time("drain.grace", config.drain.grace, Duration::ZERO..=HOUR);
}

/// Whether it can stand before a topic.
fn mount(mount: &str, auth: AuthMode) -> Result<(), &'static str> {
    if mount.is_empty() {
        return Ok(());
    }
    if !mount.ends_with('/') || mount.len() > 1024 {
        return Err("must end with / and have at most 1024 bytes, such as \"tenants/%u/\"");
    }
    if mount.contains(['+', '#', '\0']) || mount.starts_with('$') {
        return Err("must have no wildcard and not begin with $");
    }
    let names = mount.split('%').skip(1);
    if !names.into_iter().all(|n| n.starts_with(['u', 'c'])) {
        return Err("after % only u (user name) and c (client id) are known");
    }
    if mount.contains("%u") && auth == AuthMode::Anonymous {
        return Err("%u needs a user name, and this listener's clients are anonymous");
    }
    Ok(())
}

/// Whether only this machine can reach an address.
pub(crate) fn is_loopback(addr: &SocketAddr) -> bool {
    match addr.ip() {
        IpAddr::V4(ip) => ip.is_loopback(),
        IpAddr::V6(ip) => {
            ip.is_loopback() || ip.to_ipv4_mapped().is_some_and(|ip| ip.is_loopback())
        }
    }
}

struct Check<'a, 'd> {
    doc: &'a Document<'d>,
    problems: &'a mut Vec<Problem>,
}

impl Check<'_, '_> {
    fn say(&mut self, key: &str, message: impl Into<String>) {
        self.problems.push(Problem {
            line: self.doc.line(key),
            key: key.to_owned(),
            message: message.into(),
        });
    }

    fn range<T: PartialOrd + Display>(&mut self, key: &str, value: T, range: RangeInclusive<T>) {
        if !range.contains(&value) {
            let (least, most) = (range.start(), range.end());
            self.say(
                key,
                format!("{value} is out of range; allowed: {least} to {most}"),
            );
        }
    }

    fn range_time(&mut self, key: &str, value: Duration, range: RangeInclusive<Duration>) {
        if !range.contains(&value) {
            let text = humantime::format_duration;
            let (least, most) = (text(*range.start()), text(*range.end()));
            let value = text(value);
            self.say(
                key,
                format!("{value} is out of range; allowed: {least} to {most}"),
            );
        }
    }

    fn whole_seconds(&mut self, key: &str, value: Duration) {
        if value.subsec_nanos() != 0 {
            self.say(key, "MQTT counts it in seconds; write whole seconds");
        }
    }

    /// Reads a byte, which also finds a directory and a missing right.
    fn readable(&mut self, key: &str, path: &Path) {
        let read =
            std::fs::File::open(path).and_then(|mut file| std::io::Read::read(&mut file, &mut [0]));
        if let Err(error) = read {
            self.say(key, format!("{} cannot be read: {error}", path.display()));
        }
    }

    fn name(&mut self, key: &str, name: &str) {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
        if name.is_empty() || name.len() > 64 || !name.chars().all(legal) {
            self.say(
                key,
                format!("{name:?} is no name; allowed: 1 to 64 of A-Z a-z 0-9 - _ ."),
            );
        }
    }

    fn node(&mut self, config: &Config) {
        if config.node.id.is_empty() {
            self.say(
                "node.id",
                "required, unless upstream.servers is [\"embedded:\"]: a name that stays the \
                 same over restarts and that no other tidegate of this core has",
            );
        } else {
            self.name("node.id", &config.node.id);
        }
    }

    fn listeners(&mut self, config: &Config) {
        if config.listeners.is_empty() {
            self.say("listeners", "empty; write at least one [[listeners]]");
        }
        for (i, listener) in config.listeners.iter().enumerate() {
            let key = |name: &str| format!("listeners[{i}].{name}");
            self.name(&key("name"), &listener.name);
            let before = &config.listeners[..i];
            if before.iter().any(|l| l.name == listener.name) {
                let message = format!("\"{}\" is already the name of another", listener.name);
                self.say(&key("name"), message);
            }
            let udp = |t: Transport| t == Transport::Quic;
            let taken = before.iter().find(|l| {
                l.bind == listener.bind
                    && l.bind.port() != 0
                    && udp(l.transport) == udp(listener.transport)
            });
            if let Some(other) = taken {
                let message = format!("{} is already bound by \"{}\"", listener.bind, other.name);
                self.say(&key("bind"), message);
            }
            self.paths(&key("path"), &listener.paths);
            for origin in &listener.origins {
                if !origin.contains("://") || origin.ends_with('/') {
                    let message =
                        format!("{origin:?} is no origin; write it as \"https://app.example.com\"");
                    self.say(&key("origins"), message);
                }
            }
            self.proxies(&key("proxy_protocol"), &key("trusted_proxies"), listener);
            if let Some(interval) = listener.ping_interval {
                self.range_time(&key("ping_interval"), interval, SECOND..=HOUR);
            }
            if let Err(why) = mount(&listener.mount, listener.auth) {
                self.say(&key("mount"), why);
            }
            self.listener_tls(config, &key("tls"), i);
            self.listener_auth(config, i);
        }
    }

    fn upstream(&mut self, config: &Config) {
        let up = &config.upstream;
        if up.servers.is_empty() {
            self.say("upstream.servers", "empty; write at least one address");
        }
        if up.servers.len() > 1
            && up
                .servers
                .iter()
                .any(|s| matches!(s, Server::Embedded { .. }))
        {
            self.say(
                "upstream.servers",
                "\"embedded:\" stands alone or not at all",
            );
        }
        if let Some(path) = &up.password_file {
            self.readable("upstream.password_file", path);
            if up.username.is_none() {
                self.say("upstream.password_file", "needs upstream.username");
            }
        }
        self.name("upstream.client_id_prefix", &up.client_id_prefix);
        if !plain_topic(&up.probe_topic) {
            self.say(
                "upstream.probe_topic",
                "not a topic name without wildcards, or it begins with \"$\" or ends in \"/\"",
            );
        }
        for (n, root) in up.roots.iter().enumerate() {
            let key = format!("upstream.roots[{n}]");
            if let Some(why) = bad_filter(root) {
                self.say(&key, why);
            } else if root.starts_with('$') {
                self.say(&key, "a root does not begin with \"$\"");
            }
        }
        self.range("upstream.data_links", up.data_links, 1..=8);
        self.range("upstream.shared_links", up.shared_links, 1..=4);
        self.range_time("upstream.linger", up.linger, Duration::ZERO..=YEAR);
        if up.linger_busy_min > up.linger {
            self.say("upstream.linger_busy_min", "longer than upstream.linger");
        }
        self.range_time("upstream.keepalive", up.keepalive, KEEPALIVE);
        self.whole_seconds("upstream.keepalive", up.keepalive);
        let ms = Duration::from_millis(1);
        self.range_time("upstream.connect_timeout", up.connect_timeout, ms..=HOUR);
        self.range_time("upstream.backoff_min", up.backoff_min, ms..=HOUR);
        self.range_time("upstream.backoff_max", up.backoff_max, ms..=HOUR);
        if up.backoff_min > up.backoff_max {
            self.say("upstream.backoff_min", "longer than upstream.backoff_max");
        }
        self.range_time(
            "upstream.subscribe_wait",
            up.subscribe_wait,
            Duration::ZERO..=HOUR,
        );
        let share = up.publishes_waiting_per_client;
        if share > up.publishes_waiting {
            let message = "larger than upstream.publishes_waiting";
            self.say("upstream.publishes_waiting_per_client", message);
        }
        if share < u64::from(config.limits.packet_max) {
            let message = "smaller than limits.packet_max: the largest legal publish could \
                           never be sent";
            self.say("upstream.publishes_waiting_per_client", message);
        }
        self.range(
            "upstream.publishes_waiting_v3_max",
            up.publishes_waiting_v3_max,
            1..=65535,
        );
        self.upstream_tls(config);
    }

    fn upstream_tls(&mut self, config: &Config) {
        let (up, tls) = (&config.upstream, &config.upstream.tls);
        let encrypted = up
            .servers
            .iter()
            .any(|s| matches!(s, Server::Remote { tls: true, .. }));
        if *tls != Default::default() && !encrypted {
            self.say(
                "upstream.tls",
                "no server is mqtts://, so nothing of it would be used",
            );
        }
        for (key, path) in [("ca", &tls.ca), ("cert", &tls.cert), ("key", &tls.key)] {
            if let Some(path) = path {
                self.readable(&format!("upstream.tls.{key}"), path);
            }
        }
        if tls.cert.is_some() != tls.key.is_some() {
            self.say("upstream.tls", "cert and key belong together");
        }
        for protocol in &tls.alpn {
            if protocol.is_empty() || protocol.len() > 255 {
                self.say("upstream.tls.alpn", "a protocol has 1 to 255 bytes");
            }
        }
    }

    fn session(&mut self, config: &Config) {
        let session = &config.session;
        // 0xFFFFFFFF is "never" on the wire [MQTT5 3.1.2.11.2].
        let longest = Duration::from_secs(u64::from(u32::MAX) - 1);
        self.range_time(
            "session.expiry_max",
            session.expiry_max,
            Duration::ZERO..=longest,
        );
        for (key, value) in [
            ("session.expiry_max", Some(session.expiry_max)),
            ("session.expiry_v3", Some(session.expiry_v3)),
            ("session.keepalive_max", session.keepalive_max),
            ("session.keepalive_default", session.keepalive_default),
        ] {
            if let Some(value) = value {
                self.whole_seconds(key, value);
            }
        }
        if session.expiry_v3 > session.expiry_max {
            self.say("session.expiry_v3", "longer than session.expiry_max");
        }
        self.range(
            "session.queue_messages_max",
            session.queue_messages_max,
            1..=1_000_000,
        );
        let least = 1024;
        self.range(
            "session.queue_bytes_max",
            session.queue_bytes_max,
            least..=u64::from(u32::MAX),
        );
        for (key, value) in [
            ("session.keepalive_max", session.keepalive_max),
            ("session.keepalive_default", session.keepalive_default),
        ] {
            if let Some(value) = value {
                self.range_time(key, value, KEEPALIVE);
            }
        }
        if let (Some(default), Some(max)) = (session.keepalive_default, session.keepalive_max)
            && default > max
        {
            self.say(
                "session.keepalive_default",
                "longer than session.keepalive_max",
            );
        }
        let minute = Duration::from_secs(60);
        self.range_time(
            "session.will_grace",
            session.will_grace,
            Duration::ZERO..=minute,
        );
        let topic = &session.presence_topic;
        let fit = topic.is_empty()
            || (topic.contains("%c")
                && plain_topic(&topic.replace("%c", "c"))
                && !topic.contains("%u"));
        if !fit {
            self.say(
                "session.presence_topic",
                "must be a topic name without wildcards in which %c stands for the client id",
            );
        }
        self.range_time(
            "session.shared_redeliver_after",
            session.shared_redeliver_after,
            Duration::ZERO..=YEAR,
        );
        if let Some(age) = session.queue_age_max {
            self.range_time("session.queue_age_max", age, SECOND..=YEAR * 100);
        }
    }

    fn limits(&mut self, config: &Config) {
        let limits = &config.limits;
        self.range(
            "limits.packet_max",
            limits.packet_max,
            1024..=MQTT_PACKET_MAX,
        );
        self.range(
            "limits.connections_max",
            limits.connections_max,
            1..=10_000_000,
        );
        self.range(
            "limits.connect_rate_max",
            limits.connect_rate_max,
            1..=10_000_000,
        );
        self.range("limits.receive_max", limits.receive_max, 1..=65535);
        let subscriptions = limits.subscriptions_per_client_max;
        self.range(
            "limits.subscriptions_per_client_max",
            subscriptions,
            1..=1_000_000,
        );
        self.range(
            "limits.topic_levels_max",
            limits.topic_levels_max,
            1..=65535,
        );
        self.range(
            "limits.handshakes_max",
            limits.handshakes_max,
            1..=1_000_000,
        );
        let ms = Duration::from_millis(1);
        for (key, value) in [
            ("limits.accept_deadline", limits.accept_deadline),
            ("limits.packet_deadline", limits.packet_deadline),
            ("limits.write_stall", limits.write_stall),
        ] {
            self.range_time(key, value, ms..=HOUR);
        }
        self.range(
            "limits.output_buffer",
            limits.output_buffer,
            1024..=16 << 20,
        );
    }

    fn memory(&mut self, config: &Config) {
        let memory = &config.memory;
        if memory.queues > memory.max {
            self.say("memory.queues", "larger than memory.max");
        }
        let up = &config.upstream;
        let sum = memory
            .queues
            .saturating_add(up.publishes_waiting)
            .saturating_add(up.retained_cache);
        if sum > memory.max {
            self.say(
                "memory.max",
                format!(
                    "{} bytes cannot hold memory.queues ({}), upstream.publishes_waiting ({}) and \
                     upstream.retained_cache ({}) together",
                    memory.max, memory.queues, up.publishes_waiting, up.retained_cache
                ),
            );
        }
    }

    fn auth(&mut self, config: &Config) {
        let auth = &config.auth;
        if let Some(path) = &auth.file {
            self.readable("auth.file", path);
            let used = config.listeners.iter().any(|l| l.auth == AuthMode::File);
            if !used {
                self.say(
                    "auth.file",
                    "no listener uses it; write mode = \"file\" in [auth]",
                );
            }
        }
        let anonymous = config
            .listeners
            .iter()
            .find(|l| l.auth == AuthMode::Anonymous);
        if let (ClientIdRule::Username, Some(listener)) = (auth.client_id, anonymous) {
            let message = format!(
                "\"username\" needs verified user names, but listener \"{}\" is anonymous",
                listener.name
            );
            self.say("auth.client_id", message);
        }
    }

    fn acl(&mut self, config: &Config) {
        match (config.auth.acl, config.acl.is_empty()) {
            (AclMode::Open, false) => {
                self.say("auth.acl", "\"open\" and [[acl]] rules exclude each other");
            }
            (AclMode::Rules, true) => {
                self.say("auth.acl", "\"rules\" needs at least one [[acl]] rule");
            }
            (AclMode::Open, true) if !self.doc.has("auth.acl") => {
                let open = config.listeners.iter().position(|l| !is_loopback(&l.bind));
                if let Some(i) = open {
                    let message = format!(
                        "{} can be reached from other machines, and nothing says what clients \
                         may do: write [[acl]] rules, or acl = \"open\" in [auth]",
                        config.listeners[i].bind
                    );
                    self.say(&format!("listeners[{i}].bind"), message);
                }
            }
            _ => {}
        }
        for (i, rule) in config.acl.iter().enumerate() {
            if rule.who.is_empty() {
                let message = "empty; write a user name, a pattern such as \"edge-*\", or \"*\"";
                self.say(&format!("acl[{i}].who"), message);
            }
            let key = format!("acl[{i}].topics");
            if rule.topics.is_empty() {
                self.say(&key, "empty; write at least one topic filter");
            }
            for topic in &rule.topics {
                if let Some(why) = bad_pattern(topic) {
                    self.say(&key, format!("{topic:?}: {why}"));
                }
            }
        }
    }

    fn log(&mut self, config: &Config) {
        const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];
        for directive in config.log.level.split(',') {
            let level = directive.rsplit('=').next().unwrap_or(directive);
            if !LEVELS.contains(&level) {
                let message = crate::config::units::not_a_choice(level, &LEVELS, &[]);
                self.say("log.level", message);
            }
        }
    }
}

/// A topic name below which others can be.
fn plain_topic(topic: &str) -> bool {
    !topic.is_empty()
        && topic.len() < 1024
        && !topic.starts_with(['$', '/'])
        && !topic.ends_with('/')
        && !topic.contains(['+', '#', '\0'])
}

/// What is wrong with a topic filter.
fn bad_filter(pattern: &str) -> Option<&'static str> {
    if pattern.is_empty() || pattern.len() > 65535 || pattern.contains('\0') {
        return Some("a topic filter has 1 to 65535 bytes and no U+0000");
    }
    if pattern.starts_with("$share/") {
        return Some("write the filter behind the share name; it holds for shared ones too");
    }
    let levels: Vec<&str> = pattern.split('/').collect();
    for (i, level) in levels.iter().enumerate() {
        if level.contains('#') && (*level != "#" || i + 1 != levels.len()) {
            return Some("# stands alone and last");
        }
        if level.contains('+') && *level != "+" {
            return Some("+ stands alone between slashes");
        }
    }
    None
}

/// What is wrong with a topic pattern of a rule.
fn bad_pattern(pattern: &str) -> Option<&'static str> {
    if let Some(why) = bad_filter(pattern) {
        return Some(why);
    }
    let mut rest = pattern;
    while let Some((_, after)) = rest.split_once('%') {
        if !after.starts_with(['c', 'u']) {
            return Some("after % comes c (the client id) or u (the user name)");
        }
        rest = after;
    }
    None
}
