//! Dialling a broker over TCP, TLS or WebSocket, with typed errors.

mod ws;

use std::future::Future;
use std::io::{self, IoSlice};
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use rustls::{AlertDescription, CertificateError};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::transport::tls::TlsError;
use crate::transport::tls::client::{ClientTls, parse_name};
pub use ws::UpgradeError;
use ws::WsBytes;

/// The address of a broker, and how to reach it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DialTarget {
    /// A name or an address (IPv6 without brackets).
    pub host: String,
    /// The port.
    pub port: u16,
    /// Whether to use TLS. Chain and name are verified.
    pub tls: bool,
    /// The path of a WebSocket; without one, MQTT runs directly on the connection.
    pub path: Option<String>,
}

/// Why a dial failed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name has no address.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// The system's error.
        source: io::Error,
    },
    /// Nothing listens there.
    #[error("{0}: connection refused")]
    Refused(SocketAddr),
    /// Not done in time.
    #[error("timed out")]
    Timeout,
    /// The TLS handshake failed.
    #[error("TLS: {reason}: {source}")]
    Tls {
        /// The kind of failure.
        reason: TlsFailure,
        /// The library's error.
        source: rustls::Error,
    },
    /// A TLS target has no TLS configuration.
    #[error("TLS settings: none given for a TLS target")]
    NoTlsSettings,
    /// The host of a TLS target is not a valid server name.
    #[error("TLS settings: {0}")]
    ServerName(TlsError),
    /// The WebSocket was refused.
    #[error("WebSocket: {0}")]
    WebSocket(UpgradeError),
    /// Any other failure.
    #[error("{addr}: {source}")]
    Io {
        /// The address.
        addr: SocketAddr,
        /// The system's error.
        source: io::Error,
    },
}

/// Why a TLS handshake with a broker failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsFailure {
    /// The chain does not end at a root we trust.
    UnknownCa,
    /// The certificate is for another name.
    NameMismatch,
    /// The certificate is not valid today.
    Expired,
    /// The broker refused us by an alert, often because of a missing client certificate.
    Refused,
    /// Something else.
    Other,
}

impl std::fmt::Display for TlsFailure {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::UnknownCa => "certificate of an unknown CA",
            Self::NameMismatch => "certificate for another name",
            Self::Expired => "certificate not valid now",
            Self::Refused => "refused by the broker",
            Self::Other => "handshake failed",
        })
    }
}

/// A connection to a broker.
#[derive(Debug)]
pub enum Dialed {
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// WebSocket.
    Ws(Box<WsBytes<TcpStream>>),
    /// WebSocket over TLS.
    Wss(Box<WsBytes<TlsStream<TcpStream>>>),
    /// An in-memory connection to the embedded broker or to a test.
    Pipe(DuplexStream),
}

/// A connection whose TCP acknowledgements can be sent at once.
pub trait QuickAck {
    /// Sends the acknowledgement of the bytes that have arrived at once, and of some that follow; or
    /// lets the system delay them. The system falls back to delays by itself, so a caller repeats it.
    /// Returns false if the transport or the system does not have the setting.
    fn quick_ack(&self, at_once: bool) -> bool;
}

impl QuickAck for DuplexStream {
    fn quick_ack(&self, _: bool) -> bool {
        false
    }
}

impl QuickAck for Dialed {
    fn quick_ack(&self, at_once: bool) -> bool {
        let tcp = match self {
            Self::Tcp(io) => io,
            Self::Tls(io) => io.get_ref().0,
            Self::Ws(io) => io.get_ref(),
            Self::Wss(io) => io.get_ref().get_ref().0,
            Self::Pipe(_) => return false,
        };
        #[cfg(target_os = "linux")]
        return tcp.set_quickack(at_once).is_ok();
        #[cfg(not(target_os = "linux"))]
        return false;
    }
}

/// Connects to `target` within `timeout`, trying each address of the name.
///
/// # Errors
/// The failure of the last address tried; see [`DialError`].
pub async fn dial(
    target: &DialTarget,
    tls: Option<&ClientTls>,
    timeout: Duration,
) -> Result<Dialed, DialError> {
    let deadline = Instant::now() + timeout;
    let DialTarget { host, port, .. } = target;
    let io = connect(host, *port, deadline).await?;
    let authority = match host.contains(':') {
        true => format!("[{host}]:{port}"),
        false => format!("{host}:{port}"),
    };
    if !target.tls {
        return match &target.path {
            None => Ok(Dialed::Tcp(io)),
            Some(path) => {
                let upgrading = ws::upgrade(io, false, &authority, path);
                let upgraded = within(deadline, upgrading).await?;
                let ws = upgraded.map_err(DialError::WebSocket)?;
                Ok(Dialed::Ws(Box::new(ws)))
            }
        };
    }
    let tls = tls.ok_or(DialError::NoTlsSettings)?;
    let name = match &tls.server_name {
        Some(name) => name.clone(),
        None => parse_name(host).map_err(DialError::ServerName)?,
    };
    let addr = io
        .peer_addr()
        .unwrap_or_else(|_| ([0, 0, 0, 0], *port).into());
    // Boxed, so that the link's task does not keep room for the handshake's state.
    let connecting = Box::pin(TlsConnector::from(tls.config.clone()).connect(name, io));
    let stream = match timeout_at(deadline, connecting).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return Err(tls_error(addr, error)),
        Err(_) => return Err(DialError::Timeout),
    };
    let Some(path) = &target.path else {
        return Ok(Dialed::Tls(Box::new(stream)));
    };
    let upgrading = Box::pin(ws::upgrade(stream, true, &authority, path));
    let upgraded = within(deadline, upgrading).await?;
    let ws = upgraded.map_err(DialError::WebSocket)?;
    Ok(Dialed::Wss(Box::new(ws)))
}

