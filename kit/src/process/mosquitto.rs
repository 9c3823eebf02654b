//! Debian's mosquitto as the broker, on a free loopback port.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{START_PATIENCE, Server, TempDir, free_port};
use crate::certs::Certs;

/// The configuration of a broker. The default is open and volatile, and has no queue limit.
#[derive(Debug, Clone, Default)]
pub struct MosquittoConfig {
    /// `max_queued_messages`; 0, the default here, means no limit.
    pub max_queued_messages: u32,
    /// `max_inflight_messages`, also its Receive Maximum; `None` leaves mosquitto's 20.
    pub max_inflight_messages: Option<u32>,
    /// Keeps sessions and retained messages over a stop and start.
    pub persistence: bool,
    /// Allows only this user name and password.
    pub login: Option<(String, String)>,
    /// Serves TLS with these certificates instead of plain TCP.
    pub tls: Option<Certs>,
    /// Further lines of its configuration.
    pub extra: Vec<String>,
}

impl MosquittoConfig {
    /// Starts a broker.
    ///
    /// # Errors
    /// mosquitto is not installed or does not start.
    pub fn start(&self) -> io::Result<Mosquitto> {
        let dir = TempDir::new("mosquitto")?;
        let mut broker = Mosquitto {
            dir,
            port: 0,
            config: self.clone(),
            server: None,
        };
        // Another process may take the free port first; then the next one is tried.
        let mut last = None;
        for _ in 0..5 {
            broker.port = free_port()?;
            match broker.start_again() {
                Ok(()) => return Ok(broker),
                Err(e) => last = Some(e),
            }
        }
        Err(last.expect("the loop above ran"))
    }
}

/// A running broker, killed when dropped.
#[derive(Debug)]
pub struct Mosquitto {
    dir: TempDir,
    port: u16,
    config: MosquittoConfig,
    server: Option<Server>,
}

impl Mosquitto {
    /// Starts an open, volatile broker without queue limits.
    ///
    /// # Errors
    /// As [`MosquittoConfig::start`].
    pub fn start() -> io::Result<Self> {
        MosquittoConfig::default().start()
    }

    /// Its address.
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Its URL for Tidegate's `upstream.servers`.
    pub fn url(&self) -> String {
        let scheme = if self.config.tls.is_some() {
            "mqtts"
        } else {
            "mqtt"
        };
        format!("{scheme}://127.0.0.1:{}", self.port)
    }

    /// The broker's process id.
    ///
    /// # Panics
    /// If the broker is stopped.
    pub fn pid(&self) -> u32 {
        self.server.as_ref().expect("the broker is running").pid()
    }

    /// Its log so far.
    pub fn log(&self) -> Vec<String> {
        self.server.as_ref().map(Server::log).unwrap_or_default()
    }

    /// Ends the broker: at once, or with SIGTERM so that it saves its persistent state.
    ///
    /// # Errors
    /// The broker does not end.
    pub fn stop(&mut self, at_once: bool) -> io::Result<()> {
        let Some(mut server) = self.server.take() else {
            return Ok(());
        };
        if !at_once {
            server.signal(Signal::TERM)?;
            server.wait(START_PATIENCE)?;
        }
        Ok(())
    }

    /// Starts the broker on the same port and with the same folder as before.
    ///
    /// # Errors
    /// The broker does not start.
    pub fn start_again(&mut self) -> io::Result<()> {
        let path = self.dir.path().join("mosquitto.conf");
        std::fs::write(&path, self.text()?)?;
        let child = Command::new(program()?)
            .arg("-c")
            .arg(&path)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()?;
        let mut server = Server::new(child, "mosquitto");
        let deadline = Instant::now() + START_PATIENCE;
        while std::net::TcpStream::connect(self.addr()).is_err() {
            if let Some(status) = server.child().try_wait()? {
                let log = server.log().join("\n");
                return Err(io::Error::other(format!(
                    "mosquitto ended with {status}\n{log}"
                )));
            }
            if Instant::now() > deadline {
                return Err(io::Error::other("mosquitto does not accept connections"));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        self.server = Some(server);
        Ok(())
    }

    fn text(&self) -> io::Result<String> {
        let config = &self.config;
        let dir = self.dir.path().display();
        // As root it would change to a user that may not read this folder.
        let mut lines = vec![
            "user root".to_owned(),
            format!("listener {} 127.0.0.1", self.port),
            format!("max_queued_messages {}", config.max_queued_messages),
            "log_dest stderr".to_owned(),
            "log_type error".to_owned(),
            "log_type warning".to_owned(),
            "log_type notice".to_owned(),
            "connection_messages false".to_owned(),
            "set_tcp_nodelay true".to_owned(),
        ];
        if let Some(n) = config.max_inflight_messages {
            lines.push(format!("max_inflight_messages {n}"));
        }
        if config.persistence {
            lines.push("persistence true".to_owned());
            lines.push(format!("persistence_location {dir}/"));
        }
        if let Some(certs) = &config.tls {
            lines.push(format!("certfile {}", certs.cert.display()));
            lines.push(format!("keyfile {}", certs.key.display()));
        }
        match &config.login {
            None => lines.push("allow_anonymous true".to_owned()),
            Some((user, password)) => {
                let file = self.dir.path().join("passwords");
                write_passwords(&file, user, password)?;
                lines.push("allow_anonymous false".to_owned());
                lines.push(format!("password_file {}", file.display()));
            }
        }
        lines.extend(config.extra.iter().cloned());
        Ok(lines.join("\n") + "\n")
    }
}

fn write_passwords(file: &Path, user: &str, password: &str) -> io::Result<()> {
    let status = Command::new("mosquitto_passwd")
        .args(["-b", "-c"])
        .arg(file)
        .args([user, password])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()?;
    if status.success() {
        Ok(())
    } else {
        Err(io::Error::other("mosquitto_passwd failed"))
    }
}

fn program() -> io::Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian installs it where only root's PATH looks.
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join("mosquitto"))
        .find(|file| file.is_file())
        .ok_or_else(|| io::Error::other("mosquitto is not installed (apt-get install mosquitto)"))
}
