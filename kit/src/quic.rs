//! QUIC connections that can fall silent, like a phone that loses its network.

use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};

use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, Endpoint, EndpointConfig, Runtime, TokioRuntime, UdpPoller, VarInt};

/// Opens QUIC connections and their first bidirectional stream.
#[derive(Debug)]
pub struct QuicDialer {
    addr: SocketAddr,
    name: String,
    source: Option<IpAddr>,
    config: quinn::ClientConfig,
    share: usize,
    endpoint: Mutex<Option<(Socket, usize)>>,
}

/// One QUIC connection and its control stream, or another of its streams.
#[derive(Debug)]
pub struct QuicStream {
    pub(crate) connection: quinn::Connection,
    pub(crate) send: quinn::SendStream,
    pub(crate) recv: quinn::RecvStream,
    socket: Socket,
}

impl QuicStream {
    /// The connection, for tests that open further streams.
    pub fn connection(&self) -> &quinn::Connection {
        &self.connection
    }

    pub(crate) async fn open_stream(&self) -> io::Result<Self> {
        let (send, recv) = self.connection.open_bi().await?;
        Ok(Self {
            connection: self.connection.clone(),
            send,
            recv,
            socket: self.socket.clone(),
        })
    }

    /// Sends and hears nothing from now on, without telling the server.
    pub fn mute(&self) {
        self.socket.muted.store(true, Ordering::Relaxed);
    }

    /// Ends the connection with CONNECTION_CLOSE.
    pub fn close(&self) {
        self.connection.close(VarInt::from_u32(0), b"");
    }
}

/// One WebTransport session and its control stream, or another of its streams.
#[derive(Debug)]
pub struct SessionStream {
    session: web_transport_quinn::Session,
    pub(crate) send: web_transport_quinn::SendStream,
    pub(crate) recv: web_transport_quinn::RecvStream,
    socket: Socket,
}

impl SessionStream {
    pub(crate) fn connection(&self) -> &quinn::Connection {
        &self.session
    }

    pub(crate) async fn open_stream(&self) -> io::Result<Self> {
        let (send, recv) = self.session.open_bi().await.map_err(io::Error::other)?;
        Ok(Self {
            session: self.session.clone(),
            send,
            recv,
            socket: self.socket.clone(),
        })
    }

    /// Sends and hears nothing from now on, without telling the server.
    pub fn mute(&self) {
        self.socket.muted.store(true, Ordering::Relaxed);
    }

    /// Ends the session.
    pub fn close(&self) {
        self.session.close(0, b"");
    }
}

impl QuicDialer {
    /// A dialer to one address with the certificate name to expect.
    ///
    /// # Errors
    /// The TLS configuration cannot be used for QUIC.
    pub fn new(addr: SocketAddr, name: &str, tls: rustls::ClientConfig) -> io::Result<Self> {
        let crypto =
            quinn::crypto::rustls::QuicClientConfig::try_from(tls).map_err(io::Error::other)?;
        let mut transport = quinn::TransportConfig::default();
        transport
            .max_idle_timeout(None)
            .mtu_discovery_config(None)
            .datagram_receive_buffer_size(None);
        let mut config = quinn::ClientConfig::new(Arc::new(crypto));
        config.transport_config(Arc::new(transport));
        let name = name.to_owned();
        Ok(Self {
            addr,
            name,
            source: None,
            config,
            share: 1,
            endpoint: Mutex::new(None),
        })
    }

    pub(crate) fn source(mut self, source: IpAddr) -> Self {
        self.source = Some(source);
        self
    }

    pub(crate) fn share(mut self, connections: usize) -> Self {
        self.share = connections.max(1);
        self
    }

    /// Connects and opens the control stream.
    ///
    /// # Errors
    /// The handshake failed.
    pub async fn open(&self) -> io::Result<QuicStream> {
        let (connection, socket) = self.connect().await?;
        let (send, recv) = connection.open_bi().await?;
        Ok(QuicStream {
            connection,
            send,
            recv,
            socket,
        })
    }

    /// Connects, opens a WebTransport session at `url`, and in it a bidirectional stream.
    ///
    /// # Errors
    /// A handshake failed, or the server refused the session.
    pub async fn open_session(&self, url: &str) -> io::Result<SessionStream> {
        let (connection, socket) = self.connect().await?;
        let url: url::Url = url.parse().map_err(io::Error::other)?;
        let request = web_transport_quinn::proto::ConnectRequest::new(url).with_protocol("mqtt");
        let session = web_transport_quinn::Session::connect(connection, request);
        let session = session.await.map_err(io::Error::other)?;
        let (send, recv) = session.open_bi().await.map_err(io::Error::other)?;
        Ok(SessionStream {
            session,
            send,
            recv,
            socket,
        })
    }

    async fn connect(&self) -> io::Result<(quinn::Connection, Socket)> {
        let socket = self.socket()?;
        let connecting = socket
            .endpoint
            .connect_with(self.config.clone(), self.addr, &self.name)
            .map_err(io::Error::other)?;
        Ok((connecting.await?, socket))
    }

    fn socket(&self) -> io::Result<Socket> {
        let mut slot = self
            .endpoint
            .lock()
            .expect("no panic happens under this lock");
        if let Some((socket, used)) = &mut *slot
            && *used < self.share
        {
            *used += 1;
            return Ok(socket.clone());
        }
        let socket = Socket::bind(self.source, self.addr)?;
        if self.share > 1 {
            *slot = Some((socket.clone(), 1));
        }
        Ok(socket)
    }
}

/// A UDP socket with its endpoint and the switch that silences it.
#[derive(Clone)]
struct Socket {
    endpoint: Endpoint,
    muted: Arc<AtomicBool>,
}

impl fmt::Debug for Socket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Socket")
            .field("muted", &self.muted)
            .finish_non_exhaustive()
    }
}

impl Socket {
    fn bind(source: Option<IpAddr>, to: SocketAddr) -> io::Result<Self> {
        let any: IpAddr = if to.is_ipv4() {
            [0; 4].into()
        } else {
            [0u16; 8].into()
        };
        let socket = std::net::UdpSocket::bind(SocketAddr::new(source.unwrap_or(any), 0))?;
        let muted = Arc::new(AtomicBool::new(false));
        let inner = TokioRuntime.wrap_udp_socket(socket)?;
        let endpoint = Endpoint::new_with_abstract_socket(
            EndpointConfig::default(),
            None,
            Arc::new(Mutable {
                inner,
                muted: muted.clone(),
            }),
            Arc::new(TokioRuntime),
        )?;
        Ok(Self { endpoint, muted })
    }
}

/// A socket that, once muted, drops every datagram in both directions.
#[derive(Debug)]
struct Mutable {
    inner: Arc<dyn AsyncUdpSocket>,
    muted: Arc<AtomicBool>,
}

impl AsyncUdpSocket for Mutable {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.inner.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        if self.muted.load(Ordering::Relaxed) {
            return Ok(());
        }
        self.inner.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        bufs: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            match self.inner.poll_recv(cx, bufs, meta) {
                Poll::Ready(Ok(_)) if self.muted.load(Ordering::Relaxed) => {}
                other => return other,
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.inner.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.inner.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.inner.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.inner.may_fragment()
    }
}
