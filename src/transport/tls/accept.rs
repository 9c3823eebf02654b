//! The server's side of a TLS handshake over TCP.

use std::io;
use std::time::Duration;

use rustls::HandshakeKind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::shares::SharePermit;
use crate::transport::error::{HandshakeError, LibraryError};
use crate::transport::tls::clients::{ClientCertificate, fault, refused_by_client};
use crate::transport::tls::server::{ALPN_HTTP, ServerTls};

/// How long a refused client is given to read the alert.
const LINGER: Duration = Duration::from_millis(500);
/// The most bytes of a refused client that are discarded meanwhile.
const LINGER_MAX_BYTES: u64 = 64 * 1024;

/// Runs the handshake, which has `permit`; returns the client's certificate with the stream, if the
/// client gave one.
pub(in crate::transport) async fn accept<S>(
    io: S,
    tls: &ServerTls,
    alpn: &'static str,
    permit: SharePermit,
) -> Result<(TlsStream<S>, Option<Box<ClientCertificate>>), HandshakeError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let configs = tls.current();
    let config = match alpn {
        ALPN_HTTP => &configs.http,
        _ => &configs.mqtt,
    };
    let handshake = TlsAcceptor::from(config.clone()).accept(io).into_fallible();
    let done = handshake.await;
    // The handshake is done, also where a refused client still reads its alert.
    drop(permit);
    let (error, stream) = match done {
        Ok(stream) => {
            let session = stream.get_ref().1;
            let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
            match tls.identify(session.peer_certificates(), &configs, resumed) {
                Ok(client) => return Ok((stream, client)),
                Err(error) => {
                    linger(stream).await;
                    return Err(error);
                }
            }
        }
        Err((error, io)) => (failed(error, alpn), io),
    };
    if matches!(error, HandshakeError::ClientCertificate { .. }) {
        linger(stream).await;
    }
    Err(error)
}

/// Ends the stream so that the alert arrives. A TLS 1.3 client sends its first packet before it can know
/// that its certificate is refused; closing a socket with unread bytes resets the connection, and the
/// alert may be lost.
async fn linger<S: AsyncRead + AsyncWrite + Unpin>(mut io: S) {
    let end = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(LINGER_MAX_BYTES), &mut tokio::io::sink()).await
    };
    // The connection ends in any case.
    let _ = timeout(LINGER, end).await;
}

fn failed(error: io::Error, alpn: &'static str) -> HandshakeError {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    if let Some(rustls::Error::AlertReceived(alert)) = tls
        && let Some(refused) = refused_by_client(*alert)
    {
        return refused;
    }
    match tls {
        Some(rustls::Error::NoApplicationProtocol) => HandshakeError::Alpn(alpn),
        Some(tls) => match fault(tls) {
            Some(fault) => HandshakeError::ClientCertificate {
                fault,
                why: LibraryError::Tls(tls.clone()),
            },
            None => HandshakeError::Tls {
                reason: tls.clone(),
                detected: None,
            },
        },
        None => HandshakeError::Io(error),
    }
}
