//! Legal frames, built by hand from the tables of the specification and not by the code under
//! test.

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::sample::{select, subsequence};
use tidegate::mqtt::{Receiver, Version};

/// Any legal frame that this receiver may get.
pub(crate) fn frame(version: Version, receiver: Receiver) -> BoxedStrategy<Vec<u8>> {
    let (both, v5) = (acks(version), version == Version::V5);
    let mut kinds = vec![publish(version, receiver), both];
    match receiver {
        Receiver::Server => {
            kinds.extend([connect(version), subscribe(version), unsubscribe(version)]);
            kinds.push(Just(vec![0xC0, 0]).boxed());
            kinds.push(disconnect(version, receiver));
        }
        Receiver::Client => {
            kinds.extend([connack(version), suback(version), unsuback(version)]);
            kinds.push(Just(vec![0xD0, 0]).boxed());
            if v5 {
                kinds.push(disconnect(version, receiver));
            }
        }
    }
    if v5 {
        kinds.push(auth(receiver));
    }
    proptest::strategy::Union::new(kinds).boxed()
}

/// One of the decoders with one of its legal frames.
pub(crate) fn any_frame() -> BoxedStrategy<(Version, Receiver, Vec<u8>)> {
    select(&crate::properties::packets::DECODERS[..])
        .prop_flat_map(|(v, r)| frame(v, r).prop_map(move |bytes| (v, r, bytes)))
        .boxed()
}

/// A legal frame, then spoiled: bytes changed, removed, inserted; the remaining length is mostly
/// corrected.
pub(crate) fn spoiled() -> BoxedStrategy<(Version, Receiver, Vec<u8>)> {
    let change = (any::<prop::sample::Index>(), 0..4u8, any::<u8>());
    (any_frame(), vec(change, 1..4), prop::bool::weighted(0.9))
        .prop_map(|((v, r, mut bytes), changes, mend)| {
            for (at, how, byte) in changes {
                let at = at.index(bytes.len());
                match how {
                    0 => bytes[at] ^= 1 << (byte & 7),
                    1 => bytes[at] = byte,
                    2 if bytes.len() > 2 => drop(bytes.remove(at)),
                    _ => bytes.insert(at, byte),
                }
            }
            if mend && let Some(body) = body(&bytes) {
                bytes = packet(bytes[0], body.to_vec());
            }
            (v, r, bytes)
        })
        .boxed()
}

// Everything after the apparent fixed header.
fn body(bytes: &[u8]) -> Option<&[u8]> {
    let len = bytes.get(1..)?.iter().take(4).position(|b| b & 0x80 == 0)? + 1;
    bytes.get(1 + len..)
}

/// First byte, remaining length, body.
pub(crate) fn packet(first: u8, body: Vec<u8>) -> Vec<u8> {
    let mut out = vec![first];
    out.extend(varint(body.len() as u32));
    out.extend(body);
    out
}

/// A string or binary data with its length.
pub(crate) fn field(data: impl AsRef<[u8]>) -> Vec<u8> {
    let data = data.as_ref();
    let mut out = (data.len() as u16).to_be_bytes().to_vec();
    out.extend_from_slice(data);
    out
}

pub(crate) fn varint(mut value: u32) -> Vec<u8> {
    let mut out = Vec::new();
    while value > 127 {
        out.push(value as u8 & 127 | 128);
        value /= 128;
    }
    out.push(value as u8);
    out
}

fn text() -> BoxedStrategy<String> {
    prop_oneof![
        "[a-zA-Z0-9 /+#$]{0,9}",
        "[^\\x00]{0,6}",
        Just("\u{FEFF}x".into())
    ]
    .boxed()
}

fn binary() -> BoxedStrategy<Vec<u8>> {
    vec(any::<u8>(), 0..12).boxed()
}

fn payload() -> BoxedStrategy<Vec<u8>> {
    prop_oneof![8 => binary(), 1 => vec(any::<u8>(), 100..300), 1 => vec(any::<u8>(), 5_000..5_100)]
        .boxed()
}

fn level() -> BoxedStrategy<String> {
    prop_oneof!["[a-z0-9 $é]{0,4}", "[^\\x00/+#]{0,3}"].boxed()
}

