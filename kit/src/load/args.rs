//! The command line of the load tool.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use super::report::Watched;
use crate::dial::{Dialer, Transport, Trust, Url};
use crate::wire::Version;

/// Puts loads on an MQTT server and reports what they cost it.
#[derive(Debug, Parser)]
pub struct Cli {
    /// Which load.
    #[command(subcommand)]
    pub load: Load,
}

/// The loads.
#[derive(Debug, Subcommand)]
pub enum Load {
    /// Many idle subscribed connections: time to connect, memory of each
    Connect(ConnectArgs),
    /// Each message to many subscribers
    FanOut(TrafficArgs),
    /// Many publishers to few subscribers
    FanIn(TrafficArgs),
    /// Pairs of one publisher and one subscriber
    Pairs(TrafficArgs),
    /// A fixed rate, for latencies
    Paced(TrafficArgs),
    /// Clients that vanish and come back under live traffic
    Flap(FlapArgs),
    /// Sessions that are away while messages come, and then drain their queues
    Drain(DrainArgs),
}

/// What all loads have in common.
#[derive(Debug, Clone, Args)]
pub struct Common {
    /// Server of the subscribers: tcp://, tls://, ws://, wss:// or quic://; repeat to spread them
    #[arg(long, required = true)]
    pub url: Vec<Url>,
    /// Server of the publishers; the first --url by default
    #[arg(long)]
    pub publish_url: Vec<Url>,
    /// PEM file of the authority to trust; without it every certificate is accepted
    #[arg(long)]
    pub ca: Option<PathBuf>,
    /// Local address to connect from; repeat to spread (127.0.0.2 ...)
    #[arg(long)]
    pub source: Vec<std::net::IpAddr>,
    /// Process to watch, as NAME=PID; repeat
    #[arg(long = "pid")]
    pub watched: Vec<Watched>,
    /// Protocol level: 5, or 4 for MQTT 3.1.1
    #[arg(long, default_value_t = 5)]
    pub level: u8,
    /// QoS 0, 1 or 2 of publishes and subscriptions
    #[arg(long, default_value_t = 0)]
    pub qos: u8,
    /// Payload in bytes, at least 20
    #[arg(long, default_value_t = 64)]
    pub payload: usize,
    /// Handshakes at the same time
    #[arg(long, default_value_t = 32)]
    pub handshakes: usize,
    /// Worker threads of the load tool
    #[arg(long, default_value_t = 2)]
    pub threads: usize,
    /// Prefix of topics and client identifiers; by default made of the process id
    #[arg(long)]
    pub prefix: Option<String>,
    /// QUIC connections on one local UDP socket
    #[arg(long, default_value_t = 128)]
    pub per_socket: usize,
}

/// fan-out, fan-in, pairs and paced.
#[derive(Debug, Clone, Args)]
pub struct TrafficArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap takes its help from the flattened fields")]
    pub common: Common,
    /// Publishers (fan-out 1, fan-in 100, pairs and paced 100)
    #[arg(long)]
    pub publishers: Option<usize>,
    /// Subscribers (fan-out 500, fan-in 1; pairs and paced as publishers)
    #[arg(long)]
    pub subscribers: Option<usize>,
    /// Messages a second together; 0 is as fast as they go (paced 1000)
    #[arg(long)]
    pub rate: Option<f64>,
    /// How many messages publishers together may be ahead of the slowest half of the deliveries
    #[arg(long, default_value_t = 200)]
    pub ahead: u64,
    /// Publishes of one publisher that may wait for their acknowledgement
    #[arg(long, default_value_t = 64)]
    pub window: u16,
    /// Seconds measured
    #[arg(long, default_value_t = 10.0)]
    pub seconds: f64,
    /// Seconds of the same load before the measurement
    #[arg(long, default_value_t = 2.0)]
    pub warmup: f64,
    /// Ends after so many published messages instead
    #[arg(long)]
    pub messages: Option<u64>,
}

