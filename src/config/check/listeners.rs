//! What a listener's paths and proxies may be.

use crate::config::check::{Check, HEALTH_PATH};
use crate::config::choices::ProxyProtocol;
use crate::config::types::Listener;

impl Check<'_, '_> {
    pub(super) fn paths(&mut self, key: &str, paths: &[String]) {
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

    pub(super) fn proxies(&mut self, protocol: &str, trusted: &str, listener: &Listener) {
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
