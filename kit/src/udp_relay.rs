//! A UDP relay in user space between QUIC clients and their server: it loses, duplicates and
//! reorders datagrams by a seed, and changes the port that the server sees, as a NAT does.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::net::UdpSocket;
use tokio::sync::mpsc;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, sleep_until};

use crate::netem::{Chance, Netem};

/// The largest datagram that is passed on, bytes.
const DATAGRAM: usize = 2048;

/// Datagrams that may be under way in one direction of a client; more are lost, as in a router.
const WAITING: usize = 4096;

/// A running relay; it ends when dropped.
#[derive(Debug)]
pub struct UdpRelay {
    addr: SocketAddr,
    shared: Arc<Shared>,
    task: AbortHandle,
}

#[derive(Debug)]
struct Shared {
    front: UdpSocket,
    target: Mutex<SocketAddr>,
    netem: Mutex<Netem>,
    chance: Chance,
    backs: Mutex<HashMap<SocketAddr, Back>>,
    lost: AtomicU64,
}

/// The path of one client to the server, over a socket of its own.
#[derive(Debug, Clone)]
struct Back {
    up: Direction,
    task: AbortHandle,
}

/// One direction of one client: datagrams in their order, and when each arrives.
type Direction = mpsc::Sender<(Instant, Vec<u8>)>;

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl UdpRelay {
    /// Relays from a free loopback port to `target`.
    ///
    /// # Errors
    /// No port is free.
    pub async fn start(target: SocketAddr, netem: Netem) -> io::Result<Self> {
        let front = UdpSocket::bind("127.0.0.1:0").await?;
        let addr = front.local_addr()?;
        let shared = Arc::new(Shared {
            front,
            target: Mutex::new(target),
            netem: Mutex::new(netem),
            chance: Chance::new(netem.seed),
            backs: Mutex::default(),
            lost: AtomicU64::new(0),
        });
        let task = tokio::spawn(shared.clone().run()).abort_handle();
        Ok(Self { addr, shared, task })
    }

    /// The address to which clients send.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Changes the treatment of packets from now on.
    pub fn set_netem(&self, netem: Netem) {
        *lock(&self.shared.netem) = netem;
    }

    /// Gives all clients new ports toward the server from now on.
    pub fn rebind(&self) {
        for (_, back) in lock(&self.shared.backs).drain() {
            back.task.abort();
        }
    }

    /// Relays to another server from now on; clients get new ports toward it.
    pub fn lead_to(&self, target: SocketAddr) {
        *lock(&self.shared.target) = target;
        self.rebind();
    }

    /// Datagrams lost so far.
    pub fn lost(&self) -> u64 {
        self.shared.lost.load(Ordering::Relaxed)
    }
}

impl Shared {
    async fn run(self: Arc<Self>) {
        let mut buffer = vec![0; DATAGRAM];
        // The sockets end with this task.
        let mut tasks = JoinSet::new();
        loop {
            // ICMP reports a client that is gone; the relay goes on.
            let Ok((n, client)) = self.front.recv_from(&mut buffer).await else {
                continue;
            };
            let up = match self.back(client, &mut tasks).await {
                Ok(back) => back.up,
                Err(_) => continue,
            };
            self.pass(&buffer[..n], &up);
            while tasks.try_join_next().is_some() {}
        }
    }

    async fn back(
        self: &Arc<Self>,
        client: SocketAddr,
        tasks: &mut JoinSet<()>,
    ) -> io::Result<Back> {
        if let Some(back) = lock(&self.backs).get(&client) {
            return Ok(back.clone());
        }
        let socket = UdpSocket::bind("127.0.0.1:0").await?;
        let target = *lock(&self.target);
        socket.connect(target).await?;
        let (up, going) = mpsc::channel(WAITING);
        let task = tasks.spawn(self.clone().client(socket, going, client));
        let back = Back { up, task };
        lock(&self.backs).insert(client, back.clone());
        Ok(back)
    }

    /// Both directions of one client.
    async fn client(
        self: Arc<Self>,
        back: UdpSocket,
        going: mpsc::Receiver<(Instant, Vec<u8>)>,
        client: SocketAddr,
    ) {
        let (down, coming) = mpsc::channel(WAITING);
        let receiving = async {
            let mut buffer = vec![0; DATAGRAM];
            loop {
                // The server may not have started yet.
                if let Ok(n) = back.recv(&mut buffer).await {
                    self.pass(&buffer[..n], &down);
                }
            }
        };
        tokio::join!(
            receiving,
            deliver(going, &back, None),
            deliver(coming, &self.front, Some(client)),
        );
    }

    /// Sends a datagram's copies on their way.
    fn pass(&self, datagram: &[u8], queue: &Direction) {
        let netem = *lock(&self.netem);
        if self.chance.next() < netem.loss {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let copies = 1 + usize::from(self.chance.next() < netem.duplicate);
        for _ in 0..copies {
            let due = Instant::now() + netem.delay;
            let datagram = datagram.to_vec();
            if self.chance.next() < netem.late {
                let (queue, due) = (queue.clone(), due + netem.by.mul_f64(self.chance.next()));
                tokio::spawn(async move {
                    sleep_until(due).await;
                    let _ = queue.try_send((due, datagram));
                });
            } else {
                let _ = queue.try_send((due, datagram));
            }
        }
    }
}

/// Sends datagrams that are due: to an address, or to the peer of a connected socket.
async fn deliver(
    mut queue: mpsc::Receiver<(Instant, Vec<u8>)>,
    socket: &UdpSocket,
    to: Option<SocketAddr>,
) {
    while let Some((due, datagram)) = queue.recv().await {
        sleep_until(due).await;
        // A receiver that has gone misses the datagram.
        let _ = match to {
            Some(to) => socket.send_to(&datagram, to).await,
            None => socket.send(&datagram).await,
        };
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn datagrams_take_their_time_and_some_are_lost() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let netem = Netem {
            delay: Duration::from_millis(5),
            loss: 0.3,
            seed: 7,
            ..Netem::FAIR
        };
        let target = server.local_addr().expect("bound");
        let relay = UdpRelay::start(target, netem).await.expect("starts");
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let begun = Instant::now();
        for n in 0..200u8 {
            client.send_to(&[n], relay.addr()).await.expect("sent");
        }
        let mut came = Vec::new();
        let mut datagram = [0; 4];
        while came.len() + (relay.lost() as usize) < 200 {
            server.recv(&mut datagram).await.expect("comes");
            came.push(datagram[0]);
        }
        assert!(begun.elapsed() >= netem.delay);
        assert!((30..90).contains(&relay.lost()), "{}", relay.lost());
        assert!(came.is_sorted(), "none overtakes another");
    }
}
