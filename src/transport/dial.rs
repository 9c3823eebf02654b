//! Dialling a core: TCP or TLS, with errors that can be told apart.

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

use super::tls::{ClientTls, parse_name};

/// Where to dial.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DialTarget {
    /// MQTT over TCP.
    Tcp {
        /// A name or an address (IPv6 without brackets).
        host: String,
        /// The port.
        port: u16,
    },
    /// MQTT over TLS; chain and name are verified.
    Tls {
        /// A name or an address (IPv6 without brackets).
        host: String,
        /// The port.
        port: u16,
    },
}

/// Why a dial failed.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The name has no address.
    #[error("cannot resolve {host}: {source}")]
    Resolve {
        /// The name.
        host: String,
        /// Why.
        source: io::Error,
    },
    /// Nothing listens there.
    #[error("{0}: connection refused")]
    Refused(SocketAddr),
    /// Not done in time.
    #[error("timed out")]
    Timeout,
    /// The TLS handshake failed.
    #[error("TLS: {reason}: {detail}")]
    Tls {
        /// What kind of failure.
        reason: TlsFailure,
        /// The library's words.
        detail: String,
    },
    /// A TLS target without a TLS configuration, or with a host that is no
    /// valid server name.
    #[error("TLS settings: {0}")]
    Settings(String),
    /// Any other failure.
    #[error("{addr}: {source}")]
    Io {
        /// The address.
        addr: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

/// What went wrong in a TLS handshake with a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TlsFailure {
    /// The chain does not end at a root we trust.
    UnknownCa,
    /// The certificate is for another name.
    NameMismatch,
    /// The certificate is not valid today.
    Expired,
    /// The core refused us, by alert; often a missing client certificate.
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
            Self::Refused => "refused by the core",
            Self::Other => "handshake failed",
        })
    }
}

impl DialError {
    /// A bounded name for a metric label.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::Resolve { .. } => "resolve",
            Self::Refused(_) => "refused",
            Self::Timeout => "timeout",
            Self::Tls { reason, .. } => match reason {
                TlsFailure::UnknownCa => "tls_unknown_ca",
                TlsFailure::NameMismatch => "tls_name_mismatch",
                TlsFailure::Expired => "tls_expired",
                TlsFailure::Refused => "tls_refused",
                TlsFailure::Other => "tls_other",
            },
            Self::Settings(_) => "settings",
            Self::Io { .. } => "io",
        }
    }
}

/// A connection to a core.
#[derive(Debug)]
pub enum Dialed {
    /// Plain TCP.
    Tcp(TcpStream),
    /// TLS over TCP.
    Tls(Box<TlsStream<TcpStream>>),
    /// In memory, to the embedded core or a test.
    Pipe(DuplexStream),
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
    match target {
        DialTarget::Tcp { host, port } => connect(host, *port, deadline).await.map(Dialed::Tcp),
        DialTarget::Tls { host, port } => {
            let tls =
                tls.ok_or_else(|| DialError::Settings("none given for a TLS target".into()))?;
            let name = match &tls.server_name {
                Some(name) => name.clone(),
                None => parse_name(host).map_err(|e| DialError::Settings(e.to_string()))?,
            };
            let io = connect(host, *port, deadline).await?;
            let addr = io
                .peer_addr()
                .unwrap_or_else(|_| ([0, 0, 0, 0], *port).into());
            // Boxed: the handshake's state is not carried by the link's task.
            let connecting = Box::pin(TlsConnector::from(tls.config.clone()).connect(name, io));
            match timeout_at(deadline, connecting).await {
                Ok(Ok(stream)) => Ok(Dialed::Tls(Box::new(stream))),
                Ok(Err(error)) => Err(tls_error(addr, error)),
                Err(_) => Err(DialError::Timeout),
            }
        }
    }
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
        // A black hole in front must not use up the others' time.
        let left = deadline.saturating_duration_since(Instant::now());
        let share = left / u32::try_from(addrs.len() - i).unwrap_or(u32::MAX);
        match timeout_at(Instant::now() + share, TcpStream::connect(addr)).await {
            Ok(Ok(io)) => {
                // Only latency is lost without it.
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
        detail: tls.to_string(),
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
            Self::Pipe(io) => Pin::new(io).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(io) => io.is_write_vectored(),
            Self::Tls(io) => io.is_write_vectored(),
            Self::Pipe(io) => io.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_flush(cx),
            Self::Tls(io) => Pin::new(io).poll_flush(cx),
            Self::Pipe(io) => Pin::new(io).poll_flush(cx),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Tcp(io) => Pin::new(io).poll_shutdown(cx),
            Self::Tls(io) => Pin::new(io).poll_shutdown(cx),
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
        for (error, label) in [
            (
                E::InvalidCertificate(CertificateError::Expired),
                "tls_expired",
            ),
            (
                E::InvalidCertificate(CertificateError::NotValidYet),
                "tls_expired",
            ),
            (
                E::InvalidCertificate(CertificateError::UnknownIssuer),
                "tls_unknown_ca",
            ),
            (
                E::InvalidCertificate(CertificateError::NotValidForName),
                "tls_name_mismatch",
            ),
            (
                E::InvalidCertificate(CertificateError::Revoked),
                "tls_other",
            ),
            (
                E::AlertReceived(AlertDescription::CertificateRequired),
                "tls_refused",
            ),
            (E::NoApplicationProtocol, "tls_other"),
        ] {
            let error = io::Error::new(io::ErrorKind::InvalidData, error);
            let dial = tls_error(([127, 0, 0, 1], 1).into(), error);
            assert_eq!(dial.label(), label);
        }
        let broken = io::Error::from(io::ErrorKind::ConnectionReset);
        assert_eq!(tls_error(([127, 0, 0, 1], 1).into(), broken).label(), "io");
    }
}