pub(crate) fn topic() -> BoxedStrategy<String> {
    vec(level(), 1..5)
        .prop_map(|levels| levels.join("/"))
        .prop_filter("at least one character", |topic| !topic.is_empty())
        .boxed()
}

pub(crate) fn filter() -> BoxedStrategy<String> {
    let level = prop_oneof![3 => level(), 1 => Just("+".to_string())];
    (vec(level, 0..4), any::<bool>())
        .prop_map(|(mut levels, hash)| {
            if hash {
                levels.push("#".into());
            }
            levels.join("/")
        })
        .prop_filter("plain and not empty", |f| {
            !f.is_empty() && !f.starts_with("$share/")
        })
        .boxed()
}

fn shared() -> BoxedStrategy<String> {
    ("[a-z0-9$]{1,5}", filter())
        .prop_map(|(group, f)| format!("$share/{group}/{f}"))
        .boxed()
}

fn packet_id() -> BoxedStrategy<[u8; 2]> {
    (1..=u16::MAX).prop_map(u16::to_be_bytes).boxed()
}

// One property with its identifier and a legal value (§2.2.2.2).
fn property(id: u8) -> BoxedStrategy<Vec<u8>> {
    let value = match id {
        0x01 | 0x17 | 0x19 | 0x24 | 0x25 | 0x28 | 0x29 | 0x2A => {
            (0..=1u8).prop_map(|v| vec![v]).boxed()
        }
        0x02 | 0x11 | 0x18 => any::<u32>().prop_map(|v| v.to_be_bytes().to_vec()).boxed(),
        0x27 => (1..=u32::MAX)
            .prop_map(|v| v.to_be_bytes().to_vec())
            .boxed(),
        0x13 | 0x22 => any::<u16>().prop_map(|v| v.to_be_bytes().to_vec()).boxed(),
        0x21 | 0x23 => (1..=u16::MAX)
            .prop_map(|v| v.to_be_bytes().to_vec())
            .boxed(),
        0x0B => prop_oneof![1..200u32, 1..=268_435_455u32]
            .prop_map(varint)
            .boxed(),
        0x08 => topic().prop_map(field).boxed(),
        0x09 | 0x16 => binary().prop_map(field).boxed(),
        0x26 => (text(), text())
            .prop_map(|(k, v)| [field(k), field(v)].concat())
            .boxed(),
        _ => text().prop_map(field).boxed(),
    };
    value.prop_map(move |v| [vec![id], v].concat()).boxed()
}

// Any of `once`, any number of `many`, in any order, preceded by the length.
fn properties(
    once: &'static [u8],
    many: &'static [u8],
    must: &'static [u8],
) -> BoxedStrategy<Vec<u8>> {
    (subsequence(once, 0..=once.len()), vec(select(many), 0..4))
        .prop_map(move |(mut ids, more)| {
            // Authentication Data is legal only together with Authentication Method.
            let method = if ids.contains(&0x16) {
                &[0x15][..]
            } else {
                &[]
            };
            for id in must.iter().chain(method) {
                if !ids.contains(id) {
                    ids.push(*id);
                }
            }
            ids.extend(more);
            ids
        })
        .prop_shuffle()
        .prop_flat_map(|ids| ids.into_iter().map(property).collect::<Vec<_>>())
        .prop_map(|all| all.concat())
        .prop_map(|all| [varint(all.len() as u32), all].concat())
        .boxed()
}

// MQTT 3.x has no property field.
fn properties_if(v5: bool, once: &'static [u8], many: &'static [u8]) -> BoxedStrategy<Vec<u8>> {
    if v5 {
        properties(once, many, &[])
    } else {
        Just(Vec::new()).boxed()
    }
}

const USER: &[u8] = &[0x26];

pub(crate) fn publish(version: Version, receiver: Receiver) -> BoxedStrategy<Vec<u8>> {
    let v5 = version == Version::V5;
    let many: &[u8] = if receiver == Receiver::Client {
        &[0x26, 0x0B]
    } else {
        USER
    };
    let head = (0..3u8, any::<bool>(), any::<bool>(), packet_id());
    let properties = properties_if(v5, &[0x01, 0x02, 0x03, 0x08, 0x09, 0x23], many);
    (head, topic(), properties, payload())
        .prop_map(|((qos, dup, retain, id), topic, properties, payload)| {
            let first = 0x30 | u8::from(dup && qos > 0) << 3 | qos << 1 | u8::from(retain);
            let id = if qos > 0 { &id[..] } else { &[] };
            packet(first, [&field(topic), id, &properties, &payload].concat())
        })
        .boxed()
}

