//! A TCP relay that stands between Tidegate and its broker and writes down what passes.
//!
//! It reads MQTT in both directions, counts packets, remembers filters and publishes, and can be told
//! to misbehave: to pause a direction, to delay acknowledgements, to cut every link, to refuse.

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
    /// How long PUBACK, PUBREC and PUBCOMP of the broker are held back.
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

    /// Where Tidegate is to connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// The same as an `mqtt://` URL.
    pub fn url(&self) -> String {
        format!("mqtt://{}", self.addr)
    }

    /// What has passed so far.
    pub fn snapshot(&self) -> Snapshot {
        self.counts
            .lock()
            .expect("counting does not panic")
            .snapshot()
    }

    /// Holds a direction back, or lets it go on. What is held back is not counted as passed.
    pub fn pause(&self, toward: Toward, paused: bool) {
        self.behaviour.send_modify(|b| match toward {
            Toward::Broker => b.paused_to_broker = paused,
            Toward::Tidegate => b.paused_to_tidegate = paused,
        });
    }

    /// Delays the broker's PUBACK, PUBREC and PUBCOMP. Order is kept, so what follows one waits too.
    pub fn delay_acks(&self, delay: Duration) {
        self.behaviour.send_modify(|b| b.ack_delay = delay);
    }

    /// Cuts every link, now and abruptly (RST to both sides).
    pub fn cut(&self) {
        self.behaviour.send_modify(|b| b.generation += 1);
    }

    /// Refuses new links (they are reset at once) or takes them again.
    pub fn refuse(&self, refuse: bool) {
        self.behaviour.send_modify(|b| b.refuse = refuse);
    }

    /// Looks for second copies only among topics that begin with `prefix` (at first: all topics), so
    /// that what Tidegate sends of its own accord is not mistaken for one.
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
