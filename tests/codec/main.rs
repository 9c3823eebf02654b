//! The codec from outside: properties over any bytes, legal frames, spoiled frames, two independent
//! codecs, and a table of frames named by the statement that judges them.

mod differential;
mod frames;
mod oracles;
#[allow(
    unreachable_pub,
    reason = "the fuzz targets include these files and call their functions from outside"
)]
mod properties;
mod table;

use proptest::prelude::*;
use tidegate::mqtt::*;
use tidegate::topics::{covers, matches, overlaps, valid_filter, valid_topic_name};

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, failure_persistence: None, ..Default::default() })]

    /// Legal frames decode at once and byte by byte, and survive encoding and decoding.
    #[test]
    fn legal_frames_pass((version, receiver, frame) in frames::any_frame()) {
        let decoder = Decoder { version, receiver, max: u32::MAX };
        let got = decoder.next(&frame);
        prop_assert!(matches!(&got, Ok(Some((_, taken))) if *taken == frame.len()), "{:?}", got);
        properties::packets::stream(version, receiver, &frame);
        if frame[0] == 0x10 {
            properties::packets::first(&frame);
        }
    }

    /// Several packets in one buffer come out one by one.
    #[test]
    fn streams_pass(
        (version, receiver, all) in prop::sample::select(&properties::packets::DECODERS[..])
            .prop_flat_map(|(v, r)| (Just(v), Just(r), prop::collection::vec(frames::frame(v, r), 1..5))),
        cut in any::<prop::sample::Index>(),
    ) {
        let decoder = Decoder { version, receiver, max: u32::MAX };
        let bytes = all.concat();
        let mut rest = &bytes[..];
        for frame in &all {
            let (_, taken) = decoder.next(rest).expect("legal").expect("whole");
            prop_assert_eq!(taken, frame.len());
            rest = &rest[taken..];
        }
        prop_assert_eq!(decoder.next(rest), Ok(None));
        properties::packets::stream(version, receiver, &bytes[..cut.index(bytes.len())]);
    }

    /// Spoiled frames keep every property, whether they are accepted or refused.
    #[test]
    fn spoiled_frames_keep_every_property((version, receiver, frame) in frames::spoiled()) {
        properties::packets::stream(version, receiver, &frame);
        properties::packets::first(&frame);
    }

    /// Any bytes at all.
    #[test]
    fn any_bytes_keep_every_property(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        for (version, receiver) in properties::packets::DECODERS {
            properties::packets::stream(version, receiver, &bytes);
        }
        properties::packets::first(&bytes);
    }

    /// Bytes behind a plausible fixed header, so that decoding reaches the packet's body.
    #[test]
    fn any_bodies_keep_every_property(
        kind in 0..16u8,
        flags in prop_oneof![Just(0u8), Just(2), 0..16u8],
        body in prop::collection::vec(prop_oneof![3 => 0..6u8, 2 => any::<u8>()], 0..40),
    ) {
        let frame = frames::packet(kind << 4 | flags, body);
        for (version, receiver) in properties::packets::DECODERS {
            properties::packets::stream(version, receiver, &frame);
        }
        properties::packets::first(&frame);
    }

    #[test]
    fn topics_relate(a in frames::filter(), b in frames::filter(), topic in frames::topic()) {
        properties::topics::relations(&a, &b, &topic);
    }

    #[test]
    fn any_text_keeps_the_topic_properties(a in "[a/+#$]{0,8}|\\PC{0,9}", b in "[a/+#$]{0,8}", t in "[a/$]{0,6}") {
        properties::topics::relations(&a, &b, &t);
        properties::topics::relations(&b, &a, &format!("$share/{t}"));
    }
}

/// `overlaps` and `covers` are exact: every pair of small filters, against all names that could
/// distinguish them.
#[test]
fn relations_are_exact() {
    let words = |levels: &[&str], depth: usize| {
        let mut all: Vec<String> = levels.iter().map(|s| s.to_string()).collect();
        let mut last = all.clone();
        for _ in 1..depth {
            last = last
                .iter()
                .flat_map(|head| levels.iter().map(move |tail| format!("{head}/{tail}")))
                .collect();
            all.extend(last.iter().cloned());
        }
        all
    };
    let names: Vec<String> = words(&["", "a", "b", "$x", "z"], 4)
        .into_iter()
        .filter(|t| valid_topic_name(t))
        .collect();
    let filters: Vec<String> = words(&["", "a", "b", "$x", "+", "#"], 3)
        .into_iter()
        .filter(|f| valid_filter(f))
        .collect();
    let matched: Vec<Vec<bool>> = filters
        .iter()
        .map(|f| names.iter().map(|t| matches(f, t)).collect())
        .collect();
    for (a, in_a) in filters.iter().zip(&matched) {
        for (b, in_b) in filters.iter().zip(&matched) {
            let both = in_a.iter().zip(in_b).any(|(x, y)| *x && *y);
            assert_eq!(overlaps(a, b), both, "overlaps {a:?} {b:?}");
            let all = in_a.iter().zip(in_b).all(|(x, y)| *x || !*y);
            assert_eq!(covers(a, b), all, "covers {a:?} {b:?}");
        }
    }
}

/// Decoding allocates for CONNECT only, encoding only to grow its buffer, a message once.
#[test]
fn allocations_are_counted() {
    let count = |f: &mut dyn FnMut()| allocation_counter::measure(f).count_total;
    let publish = b"\x32\x11\x00\x03a/b\x00\x01\x05\x02\x00\x00\x00\x09hello";
    let decoder = Decoder {
        version: Version::V5,
        receiver: Receiver::Server,
        max: 1024,
    };
    let mut out = Vec::with_capacity(1024);
    let decoded = count(&mut || assert!(decoder.next(publish).is_ok()));
    assert_eq!(decoded, 0);
    let Ok(Some((Packet::Publish(p), _))) = decoder.next(publish) else {
        panic!("legal");
    };
    let spec = MessageSpec {
        topic: p.topic,
        properties: p.properties,
        payload: p.payload,
        qos: p.qos,
        retain: p.retain,
        expires_at: None,
        strip_key: None,
        account: None,
    };
    let mut message = None;
    assert_eq!(count(&mut || message = Some(Message::new(&spec))), 1);
    let message = message.expect("just made");
    let delivery = Delivery {
        version: Version::V5,
        dup: false,
        qos: QoS::AtLeastOnce,
        retain: false,
        packet_id: 7,
        alias: Alias::Define(3),
        message_expiry: Some(8),
        subscription_ids: &[1, 2],
        user_property: None,
        hidden: 0,
    };
    assert_eq!(count(&mut || delivery.encode(&message, &mut out)), 0);
    assert_eq!(
        count(&mut || drop(std::hint::black_box(message.clone()))),
        0
    );
    let connack = Connack {
        reason_string: Some("x"),
        ..Connack::default()
    };
    assert_eq!(count(&mut || connack.encode(Version::V5, &mut out)), 0);
}
