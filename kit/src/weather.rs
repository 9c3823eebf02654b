//! Networks between client and server that take their time and lose packets, in user space.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

/// Datagrams or segments that may wait in one direction.
const WAITING: usize = 4096;
/// What one TCP segment carries, bytes.
const SEGMENT: usize = 1400;
/// TCP's shortest retransmission time-out on Linux.
const RTO: Duration = Duration::from_millis(200);
/// The first one, of a SYN (RFC 6298 section 2.1).
const RTO_SYN: Duration = Duration::from_secs(1);

/// How a network treats packets.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Weather {
    /// How long a packet is on its way, in each direction.
    pub delay: Duration,
    /// How many of 1,000 packets are lost, in each direction.
    pub loss: u32,
    /// Seed of the choice which.
    pub seed: u64,
}

/// A network between clients and one server; it ends when this is dropped.
#[derive(Debug)]
pub struct Network {
    addr: SocketAddr,
    _tasks: JoinSet<()>,
}

impl Network {
    /// For datagrams: a lost one does not arrive.
    ///
    /// # Errors
    /// A socket cannot be bound.
    pub async fn udp(server: SocketAddr, weather: Weather) -> io::Result<Self> {
        let socket = Arc::new(UdpSocket::bind("127.0.0.1:0").await?);
        let addr = socket.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(udp(socket, server, Fate::new(weather)));
        Ok(Self {
            addr,
            _tasks: tasks,
        })
    }

    /// For byte streams, an emulation: a TCP connection to this is a segment's way long, and each lost
    /// segment holds up all behind it for one retransmission time-out of 200 ms, a lost SYN for 1 s.
    ///
    /// # Errors
    /// A socket cannot be bound.
    pub async fn tcp(server: SocketAddr, weather: Weather) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let addr = listener.local_addr()?;
        let mut tasks = JoinSet::new();
        tasks.spawn(tcp(listener, server, Fate::new(weather)));
        Ok(Self {
            addr,
            _tasks: tasks,
        })
    }

    /// Where clients find the server through it.
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }
}

/// Decides about packets, the same for the same seed and order.
#[derive(Debug, Clone)]
struct Fate {
    weather: Weather,
    state: Arc<Mutex<u64>>,
}

impl Fate {
    fn new(weather: Weather) -> Self {
        Self {
            weather,
            state: Arc::new(Mutex::new(weather.seed | 1)),
        }
    }

    fn loses(&self) -> bool {
        let mut state = self.state.lock().expect("no panic happens under this lock");
        // xorshift64*
        *state ^= *state >> 12;
        *state ^= *state << 25;
        *state ^= *state >> 27;
        (state.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) % 1000 < u64::from(self.weather.loss)
    }

    fn arrives(&self) -> Instant {
        Instant::now() + self.weather.delay
    }
}

async fn udp(socket: Arc<UdpSocket>, server: SocketAddr, fate: Fate) {
    let mut clients: HashMap<SocketAddr, mpsc::Sender<(Instant, Vec<u8>)>> = HashMap::new();
    let mut tasks = JoinSet::new();
    let mut datagram = vec![0; 65_536];
    while let Ok((n, from)) = socket.recv_from(&mut datagram).await {
        if fate.loses() {
            continue;
        }
        let upward = match clients.get(&from) {
            Some(upward) => upward,
            None => {
                let Ok(own) = UdpSocket::bind("127.0.0.1:0").await else {
                    continue;
                };
                if own.connect(server).await.is_err() {
                    continue;
                }
                let own = Arc::new(own);
                let (upward, up) = mpsc::channel(WAITING);
                tasks.spawn(datagrams(up, own.clone(), None));
                let (downward, down) = mpsc::channel(WAITING);
                tasks.spawn(datagrams(down, socket.clone(), Some(from)));
                let fate = fate.clone();
                tasks.spawn(async move {
                    let mut datagram = vec![0; 65_536];
                    // A server that is away is a matter for the client's time-outs.
                    while let Ok(n) = own.recv(&mut datagram).await {
                        if !fate.loses() {
                            let _ = downward.try_send((fate.arrives(), datagram[..n].to_vec()));
                        }
                    }
                });
                clients.entry(from).or_insert(upward)
            }
        };
        // A full queue loses, as routers do.
        let _ = upward.try_send((fate.arrives(), datagram[..n].to_vec()));
    }
}

