//! Rules for `[[tls]]`, and for the listeners that use one.

use std::path::Path;

use crate::config::address::is_loopback;
use crate::config::check::checker::Checker;
use crate::config::choices::AuthMode;
use crate::config::types::{CertSource, Config, Tls};

impl Checker<'_, '_> {
    pub(super) fn tls(&mut self, config: &Config) {
        for (i, tls) in config.tls.iter().enumerate() {
            let key = format!("tls[{i}].name");
            self.name(&key, &tls.name);
            if config.tls[..i].iter().any(|t| t.name == tls.name) {
                self.say(
                    &key,
                    format!("\"{}\" is already the name of another", tls.name),
                );
            }
            if let CertSource::Files { cert, key } = &tls.source {
                self.readable(&format!("tls[{i}].cert"), cert);
                self.readable(&format!("tls[{i}].key"), key);
            }
            if let Some(clients) = &tls.clients {
                self.readable(&format!("tls[{i}].client_ca"), &clients.ca);
                for crl in &clients.crl {
                    self.readable(&format!("tls[{i}].crl"), crl);
                }
            }
            if let Some(file) = &tls.key_log
                && (file.is_dir() || !file.parent().is_some_and(Path::is_dir))
            {
                let message = format!("{} is no file in a directory that is there", file.display());
                self.say(&format!("tls[{i}].key_log"), message);
            }
        }
    }

    pub(super) fn listener_auth(&mut self, config: &Config, i: usize) {
        let listener = &config.listeners[i];
        let first = listener.tls.first();
        let asks = config
            .tls
            .iter()
            .any(|t| Some(&t.name) == first && t.clients.is_some());
        let message = match listener.auth {
            AuthMode::File if config.auth.file.is_none() => {
                "\"file\" needs auth.file, the path of a password file".to_owned()
            }
            AuthMode::Mtls if first.is_none() => format!(
                "\"mtls\" needs transport tls, wss or quic, and listener \"{}\" is {}: write its \
                 auth",
                listener.name,
                listener.transport.name()
            ),
            AuthMode::Mtls if !asks => format!(
                "\"mtls\" needs client_ca in the [[tls]] of listener \"{}\"",
                listener.name
            ),
            _ => return,
        };
        let key = |name: &str| format!("listeners[{i}].{name}");
        let named = self.doc.line(&key("auth")) != self.doc.line(&format!("listeners[{i}]"));
        let key = match named {
            true => key("auth"),
            false => "auth.mode".to_owned(),
        };
        if !self
            .problems
            .iter()
            .any(|p| p.key.as_deref() == Some(&*key))
        {
            self.say(&key, message);
        }
    }

    pub(super) fn listener_tls(&mut self, config: &Config, key: &str, i: usize) {
        let names = &config.listeners[i].tls;
        if names.is_empty() && config.listeners[i].transport.is_encrypted() {
            self.say(key, "empty; write the name of a [[tls]]");
        }
        let find = |name: &String| config.tls.iter().find(|t| t.name == *name);
        for (n, name) in names.iter().enumerate() {
            self.listener_tls_name(config, key, i, name);
            if names[..n].contains(name) {
                self.say(key, format!("\"{name}\" is named twice"));
            } else if let (Some(first), Some(tls)) = (find(&names[0]), find(name))
                && !follows(tls, first)
            {
                let message = format!(
                    "client_ca, crl, client_auth, identity and key_log of the first, \"{}\", hold \
                     for all of a listener; \"{name}\" must have the same, or none",
                    first.name
                );
                self.say(key, message);
            }
        }
    }

    fn listener_tls_name(&mut self, config: &Config, key: &str, i: usize, name: &str) {
        let listener = &config.listeners[i];
        match config.tls.iter().find(|t| t.name == *name) {
            None => {
                let known: Vec<_> = config.tls.iter().map(|t| t.name.as_str()).collect();
                let known = known.join(", ");
                self.say(
                    key,
                    format!("no [[tls]] is named \"{name}\"; there are: {known}"),
                );
            }
            Some(tls) if tls.source == CertSource::Throwaway && !is_loopback(&listener.bind) => {
                self.say(
                    key,
                    format!(
                        "{} can be reached from other machines and needs a certificate: give \
                         [[tls]] \"{name}\" a cert and a key (`tidegate certs` makes them)",
                        listener.bind
                    ),
                );
            }
            Some(_) => {}
        }
    }
}

/// Whether a listener may have this certificate beside its first.
fn follows(tls: &Tls, first: &Tls) -> bool {
    (tls.clients.is_none() || tls.clients == first.clients)
        && (tls.key_log.is_none() || tls.key_log == first.key_log)
}