pub(crate) fn connect(version: Version) -> BoxedStrategy<Vec<u8>> {
    let v5 = version == Version::V5;
    let own = properties_if(v5, &[0x11, 0x15, 0x16, 0x17, 0x19, 0x21, 0x22, 0x27], USER);
    let will_properties = properties_if(v5, &[0x01, 0x02, 0x03, 0x08, 0x09, 0x18], USER);
    let will = prop::option::of((0..3u8, any::<bool>(), will_properties, topic(), payload()));
    let login = (prop::option::of(text()), prop::option::of(binary()));
    ((any::<bool>(), any::<u16>()), own, text(), will, login)
        .prop_map(move |((clean, alive), own, id, will, (user, password))| {
            let password = password.filter(|_| v5 || user.is_some());
            let mut flags = u8::from(clean) << 1;
            flags |= u8::from(user.is_some()) << 7 | u8::from(password.is_some()) << 6;
            let mut tail = field(id);
            if let Some((qos, retain, properties, topic, payload)) = will {
                flags |= 4 | qos << 3 | u8::from(retain) << 5;
                tail.extend([properties, field(topic), field(payload)].concat());
            }
            tail.extend(user.map(field).unwrap_or_default());
            tail.extend(password.map(field).unwrap_or_default());
            let name = if version == Version::V31 {
                "MQIsdp"
            } else {
                "MQTT"
            };
            let head = [version as u8, flags];
            packet(
                0x10,
                [&field(name), &head[..], &alive.to_be_bytes(), &own, &tail].concat(),
            )
        })
        .boxed()
}

fn connack(version: Version) -> BoxedStrategy<Vec<u8>> {
    let v5 = version == Version::V5;
    let codes: &[u8] = match version {
        Version::V5 => &[
            0x00, 0x00, 0x80, 0x81, 0x82, 0x83, 0x84, 0x85, 0x86, 0x87, 0x88, 0x89, 0x8A, 0x8C,
            0x90, 0x95, 0x97, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9F,
        ],
        _ => &[0, 0, 1, 2, 3, 4, 5],
    };
    let own = properties_if(
        v5,
        &[
            0x11, 0x12, 0x13, 0x15, 0x16, 0x1A, 0x1C, 0x1F, 0x21, 0x22, 0x24, 0x25, 0x27, 0x28,
            0x29, 0x2A,
        ],
        USER,
    );
    (any::<bool>(), select(codes), own)
        .prop_map(move |(present, code, own)| {
            let present = u8::from(present && code == 0 && version != Version::V31);
            packet(0x20, [&[present, code][..], &own].concat())
        })
        .boxed()
}

fn acks(version: Version) -> BoxedStrategy<Vec<u8>> {
    let ack = |first: u8, codes: &'static [u8]| {
        (
            packet_id(),
            select(codes),
            properties(&[0x1F], USER, &[]),
            0..3u8,
        )
            .prop_map(move |(id, code, own, form)| {
                let body = match form {
                    _ if version != Version::V5 => id.to_vec(),
                    0 => id.to_vec(),
                    1 => [&id[..], &[code]].concat(),
                    _ => [&id[..], &[code], &own].concat(),
                };
                packet(first, body)
            })
    };
    const TAKEN: &[u8] = &[0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99];
    const RELEASED: &[u8] = &[0x00, 0x92];
    prop_oneof![
        ack(0x40, TAKEN),
        ack(0x50, TAKEN),
        ack(0x62, RELEASED),
        ack(0x70, RELEASED)
    ]
    .boxed()
}

