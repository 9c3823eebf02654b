//! A TCP relay in user space that emulates a network which delays and loses segments; kernel
//! emulation needs rights that tests do not have. A lost segment delays all segments behind it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use crate::netem::{Chance, Netem};

/// Segments that may wait in one direction.
const WAITING: usize = 4096;
/// The payload of a segment, in bytes.
const SEGMENT: usize = 1400;
/// The shortest retransmission time-out of Linux.
const RTO: Duration = Duration::from_millis(200);
/// The first retransmission time-out, of a SYN (RFC 6298 section 2.1).
const RTO_SYN: Duration = Duration::from_secs(1);

/// A running relay; it ends when dropped.
#[derive(Debug)]
pub struct TcpRelay {
    addr: SocketAddr,
    network: Arc<Network>,
    _tasks: JoinSet<()>,
}

impl TcpRelay {
    /// Relays from a free loopback port to `target`. Only delay, loss and seed of the netem apply:
    /// a lost segment takes 200 ms longer, a lost SYN or its answer 1 s.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(target: SocketAddr, netem: Netem) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let network = Arc::new(Network {
            netem,
            chance: Chance::new(netem.seed),
            stalled: watch::channel(false).0,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(network.clone().run(listener, target));
        Ok(Self {
            addr,
            network,
            _tasks: tasks,
        })
    }

    /// The address to which clients connect.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Pauses all segments that are under way, or resumes them.
    pub fn stall(&self, stalled: bool) {
        self.network.stalled.send_replace(stalled);
    }
}

#[derive(Debug)]
struct Network {
    netem: Netem,
    chance: Chance,
    stalled: watch::Sender<bool>,
}

impl Network {
    async fn run(self: Arc<Self>, listener: TcpListener, target: SocketAddr) {
        let mut connections = JoinSet::new();
        while let Ok((client, _)) = listener.accept().await {
            connections.spawn(self.clone().connection(client, target));
            while connections.try_join_next().is_some() {}
        }
    }

    async fn connection(self: Arc<Self>, client: TcpStream, target: SocketAddr) {
        let Ok(server) = TcpStream::connect(target).await else {
            return;
        };
        let _ = (client.set_nodelay(true), server.set_nodelay(true));
        // The kernel has just done the handshake on loopback; emulate its delay here.
        let mut open = Instant::now() + 2 * self.netem.delay;
        for _ in 0..2 {
            if self.loses() {
                open += RTO_SYN;
            }
        }
        let (client_read, client_write) = client.into_split();
        let (server_read, server_write) = server.into_split();
        tokio::join!(
            self.segments(client_read, server_write, open),
            self.segments(server_read, client_write, open)
        );
    }

    async fn segments(&self, mut from: OwnedReadHalf, mut to: OwnedWriteHalf, open: Instant) {
        let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>)>(WAITING);
        let mut stalled = self.stalled.subscribe();
        let writing = async move {
            while let Some((due, segment)) = queued.recv().await {
                sleep_until(due).await;
                // Fails only when the relay ends.
                let _ = stalled.wait_for(|stalled| !stalled).await;
                if to.write_all(&segment).await.is_err() {
                    return;
                }
            }
        };
        let reading = async move {
            let mut segment = vec![0; SEGMENT];
            let mut last = open;
            while let Ok(n @ 1..) = from.read(&mut segment).await {
                // No segment overtakes another, nor the handshake.
                last = last.max(Instant::now() + self.netem.delay);
                if self.loses() {
                    last += RTO;
                }
                if queue.send((last, segment[..n].to_vec())).await.is_err() {
                    return;
                }
            }
        };
        tokio::join!(reading, writing);
    }

    fn loses(&self) -> bool {
        self.chance.next() < self.netem.loss
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_arrives_whole_and_takes_its_time() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let netem = Netem {
            delay: Duration::from_millis(5),
            loss: 0.1,
            ..Netem::FAIR
        };
        let target = server.local_addr().expect("bound");
        let relay = TcpRelay::start(target, netem).await.expect("starts");
        let sent: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        let expected = sent.len();
        let serve = tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.expect("accepts");
            let mut got = vec![0; expected];
            stream.read_exact(&mut got).await.expect("comes");
            got
        });
        let begun = Instant::now();
        let mut client = TcpStream::connect(relay.addr()).await.expect("connects");
        client.write_all(&sent).await.expect("sent");
        assert_eq!(serve.await.expect("no panic"), sent);
        assert!(begun.elapsed() >= 2 * netem.delay);
    }
}
