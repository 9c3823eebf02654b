//! Rules for `[[listeners]]`.

use crate::config::address::HEALTH_PATH;
use crate::config::check::checker::{Checker, HOUR, SECOND};
use crate::config::choices::{AuthMode, ProxyProtocol, Transport};
use crate::config::types::{Config, Listener};

impl Checker<'_, '_> {
    pub(super) fn listeners(&mut self, config: &Config) {
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
            self.proxies(&key("proxy_protocol"), &key("trusted_proxies"), listener);
            if let Some(interval) = listener.ping_interval {
                self.range_time(&key("ping_interval"), interval, SECOND..=HOUR);
            }
            if let Err(why) =
                check_mount(&listener.mount, listener.auth, &config.upstream.probe_topic)
            {
                self.say(&key("mount"), why);
            }
            self.listener_tls(config, &key("tls"), i);
            self.listener_auth(config, i);
        }
    }

    fn paths(&mut self, key: &str, paths: &[String]) {
        if paths.is_empty() {
            self.say(key, "empty; write at least one path, such as \"/mqtt\"");
        }
        for path in paths {
            let legal = |c: char| c.is_ascii_graphic() && !matches!(c, '?' | '#');
            if !path.starts_with('/') || !path.chars().all(legal) {
                let message = format!(
                    "{path:?} must begin with / and have only ASCII without ?, # and spaces"
                );
                self.say(key, message);
            } else if path == HEALTH_PATH {
                let message = format!("{HEALTH_PATH} is where load balancers ask; take another");
                self.say(key, message);
            }
        }
    }

    fn proxies(&mut self, protocol: &str, trusted: &str, listener: &Listener) {
        let required = listener.proxy_protocol == ProxyProtocol::Required;
        if required && listener.trusted_proxies.is_empty() {
            let message = "\"required\" needs trusted_proxies, the networks that the proxies are \
                           in, such as [\"10.0.0.0/8\"]";
            self.say(protocol, message);
        }
        if !required && !listener.trusted_proxies.is_empty() && !listener.transport.is_websocket() {
            let message = format!(
                "transport \"{}\" learns a client's address by proxy_protocol = \"required\" only",
                listener.transport.name()
            );
            self.say(trusted, message);
        }
    }
}

/// Whether a mount can be the prefix of a topic.
fn check_mount(mount: &str, auth: AuthMode, probe_topic: &str) -> Result<(), &'static str> {
    if mount.is_empty() {
        return Ok(());
    }
    if !mount.ends_with('/') || mount.len() > 1024 {
        return Err("must end with / and have at most 1024 bytes, such as \"tenants/%u/\"");
    }
    if mount.contains(['+', '#', '\0']) || mount.starts_with('$') {
        return Err("must have no wildcard and not begin with $");
    }
    let own = |prefix: &str| {
        mount
            .strip_prefix(prefix)
            .is_some_and(|rest| rest.starts_with('/'))
    };
    if own("tidegate") || own(probe_topic) {
        return Err("must not lie below tidegate/ or upstream.probe_topic, where Tidegate probes");
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