pub(crate) fn subscribe(version: Version) -> BoxedStrategy<Vec<u8>> {
    let v5 = version == Version::V5;
    let options = (0..3u8, 0..4u8, 0..3u8).prop_map(move |(qos, flags, handling)| {
        if v5 {
            qos | flags << 2 | handling << 4
        } else {
            qos
        }
    });
    let entry =
        (filter(), options.clone()).prop_map(|(f, options)| [field(f), vec![options]].concat());
    // No Local is illegal on shared subscriptions.
    let shared =
        (shared(), options).prop_map(|(f, options)| [field(f), vec![options & !4]].concat());
    let entries = vec(prop_oneof![3 => entry, 1 => shared], 1..5);
    (packet_id(), properties_if(v5, &[0x0B], USER), entries)
        .prop_map(|(id, own, entries)| packet(0x82, [&id[..], &own, &entries.concat()].concat()))
        .boxed()
}

fn unsubscribe(version: Version) -> BoxedStrategy<Vec<u8>> {
    let own = properties_if(version == Version::V5, &[], USER);
    let filters = vec(
        prop_oneof![3 => filter(), 1 => shared()].prop_map(field),
        1..5,
    );
    (packet_id(), own, filters)
        .prop_map(|(id, own, filters)| packet(0xA2, [&id[..], &own, &filters.concat()].concat()))
        .boxed()
}

fn suback(version: Version) -> BoxedStrategy<Vec<u8>> {
    let v5 = version == Version::V5;
    let codes: &[u8] = if v5 {
        &[
            0, 1, 2, 0x80, 0x83, 0x87, 0x8F, 0x91, 0x97, 0x9E, 0xA1, 0xA2,
        ]
    } else {
        &[0, 1, 2, 0x80]
    };
    (
        packet_id(),
        properties_if(v5, &[0x1F], USER),
        vec(select(codes), 1..6),
    )
        .prop_map(|(id, own, codes)| packet(0x90, [&id[..], &own, &codes].concat()))
        .boxed()
}

fn unsuback(version: Version) -> BoxedStrategy<Vec<u8>> {
    let v5 = version == Version::V5;
    let codes = vec(
        select(&[0x00, 0x11, 0x80, 0x83, 0x87, 0x8F, 0x91][..]),
        1..6,
    );
    (packet_id(), properties_if(v5, &[0x1F], USER), codes)
        .prop_map(move |(id, own, codes)| {
            let codes = if v5 { codes } else { Vec::new() };
            packet(0xB0, [&id[..], &own, &codes].concat())
        })
        .boxed()
}

fn disconnect(version: Version, receiver: Receiver) -> BoxedStrategy<Vec<u8>> {
    let (codes, own): (&[u8], &[u8]) = match receiver {
        Receiver::Server => (
            &[
                0x00, 0x04, 0x80, 0x81, 0x82, 0x83, 0x90, 0x93, 0x94, 0x95, 0x96, 0x97, 0x98, 0x99,
            ],
            &[0x11, 0x1F],
        ),
        Receiver::Client => (
            &[
                0x00, 0x80, 0x81, 0x82, 0x83, 0x87, 0x89, 0x8B, 0x8D, 0x8E, 0x8F, 0x90, 0x93, 0x94,
                0x95, 0x96, 0x97, 0x98, 0x99, 0x9A, 0x9B, 0x9C, 0x9D, 0x9E, 0x9F, 0xA0, 0xA1, 0xA2,
            ],
            &[0x1C, 0x1F],
        ),
    };
    (select(codes), properties(own, USER, &[]), 0..3u8)
        .prop_map(move |(code, own, form)| match form {
            _ if version != Version::V5 => vec![0xE0, 0],
            0 => vec![0xE0, 0],
            1 => vec![0xE0, 1, code],
            _ => packet(0xE0, [&[code][..], &own].concat()),
        })
        .boxed()
}

fn auth(receiver: Receiver) -> BoxedStrategy<Vec<u8>> {
    let codes: &[u8] = match receiver {
        Receiver::Server => &[0x18, 0x19],
        Receiver::Client => &[0x00, 0x18],
    };
    (
        select(codes),
        properties(&[0x16, 0x1F], USER, &[0x15]),
        prop::bool::weighted(0.1),
    )
        .prop_map(|(code, own, short)| match (short, code) {
            (true, 0) => vec![0xF0, 0],
            _ => packet(0xF0, [&[code][..], &own].concat()),
        })
        .boxed()
}
