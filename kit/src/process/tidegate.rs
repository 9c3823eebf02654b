//! Tidegate itself, with a generated configuration and ports of its own choosing.

use std::io::{self, BufRead, BufReader};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{START_PATIENCE, Server, TempDir};
use crate::certs::Certs;
use crate::dial::{Dialer, Trust, Url};
use crate::metrics::Metrics;

/// The configuration of a Tidegate: a node id, listeners on free loopback ports, an open ACL and
/// the admin listener. [`set`](Self::set) adds further keys.
#[derive(Debug, Clone)]
pub struct TidegateConfig {
    bin: PathBuf,
    listeners: Vec<(String, String, Vec<String>)>,
    sections: Vec<(String, Vec<(String, String)>)>,
    extra: String,
}

impl TidegateConfig {
    /// A configuration for the binary `bin` (`env!("CARGO_BIN_EXE_tidegate")` in a test) before one
    /// broker, such as `mqtt://127.0.0.1:1883` or `embedded:`. It has no listeners yet.
    pub fn new(bin: impl Into<PathBuf>, broker: &str) -> Self {
        let bin = bin.into();
        let mut this = Self {
            bin,
            listeners: Vec::new(),
            sections: Vec::new(),
            extra: String::new(),
        };
        this.put("", "version", "1");
        this.put("node", "id", "\"kit\"");
        this.put("node", "data_dir", "\"data\"");
        this.put("upstream", "servers", &format!("[\"{broker}\"]"));
        this.put("auth", "mode", "\"anonymous\"");
        this.put("auth", "acl", "\"open\"");
        this.put("admin", "bind", "\"127.0.0.1:0\"");
        this
    }

    /// Adds listeners, each named like its transport: `tcp`, `tls`, `ws`, `wss`, `quic`, and
    /// `webtransport`, which is a QUIC listener that serves WebTransport.
    pub fn listen(mut self, transports: &[&str]) -> Self {
        for transport in transports {
            self = match *transport {
                "webtransport" => self.listener(transport, "quic", &["webtransport = true"]),
                transport => self.listener(transport, transport, &[]),
            };
        }
        self
    }

    /// Adds one listener with a name and further lines of its own.
    pub fn listener(mut self, name: &str, transport: &str, lines: &[&str]) -> Self {
        let lines = lines.iter().map(|line| (*line).to_owned()).collect();
        self.listeners
            .push((name.to_owned(), transport.to_owned(), lines));
        self
    }

    /// Sets a key of a section to a TOML value, such as `set("session", "expiry_v3", "\"1h\"")`.
    pub fn set(mut self, section: &str, key: &str, value: &str) -> Self {
        self.put(section, key, value);
        self
    }

    /// Appends TOML as it is, such as `[[acl]]` tables.
    pub fn append(mut self, toml: &str) -> Self {
        self.extra.push_str(toml);
        self
    }

    /// Starts Tidegate and waits until it prints that it is ready.
    ///
    /// # Errors
    /// Tidegate ends or is not ready in time; the error holds its log.
    pub fn start(&self) -> io::Result<Tidegate> {
        let dir = TempDir::new("edge")?;
        let certs = Certs::make(dir.path())?;
        let path = dir.path().join("tidegate.toml");
        std::fs::write(&path, self.text(&certs))?;
        let mut tidegate = Tidegate {
            dir,
            bin: self.bin.clone(),
            certs,
            server: None,
            listening: Vec::new(),
        };
        tidegate.start_again()?;
        Ok(tidegate)
    }

    /// The configuration's text.
    pub fn text(&self, certs: &Certs) -> String {
        let mut text = String::new();
        for (section, keys) in &self.sections {
            if !section.is_empty() {
                text += &format!("\n[{section}]\n");
            }
            for (key, value) in keys {
                text += &format!("{key} = {value}\n");
            }
        }
        let secure = |t: &str| matches!(t, "tls" | "wss" | "quic");
        if self.listeners.iter().any(|(_, t, _)| secure(t)) {
            let (cert, key) = (certs.cert.display(), certs.key.display());
            text += &format!("\n[[tls]]\nname = \"kit\"\ncert = \"{cert}\"\nkey = \"{key}\"\n");
        }
        for (name, transport, lines) in &self.listeners {
            text += &format!("\n[[listeners]]\nname = \"{name}\"\ntransport = \"{transport}\"\n");
            let given = |key: &str| lines.iter().any(|line| line.starts_with(key));
            if !given("bind") {
                text += "bind = \"127.0.0.1:0\"\n";
            }
            if matches!(transport.as_str(), "ws" | "wss") && !given("path") {
                text += "path = \"/mqtt\"\n";
            }
            if secure(transport) && !given("tls") {
                text += "tls = \"kit\"\n";
            }
            for line in lines {
                text += line;
                text.push('\n');
            }
        }
        text + &self.extra
    }

    fn put(&mut self, section: &str, key: &str, value: &str) {
        let at = self.sections.iter().position(|(name, _)| name == section);
        let at = at.unwrap_or_else(|| {
            self.sections.push((section.to_owned(), Vec::new()));
            self.sections.len() - 1
        });
        let keys = &mut self.sections[at].1;
        keys.retain(|(have, _)| have != key);
        keys.push((key.to_owned(), value.to_owned()));
    }
}

/// An address that Tidegate has printed at its start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listening {
    /// The listener's name; `admin` for the admin listener.
    pub name: String,
    /// Its transport; `http` for the admin listener.
    pub transport: String,
    /// Its URL.
    pub url: String,
}

