//! CONNACK (MQTT 5 §3.2).

use crate::mqtt::head;
use crate::mqtt::props::{self, Properties, Property};
use crate::mqtt::read::Reader;
use crate::mqtt::write::put_head;
use crate::mqtt::{Error, QoS, ReasonCode, Version, reason};

/// A CONNACK. Absent properties mean what the specification says, not zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Connack<'a> {
    /// The server has the session; false whenever `reason` is an error ([MQTT-3.2.2-6]).
    pub session_present: bool,
    /// 3.x return codes are mapped.
    pub reason: ReasonCode,
    /// Seconds; None: the client's value holds.
    pub session_expiry: Option<u32>,
    /// Never 0; None is 65,535.
    pub receive_maximum: Option<u16>,
    /// None: QoS 2.
    pub maximum_qos: Option<QoS>,
    /// None: yes.
    pub retain_available: Option<bool>,
    /// Bytes, never 0; None: no limit.
    pub maximum_packet_size: Option<u32>,
    /// Client identifier that the server chose ([MQTT-3.1.3-7]).
    pub assigned_client_id: Option<&'a str>,
    /// None is 0.
    pub topic_alias_maximum: Option<u16>,
    /// For people and logs.
    pub reason_string: Option<&'a str>,
    /// None: yes.
    pub wildcard_subscription_available: Option<bool>,
    /// None: yes.
    pub subscription_ids_available: Option<bool>,
    /// None: yes.
    pub shared_subscription_available: Option<bool>,
    /// Seconds; overrides the client's keep alive ([MQTT-3.2.2-21]).
    pub server_keep_alive: Option<u16>,
    /// Basis for response topics.
    pub response_information: Option<&'a str>,
    /// Another server to use.
    pub server_reference: Option<&'a str>,
    /// Method of extended authentication.
    pub authentication_method: Option<&'a str>,
    /// Defined by the method.
    pub authentication_data: Option<&'a [u8]>,
    /// All properties, validated. `encode` ignores them.
    pub properties: Properties<'a>,
}