async fn connect(host: &str, port: u16, deadline: Instant) -> Result<TcpStream, DialError> {
    let resolve_error = |source| DialError::Resolve {
        host: host.to_owned(),
        source,
    };
    let addrs: Vec<SocketAddr> = within(deadline, tokio::net::lookup_host((host, port)))
        .await?
        .map_err(resolve_error)?
        .collect();
    let mut last = resolve_error(io::Error::other("no address"));
    for (i, addr) in addrs.iter().enumerate() {
        // An address that does not answer must leave time for the others.
        let remaining = deadline.saturating_duration_since(Instant::now());
        let share = remaining / u32::try_from(addrs.len() - i).unwrap_or(u32::MAX);
        match timeout_at(Instant::now() + share, TcpStream::connect(addr)).await {
            Ok(Ok(io)) => {
                // A failure only costs latency.
                let _ = io.set_nodelay(true);
                return Ok(io);
            }
            Ok(Err(e)) if e.kind() == io::ErrorKind::ConnectionRefused => {
                last = DialError::Refused(*addr);
            }
            Ok(Err(e)) if e.kind() == io::ErrorKind::TimedOut => last = DialError::Timeout,
            Ok(Err(source)) => {
                last = DialError::Io {
                    addr: *addr,
                    source,
                }
            }
            Err(_) => last = DialError::Timeout,
        }
    }
    Err(last)
}

async fn within<F: Future>(deadline: Instant, f: F) -> Result<F::Output, DialError> {
    timeout_at(deadline, f)
        .await
        .map_err(|_| DialError::Timeout)
}

fn tls_error(addr: SocketAddr, error: io::Error) -> DialError {
    let Some(tls) = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>())
    else {
        return DialError::Io {
            addr,
            source: error,
        };
    };
    DialError::Tls {
        reason: classify(tls),
        source: tls.clone(),
    }
}

fn classify(error: &rustls::Error) -> TlsFailure {
    use CertificateError as C;
    match error {
        rustls::Error::InvalidCertificate(certificate) => match certificate {
            C::UnknownIssuer | C::BadSignature => TlsFailure::UnknownCa,
            C::NotValidForName | C::NotValidForNameContext { .. } => TlsFailure::NameMismatch,
            C::Expired
            | C::ExpiredContext { .. }
            | C::NotValidYet
            | C::NotValidYetContext { .. } => TlsFailure::Expired,
            _ => TlsFailure::Other,
        },
        rustls::Error::AlertReceived(
            AlertDescription::UnknownCA
            | AlertDescription::CertificateRequired
            | AlertDescription::BadCertificate
            | AlertDescription::AccessDenied,
        ) => TlsFailure::Refused,
        _ => TlsFailure::Other,
    }
}

impl AsyncRead for Dialed {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_read(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_read(cx, buf),
            Self::Ws(io) => Pin::new(io).poll_read(cx, buf),
            Self::Wss(io) => Pin::new(io).poll_read(cx, buf),
            Self::Pipe(io) => Pin::new(io).poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for Dialed {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_write(cx, buf),
            Self::Tls(io) => Pin::new(io).poll_write(cx, buf),
            Self::Ws(io) => Pin::new(io).poll_write(cx, buf),
            Self::Wss(io) => Pin::new(io).poll_write(cx, buf),
            Self::Pipe(io) => Pin::new(io).poll_write(cx, buf),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Self::Tls(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Self::Ws(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Self::Wss(io) => Pin::new(io).poll_write_vectored(cx, bufs),
            Self::Pipe(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(io) => io.is_write_vectored(),
            Self::Tls(io) => io.is_write_vectored(),
            Self::Ws(io) => io.is_write_vectored(),
            Self::Wss(io) => io.is_write_vectored(),
            Self::Pipe(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
            Self::Ws(io) => Pin::new(io).poll_flush(cx),
            Self::Wss(io) => Pin::new(io).poll_flush(cx),
            Self::Pipe(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
            Self::Ws(io) => Pin::new(io).poll_shutdown(cx),
            Self::Wss(io) => Pin::new(io).poll_shutdown(cx),
            Self::Pipe(io) => Pin::new(io).poll_shutdown(cx),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustls::Error as E;

    use super::*;

    #[test]
    fn tls_failures_are_told_apart() {
        let failure = |error| {
            let error = io::Error::new(io::ErrorKind::InvalidData, error);
            match tls_error(([127, 0, 0, 1], 1).into(), error) {
                DialError::Tls { reason, .. } => Some(reason),
                _ => None,
            }
        };
        for (error, expected) in [
            (CertificateError::Expired, TlsFailure::Expired),
            (CertificateError::NotValidYet, TlsFailure::Expired),
            (CertificateError::UnknownIssuer, TlsFailure::UnknownCa),
            (CertificateError::NotValidForName, TlsFailure::NameMismatch),
            (CertificateError::Revoked, TlsFailure::Other),
        ] {
            assert_eq!(failure(E::InvalidCertificate(error)), Some(expected));
        }
        let alert = E::AlertReceived(AlertDescription::CertificateRequired);
        assert_eq!(failure(alert), Some(TlsFailure::Refused));
        assert_eq!(failure(E::NoApplicationProtocol), Some(TlsFailure::Other));
        let broken = io::Error::from(io::ErrorKind::ConnectionReset);
        let broken = tls_error(([127, 0, 0, 1], 1).into(), broken);
        assert!(matches!(broken, DialError::Io { .. }));
    }
}