/// A running Tidegate, killed when dropped.
#[derive(Debug)]
pub struct Tidegate {
    dir: TempDir,
    bin: PathBuf,
    certs: Certs,
    server: Option<Server>,
    listening: Vec<Listening>,
}

impl Tidegate {
    /// Its process id.
    ///
    /// # Panics
    /// If it is stopped.
    pub fn pid(&self) -> u32 {
        self.server.as_ref().expect("tidegate is running").pid()
    }

    /// Its folder, with `tidegate.toml` and `data`.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The certificates of its secure listeners.
    pub fn certs(&self) -> &Certs {
        &self.certs
    }

    /// The addresses on which it listens.
    pub fn listening(&self) -> &[Listening] {
        &self.listening
    }

    /// The URL of the listener with this name.
    ///
    /// # Panics
    /// If no listener has this name.
    pub fn url(&self, name: &str) -> Url {
        // A listener may have several URLs; take the one of the transport in its name.
        let mut all = self.listening.iter().filter(|l| l.name == name);
        let found = all.clone().find(|l| l.transport == name);
        let found = found.or_else(|| all.next());
        let found = found.unwrap_or_else(|| panic!("no listener {name}: {:?}", self.listening));
        let url: Url = found.url.parse().unwrap_or_else(|e| panic!("{e}"));
        // The certificate covers the name and the address; connecting by name also checks SNI.
        let host = if self.secure(name) {
            "localhost".to_owned()
        } else {
            url.host
        };
        Url { host, ..url }
    }

    /// A dialer to the listener with this name that trusts its certificate.
    ///
    /// # Panics
    /// If no listener has this name.
    pub fn dialer(&self, name: &str) -> Dialer {
        let trust = Trust::ca(&self.certs.ca).expect("the certificates were just made");
        Dialer::new(&self.url(name), &trust).expect("a loopback URL resolves")
    }

    /// The address of the admin listener.
    ///
    /// # Panics
    /// If the configuration has no admin listener.
    pub fn admin(&self) -> SocketAddr {
        let found = self.listening.iter().find(|l| l.name == "admin");
        let url = &found.expect("the configuration has an admin listener").url;
        let addr = url.trim_start_matches("http://").trim_end_matches('/');
        addr.parse().unwrap_or_else(|e| panic!("{url}: {e}"))
    }

    /// Its metrics now, read strictly.
    ///
    /// # Errors
    /// The admin listener does not answer, or its answer breaks the exposition format.
    pub fn metrics(&self) -> io::Result<Metrics> {
        let (status, body) = crate::metrics::get(self.admin(), "/metrics")?;
        if status != 200 {
            return Err(io::Error::other(format!("/metrics answered {status}")));
        }
        Metrics::parse(&body).map_err(io::Error::other)
    }

    /// Its log so far.
    pub fn log(&self) -> Vec<String> {
        self.server.as_ref().map(Server::log).unwrap_or_default()
    }

    /// Waits until a line of its log contains `text` and returns it.
    ///
    /// # Errors
    /// No line contains `text` within `wait`.
    pub fn wait_for_log(&self, text: &str, wait: Duration) -> io::Result<String> {
        let deadline = Instant::now() + wait;
        loop {
            if let Some(line) = self.log().into_iter().find(|line| line.contains(text)) {
                return Ok(line);
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("no log line with {text:?}")));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Asks Tidegate to end (SIGTERM) and waits for its exit status.
    ///
    /// # Errors
    /// Tidegate does not end in time.
    pub fn stop(&mut self) -> io::Result<(ExitStatus, Vec<String>)> {
        let mut server = self.server.take().ok_or(io::ErrorKind::NotFound)?;
        server.signal(Signal::TERM)?;
        let status = server.wait(START_PATIENCE)?;
        Ok((status, server.log()))
    }

    /// Kills Tidegate.
    pub fn kill(&mut self) {
        self.server = None;
    }

    /// Starts Tidegate again with the same configuration, on newly chosen free ports.
    ///
    /// # Errors
    /// As [`TidegateConfig::start`].
    pub fn start_again(&mut self) -> io::Result<()> {
        let child = Command::new(&self.bin)
            .args(["run", "--config"])
            .arg(self.dir.path().join("tidegate.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut server = Server::new(child, "tidegate");
        let stdout = server
            .child()
            .stdout
            .take()
            .expect("stdout was piped above");
        let (lines, printed) = mpsc::channel();
        // The thread also keeps the pipe open and empty while the process lives.
        std::thread::spawn(move || {
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                let _ = lines.send(line);
            }
        });
        let deadline = Instant::now() + START_PATIENCE;
        let mut listening = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Ok(line) = printed.recv_timeout(left) else {
                let status = server.child().try_wait()?;
                // The log may still be on its way through the pipe.
                std::thread::sleep(Duration::from_millis(100));
                let log = server.log().join("\n");
                return Err(io::Error::other(format!(
                    "tidegate is not ready ({status:?})\n{log}"
                )));
            };
            let words: Vec<_> = line.split_whitespace().collect();
            match words.as_slice() {
                ["listening", name, transport, url, ..] => listening.push(Listening {
                    name: (*name).to_owned(),
                    transport: (*transport).to_owned(),
                    url: (*url).to_owned(),
                }),
                ["ready", ..] => break,
                _ => {}
            }
        }
        (self.server, self.listening) = (Some(server), listening);
        Ok(())
    }

    fn secure(&self, name: &str) -> bool {
        let found = self.listening.iter().find(|l| l.name == name);
        found.is_some_and(|l| matches!(l.transport.as_str(), "tls" | "wss" | "quic"))
    }
}
