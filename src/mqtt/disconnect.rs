//! DISCONNECT and AUTH (MQTT 5 §3.14, §3.15).

use crate::mqtt::head;
use crate::mqtt::props::{self, Properties, Property};
use crate::mqtt::read::Reader;
use crate::mqtt::write::put_head;
use crate::mqtt::{Error, ReasonCode, Receiver, Version, reason};

/// A DISCONNECT.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Disconnect<'a> {
    /// A code that the sender may use; 0x00 in 3.x.
    pub reason: ReasonCode,
    /// Seconds; from a client only ([MQTT-3.14.2-2]).
    pub session_expiry: Option<u32>,
    /// For people and logs.
    pub reason_string: Option<&'a str>,
    /// Another server to use.
    pub server_reference: Option<&'a str>,
    /// All properties, validated.
    pub properties: Properties<'a>,
}

impl<'a> Disconnect<'a> {
    pub(crate) fn read(
        body: &'a [u8],
        version: Version,
        receiver: Receiver,
    ) -> Result<Disconnect<'a>, Error> {
        let mut r = Reader(body);
        let mut disconnect = Disconnect::default();
        if version == Version::V5 && !r.is_empty() {
            let (listed, allowed) = match receiver {
                Receiver::Server => (reason::DISCONNECT_BY_CLIENT, props::ON_DISCONNECT_BY_CLIENT),
                Receiver::Client => (reason::DISCONNECT_BY_SERVER, props::ON_DISCONNECT_BY_SERVER),
            };
            disconnect.reason = ReasonCode(r.u8()?);
            if !listed.has(disconnect.reason.0) {
                return Err(Error::Protocol(
                    "DISCONNECT reason code not listed for its sender [MQTT-3.14.2-1]",
                ));
            }
            // §3.14.2.2.1: a remaining length below 2 leaves out the property length.
            if !r.is_empty() {
                disconnect.properties = props::read(&mut r, allowed, |p| match p {
                    Property::SessionExpiryInterval(s) => disconnect.session_expiry = Some(s),
                    Property::ReasonString(s) => disconnect.reason_string = Some(s),
                    Property::ServerReference(s) => disconnect.server_reference = Some(s),
                    _ => {}
                })?;
            }
        }
        r.end()?;
        Ok(disconnect)
    }
}

/// An AUTH.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Auth<'a> {
    /// A code that the sender may use.
    pub reason: ReasonCode,
    /// None only in the two byte form of success.
    pub method: Option<&'a str>,
    /// Defined by the method.
    pub data: Option<&'a [u8]>,
    /// For people and logs.
    pub reason_string: Option<&'a str>,
    /// All properties, validated.
    pub properties: Properties<'a>,
}

