//! The events of listeners, counted and logged.

use std::net::SocketAddr;
use std::time::Duration;

use crate::clock::Clock;
use crate::config::{Listener, Transport};
use crate::telemetry::{AcceptErrorReason, HandshakeReason, RateLimited, metrics};
use crate::transport::{
    AcceptError, CertificateFault, Events, HandshakeError, RefusalReason, RequestError,
};

/// Log lines of one kind per [`PERIOD`] and listener.
const LINES_MAX: u32 = 10;
const PERIOD: Duration = Duration::from_secs(10);

/// Counts the events of one listener in the process's metrics and logs them.
pub(super) struct ListenerEvents {
    name: String,
    transport: Transport,
    clock: Clock,
    accept_log: RateLimited,
    handshake_log: RateLimited,
    uni_stream_log: RateLimited,
}

impl ListenerEvents {
    pub(super) fn new(listener: &Listener, clock: Clock) -> Self {
        Self {
            name: listener.name.clone(),
            transport: listener.transport,
            clock,
            accept_log: RateLimited::burst(LINES_MAX, PERIOD),
            handshake_log: RateLimited::burst(LINES_MAX, PERIOD),
            uni_stream_log: RateLimited::burst(1, PERIOD),
        }
    }
}

impl Events for ListenerEvents {
    fn accept_failed(&self, error: &AcceptError) {
        let reason = accept_reason(error);
        metrics().accept_errors[reason].increment(1);
        if let Some(suppressed) = self.accept_log.permit(self.clock.now()) {
            let listener = &self.name;
            tracing::warn!(listener, %reason, suppressed, "Accept failed: {error}");
        }
    }

    fn refused(&self, reason: RefusalReason) {
        let reason = match reason {
            RefusalReason::Connections | RefusalReason::Handshakes => HandshakeReason::Limit,
        };
        metrics().handshakes_failed[reason].increment(1);
    }

    fn handshake_failed(&self, peer: SocketAddr, error: &HandshakeError) {
        let transport = error.transport(self.transport);
        let reason = handshake_reason(transport, error);
        metrics().handshakes_failed[reason].increment(1);
        let listener = &self.name;
        // Load balancers do this to see whether the port is open.
        if matches!(error, HandshakeError::Silent) {
            tracing::debug!(listener, %transport, %peer, "Handshake failed: {error}");
        } else if let Some(suppressed) = self.handshake_log.permit(self.clock.now()) {
            tracing::info!(
                listener, %transport, %peer, %reason, suppressed,
                "Handshake failed: {error}"
            );
        }
    }

    fn health_checked(&self) {
        metrics().health_checks.increment(1);
    }

    fn retry_sent(&self) {
        metrics().quic_retries.increment(1);
    }

    fn uni_stream_stopped(&self, peer: SocketAddr) {
        if let Some(suppressed) = self.uni_stream_log.permit(self.clock.now()) {
            tracing::info!(
                listener = self.name, %peer, suppressed,
                "A unidirectional stream was stopped with error code 0x82: MQTT is served on \
                 bidirectional streams that the client opens"
            );
        }
    }

    fn migrated(&self, _from: SocketAddr, _to: SocketAddr) {
        metrics().quic_migrations.increment(1);
    }
}

/// The metric's label for an error of `accept`.
const fn accept_reason(error: &AcceptError) -> AcceptErrorReason {
    match error {
        AcceptError::FileLimit(_) => AcceptErrorReason::FileLimit,
        AcceptError::Memory(_) => AcceptErrorReason::Memory,
        AcceptError::Aborted(_) => AcceptErrorReason::Aborted,
        AcceptError::Other(_) => AcceptErrorReason::Other,
    }
}

/// The metric's label for a failed handshake of this transport.
const fn handshake_reason(transport: Transport, error: &HandshakeError) -> HandshakeReason {
    use HandshakeReason as R;
    match error {
        HandshakeError::Deadline => R::Timeout,
        HandshakeError::Stopped | HandshakeError::Silent | HandshakeError::NoRequest => R::Closed,
        HandshakeError::Io(_) => R::Io,
        HandshakeError::Tls { .. } => R::Tls,
        HandshakeError::CertificateRefused { .. } => R::CertificateRefused,
        HandshakeError::ClientCertificate { fault, .. } => match fault {
            CertificateFault::Missing => R::CertificateMissing,
            CertificateFault::Expired => R::CertificateExpired,
            CertificateFault::Revoked => R::CertificateRevoked,
            CertificateFault::Untrusted => R::CertificateUntrusted,
            CertificateFault::Other => R::CertificateOther,
        },
        HandshakeError::Alpn(_) => R::Alpn,
        HandshakeError::Proxy(_) => R::Proxy,
        HandshakeError::Request(error) => request_reason(transport, error),
        HandshakeError::Quic(_) => R::Quic,
        HandshakeError::WebTransport(_) => R::WebTransport,
    }
}

/// The metric's label for a refused request.
const fn request_reason(transport: Transport, error: &RequestError) -> HandshakeReason {
    use HandshakeReason as R;
    use RequestError as E;
    match error {
        E::Path(_) | E::NotWebTransport => R::Path,
        E::Origin(_) => R::Origin,
        E::Subprotocol => R::Subprotocol,
        E::ConnectProtocol | E::WebTransportProtocol => R::WebTransport,
        E::Malformed(_)
        | E::HeaderTooLarge
        | E::TooManyLines
        | E::Version(_)
        | E::Http10
        | E::UpgradeMethod
        | E::HealthMethod
        | E::Host
        | E::NotWebSocket
        | E::WebSocketVersion
        | E::WebSocketKey => match transport {
            Transport::Quic | Transport::WebTransport => R::WebTransport,
            Transport::Tcp | Transport::Tls | Transport::Ws | Transport::Wss => R::WebSocket,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::WebTransportError;

    #[test]
    fn refused_requests_have_the_label_of_their_transport() {
        let reason =
            |listener, error: HandshakeError| handshake_reason(error.transport(listener), &error);
        for error in [RequestError::Malformed(None), RequestError::HeaderTooLarge] {
            let request = || HandshakeError::Request(error.clone());
            let on_quic = reason(Transport::Quic, request());
            assert_eq!(on_quic, HandshakeReason::WebTransport);
            for listener in [Transport::Ws, Transport::Wss] {
                assert_eq!(reason(listener, request()), HandshakeReason::WebSocket);
            }
        }
        let path = HandshakeError::Request(RequestError::Path("/".into()));
        assert_eq!(reason(Transport::Quic, path), HandshakeReason::Path);
        let connect = HandshakeError::Request(RequestError::ConnectProtocol);
        assert_eq!(
            reason(Transport::Quic, connect),
            HandshakeReason::WebTransport
        );
        let settings = HandshakeError::WebTransport(WebTransportError::Settings);
        assert_eq!(
            reason(Transport::Quic, settings),
            HandshakeReason::WebTransport
        );
        let quic = HandshakeError::Quic(quinn::ConnectionError::TimedOut.into());
        assert_eq!(reason(Transport::Quic, quic), HandshakeReason::Quic);
    }
}
