//! The server's handshake over TCP.

use std::io;
use std::time::Duration;

use rustls::HandshakeKind;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::transport::limits::{HandshakeError, HandshakePlace};
use crate::transport::tls::clients::fault;
use crate::transport::tls::{ALPN_HTTP, ClientCertificate, ServerTls};

/// How long a client that is refused is given to read why.
const GOODBYE: Duration = Duration::from_millis(500);
/// Bytes of it that are taken meanwhile.
const GOODBYE_BYTES: u64 = 64 * 1024;

/// Runs the handshake, for which it has `place`; answers with who the client is,
/// if it has a certificate.
pub(in crate::transport) async fn accept<S>(
    io: S,
    tls: &ServerTls,
    alpn: &'static str,
    place: HandshakePlace,
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
    // What is left to say to a refused client is no handshake.
    drop(place);
    let (error, stream) = match done {
        Ok(stream) => {
            let session = stream.get_ref().1;
            let resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
            match tls.identify(session.peer_certificates(), &configs, resumed) {
                Ok(client) => return Ok((stream, client)),
                Err(error) => {
                    goodbye(stream).await;
                    return Err(error);
                }
            }
        }
        Err((error, io)) => (failed(error, alpn), io),
    };
    if matches!(error, HandshakeError::ClientCertificate { .. }) {
        goodbye(stream).await;
    }
    Err(error)
}

/// In TLS 1.3 a client has sent its first packet before it can know that its
/// certificate is refused. To close a socket with that unread resets the
/// connection, and the alert may be lost with it.
async fn goodbye<S: AsyncRead + AsyncWrite + Unpin>(mut io: S) {
    let end = async {
        io.shutdown().await?;
        tokio::io::copy(&mut io.take(GOODBYE_BYTES), &mut tokio::io::sink()).await
    };
    // Whatever happens, it was the last word.
    let _ = timeout(GOODBYE, end).await;
}

fn failed(error: io::Error, alpn: &'static str) -> HandshakeError {
    let tls = error
        .get_ref()
        .and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match tls {
        Some(rustls::Error::NoApplicationProtocol) => HandshakeError::Alpn(alpn),
        Some(tls) => match fault(tls) {
            Some(fault) => HandshakeError::ClientCertificate {
                fault,
                why: tls.to_string(),
            },
            None => HandshakeError::Tls(tls.to_string()),
        },
        None => HandshakeError::Io(error),
    }
}
