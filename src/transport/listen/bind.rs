//! Binding a listener's socket.

use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, TcpKeepalive, Type};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::config::{self, Transport};
use crate::transport::events::Events;
use crate::transport::limits::Limits;
use crate::transport::listen::accept::serve_tcp;
use crate::transport::listen::listener::{Accepted, ConnectionTask, Listener};
use crate::transport::quic;
use crate::transport::tls::server::ServerTls;
use crate::transport::types::CloseHow;

/// How many connections the system may hold before `accept`. It has a cap of its own.
const BACKLOG: i32 = 4096;

/// The silence after which the system asks whether the other end of a TCP connection is still there, so
/// that a client without Keep Alive is found to be gone.
const PROBE_AFTER: Duration = Duration::from_secs(10 * 60);
/// The time between two such questions.
const PROBE_INTERVAL: Duration = Duration::from_secs(60);
/// How many of them may stay without an answer.
const PROBES: u32 = 5;

/// Why a listener could not be bound.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another socket has the address.
    #[error("listener \"{listener}\": {addr} is in use")]
    AddrInUse {
        /// The listener's name.
        listener: String,
        /// The address.
        addr: SocketAddr,
    },
    /// The transport needs a certificate, and none was given.
    #[error("listener \"{listener}\": {transport} needs a certificate")]
    NoTls {
        /// The listener's name.
        listener: String,
        /// The listener's transport.
        transport: Transport,
    },
    /// Any other error.
    #[error("listener \"{listener}\": cannot bind {addr}: {source}")]
    Io {
        /// The listener's name.
        listener: String,
        /// The address.
        addr: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
}

/// A bound listener that does not accept yet.
#[derive(Debug)]
pub struct Bound {
    listener: Arc<Listener>,
    socket: BoundSocket,
    addr: SocketAddr,
}

#[derive(Debug)]
enum BoundSocket {
    Tcp(TcpListener),
    Quic(quic::Server),
}

/// Binds a listener. `tls` holds its certificates, which an encrypted transport needs. Must be called
/// inside a tokio runtime.
///
/// # Errors
/// See [`BindError`].
pub fn bind(
    config: config::Listener,
    tls: Option<Arc<ServerTls>>,
    limits: Arc<Limits>,
    events: Arc<dyn Events>,
) -> Result<Bound, BindError> {
    let bound = match (config.transport, &tls) {
        (Transport::Quic | Transport::WebTransport, Some(tls)) => bind_quic(&config, tls, &limits),
        (transport, None) if transport.is_encrypted() => {
            return Err(BindError::NoTls {
                listener: config.name,
                transport,
            });
        }
        _ => bind_tcp(config.bind),
    };
    let (socket, addr) = bound.map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::AddrInUse {
            listener: config.name.clone(),
            addr: config.bind,
        },
        _ => BindError::Io {
            listener: config.name.clone(),
            addr: config.bind,
            source,
        },
    })?;
    Ok(Bound {
        listener: Arc::new(Listener {
            config,
            tls,
            limits,
            events,
        }),
        socket,
        addr,
    })
}

impl Bound {
    /// The address, with the port that was taken.
    pub fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The listener's settings.
    pub fn listener(&self) -> &config::Listener {
        &self.listener.config
    }

    /// The listener's certificates.
    pub fn tls(&self) -> Option<&Arc<ServerTls>> {
        self.listener.tls.as_ref()
    }

    /// How long a connection may be silent before the transport ends it: QUIC's idle timeout. `None`: the
    /// transport has none.
    pub fn idle_timeout(&self) -> Option<Duration> {
        matches!(self.socket, BoundSocket::Quic(_)).then_some(self.listener.limits.quic_idle)
    }

    /// A handle for the end of a drain.
    pub fn drain(&self) -> Drain {
        Drain(match &self.socket {
            BoundSocket::Tcp(_) => None,
            BoundSocket::Quic(server) => Some(server.clone()),
        })
    }

