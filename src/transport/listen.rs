//! Listeners: binding, accepting, and transport handshakes, each in its own
//! task with a deadline, so that nobody waits for another's.

mod pace;

use std::future::{Future, ready};
use std::io;
use std::net::{SocketAddr, TcpListener as StdTcpListener, UdpSocket};
use std::sync::Arc;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{Instant, sleep, timeout_at};
use tokio_util::sync::CancellationToken;

use pace::{Backoff, LogGate, accept_error_kind};

use crate::config::ProxyProtocol;
use crate::transport::detect::detect;
use crate::transport::limits::{HandshakeError, Limits, Permit};
pub(super) use crate::transport::proxy::canonical;
use crate::transport::tls::{self, ALPN_HTTP, ALPN_MQTT, ServerTls};
use crate::transport::ws::{self, Ws};
use crate::transport::{
    Accepted, CloseHow, ConnectionTask, Kind, ListenSpec, ListenerInfo, Stream, quic,
};

/// Connections that the system may hold before `accept`; it has its own cap.
const BACKLOG: i32 = 4096;

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
    /// The kind needs a certificate and the spec has none.
    #[error("listener \"{listener}\": {kind} needs a certificate")]
    NoTls {
        /// The listener's name.
        listener: String,
        /// What it should speak.
        kind: Kind,
    },
    /// Anything else.
    #[error("listener \"{listener}\": cannot bind {addr}: {source}")]
    Io {
        /// The listener's name.
        listener: String,
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// A bound listener that does not accept yet.
#[derive(Debug)]
pub struct Bound {
    listener: Arc<Listener>,
    socket: Bind,
    addr: SocketAddr,
}

#[derive(Debug)]
enum Bind {
    Tcp(TcpListener),
    Quic(quic::Server),
}

/// Binds `spec`. Must be called inside a tokio runtime.
///
/// # Errors
/// See [`BindError`].
pub fn bind(spec: ListenSpec, limits: Arc<Limits>) -> Result<Bound, BindError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::AddrInUse => BindError::AddrInUse {
            listener: spec.name.clone(),
            addr: spec.bind,
        },
        _ => BindError::Io {
            listener: spec.name.clone(),
            addr: spec.bind,
            source,
        },
    };
    if spec.transport.needs_tls() && spec.tls.is_none() {
        return Err(BindError::NoTls {
            listener: spec.name,
            kind: spec.transport,
        });
    }
    let (socket, addr) = match (&spec.tls, spec.transport) {
        (Some(tls), Kind::Quic | Kind::WebTransport) => bind_quic(&spec, tls, &limits),
        _ => bind_tcp(spec.bind),
    }
    .map_err(failed)?;
    let info = Arc::new(ListenerInfo {
        name: spec.name.clone(),
        kind: spec.transport,
    });
    Ok(Bound {
        listener: Arc::new(Listener {
            spec,
            info,
            limits,
            log: LogGate::default(),
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

    /// What was asked for.
    pub fn spec(&self) -> &ListenSpec {
        &self.listener.spec
    }

    /// A handle for the end of a drain.
    pub fn drain(&self) -> Drain {
        Drain(match &self.socket {
            Bind::Tcp(_) => None,
            Bind::Quic(server) => Some(server.clone()),
        })
    }

    /// Accepts connections, each in a task of its own that runs the handshake
    /// and then `handler`, and then what that returns. Returns when `stop` is
    /// cancelled: the socket is closed, handshakes under way end, and handlers
    /// go on.
    pub async fn serve<H, F>(self, handler: H, stop: CancellationToken)
    where
        H: Fn(Accepted) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Option<ConnectionTask>> + Send + 'static,
    {
        match self.socket {
            Bind::Tcp(socket) => serve_tcp(socket, self.listener, handler, stop).await,
            Bind::Quic(server) => server.serve(self.listener, handler, stop).await,
        }
    }
}

/// Finishes what outlives the connections of a listener: QUIC's closing
/// packets are sent by the socket, after the connections are gone.
#[derive(Clone, Debug)]
pub struct Drain(Option<quic::Server>);

impl Drain {
    /// Resolves when no connection is left and every close has been sent; the
    /// caller bounds it. At once for all but QUIC.
    pub async fn idle(&self) {
        if let Some(server) = &self.0 {
            server.idle().await;
        }
    }

    /// Closes all QUIC connections that are left. Nothing happens elsewhere.
    pub fn close(&self, how: CloseHow) {
        if let Some(server) = &self.0 {
            server.close(how);
        }
    }
}

/// What the tasks of one listener share.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) spec: ListenSpec,
    pub(super) info: Arc<ListenerInfo>,
    pub(super) limits: Arc<Limits>,
    log: LogGate,
}

impl Listener {
    pub(super) fn deadline(&self) -> Instant {
        Instant::now() + self.limits.accept_deadline
    }

    pub(super) fn tls(&self) -> Option<&Arc<ServerTls>> {
        self.spec.tls.as_ref()
    }

    /// A place under the connection limit.
    pub(super) fn admit(&self) -> Option<Permit> {
        let permit = Permit::take(&self.limits.connections);
        match permit {
            Some(_) => self.limits.events.accepted(&self.info),
            None => self.limits.events.refused(&self.info, "connections_max"),
        }
        permit
    }

    /// Runs a handshake within its deadline and the listener's life.
    pub(super) async fn bounded<T>(
        &self,
        deadline: Instant,
        stop: &CancellationToken,
        handshake: impl Future<Output = Result<T, HandshakeError>>,
    ) -> Result<T, HandshakeError> {
        match stop
            .run_until_cancelled(timeout_at(deadline, handshake))
            .await
        {
            Some(Ok(result)) => result,
            Some(Err(_)) => Err(HandshakeError::Deadline),
            None => Err(HandshakeError::Stopped),
        }
    }

    pub(super) fn finish(
        &self,
        result: Result<Stream, HandshakeError>,
        peer: SocketAddr,
        deadline: Instant,
        permit: Permit,
    ) -> Option<Accepted> {
        match result {
            Ok(stream) => Some(Accepted {
                stream,
                peer,
                listener: Arc::clone(&self.info),
                deadline,
                permit,
            }),
            Err(HandshakeError::Health) => {
                self.limits.events.health_checked(&self.info);
                None
            }
            Err(error) => {
                self.limits
                    .events
                    .handshake_failed(&self.info, error.label());
                // What balancers do to see whether the port is open.
                if matches!(error, HandshakeError::Silent) {
                    let (listener, transport) = (&self.info.name, self.info.kind);
                    tracing::debug!(listener, %transport, %peer, "{error}");
                    return None;
                }
                if let Some(suppressed) = self.log.pass(Instant::now()) {
                    let (listener, transport) = (&self.info.name, error.on(self.info.kind));
                    tracing::info!(
                        listener, %transport, %peer, reason = error.label(), suppressed,
                        "handshake failed: {error}"
                    );
                }
                None
            }
        }
    }

    /// The handshake of everything that begins with TCP; `peer` becomes the
    /// client where a proxy tells of it.
    async fn upgrade(
        &self,
        mut io: TcpStream,
        peer: &mut SocketAddr,
    ) -> Result<Stream, HandshakeError> {
        self.spec.proxies.read(&mut io, peer).await?;
        if self.info.kind == Kind::Tcp {
            return Ok(Stream::tcp(io, *peer));
        }
        // A client that says nothing holds no place. (`readable` may be ready
        // for no reason, and is for a fresh socket.)
        let mut first = [0; 16];
        let seen = io
            .peek(&mut first)
            .await
            .map_err(HandshakeError::before_all)?;
        if seen == 0 {
            return Err(HandshakeError::Silent);
        }
        let not_tls = |error| match (error, detect(&first[..seen])) {
            (HandshakeError::Tls(why), Some(other)) => {
                HandshakeError::Tls(format!("{why}; this looks like {other}"))
            }
            (error, _) => error,
        };
        // What costs little waits for nobody: health checks, too, get their answer.
        if self.info.kind == Kind::Ws {
            return Ok(Stream::ws(self.websocket(io, peer).await?, *peer));
        }
        let place = self.limits.handshakes.tls.place(*peer).await;
        match (self.info.kind, &self.spec.tls) {
            (Kind::Tls, Some(tls)) => {
                let accepted = tls::accept(io, tls, ALPN_MQTT, place).await;
                let (io, client) = accepted.map_err(not_tls)?;
                Ok(Stream::tls(io, *peer).of(client))
            }
            (Kind::Wss, Some(tls)) => {
                let accepted = tls::accept(io, tls, ALPN_HTTP, place).await;
                let (io, client) = accepted.map_err(not_tls)?;
                Ok(Stream::wss(self.websocket(io, peer).await?, *peer).of(client))
            }
            _ => Ok(Stream::tcp(io, *peer)),
        }
    }

    async fn websocket<S>(&self, mut io: S, peer: &mut SocketAddr) -> Result<Ws<S>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let early = ws::accept(&mut io, &self.spec, peer).await?;
        Ok(Ws::new(
            io,
            early,
            self.limits.frame_before_auth,
            self.limits.message_max(),
        ))
    }
}

async fn serve_tcp<H, F>(
    socket: TcpListener,
    listener: Arc<Listener>,
    handler: H,
    stop: CancellationToken,
) where
    H: Fn(Accepted) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Option<ConnectionTask>> + Send + 'static,
{
    let mut backoff = Backoff::default();
    while let Some(accepted) = stop.run_until_cancelled(socket.accept()).await {
        match accepted {
            Ok((io, peer)) => {
                let peer = canonical(peer);
                backoff.reset();
                if let Some(permit) = listener.admit() {
                    start(io, peer, permit, &listener, handler.clone(), &stop);
                }
            }
            Err(error) => {
                let kind = accept_error_kind(&error);
                listener.limits.events.accept_error(&listener.info, kind);
                if let Some(suppressed) = backoff.log.pass(Instant::now()) {
                    let name = &listener.info.name;
                    tracing::warn!(listener = name, kind, suppressed, "accept failed: {error}");
                }
                // Trying again at once would only burn a core until files are
                // free; a connection that broke before accept is no such case.
                if kind != "aborted" {
                    let wait = sleep(backoff.next());
                    if stop.run_until_cancelled(wait).await.is_none() {
                        return;
                    }
                }
            }
        }
    }
}

fn start<H, F>(
    io: TcpStream,
    peer: SocketAddr,
    permit: Permit,
    listener: &Arc<Listener>,
    handler: H,
    stop: &CancellationToken,
) where
    H: Fn(Accepted) -> F + Send + 'static,
    F: Future<Output = Option<ConnectionTask>> + Send + 'static,
{
    // Packets are written whole; waiting to fill a segment only costs latency.
    let _ = io.set_nodelay(true);
    let deadline = listener.deadline();
    if listener.info.kind == Kind::Tcp && listener.spec.proxies.protocol == ProxyProtocol::Off {
        let stream = Ok(Stream::tcp(io, peer));
        if let Some(accepted) = listener.finish(stream, peer, deadline, permit) {
            spawn(ready(Some(accepted)), handler);
        }
        return;
    }
    let (listener, stop) = (Arc::clone(listener), stop.clone());
    let handshake = async move {
        let mut peer = peer;
        let upgrade = Box::pin(listener.upgrade(io, &mut peer));
        let result = listener.bounded(deadline, &stop, upgrade).await;
        listener.finish(result, peer, deadline, permit)
    };
    spawn(handshake, handler);
}

/// Serves one connection in a task of its own.
pub(super) fn spawn<H, F>(
    handshake: impl Future<Output = Option<Accepted>> + Send + 'static,
    handler: H,
) where
    H: Fn(Accepted) -> F + Send + 'static,
    F: Future<Output = Option<ConnectionTask>> + Send + 'static,
{
    // A future is as large as its largest state for all its life, and keeps room for
    // what was moved into the one it waits for. So these are in boxes, and the task
    // is a few pointers.
    let handshake = Box::pin(handshake);
    let beginning = Box::pin(async move {
        let accepted = handshake.await?;
        handler(accepted).await
    });
    tokio::spawn(async move {
        let life = beginning.await;
        if let Some(life) = life {
            life.await;
        }
    });
}

fn bind_tcp(addr: SocketAddr) -> io::Result<(Bind, SocketAddr)> {
    let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
    // A restart must not wait for the TIME_WAIT of its predecessor.
    socket.set_reuse_address(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&addr.into())?;
    socket.listen(BACKLOG)?;
    let socket = TcpListener::from_std(StdTcpListener::from(socket))?;
    let addr = socket.local_addr()?;
    Ok((Bind::Tcp(socket), addr))
}

fn bind_quic(
    spec: &ListenSpec,
    tls: &Arc<ServerTls>,
    limits: &Limits,
) -> io::Result<(Bind, SocketAddr)> {
    let socket = UdpSocket::bind(spec.bind)?;
    let server = quic::Server::new(socket, tls, limits, spec)?;
    let addr = server.local_addr()?;
    Ok((Bind::Quic(server), addr))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Proxies;

    #[tokio::test]
    async fn bind_errors_are_told_apart() {
        let spec = |transport, bind| ListenSpec {
            name: "here".into(),
            transport,
            bind,
            paths: vec![],
            origins: vec![],
            proxies: Proxies::default(),
            tls: None,
            webtransport: false,
        };
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let limits = Arc::new(Limits::default());
        let first = bind(spec(Kind::Tcp, any), Arc::clone(&limits)).expect("binds");
        let taken = bind(spec(Kind::Ws, first.local_addr()), Arc::clone(&limits));
        let error = taken.expect_err("in use");
        assert!(matches!(error, BindError::AddrInUse { .. }));
        assert!(error.to_string().contains("\"here\"") && error.to_string().contains("in use"));
        let error = bind(spec(Kind::Quic, any), Arc::clone(&limits)).expect_err("no certificate");
        assert!(matches!(error, BindError::NoTls { .. }));
        let elsewhere = SocketAddr::from(([192, 0, 2, 1], 1));
        let error = bind(spec(Kind::Tcp, elsewhere), limits).expect_err("not our address");
        assert!(matches!(error, BindError::Io { .. }));
    }
}
