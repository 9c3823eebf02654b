//! MQTT over QUIC, ALPN `mqtt`: the first stream that the client opens is stream 0, the control
//! stream, and the next ones are data streams. We never open a stream, and stop
//! unidirectional ones. No standard defines this; it follows deployed brokers and
//! clients. On the same socket browsers are served over WebTransport, if the listener's `webtransport`
//! is true. The handshake then allows every client what HTTP/3 needs, and the datagrams of MQTT clients
//! are dropped.

pub(super) mod bidi;
pub(super) mod capsules;
mod close;
pub(super) mod keys;
mod session;
mod settings;
pub(super) mod streams;
mod webtransport;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use quinn::crypto::rustls::HandshakeData;
use quinn::{Connection, Endpoint, EndpointConfig, Incoming, ServerConfig, TokioRuntime, VarInt};
use tokio_util::sync::CancellationToken;

use crate::config;
use crate::shares::SharePermit;
use crate::transport::error::{HandshakeError, RefusalReason};
use crate::transport::limits::{Admitted, Limits};
use crate::transport::listen::listener::{Accepted, ConnectionTask, Listener, spawn};
use crate::transport::proxy::canonical;
use crate::transport::stream::Stream;
use crate::transport::tls::ALPN_H3;
use crate::transport::tls::clients::ClientCertificate;
use crate::transport::tls::server::ServerTls;
use crate::transport::types::CloseHow;
use bidi::{Bidi, Layer};
pub use capsules::CapsuleError;
use close::{CloseCode, CloseOnDrop, Missing, handshake_error};
pub use keys::QuicSecret;
use settings::CurrentConfig;
use streams::Quic;

/// The socket's buffers, as far as the system allows. All clients share them, and a burst that is
/// larger is lost.
const SOCKET_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// The shortest time between two stateless resets: after a restart, as many clients per second learn
/// of it as may connect again by default.
const RESET_INTERVAL: Duration = Duration::from_micros(200);

/// A bound QUIC socket.
#[derive(Clone, Debug)]
pub(super) struct Server {
    endpoint: Endpoint,
    config: CurrentConfig,
}

impl Server {
    /// Must be called inside a tokio runtime.
    pub(super) fn new(
        socket: UdpSocket,
        tls: &Arc<ServerTls>,
        limits: &Limits,
        listener: &config::Listener,
    ) -> io::Result<Self> {
        let keys = limits.quic_secret.keys(&listener.name);
        let keys = keys.ok_or_else(|| io::Error::other("the QUIC keys cannot be derived"))?;
        for result in [
            socket2::SockRef::from(&socket).set_recv_buffer_size(SOCKET_BUFFER_BYTES),
            socket2::SockRef::from(&socket).set_send_buffer_size(SOCKET_BUFFER_BYTES),
        ] {
            if let Err(error) = result {
                tracing::debug!(%error, "The size of a UDP socket buffer cannot be set");
            }
        }
        let mut endpoint = EndpointConfig::new(keys.reset);
        let ids = keys.ids;
        endpoint
            .cid_generator(move || Box::new(ids.clone()))
            .min_reset_interval(RESET_INTERVAL);
        let config = CurrentConfig::new(tls, listener.webtransport, limits.quic_idle, keys.token)?;
        let first = ServerConfig::clone(&config.get());
        let endpoint = Endpoint::new(endpoint, Some(first), socket, Arc::new(TokioRuntime))?;
        Ok(Self { endpoint, config })
    }

    pub(super) fn local_addr(&self) -> io::Result<SocketAddr> {
        self.endpoint.local_addr()
    }

