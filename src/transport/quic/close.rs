//! The ends of QUIC connections: the codes that we send, and the reasons that the library reports.

use quinn::{Connection, ConnectionError, TransportErrorCode, VarInt};

use crate::transport::closed::{Closed, ResetReason};
use crate::transport::error::{CertificateFault, HandshakeError, LibraryError};
use crate::transport::quic::bidi::Layer;
use crate::transport::tls::ALPN_MQTT;
use crate::transport::tls::clients::{fault_of_alert, refused_by_client};
use crate::transport::types::CloseHow;

/// Application codes that end a connection. They are EMQX's, so that clients' logs name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CloseCode {
    Normal = 0,
    /// The control stream is missing or ended first.
    ControlGone = 1,
    Overload = 2,
}

impl CloseCode {
    /// The number on the wire where no layer lies above QUIC.
    pub(super) const fn number(self) -> u32 {
        self as u32
    }
}

impl From<CloseHow> for CloseCode {
    fn from(how: CloseHow) -> Self {
        match how {
            CloseHow::Normal | CloseHow::GoingAway => Self::Normal,
            CloseHow::Protocol => Self::ControlGone,
            CloseHow::Overload => Self::Overload,
        }
    }
}

/// Codes of HTTP/3 (RFC 9114 section 8.1).
pub(super) mod h3 {
    pub(in crate::transport::quic) const FRAME_UNEXPECTED: u32 = 0x0105;
    pub(in crate::transport::quic) const SETTINGS_ERROR: u32 = 0x0109;
    pub(in crate::transport::quic) const MISSING_SETTINGS: u32 = 0x010a;
    pub(in crate::transport::quic) const REQUEST_INCOMPLETE: u32 = 0x010d;
}

/// The code that stops a unidirectional stream: MQTT's reason code for a protocol error.
pub(super) const UNI_STREAM_STOPPED: u32 = 0x82;

/// The TLS alert no_application_protocol (RFC 7301 section 3.2).
const ALERT_NO_ALPN: u8 = 120;
/// The first of the error codes that carry a TLS alert (RFC 9000 section 20.1).
const CRYPTO_ERROR: u64 = 0x100;

/// Closes the connection when it is dropped, so that a client learns why the deadline ended its
/// handshake.
pub(super) struct CloseOnDrop<'a> {
    pub connection: &'a Connection,
    pub missing: Missing,
}

/// The part of a handshake that has not arrived yet.
#[derive(Clone, Copy, Debug)]
pub(super) enum Missing {
    /// The SETTINGS of HTTP/3 (RFC 9114 section 7.2.4).
    Settings,
    /// The request for a WebTransport session.
    Request,
    /// The control stream.
    ControlStream(Layer),
}

impl Missing {
    fn code(self) -> VarInt {
        match self {
            Self::Settings => VarInt::from_u32(h3::MISSING_SETTINGS),
            Self::Request => VarInt::from_u32(h3::REQUEST_INCOMPLETE),
            Self::ControlStream(layer) => layer.code(CloseCode::ControlGone.number()),
        }
    }

    /// The reason phrase of CONNECTION_CLOSE.
    fn phrase(self) -> &'static str {
        match self {
            Self::Settings => "no SETTINGS",
            Self::Request => "no request",
            Self::ControlStream(_) => "no control stream",
        }
    }
}

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        // Does nothing if the connection is closed already.
        let phrase = self.missing.phrase().as_bytes();
        self.connection.close(self.missing.code(), phrase);
    }
}

/// Why a connection with this layer was lost.
pub(super) fn lost(error: &ConnectionError, layer: Layer) -> Closed {
    Closed::Reset(match error {
        ConnectionError::ApplicationClosed(close) if layer.is_normal(close.error_code) => {
            return Closed::Eof;
        }
        ConnectionError::ApplicationClosed(close) => {
            ResetReason::ConnectionClosed(layer.peer_code(close.error_code))
        }
        ConnectionError::TimedOut => ResetReason::IdleTimeout,
        ConnectionError::Reset => ResetReason::StatelessReset,
        ConnectionError::LocallyClosed => ResetReason::ClosedLocally,
        ConnectionError::ConnectionClosed(_)
        | ConnectionError::VersionMismatch
        | ConnectionError::TransportError(_)
        | ConnectionError::CidsExhausted => ResetReason::Quic(Box::new(error.clone().into())),
    })
}

/// Why a handshake ended with this error of the connection.
pub(super) fn handshake_error(error: ConnectionError) -> HandshakeError {
    if let ConnectionError::ConnectionClosed(close) = &error
        && let Some(refused) = alert(close.error_code).and_then(|a| refused_by_client(a.into()))
    {
        return refused;
    }
    let ConnectionError::TransportError(transport) = &error else {
        return HandshakeError::Quic(error.into());
    };
    let alert = alert(transport.code);
    if alert == Some(ALERT_NO_ALPN) {
        return HandshakeError::Alpn(ALPN_MQTT);
    }
    match alert.and_then(certificate_fault) {
        Some(fault) => HandshakeError::ClientCertificate {
            fault,
            why: LibraryError::Quic(error),
        },
        None => HandshakeError::Quic(error.into()),
    }
}

/// The TLS alert that ended a handshake, if one did.
fn alert(code: TransportErrorCode) -> Option<u8> {
    u8::try_from(u64::from(code).checked_sub(CRYPTO_ERROR)?).ok()
}

/// The fault of the client's certificate, if the alert says so: a server sends these alerts for
/// no other reason.
fn certificate_fault(alert: u8) -> Option<CertificateFault> {
    fault_of_alert(alert.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alerts_are_found_in_error_codes() {
        assert_eq!(alert(TransportErrorCode::crypto(0)), Some(0));
        assert_eq!(alert(TransportErrorCode::crypto(255)), Some(255));
        assert_eq!(alert(TransportErrorCode::PROTOCOL_VIOLATION), None);
        assert_eq!(certificate_fault(44), Some(CertificateFault::Revoked));
        assert_eq!(certificate_fault(ALERT_NO_ALPN), None);
    }
}
