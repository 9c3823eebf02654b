//! A TCP relay that stands between Tidegate and its broker and records the packets that pass.
//!
//! The relay reads MQTT in both directions, counts packets and remembers filters and publishes. A
//! test can make it misbehave: pause a direction, delay acknowledgements, cut every link, refuse
//! links.

mod counts;
mod relay;

pub use counts::{Diff, LinkInfo, SecondCopy, Snapshot};

use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use counts::Counts;
use relay::Shared;

/// A direction through the recorder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Toward {
    /// From Tidegate to the broker.
    Broker,
    /// From the broker to Tidegate.
    Tidegate,
}

/// How the relay behaves now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Behaviour {
    paused_to_broker: bool,
    paused_to_tidegate: bool,
    /// The delay of the broker's PUBACK, PUBREC and PUBCOMP.
    ack_delay: Duration,
    refuse: bool,
    /// Links older than this generation are to end.
    generation: u64,
}

/// The relay; it stops when dropped.
#[derive(Debug)]
pub struct Recorder {
    addr: SocketAddr,
    behaviour: watch::Sender<Behaviour>,
    counts: Arc<Mutex<Counts>>,
    accepting: JoinHandle<()>,
}

impl Recorder {
    /// Listens on a free loopback port and relays to `broker`.
    ///
    /// # Errors
    /// No port could be bound.
    pub async fn start(broker: SocketAddr) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let behaviour = watch::Sender::new(Behaviour::default());
        let counts = Arc::new(Mutex::new(Counts::default()));
        let shared = Shared {
            broker,
            behaviour: behaviour.subscribe(),
            counts: counts.clone(),
        };
        let accepting = tokio::spawn(relay::accept(listener, shared));
        Ok(Self {
            addr,
            behaviour,
            counts,
            accepting,
        })
    }

    /// The address to which Tidegate connects.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The relay's address as an `mqtt://` URL.
    pub fn url(&self) -> String {
        format!("mqtt://{}", self.addr)
    }

    /// The counts up to now.
    pub fn snapshot(&self) -> Snapshot {
        self.counts
            .lock()
            .expect("counting does not panic")
            .snapshot()
    }

    /// Pauses a direction or resumes it. Paused packets do not count as passed.
    pub fn pause(&self, toward: Toward, paused: bool) {
        self.behaviour.send_modify(|b| match toward {
            Toward::Broker => b.paused_to_broker = paused,
            Toward::Tidegate => b.paused_to_tidegate = paused,
        });
    }

    /// Delays the broker's PUBACK, PUBREC and PUBCOMP. Order is kept, so packets behind a delayed
    /// one wait too.
    pub fn delay_acks(&self, delay: Duration) {
        self.behaviour.send_modify(|b| b.ack_delay = delay);
    }

    /// Cuts every link, now and abruptly (RST to both sides).
    pub fn cut(&self) {
        self.behaviour.send_modify(|b| b.generation += 1);
    }

    /// Refuses new links (they are reset at once) or accepts them again.
    pub fn refuse(&self, refuse: bool) {
        self.behaviour.send_modify(|b| b.refuse = refuse);
    }

    /// Looks for second copies only among topics that begin with `prefix` (initially all topics),
    /// so that Tidegate's own publishes, such as probes, are not mistaken for second copies.
    pub fn watch(&self, prefix: &str) {
        self.counts
            .lock()
            .expect("counting does not panic")
            .watch(prefix);
    }

    /// Forgets the digests of publishes, so that a later phase may send equal ones again.
    pub fn forget_publishes(&self) {
        self.counts
            .lock()
            .expect("counting does not panic")
            .forget_publishes();
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}