    /// Accepts until `stop` is cancelled; connections then go on.
    pub(super) async fn serve<H, F>(
        self,
        listener: Arc<Listener>,
        handler: H,
        stop: CancellationToken,
    ) where
        H: Fn(Accepted) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Option<ConnectionTask>> + Send + 'static,
    {
        while let Some(Some(incoming)) = stop.run_until_cancelled(self.endpoint.accept()).await {
            let Some((incoming, admitted, handshake)) = admit(incoming, &listener) else {
                continue;
            };
            let listener = Arc::clone(&listener);
            let (stop, config) = (stop.clone(), self.config.get());
            let handshake = async move {
                let peer = canonical(incoming.remote_address());
                let deadline = listener.deadline();
                let connecting = Box::pin(connect(incoming, config, &listener, handshake));
                let result = listener.bounded(deadline, &stop, connecting).await;
                match result {
                    // The client may have moved since its first datagram.
                    Ok((quic, client)) => {
                        let peer = quic.remote_address();
                        let stream = Stream::quic(quic).with_certificate(client);
                        listener.finish(Ok(stream), peer, deadline, admitted)
                    }
                    Err(error) => listener.finish(Err(error), peer, deadline, admitted),
                }
            };
            spawn(handshake, handler.clone());
        }
        if !stop.is_cancelled() {
            return;
        }
        // While connections drain, new clients are refused rather than left to time out.
        #[expect(clippy::disallowed_methods, reason = "it ends with the endpoint")]
        tokio::spawn(async move {
            let refuse = async {
                while let Some(incoming) = self.endpoint.accept().await {
                    incoming.refuse();
                }
            };
            tokio::select! {
                () = refuse => {}
                () = self.endpoint.wait_idle() => {}
            }
            self.endpoint.set_server_config(None);
            while let Some(Some(incoming)) = self.endpoint.accept().now_or_never() {
                incoming.refuse();
            }
        });
    }

    /// Resolves when no connection is left and all closes are sent.
    pub(super) async fn idle(&self) {
        self.endpoint.wait_idle().await;
    }

    pub(super) fn close(&self, how: CloseHow) {
        let code = CloseCode::from(how).number();
        self.endpoint.close(code.into(), b"");
    }
}

/// Refuses a connection beyond the limits, and asks for proof of its address when many
/// handshakes run, so that a spoofed source costs no more than one packet.
fn admit(incoming: Incoming, listener: &Listener) -> Option<(Incoming, Admitted, SharePermit)> {
    let permits = &listener.limits.handshakes.quic;
    // A client with a token of an earlier connection has proved its address already.
    let proved = incoming.remote_address_validated();
    if permits.pressed() && !proved && incoming.may_retry() {
        listener.events.retry_sent();
        // Fails only without may_retry.
        let _ = incoming.retry();
        return None;
    }
    let from = canonical(incoming.remote_address());
    let Some(handshake) = permits.try_acquire(from) else {
        listener.events.refused(RefusalReason::Handshakes);
        incoming.refuse();
        return None;
    };
    let Some(admitted) = listener.admit(from) else {
        incoming.refuse();
        return None;
    };
    Some((incoming, admitted, handshake))
}

/// The handshake, and the wait for the control stream, which costs nothing and so needs no permit.
async fn connect(
    incoming: Incoming,
    config: Arc<ServerConfig>,
    listener: &Listener,
    permit: SharePermit,
) -> Result<(Quic, Option<Box<ClientCertificate>>), HandshakeError> {
    let connection = incoming
        .accept_with(config)
        .map_err(handshake_error)?
        .await
        .map_err(handshake_error)?;
    drop(permit);
    let control_gone = VarInt::from_u32(CloseCode::ControlGone.number());
    let client = match &listener.tls {
        Some(tls) => tls.identify_any(connection.peer_identity()),
        None => Ok(None),
    }
    .inspect_err(|_| connection.close(control_gone, b"client certificate"))?;
    if is_http3(&connection) {
        return Ok((webtransport::accept(connection, listener).await?, client));
    }
    let guard = CloseOnDrop {
        connection: &connection,
        missing: Missing::ControlStream(Layer::Plain),
    };
    let (send, recv) = connection.accept_bi().await.map_err(handshake_error)?;
    std::mem::forget(guard);
    let control = Bidi::new(send, recv, Layer::Plain);
    let events = Arc::clone(&listener.events);
    let quic = Quic::new(connection, Layer::Plain, control, None, events);
    Ok((quic, client))
}

fn is_http3(connection: &Connection) -> bool {
    connection
        .handshake_data()
        .and_then(|data| data.downcast::<HandshakeData>().ok())
        .and_then(|data| data.protocol)
        .is_some_and(|alpn| alpn == ALPN_H3.as_bytes())
}