    /// Accepts connections, each in a task of its own that runs the handshake, then `handler`, then
    /// the task that `handler` returns. Returns when `stop` is cancelled: unfinished handshakes end,
    /// and handlers go on; the socket is closed when this is dropped. A return before that means that
    /// the socket is of no use any more.
    pub async fn serve<H, F>(&self, handler: H, stop: CancellationToken)
    where
        H: Fn(Accepted) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Option<ConnectionTask>> + Send + 'static,
    {
        let listener = self.listener.clone();
        match &self.socket {
            BoundSocket::Tcp(socket) => serve_tcp(socket, listener, handler, stop).await,
            BoundSocket::Quic(server) => server.clone().serve(listener, handler, stop).await,
        }
    }
}

/// Ends the part of a listener that outlives its connections: QUIC's closing packets are sent by the
/// socket, after the connections are gone.
#[derive(Clone, Debug)]
pub struct Drain(Option<quic::Server>);

impl Drain {
    /// Resolves when no QUIC connection is left and every close has been sent. The caller bounds the
    /// wait. Other transports have nothing to wait for.
    pub async fn idle(&self) {
        if let Some(server) = &self.0 {
            server.idle().await;
        }
    }

    /// Closes all remaining QUIC connections. Does nothing for other transports.
    pub fn close(&self, how: CloseHow) {
        if let Some(server) = &self.0 {
            server.close(how);
        }
    }
}

fn bind_tcp(addr: SocketAddr) -> io::Result<(BoundSocket, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the TIME_WAIT of the earlier process.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    // Every accepted socket inherits this.
    let probes = TcpKeepalive::new()
        .with_time(PROBE_AFTER)
        .with_interval(PROBE_INTERVAL)
        .with_retries(PROBES);
    socket.set_tcp_keepalive(&probes)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    let socket = TcpListener::from_std(StdTcpListener::from(socket))?;
    let addr = socket.local_addr()?;
    Ok((BoundSocket::Tcp(socket), addr))
}

fn bind_quic(
    config: &config::Listener,
    tls: &Arc<ServerTls>,
    limits: &Limits,
) -> io::Result<(BoundSocket, SocketAddr)> {
    let socket = UdpSocket::bind(config.bind)?;
    let server = quic::Server::new(socket, tls, limits, config)?;
    let addr = server.local_addr()?;
    Ok((BoundSocket::Quic(server), addr))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::NoEvents;

    #[tokio::test]
    async fn accepted_sockets_ask_whether_a_silent_client_is_there() {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (socket, addr) = bind_tcp(any).expect("binds");
        let BoundSocket::Tcp(listener) = socket else {
            panic!("it listens on TCP");
        };
        let client = tokio::net::TcpStream::connect(addr).await;
        let (accepted, _) = listener.accept().await.expect("accepted");
        let socket = socket2::SockRef::from(&accepted);
        assert!(socket.keepalive().expect("asked"));
        assert_eq!(socket.tcp_keepalive_time().expect("asked"), PROBE_AFTER);
        let interval = socket.tcp_keepalive_interval().expect("asked");
        let retries = socket.tcp_keepalive_retries().expect("asked");
        assert_eq!(
            PROBE_AFTER + interval * retries,
            Duration::from_secs(15 * 60)
        );
        drop(client);
    }

    #[tokio::test]
    async fn bind_errors_are_told_apart() {
        let bind = |transport, addr| {
            let config = config::Listener {
                name: "here".into(),
                ..config::Listener::new(transport, addr)
            };
            bind(config, None, Arc::default(), Arc::new(NoEvents))
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let first = bind(Transport::Tcp, any).expect("binds");
        let error = bind(Transport::Ws, first.local_addr()).expect_err("in use");
        assert!(matches!(error, BindError::AddrInUse { .. }));
        assert!(error.to_string().contains("\"here\"") && error.to_string().contains("in use"));
        let error = bind(Transport::Quic, any).expect_err("no certificate");
        assert!(matches!(error, BindError::NoTls { .. }));
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], 1));
        let error = bind(Transport::Tcp, elsewhere).expect_err("not our address");
        assert!(matches!(error, BindError::Io { .. }));
    }
}