async fn datagrams(
    mut queue: mpsc::Receiver<(Instant, Vec<u8>)>,
    socket: Arc<UdpSocket>,
    to: Option<SocketAddr>,
) {
    while let Some((due, datagram)) = queue.recv().await {
        sleep_until(due).await;
        let _ = match to {
            Some(to) => socket.send_to(&datagram, to).await,
            None => socket.send(&datagram).await,
        };
    }
}

async fn tcp(listener: TcpListener, server: SocketAddr, fate: Fate) {
    let mut tasks = JoinSet::new();
    while let Ok((client, _)) = listener.accept().await {
        let fate = fate.clone();
        tasks.spawn(async move {
            let Ok(server) = TcpStream::connect(server).await else {
                return;
            };
            let _ = (client.set_nodelay(true), server.set_nodelay(true));
            // The handshake that the kernel has just done on loopback.
            let mut open = fate.arrives() + fate.weather.delay;
            for _ in 0..2 {
                if fate.loses() {
                    open += RTO_SYN;
                }
            }
            let (client_read, client_write) = client.into_split();
            let (server_read, server_write) = server.into_split();
            let mut both = JoinSet::new();
            both.spawn(segments(client_read, server_write, fate.clone(), open));
            both.spawn(segments(server_read, client_write, fate, open));
            both.join_next().await;
        });
    }
}

async fn segments(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    fate: Fate,
    open: Instant,
) {
    let (queue, mut queued) = mpsc::channel::<(Instant, Vec<u8>)>(WAITING);
    let writing = async move {
        while let Some((due, segment)) = queued.recv().await {
            sleep_until(due).await;
            if to.write_all(&segment).await.is_err() {
                return;
            }
        }
    };
    let reading = async move {
        let mut segment = vec![0; SEGMENT];
        let mut last = open;
        while let Ok(n) = from.read(&mut segment).await {
            if n == 0 {
                return;
            }
            // One that is sent before the connection stands waits for it, and none overtakes another.
            let mut due = last.max(fate.arrives());
            if fate.loses() {
                due += RTO;
            }
            last = due;
            if queue.send((due, segment[..n].to_vec())).await.is_err() {
                return;
            }
        }
    };
    tokio::join!(reading, writing);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weather(loss: u32) -> Weather {
        Weather {
            delay: Duration::from_millis(5),
            loss,
            seed: 7,
        }
    }

    #[tokio::test]
    async fn datagrams_take_their_time_and_some_are_lost() {
        let server = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let at = server.local_addr().expect("bound");
        let network = Network::udp(at, weather(300)).await.expect("starts");
        let client = UdpSocket::bind("127.0.0.1:0").await.expect("binds");
        let begun = Instant::now();
        for n in 0..200u8 {
            client.send_to(&[n], network.addr()).await.expect("sent");
        }
        let mut came = Vec::new();
        let mut datagram = [0; 4];
        let wait = Duration::from_millis(500);
        while let Ok(Ok(_)) = tokio::time::timeout(wait, server.recv(&mut datagram)).await {
            if came.is_empty() {
                assert!(begun.elapsed() >= Duration::from_millis(5));
            }
            came.push(datagram[0]);
        }
        assert!((100..180).contains(&came.len()), "{}", came.len());
        assert!(came.is_sorted(), "none overtakes another");
    }

    #[tokio::test]
    async fn a_stream_arrives_whole() {
        let server = TcpListener::bind("127.0.0.1:0").await.expect("binds");
        let at = server.local_addr().expect("bound");
        let network = Network::tcp(at, weather(100)).await.expect("starts");
        let sent: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        let echo = sent.clone();
        let serve = tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.expect("accepts");
            let mut got = vec![0; echo.len()];
            stream.read_exact(&mut got).await.expect("comes");
            got
        });
        let mut client = TcpStream::connect(network.addr()).await.expect("connects");
        client.write_all(&sent).await.expect("sent");
        assert_eq!(serve.await.expect("no panic"), sent);
    }
}
