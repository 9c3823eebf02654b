//! Rules for `[auth]` and `[[acl]]`.

use crate::config::address::is_loopback;
use crate::config::check::checker::Checker;
use crate::config::check::topics::bad_pattern;
use crate::config::choices::{AclMode, AuthMode, ClientIdRule};
use crate::config::types::Config;

impl Checker<'_, '_> {
    pub(super) fn auth(&mut self, config: &Config) {
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

    pub(super) fn acl(&mut self, config: &Config) {
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
}
