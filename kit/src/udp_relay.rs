//! A UDP relay in user space between QUIC clients and their server: it loses, doubles and reorders
//! datagrams by a seed, and changes the port that the server sees, as a NAT does.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::UdpSocket;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::sleep;

/// The largest datagram that is passed on, bytes.
const DATAGRAM: usize = 2048;

/// What befalls each datagram, in each direction.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    /// The part of them that is lost.
    pub loss: f64,
    /// The part that comes twice.
    pub duplicate: f64,
    /// The part that comes later than those behind it.
    pub late: f64,
    /// How much later, at most.
    pub by: Duration,
    /// Repeats a run's choices, as far as the datagrams are the same.
    pub seed: u64,
}

impl Weather {
    /// Every datagram passes.
    pub const FAIR: Self = Self {
        loss: 0.0,
        duplicate: 0.0,
        late: 0.0,
        by: Duration::ZERO,
        seed: 1,
    };
}

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
    weather: Mutex<Weather>,
    random: AtomicU64,
    backs: Mutex<HashMap<SocketAddr, Back>>,
    lost: AtomicU64,
}

/// The socket that stands for one client toward the server.
#[derive(Debug, Clone)]
struct Back {
    socket: Arc<UdpSocket>,
    task: AbortHandle,
}

impl Drop for UdpRelay {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl UdpRelay {
    /// Relays from a free loopback port to `target`.
    ///
    /// # Errors
    /// No port can be had.
    pub async fn start(target: SocketAddr, weather: Weather) -> io::Result<Self> {
        let front = UdpSocket::bind("127.0.0.1:0").await?;
        let addr = front.local_addr()?;
        let shared = Arc::new(Shared {
            front,
            target: Mutex::new(target),
            weather: Mutex::new(weather),
            random: AtomicU64::new(weather.seed),
            backs: Mutex::default(),
            lost: AtomicU64::new(0),
        });
        let task = tokio::spawn(shared.clone().run()).abort_handle();
        Ok(Self { addr, shared, task })
    }

    /// Where clients send to.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// From now on the weather is another.
    pub fn set_weather(&self, weather: Weather) {
        *lock(&self.shared.weather) = weather;
    }

    /// From now on the server sees all clients at other ports.
    pub fn rebind(&self) {
        for (_, back) in lock(&self.shared.backs).drain() {
            back.task.abort();
        }
    }

    /// From now on the server is another; clients' ports toward it are new.
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
        // Ends with this task.
        let mut tasks = JoinSet::new();
        loop {
            // A client that is gone is told by ICMP, and that is no end.
            let Ok((n, client)) = self.front.recv_from(&mut buffer).await else {
                continue;
            };
            let back = match self.back(client, &mut tasks).await {
                Ok(back) => back.socket,
                Err(_) => continue,
            };
            for (after, datagram) in self.fate(&buffer[..n]) {
                let back = back.clone();
                pass(&mut tasks, after, async move {
                    let _ = back.send(&datagram).await;
                })
                .await;
            }
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
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await?);
        let target = *lock(&self.target);
        socket.connect(target).await?;
        let task = tasks.spawn(self.clone().downward(socket.clone(), client));
        let back = Back { socket, task };
        lock(&self.backs).insert(client, back.clone());
        Ok(back)
    }

    async fn downward(self: Arc<Self>, back: Arc<UdpSocket>, client: SocketAddr) {
        let mut buffer = vec![0; DATAGRAM];
        let mut tasks = JoinSet::new();
        loop {
            let Ok(n) = back.recv(&mut buffer).await else {
                // The server is not there: it may come.
                sleep(Duration::from_millis(5)).await;
                continue;
            };
            for (after, datagram) in self.fate(&buffer[..n]) {
                let this = self.clone();
                pass(&mut tasks, after, async move {
                    let _ = this.front.send_to(&datagram, client).await;
                })
                .await;
            }
            while tasks.try_join_next().is_some() {}
        }
    }

    /// The copies of a datagram that are passed on, and when.
    fn fate(&self, datagram: &[u8]) -> Vec<(Duration, Vec<u8>)> {
        let weather = *lock(&self.weather);
        if self.chance() < weather.loss {
            self.lost.fetch_add(1, Ordering::Relaxed);
            return Vec::new();
        }
        let copies = 1 + usize::from(self.chance() < weather.duplicate);
        let copy = |_| {
            let late = self.chance() < weather.late;
            let after = weather.by.mul_f64(if late { self.chance() } else { 0.0 });
            (after, datagram.to_vec())
        };
        (0..copies).map(copy).collect()
    }

    /// From 0 to 1 (SplitMix64).
    fn chance(&self) -> f64 {
        const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
        let mut z = self
            .random
            .fetch_add(STEP, Ordering::Relaxed)
            .wrapping_add(STEP);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// At once, or by a task of its own.
async fn pass(
    tasks: &mut JoinSet<()>,
    after: Duration,
    send: impl Future<Output = ()> + Send + 'static,
) {
    if after.is_zero() {
        send.await;
    } else {
        tasks.spawn(async move {
            sleep(after).await;
            send.await;
        });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
