//! SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK (MQTT 5 §3.8 to §3.11).

use crate::mqtt::head;
use crate::mqtt::props::{self, Properties, Property};
use crate::mqtt::read::Reader;
use crate::mqtt::write::{put_head, put_str, put_u16, str_len};
use crate::mqtt::{Error, QoS, Version, reason};
use crate::topics::{split_shared, valid_filter};

/// Subscription options (§3.8.3.1); in 3.x only the QoS.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Hash)]
pub struct SubscribeOptions {
    /// Highest QoS wanted.
    pub qos: QoS,
    /// Not one's own publishes ([MQTT-3.8.3-3]).
    pub no_local: bool,
    /// Keep RETAIN as it was published.
    pub retain_as_published: bool,
    /// 0: send retained; 1: only if the subscription is new; 2: none.
    pub retain_handling: u8,
}

impl SubscribeOptions {
    /// The options byte of MQTT 5.
    pub const fn to_u8(self) -> u8 {
        self.qos as u8
            | (self.no_local as u8) << 2
            | (self.retain_as_published as u8) << 3
            | (self.retain_handling & 3) << 4
    }

    fn read(byte: u8, version: Version) -> Result<SubscribeOptions, Error> {
        if version != Version::V5 && byte > 2 {
            return Err(Error::Malformed(
                "reserved bits or QoS 3 in SUBSCRIBE [MQTT-3.8.3-4]",
            ));
        }
        if byte & 0xC0 != 0 {
            return Err(Error::Malformed(
                "reserved subscription option bits [MQTT-3.8.3-5]",
            ));
        }
        let retain_handling = byte >> 4 & 3;
        if retain_handling == 3 {
            return Err(Error::Protocol("Retain Handling 3 (§3.8.3.1)"));
        }
        let qos = QoS::from_u8(byte & 3).ok_or(Error::Protocol("Maximum QoS 3 (§3.8.3.1)"))?;
        Ok(SubscribeOptions {
            qos,
            no_local: byte & 4 != 0,
            retain_as_published: byte & 8 != 0,
            retain_handling,
        })
    }
}

/// A SUBSCRIBE with at least one filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subscribe<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// Never 0.
    pub subscription_id: Option<u32>,
    /// All properties, validated.
    pub properties: Properties<'a>,
    filters: &'a [u8],
    version: Version,
}

