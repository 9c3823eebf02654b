//! Accepting TCP connections, and the handshakes of the transports that begin with TCP.

use std::future::ready;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use rustix::io::Errno;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::backoff::Backoff;
use crate::config::{ProxyProtocol, Transport};
use crate::transport::detect::{Detected, detect};
use crate::transport::error::{AcceptError, HandshakeError};
use crate::transport::limits::Admitted;
use crate::transport::listen::listener::{Accepted, ConnectionTask, Listener, spawn};
use crate::transport::proxy::{canonical, read_header};
use crate::transport::stream::Stream;
use crate::transport::tls::accept::accept as accept_tls;
use crate::transport::tls::{ALPN_HTTP, ALPN_MQTT};
use crate::transport::ws::Ws;
use crate::transport::ws::handshake::{self, Answer};

impl From<io::Error> for AcceptError {
    fn from(error: io::Error) -> Self {
        match Errno::from_io_error(&error) {
            Some(Errno::MFILE | Errno::NFILE) => Self::FileLimit(error),
            Some(Errno::NOBUFS | Errno::NOMEM) => Self::Memory(error),
            // Errors of the connection that waited, not of the listener (accept(2)).
            Some(
                Errno::CONNABORTED
                | Errno::CONNRESET
                | Errno::INTR
                | Errno::PROTO
                | Errno::PERM
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NONET
                | Errno::NOPROTOOPT
                | Errno::OPNOTSUPP,
            ) => Self::Aborted(error),
            _ => Self::Other(error),
        }
    }
}

/// Accepts until `stop` is cancelled.
pub(super) async fn serve_tcp<H, F>(
    socket: &TcpListener,
    listener: Arc<Listener>,
    handler: H,
    stop: CancellationToken,
) where
    H: Fn(Accepted) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Option<ConnectionTask>> + Send + 'static,
{
    let mut backoff = Backoff::for_accept();
    while let Some(accepted) = stop.run_until_cancelled(socket.accept()).await {
        match accepted.map_err(AcceptError::from) {
            Ok((io, peer)) => {
                backoff.reset();
                let peer = canonical(peer);
                if let Some(admitted) = listener.admit(peer) {
                    let handler = handler.clone();
                    start(io, peer, admitted, &listener, handler, &stop);
                }
            }
            Err(error) => {
                listener.events.accept_failed(&error);
                if !matches!(error, AcceptError::Aborted(_)) {
                    let wait = sleep(backoff.next_wait());
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
    admitted: Admitted,
    listener: &Arc<Listener>,
    handler: H,
    stop: &CancellationToken,
) where
    H: Fn(Accepted) -> F + Send + 'static,
    F: Future<Output = Option<ConnectionTask>> + Send + 'static,
{
    // Packets are written whole; Nagle's algorithm would only delay them.
    let _ = io.set_nodelay(true);
    let deadline = listener.deadline();
    let config = &listener.config;
    if config.transport == Transport::Tcp && config.proxy_protocol == ProxyProtocol::Off {
        let stream = Ok(Stream::tcp(io));
        if let Some(accepted) = listener.finish(stream, peer, deadline, admitted) {
            spawn(ready(Some(accepted)), handler);
        }
        return;
    }
    let (listener, stop) = (Arc::clone(listener), stop.clone());
    let handshake = async move {
        let mut peer = peer;
        let upgrade = Box::pin(listener.upgrade(io, &mut peer));
        match listener.bounded(deadline, &stop, upgrade).await {
            Ok(Upgraded::Client(stream)) => listener.finish(Ok(stream), peer, deadline, admitted),
            Ok(Upgraded::HealthCheck) => {
                listener.events.health_checked();
                None
            }
            Err(error) => listener.finish(Err(error), peer, deadline, admitted),
        }
    };
    spawn(handshake, handler);
}

/// What a successful handshake led to.
enum Upgraded {
    /// A client's connection.
    Client(Stream),
    /// A load balancer's question, which was answered.
    HealthCheck,
}

impl Listener {
    /// The handshake of every transport that begins with TCP; `peer` becomes the client's address
    /// where a proxy names it.
    async fn upgrade(
        &self,
        mut io: TcpStream,
        peer: &mut SocketAddr,
    ) -> Result<Upgraded, HandshakeError> {
        read_header(&self.config, &mut io, peer).await?;
        let transport = self.config.transport;
        if transport == Transport::Tcp {
            return Ok(Upgraded::Client(Stream::tcp(io)));
        }
        // A silent client must not take a handshake permit. (`readable` may be ready without bytes,
        // and is for a new socket.)
        let mut first = [0; 16];
        let seen = io
            .peek(&mut first)
            .await
            .map_err(HandshakeError::before_first_byte)?;
        if seen == 0 {
            return Err(HandshakeError::Silent);
        }
        // A WebSocket without TLS costs little and needs no permit, so health checks are answered
        // under load as well.
        if transport == Transport::Ws {
            let upgraded = self.websocket(io, peer).await?;
            return Ok(
                upgraded.map_or(Upgraded::HealthCheck, |ws| Upgraded::Client(Stream::ws(ws)))
            );
        }
        let Some(tls) = &self.tls else {
            return Ok(Upgraded::Client(Stream::tcp(io)));
        };
        let alpn = match transport {
            Transport::Wss => ALPN_HTTP,
            _ => ALPN_MQTT,
        };
        let permit = self.limits.handshakes.tls.acquire(*peer).await;
        let (io, client) = match accept_tls(io, tls, alpn, permit).await {
            Err(HandshakeError::Tls { reason, .. }) => {
                // Bytes that begin as TLS are what this listener expects.
                let detected = detect(&first[..seen]).filter(|what| *what != Detected::Tls);
                return Err(HandshakeError::Tls { reason, detected });
            }
            accepted => accepted?,
        };
        if transport != Transport::Wss {
            let stream = Stream::tls(io).with_certificate(client);
            return Ok(Upgraded::Client(stream));
        }
        let upgraded = self.websocket(io, peer).await?;
        Ok(upgraded.map_or(Upgraded::HealthCheck, |ws| {
            Upgraded::Client(Stream::wss(ws).with_certificate(client))
        }))
    }

    /// The WebSocket, or nothing where the request was a health check.
    async fn websocket<S>(
        &self,
        mut io: S,
        peer: &mut SocketAddr,
    ) -> Result<Option<Ws<S>>, HandshakeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let answer = handshake::accept(&mut io, &self.config, peer).await?;
        Ok(match answer {
            Answer::HealthCheck => None,
            Answer::Upgraded { early } => Some(Ws::new(
                io,
                early,
                self.limits.connect_max,
                self.limits.message_max(),
            )),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accept_errors_are_told_apart() {
        use AcceptError as E;
        let error = |errno: Errno| E::from(io::Error::from(errno));
        assert!(matches!(error(Errno::MFILE), E::FileLimit(_)));
        assert!(matches!(error(Errno::NFILE), E::FileLimit(_)));
        assert!(matches!(error(Errno::NOMEM), E::Memory(_)));
        assert!(matches!(error(Errno::CONNABORTED), E::Aborted(_)));
        assert!(matches!(error(Errno::BADF), E::Other(_)));
    }
}