impl<'a> Connack<'a> {
    pub(crate) fn read(body: &'a [u8], version: Version) -> Result<Connack<'a>, Error> {
        let mut r = Reader(body);
        let flags = r.u8()?;
        if flags & 0xFE != 0 || (version == Version::V31 && flags != 0) {
            return Err(Error::Malformed("reserved CONNACK flags [MQTT-3.2.2-1]"));
        }
        let code = r.u8()?;
        let mut connack = Connack {
            session_present: flags == 1,
            ..Connack::default()
        };
        if version == Version::V5 && body == [0, 1] {
            // A server without MQTT 5 answers in its own form ([MQTT-3.1.2-2] of 3.1.1).
            connack.reason = ReasonCode::UNSUPPORTED_PROTOCOL_VERSION;
            return Ok(connack);
        }
        if version == Version::V5 {
            if !reason::CONNACK.has(code) {
                return Err(Error::Protocol(
                    "CONNACK reason code not listed [MQTT-3.2.2-8]",
                ));
            }
            connack.reason = ReasonCode(code);
            connack.read_properties(&mut r)?;
        } else {
            connack.reason = ReasonCode::from_connack_v3(code).ok_or(Error::Malformed(
                "CONNACK return code is reserved (§3.2.2.3)",
            ))?;
        }
        if connack.session_present && connack.reason != ReasonCode::SUCCESS {
            return Err(Error::Protocol(
                "Session Present in a refusal [MQTT-3.2.2-6]",
            ));
        }
        r.end()?;
        Ok(connack)
    }

    fn read_properties(&mut self, r: &mut Reader<'a>) -> Result<(), Error> {
        use Property as P;
        self.properties = props::read(r, props::ON_CONNACK, |p| match p {
            P::SessionExpiryInterval(v) => self.session_expiry = Some(v),
            P::ReceiveMaximum(v) => self.receive_maximum = Some(v),
            P::MaximumQoS(v) => self.maximum_qos = Some(props::maximum_qos(v)),
            P::RetainAvailable(v) => self.retain_available = Some(v == 1),
            P::MaximumPacketSize(v) => self.maximum_packet_size = Some(v),
            P::AssignedClientIdentifier(v) => self.assigned_client_id = Some(v),
            P::TopicAliasMaximum(v) => self.topic_alias_maximum = Some(v),
            P::ReasonString(v) => self.reason_string = Some(v),
            P::WildcardSubscriptionAvailable(v) => {
                self.wildcard_subscription_available = Some(v == 1);
            }
            P::SubscriptionIdentifierAvailable(v) => self.subscription_ids_available = Some(v == 1),
            P::SharedSubscriptionAvailable(v) => self.shared_subscription_available = Some(v == 1),
            P::ServerKeepAlive(v) => self.server_keep_alive = Some(v),
            P::ResponseInformation(v) => self.response_information = Some(v),
            P::ServerReference(v) => self.server_reference = Some(v),
            P::AuthenticationMethod(v) => self.authentication_method = Some(v),
            P::AuthenticationData(v) => self.authentication_data = Some(v),
            _ => {}
        })?;
        // [MQTT-4.12.0-5]: an accepting CONNACK that has the data must name the method.
        let accepted = self.reason == ReasonCode::SUCCESS;
        if accepted && self.authentication_data.is_some() && self.authentication_method.is_none() {
            return Err(Error::Protocol(
                "Authentication Data without a method [MQTT-4.12.0-5]",
            ));
        }
        Ok(())
    }

    /// Appends the packet. 3.x gets flags and the mapped return code only, 3.1 no flags; a
    /// refusal never says Session Present ([MQTT-3.2.2-6]).
    pub fn encode(&self, version: Version, out: &mut Vec<u8>) {
        let refused = self.reason != ReasonCode::SUCCESS;
        let present = u8::from(self.session_present && !refused && version != Version::V31);
        if version != Version::V5 {
            out.extend_from_slice(&[0x20, 2, present, self.reason.connack_v3()]);
            return;
        }
        let block = self.block();
        let len = 2 + props::framed_len(props::block_len(&block));
        if put_head(head::CONNACK << 4, len, out) {
            out.extend_from_slice(&[present, self.reason.0]);
            props::put_block(&block, out);
        }
    }

    /// Bytes that `encode` appends.
    pub fn size(&self, version: Version) -> usize {
        match version {
            Version::V5 => {
                let len = 2 + props::framed_len(props::block_len(&self.block()));
                1 + head::varint_len(len) + len
            }
            _ => 4,
        }
    }

    fn block(&self) -> [Option<Property<'a>>; 16] {
        use Property as P;
        let qos = self.maximum_qos.filter(|&qos| qos != QoS::ExactlyOnce);
        [
            self.session_expiry.map(P::SessionExpiryInterval),
            self.receive_maximum.map(P::ReceiveMaximum),
            qos.map(|qos| P::MaximumQoS(qos as u8)),
            self.retain_available.map(|v| P::RetainAvailable(v.into())),
            self.maximum_packet_size.map(P::MaximumPacketSize),
            self.assigned_client_id.map(P::AssignedClientIdentifier),
            self.topic_alias_maximum.map(P::TopicAliasMaximum),
            self.reason_string.map(P::ReasonString),
            self.wildcard_subscription_available
                .map(|v| P::WildcardSubscriptionAvailable(v.into())),
            self.subscription_ids_available
                .map(|v| P::SubscriptionIdentifierAvailable(v.into())),
            self.shared_subscription_available
                .map(|v| P::SharedSubscriptionAvailable(v.into())),
            self.server_keep_alive.map(P::ServerKeepAlive),
            self.response_information.map(P::ResponseInformation),
            self.server_reference.map(P::ServerReference),
            self.authentication_method.map(P::AuthenticationMethod),
            self.authentication_data.map(P::AuthenticationData),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(connack: &Connack<'_>, version: Version) -> Vec<u8> {
        let mut out = Vec::new();
        connack.encode(version, &mut out);
        assert_eq!(out.len(), connack.size(version));
        out
    }

    #[test]
    fn each_version_has_its_form() {
        let resumed = Connack {
            session_present: true,
            ..Connack::default()
        };
        assert_eq!(bytes(&resumed, Version::V5), [0x20, 3, 1, 0, 0]);
        assert_eq!(bytes(&resumed, Version::V311), [0x20, 2, 1, 0]);
        // 3.1 knows no Session Present.
        assert_eq!(bytes(&resumed, Version::V31), [0x20, 2, 0, 0]);
    }

    #[test]
    fn a_refusal_has_no_session() {
        let refused = Connack {
            session_present: true,
            reason: ReasonCode::NOT_AUTHORIZED,
            ..Connack::default()
        };
        assert_eq!(bytes(&refused, Version::V5), [0x20, 3, 0, 0x87, 0]);
        assert_eq!(bytes(&refused, Version::V311), [0x20, 2, 0, 5]);
    }

    #[test]
    fn every_field_goes_round() {
        let all = Connack {
            session_present: true,
            session_expiry: Some(0),
            receive_maximum: Some(1),
            maximum_qos: Some(QoS::AtLeastOnce),
            retain_available: Some(false),
            maximum_packet_size: Some(2),
            assigned_client_id: Some("id"),
            topic_alias_maximum: Some(0),
            reason_string: Some(""),
            wildcard_subscription_available: Some(false),
            subscription_ids_available: Some(true),
            shared_subscription_available: Some(false),
            server_keep_alive: Some(0),
            response_information: Some("r"),
            server_reference: Some("s"),
            authentication_method: Some("m"),
            authentication_data: Some(&[0, 255]),
            ..Connack::default()
        };
        let bytes = bytes(&all, Version::V5);
        let read = Connack::read(&bytes[2..], Version::V5).expect("legal");
        assert_eq!(
            Connack {
                properties: Properties(&[]),
                ..read
            },
            all
        );
    }

    #[test]
    fn a_server_without_mqtt_5_is_understood() {
        let got = Connack::read(&[0, 1], Version::V5).expect("legal");
        assert_eq!(got.reason, ReasonCode::UNSUPPORTED_PROTOCOL_VERSION);
    }

    #[test]
    fn qos_2_is_the_absence_of_a_maximum() {
        let all = Connack {
            maximum_qos: Some(QoS::ExactlyOnce),
            ..Connack::default()
        };
        assert_eq!(bytes(&all, Version::V5), [0x20, 3, 0, 0, 0]);
    }
}
