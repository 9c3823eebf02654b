//! Rules for `[upstream]`.

use std::time::Duration;

use crate::config::check::checker::{Checker, HOUR, KEEPALIVE, YEAR};
use crate::config::check::topics::{bad_filter, plain_topic};
use crate::config::types::Config;
use crate::config::upstream::Server;

impl Checker<'_, '_> {
    pub(super) fn upstream(&mut self, config: &Config) {
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
}