impl<'a> Subscribe<'a> {
    pub(crate) fn read(body: &'a [u8], version: Version) -> Result<Subscribe<'a>, Error> {
        let mut r = Reader(body);
        let packet_id = r.packet_id()?;
        let mut subscription_id = None;
        let mut properties = Properties(&[]);
        if version == Version::V5 {
            properties = props::read(&mut r, props::ON_SUBSCRIBE, |p| {
                if let Property::SubscriptionIdentifier(id) = p {
                    subscription_id = Some(id);
                }
            })?;
        }
        let filters = r.0;
        if r.is_empty() {
            return Err(Error::Protocol("SUBSCRIBE without a filter [MQTT-3.8.3-2]"));
        }
        while !r.is_empty() {
            let (filter, options) = subscription(&mut r, version)?;
            check_filter(filter)?;
            // valid_filter has judged the group, so this is every shared subscription.
            if options.no_local && split_shared(filter).is_some() {
                return Err(Error::Protocol(
                    "No Local on a shared subscription [MQTT-3.8.3-4]",
                ));
            }
        }
        Ok(Subscribe {
            packet_id,
            subscription_id,
            properties,
            filters,
            version,
        })
    }

    /// Filters, valid as `$share` too, with their options, in order.
    pub fn filters(&self) -> impl Iterator<Item = (&'a str, SubscribeOptions)> + Clone + use<'a> {
        let (mut r, version) = (Reader(self.filters), self.version);
        std::iter::from_fn(move || subscription(&mut r, version).ok())
    }
}

/// An UNSUBSCRIBE with at least one filter.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsubscribe<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// User properties.
    pub properties: Properties<'a>,
    filters: &'a [u8],
}

impl<'a> Unsubscribe<'a> {
    pub(crate) fn read(body: &'a [u8], version: Version) -> Result<Unsubscribe<'a>, Error> {
        let mut r = Reader(body);
        let packet_id = r.packet_id()?;
        let mut properties = Properties(&[]);
        if version == Version::V5 {
            properties = props::read(&mut r, props::ON_UNSUBSCRIBE, |_| {})?;
        }
        let filters = r.0;
        if r.is_empty() {
            return Err(Error::Protocol(
                "UNSUBSCRIBE without a filter [MQTT-3.10.3-2]",
            ));
        }
        while !r.is_empty() {
            check_filter(r.string()?)?;
        }
        Ok(Unsubscribe {
            packet_id,
            properties,
            filters,
        })
    }

    /// Filters, valid as `$share` too, in order.
    pub fn filters(&self) -> impl Iterator<Item = &'a str> + Clone + use<'a> {
        let mut r = Reader(self.filters);
        std::iter::from_fn(move || r.string().ok())
    }
}

/// A SUBACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Suback<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// One listed code per filter, at least one.
    pub codes: &'a [u8],
    /// Reason string and user properties.
    pub properties: Properties<'a>,
}

impl<'a> Suback<'a> {
    pub(crate) fn read(body: &'a [u8], version: Version) -> Result<Suback<'a>, Error> {
        let listed = match version {
            Version::V5 => reason::SUBACK,
            _ => reason::SUBACK_V3,
        };
        let (packet_id, properties, codes) = answer(body, version)?;
        if codes.is_empty() {
            return Err(Error::Protocol("SUBACK without a code [MQTT-3.8.4-6]"));
        }
        if !codes.iter().all(|&code| listed.has(code)) {
            return Err(Error::Protocol("SUBACK code not listed [MQTT-3.9.3-2]"));
        }
        Ok(Suback {
            packet_id,
            codes,
            properties,
        })
    }
}

/// An UNSUBACK.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unsuback<'a> {
    /// Never 0.
    pub packet_id: u16,
    /// One listed code per filter; empty in 3.x.
    pub codes: &'a [u8],
    /// Reason string and user properties.
    pub properties: Properties<'a>,
}

impl<'a> Unsuback<'a> {
    pub(crate) fn read(body: &'a [u8], version: Version) -> Result<Unsuback<'a>, Error> {
        let (packet_id, properties, codes) = answer(body, version)?;
        if version != Version::V5 {
            if !codes.is_empty() {
                return Err(Error::Malformed("bytes after the last field"));
            }
        } else if codes.is_empty() {
            return Err(Error::Protocol("UNSUBACK without a code (§3.11.3)"));
        }
        if !codes.iter().all(|&code| reason::UNSUBACK.has(code)) {
            return Err(Error::Protocol("UNSUBACK code not listed [MQTT-3.11.3-2]"));
        }
        Ok(Unsuback {
            packet_id,
            codes,
            properties,
        })
    }
}

/// Appends a SUBACK, one code per filter. 3.x: every failure is 0x80 ([MQTT-3.9.3-2] of 3.1.1);
/// 3.1 has no failure code, so there the caller closes instead.
pub fn encode_suback(version: Version, packet_id: u16, codes: &[u8], out: &mut Vec<u8>) {
    let v5 = version == Version::V5;
    if put_head(head::SUBACK << 4, 2 + usize::from(v5) + codes.len(), out) {
        put_u16(packet_id, out);
        if v5 {
            out.push(0);
            out.extend_from_slice(codes);
        } else {
            out.extend(codes.iter().map(|&code| code.min(0x80)));
        }
    }
}

/// Appends an UNSUBACK, one code per filter; 3.x has none.
pub fn encode_unsuback(version: Version, packet_id: u16, codes: &[u8], out: &mut Vec<u8>) {
    let v5 = version == Version::V5;
    let len = if v5 { 3 + codes.len() } else { 2 };
    if put_head(head::UNSUBACK << 4, len, out) {
        put_u16(packet_id, out);
        if v5 {
            out.push(0);
            out.extend_from_slice(codes);
        }
    }
}

/// Appends a SUBSCRIBE; 3.x leaves out the identifier and all options but QoS. There must be at
/// least one filter ([MQTT-3.8.3-2]), all valid.
pub fn encode_subscribe<'f>(
    version: Version,
    packet_id: u16,
    subscription_id: Option<u32>,
    filters: impl Iterator<Item = (&'f str, SubscribeOptions)> + Clone,
    out: &mut Vec<u8>,
) {
    let v5 = version == Version::V5;
    let block = [subscription_id.map(Property::SubscriptionIdentifier)];
    let mut len = 2 + filters.clone().map(|(f, _)| str_len(f) + 1).sum::<usize>();
    if v5 {
        len += props::framed_len(props::block_len(&block));
    }
    if !put_head(head::SUBSCRIBE << 4 | 0b0010, len, out) {
        return;
    }
    put_u16(packet_id, out);
    if v5 {
        props::put_block(&block, out);
    }
    for (filter, options) in filters {
        put_str(filter, out);
        out.push(if v5 {
            options.to_u8()
        } else {
            options.qos as u8
        });
    }
}

/// Appends an UNSUBSCRIBE. There must be at least one filter ([MQTT-3.10.3-2]), all valid.
pub fn encode_unsubscribe<'f>(
    version: Version,
    packet_id: u16,
    filters: impl Iterator<Item = &'f str> + Clone,
    out: &mut Vec<u8>,
) {
    let v5 = version == Version::V5;
    let len = 2 + usize::from(v5) + filters.clone().map(str_len).sum::<usize>();
    if !put_head(head::UNSUBSCRIBE << 4 | 0b0010, len, out) {
        return;
    }
    put_u16(packet_id, out);
    if v5 {
        out.push(0);
    }
    filters.for_each(|filter| put_str(filter, out));
}

fn subscription<'a>(
    r: &mut Reader<'a>,
    version: Version,
) -> Result<(&'a str, SubscribeOptions), Error> {
    let filter = r.string()?;
    Ok((filter, SubscribeOptions::read(r.u8()?, version)?))
}

