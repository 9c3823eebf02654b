//! Two independent codecs that judge a frame.

use bytes::BytesMut;
use mqtt_protocol_core::mqtt;
use tidegate::mqtt::{Receiver, Version};
use tokio_util::codec::{Decoder, Encoder};

/// An oracle's judgement of a frame.
#[derive(Debug)]
pub(crate) enum Opinion {
    Refused,
    /// The packet, written again by the oracle.
    Taken(Vec<u8>),
    /// The oracle does not speak the version.
    None,
}

impl Opinion {
    pub(crate) fn refused(&self) -> bool {
        matches!(self, Opinion::Refused)
    }
}

/// rmqtt-codec; the codec does not know in which role it decodes.
pub(crate) fn rmqtt(version: Version, frame: &[u8]) -> Opinion {
    let mut bytes = BytesMut::from(frame);
    let mut out = BytesMut::new();
    if version == Version::V5 {
        let mut codec = rmqtt_codec::v5::Codec::default();
        let Ok(Some((packet, _))) = codec.decode(&mut bytes) else {
            return Opinion::Refused;
        };
        // Encode with a new codec: after decoding a CONNECT, the codec leaves properties out.
        let mut writer = rmqtt_codec::v5::Codec::default();
        writer
            .encode(packet, &mut out)
            .expect("a packet that it decoded can be encoded");
    } else {
        let mut codec = rmqtt_codec::v3::Codec::default();
        let Ok(Some((packet, _))) = codec.decode(&mut bytes) else {
            return Opinion::Refused;
        };
        codec
            .encode(packet, &mut out)
            .expect("a packet that it decoded can be encoded");
        if version == Version::V31 && out[0] == 0x10 {
            // The codec reads `MQIsdp` 3 but writes `MQIsdp` 4, which no specification knows.
            let level = out
                .windows(7)
                .position(|w| w == b"MQIsdp\x04")
                .expect("its CONNECT has this name")
                + 6;
            out[level] = 3;
        }
    }
    Opinion::Taken(out.to_vec())
}

/// mqtt-protocol-core: its parsers without the state of a connection.
pub(crate) fn protocol_core(version: Version, frame: &[u8]) -> Opinion {
    if version == Version::V31 {
        return Opinion::None;
    }
    let Some((first, body)) = open(frame) else {
        return Opinion::Refused;
    };
    macro_rules! parse {
        ($packet:ty) => {
            match <$packet>::parse(body) {
                Ok((packet, used)) if used == body.len() => {
                    Opinion::Taken(packet.to_continuous_buffer())
                }
                _ => Opinion::Refused,
            }
        };
    }
    macro_rules! publish {
        ($packet:ty) => {
            match <$packet>::parse(first & 15, mqtt::Arc::from(body)) {
                Ok((packet, _)) => Opinion::Taken(packet.to_continuous_buffer()),
                Err(_) => Opinion::Refused,
            }
        };
    }
    use mqtt::packet::{v3_1_1 as v3, v5_0 as v5};
    match (version == Version::V5, first >> 4) {
        (false, 1) => parse!(v3::Connect),
        (false, 2) => parse!(v3::Connack),
        (false, 3) => publish!(v3::Publish),
        (false, 4) => parse!(v3::Puback),
        (false, 5) => parse!(v3::Pubrec),
        (false, 6) => parse!(v3::Pubrel),
        (false, 7) => parse!(v3::Pubcomp),
        (false, 8) => parse!(v3::Subscribe),
        (false, 9) => parse!(v3::Suback),
        (false, 10) => parse!(v3::Unsubscribe),
        (false, 11) => parse!(v3::Unsuback),
        (false, 12) => parse!(v3::Pingreq),
        (false, 13) => parse!(v3::Pingresp),
        (false, 14) => parse!(v3::Disconnect),
        (true, 1) => parse!(v5::Connect),
        (true, 2) => parse!(v5::Connack),
        (true, 3) => publish!(v5::Publish),
        (true, 4) => parse!(v5::Puback),
        (true, 5) => parse!(v5::Pubrec),
        (true, 6) => parse!(v5::Pubrel),
        (true, 7) => parse!(v5::Pubcomp),
        (true, 8) => parse!(v5::Subscribe),
        (true, 9) => parse!(v5::Suback),
        (true, 10) => parse!(v5::Unsubscribe),
        (true, 11) => parse!(v5::Unsuback),
        (true, 12) => parse!(v5::Pingreq),
        (true, 13) => parse!(v5::Pingresp),
        (true, 14) => parse!(v5::Disconnect),
        (true, 15) => parse!(v5::Auth),
        _ => Opinion::Refused,
    }
}

/// Whether the receiver's peer may send this packet; neither oracle judges that at this level.
pub(crate) fn for_role(receiver: Receiver, first: u8) -> bool {
    match first >> 4 {
        1 | 8 | 10 | 12 => receiver == Receiver::Server,
        2 | 9 | 11 | 13 => receiver == Receiver::Client,
        _ => true,
    }
}

// Cuts the body out for the parsers; a frame that is not exactly one packet has none.
fn open(frame: &[u8]) -> Option<(u8, &[u8])> {
    let (&first, rest) = frame.split_first()?;
    let mut len = 0usize;
    for (i, byte) in rest.iter().take(4).enumerate() {
        len |= usize::from(byte & 127) << (7 * i);
        if byte & 128 == 0 {
            let body = &rest[i + 1..];
            return (body.len() == len).then_some((first, body));
        }
    }
    None
}