/// connect.
#[derive(Debug, Clone, Args)]
pub struct ConnectArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap takes its help from the flattened fields")]
    pub common: Common,
    /// Connections in all
    #[arg(long, default_value_t = 5000)]
    pub connections: usize,
    /// Connections at the first measurement of memory
    #[arg(long, default_value_t = 1000)]
    pub base: usize,
    /// Connections a second; 0 is as fast as they go
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
    /// Distinct topics subscribed to; by default each connection has its own
    #[arg(long)]
    pub topics: Option<usize>,
    /// Session Expiry in seconds
    #[arg(long, default_value_t = 300)]
    pub expiry: u32,
    /// Keep Alive in seconds
    #[arg(long, default_value_t = 600)]
    pub keep_alive: u16,
    /// Seconds of rest before each measurement
    #[arg(long, default_value_t = 3.0)]
    pub settle: f64,
    /// Seconds to stay connected after the last measurement
    #[arg(long, default_value_t = 0.0)]
    pub seconds: f64,
}

/// flap.
#[derive(Debug, Clone, Args)]
pub struct FlapArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap takes its help from the flattened fields")]
    pub common: Common,
    /// Clients
    #[arg(long, default_value_t = 1000)]
    pub connections: usize,
    /// Flaps a second together
    #[arg(long, default_value_t = 100.0)]
    pub flaps: f64,
    /// Publishers
    #[arg(long, default_value_t = 4)]
    pub publishers: usize,
    /// Messages a second together, each to one client
    #[arg(long, default_value_t = 500.0)]
    pub rate: f64,
    /// Milliseconds between a cut and the return
    #[arg(long, default_value_t = 50)]
    pub away: u64,
    /// Seconds measured
    #[arg(long, default_value_t = 20.0)]
    pub seconds: f64,
}

/// drain.
#[derive(Debug, Clone, Args)]
pub struct DrainArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "clap takes its help from the flattened fields")]
    pub common: Common,
    /// Sessions in all
    #[arg(long, default_value_t = 5000)]
    pub connections: usize,
    /// Sessions at the first measurement of memory
    #[arg(long, default_value_t = 1000)]
    pub base: usize,
    /// Messages sent to all sessions while they are away
    #[arg(long, default_value_t = 100)]
    pub messages: u64,
    /// Messages a second while they are away; 0 is as fast as they are acknowledged
    #[arg(long, default_value_t = 0.0)]
    pub rate: f64,
    /// Topics that the sessions share
    #[arg(long, default_value_t = 1)]
    pub topics: usize,
    /// Seconds of rest before each measurement
    #[arg(long, default_value_t = 3.0)]
    pub settle: f64,
}

impl Common {
    /// The protocol version.
    pub fn version(&self) -> Version {
        Version::from_level(self.level).unwrap_or(Version::V5)
    }

    /// The prefix of topics and client identifiers.
    pub fn prefix(&self) -> String {
        self.prefix
            .clone()
            .unwrap_or_else(|| format!("load{}", std::process::id()))
    }

    /// Dialers of the subscribers, to be used in turn.
    ///
    /// # Errors
    /// A host does not resolve or the authority cannot be read.
    pub fn dialers(&self) -> std::io::Result<Vec<Dialer>> {
        self.dialers_to(&self.url)
    }

    /// Dialers of the publishers, to be used in turn.
    ///
    /// # Errors
    /// As [`dialers`](Self::dialers).
    pub fn publish_dialers(&self) -> std::io::Result<Vec<Dialer>> {
        let first = &self.url[..1];
        self.dialers_to(if self.publish_url.is_empty() {
            first
        } else {
            &self.publish_url
        })
    }

    /// The transports of the subscribers, for the report.
    pub fn transports(&self) -> String {
        let mut names: Vec<_> = self.url.iter().map(|url| url.transport.name()).collect();
        names.dedup();
        names.join("+")
    }

    fn dialers_to(&self, urls: &[Url]) -> std::io::Result<Vec<Dialer>> {
        let trust = match &self.ca {
            Some(path) => Trust::ca(path)?,
            None => Trust::Anything,
        };
        let mut dialers = Vec::new();
        for url in urls {
            // A source address of the loopback serves loopback servers only.
            let sources = self.source.iter().copied().map(Some);
            let sources: Vec<_> = if self.source.is_empty() {
                vec![None]
            } else {
                sources.collect()
            };
            for source in sources {
                let mut dialer = Dialer::new(url, &trust)?;
                if let Some(source) = source {
                    dialer = dialer.source(source);
                }
                if url.transport == Transport::Quic {
                    dialer = dialer.share_sockets(self.per_socket);
                }
                dialers.push(dialer);
            }
        }
        Ok(dialers)
    }
}