// `$share` is checked in MQTT 3 as well, because such a filter goes to a broker that speaks MQTT 5.
fn check_filter(filter: &str) -> Result<(), Error> {
    if valid_filter(filter) {
        Ok(())
    } else if filter.starts_with("$share/") {
        Err(Error::TopicFilter(
            "broken shared subscription [MQTT-4.8.2-1] [MQTT-4.8.2-2]",
        ))
    } else {
        Err(Error::TopicFilter(
            "empty, or a misplaced wildcard [MQTT-4.7.1-1] [MQTT-4.7.1-2]",
        ))
    }
}

// The common shape of SUBACK and UNSUBACK.
fn answer(body: &[u8], version: Version) -> Result<(u16, Properties<'_>, &[u8]), Error> {
    let mut r = Reader(body);
    let packet_id = r.packet_id()?;
    let mut properties = Properties(&[]);
    if version == Version::V5 {
        properties = props::read(&mut r, props::ON_ACK, |_| {})?;
    }
    Ok((packet_id, properties, r.rest()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const FULL: SubscribeOptions = SubscribeOptions {
        qos: QoS::ExactlyOnce,
        no_local: true,
        retain_as_published: true,
        retain_handling: 2,
    };

    #[test]
    fn subscribes() {
        let filters = [("a", FULL), ("b/#", SubscribeOptions::default())];
        let mut v5 = Vec::new();
        encode_subscribe(Version::V5, 1, Some(200), filters.into_iter(), &mut v5);
        assert_eq!(v5, b"\x82\x10\0\x01\x03\x0B\xC8\x01\0\x01a\x2E\0\x03b/#\0");
        let read = Subscribe::read(&v5[2..], Version::V5).expect("legal");
        assert_eq!((read.packet_id, read.subscription_id), (1, Some(200)));
        assert!(read.filters().eq(filters));

        let mut v3 = Vec::new();
        encode_subscribe(Version::V311, 1, Some(200), filters.into_iter(), &mut v3);
        assert_eq!(v3, b"\x82\x0C\0\x01\0\x01a\x02\0\x03b/#\0");
    }

    #[test]
    fn unsubscribes() {
        let mut out = Vec::new();
        encode_unsubscribe(Version::V5, 1, ["a", "b"].into_iter(), &mut out);
        encode_unsubscribe(Version::V31, 1, ["a"].into_iter(), &mut out);
        assert_eq!(out, b"\xA2\x09\0\x01\0\0\x01a\0\x01b\xA2\x05\0\x01\0\x01a");
        let read = Unsubscribe::read(&out[2..11], Version::V5).expect("legal");
        assert!(read.filters().eq(["a", "b"]));
    }

    #[test]
    fn answers() {
        let mut out = Vec::new();
        encode_suback(Version::V5, 1, &[0x02, 0x87], &mut out);
        encode_suback(Version::V311, 1, &[0x02, 0x87], &mut out);
        encode_unsuback(Version::V5, 1, &[0x11], &mut out);
        encode_unsuback(Version::V311, 1, &[0x11], &mut out);
        let wanted = [
            &b"\x90\x05\0\x01\0\x02\x87"[..],
            b"\x90\x04\0\x01\x02\x80",
            b"\xB0\x04\0\x01\0\x11",
            b"\xB0\x02\0\x01",
        ];
        assert_eq!(out, wanted.concat());
    }

    #[test]
    fn the_options_byte_goes_round() {
        for byte in 0..=u8::MAX {
            if let Ok(options) = SubscribeOptions::read(byte, Version::V5) {
                assert_eq!(options.to_u8(), byte);
            }
        }
    }
}