impl<'a> Auth<'a> {
    pub(crate) fn read(body: &'a [u8], receiver: Receiver) -> Result<Auth<'a>, Error> {
        let mut r = Reader(body);
        let mut auth = Auth::default();
        let short = r.is_empty();
        if !short {
            auth.reason = ReasonCode(r.u8()?);
        }
        let listed = match receiver {
            Receiver::Server => reason::AUTH_BY_CLIENT,
            Receiver::Client => reason::AUTH_BY_SERVER,
        };
        if !listed.has(auth.reason.0) {
            return Err(Error::Protocol(
                "AUTH reason code not listed for its sender [MQTT-3.15.2-1]",
            ));
        }
        // §3.15.2.1: success without properties is the one form that may leave out the rest.
        if short {
            return Ok(auth);
        }
        auth.properties = props::read(&mut r, props::ON_AUTH, |p| match p {
            Property::AuthenticationMethod(s) => auth.method = Some(s),
            Property::AuthenticationData(b) => auth.data = Some(b),
            Property::ReasonString(s) => auth.reason_string = Some(s),
            _ => {}
        })?;
        if auth.method.is_none() {
            return Err(Error::Protocol("AUTH without a method (§3.15.2.2.2)"));
        }
        r.end()?;
        Ok(auth)
    }
}

/// Appends a DISCONNECT: `E0 00` in MQTT 3, and in MQTT 5 where no field has to be written.
pub fn encode_disconnect(
    version: Version,
    reason: ReasonCode,
    session_expiry: Option<u32>,
    reason_string: Option<&str>,
    out: &mut Vec<u8>,
) {
    let block = [
        session_expiry.map(Property::SessionExpiryInterval),
        reason_string.map(Property::ReasonString),
    ];
    let bare = block.iter().all(Option::is_none);
    if version != Version::V5 || (bare && reason == ReasonCode::NORMAL_DISCONNECTION) {
        out.extend_from_slice(&[head::DISCONNECT << 4, 0]);
    } else if bare {
        out.extend_from_slice(&[head::DISCONNECT << 4, 1, reason.0]);
    } else {
        let len = 1 + props::framed_len(props::block_len(&block));
        if put_head(head::DISCONNECT << 4, len, out) {
            out.push(reason.0);
            props::put_block(&block, out);
        }
    }
}

/// Appends an AUTH (MQTT 5 only); every AUTH but the bare success names its method.
pub fn encode_auth(
    reason: ReasonCode,
    method: Option<&str>,
    data: Option<&[u8]>,
    out: &mut Vec<u8>,
) {
    if reason == ReasonCode::SUCCESS && method.is_none() && data.is_none() {
        out.extend_from_slice(&[head::AUTH << 4, 0]);
        return;
    }
    let block = [
        method.map(Property::AuthenticationMethod),
        data.map(Property::AuthenticationData),
    ];
    let len = 1 + props::framed_len(props::block_len(&block));
    if put_head(head::AUTH << 4, len, out) {
        out.push(reason.0);
        props::put_block(&block, out);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shortest_form_is_written() {
        let bytes = |version, reason, expiry, text| {
            let mut out = Vec::new();
            encode_disconnect(version, reason, expiry, text, &mut out);
            out
        };
        let (ok, taken) = (
            ReasonCode::NORMAL_DISCONNECTION,
            ReasonCode::SESSION_TAKEN_OVER,
        );
        assert_eq!(bytes(Version::V5, ok, None, None), [0xE0, 0]);
        assert_eq!(bytes(Version::V5, taken, None, None), [0xE0, 1, 0x8E]);
        assert_eq!(bytes(Version::V311, taken, Some(1), Some("x")), [0xE0, 0]);
        assert_eq!(
            bytes(Version::V5, ok, Some(1), None),
            [0xE0, 7, 0, 5, 0x11, 0, 0, 0, 1]
        );
        assert_eq!(
            bytes(Version::V5, taken, None, Some("x")),
            [0xE0, 6, 0x8E, 4, 0x1F, 0, 1, b'x']
        );
    }

    #[test]
    fn auth_goes_round() {
        let mut out = Vec::new();
        let go_on = ReasonCode::CONTINUE_AUTHENTICATION;
        encode_auth(go_on, Some("m"), Some(&[1]), &mut out);
        assert_eq!(out, [0xF0, 10, 0x18, 8, 0x15, 0, 1, b'm', 0x16, 0, 1, 1]);
        let auth = Auth::read(&out[2..], Receiver::Server).expect("legal");
        assert_eq!(
            (auth.reason, auth.method, auth.data),
            (go_on, Some("m"), Some(&[1][..]))
        );
        out.clear();
        encode_auth(ReasonCode::SUCCESS, None, None, &mut out);
        assert_eq!(out, [0xF0, 0]);
    }

    #[test]
    fn a_server_reference_is_read() {
        let body = [0x9C, 4, 0x1C, 0, 1, b's'];
        let moved = Disconnect::read(&body, Version::V5, Receiver::Client).expect("legal");
        assert_eq!(moved.server_reference, Some("s"));
    }
}
