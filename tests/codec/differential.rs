//! Comparison with two independent codecs. Where they differ from ours, the specification decides,
//! and each such case names its statement.

use crate::frames;
use crate::oracles::{Opinion, for_role, protocol_core, rmqtt};
use crate::properties::packets;
use proptest::prelude::*;
use tidegate::mqtt::*;

proptest! {
    #![proptest_config(ProptestConfig { cases: 1024, failure_persistence: None, ..Default::default() })]

    /// Both oracles read the frames that we write as we meant them.
    #[test]
    fn both_oracles_read_our_frames_alike((version, receiver, frame) in frames::any_frame()) {
        let decoder = Decoder { version, receiver, max: u32::MAX };
        let (packet, _) = decoder.next(&frame).expect("legal").expect("whole");
        let written = packets::encode(&packet, version);
        // The frame itself may carry properties that we never write; it must be read alike, too.
        for bytes in written.iter().chain([&frame]) {
            read_alike(version, receiver, bytes, rmqtt(version, bytes), "rmqtt", rmqtt_differs);
            read_alike(version, receiver, bytes, protocol_core(version, bytes), "protocol-core", protocol_core_differs);
        }
    }

    /// We refuse every frame that both oracles refuse.
    #[test]
    fn frames_that_both_oracles_refuse_are_refused((version, receiver, frame) in frames::spoiled()) {
        let decoder = Decoder { version, receiver, max: u32::MAX };
        if let Ok(Some((packet, taken))) = decoder.next(&frame)
            && taken == frame.len()
            && for_role(receiver, frame[0])
        {
            let refused = rmqtt(version, &frame).refused() && protocol_core(version, &frame).refused();
            prop_assert!(!refused || both_wrong(&packet), "{:02X?} as {:?}", frame, packet);
        }
    }
}

fn read_alike(
    version: Version,
    receiver: Receiver,
    frame: &[u8],
    opinion: Opinion,
    who: &str,
    differs: fn(&Packet<'_>) -> bool,
) {
    let decoder = Decoder {
        version,
        receiver,
        max: u32::MAX,
    };
    let (ours, _) = decoder.next(frame).expect("legal").expect("whole");
    if differs(&ours) {
        return;
    }
    match opinion {
        Opinion::None => {}
        Opinion::Refused => panic!("{who} refuses {frame:02X?}, {ours:?}"),
        Opinion::Taken(again) => {
            let theirs = decoder.next(&again);
            let Ok(Some((theirs, _))) = theirs else {
                panic!("{who} wrote {again:02X?} for {frame:02X?}: {theirs:?}");
            };
            assert_eq!(
                canon(&theirs),
                canon(&ours),
                "{who} read {frame:02X?} differently"
            );
        }
    }
}

// Legal frames that rmqtt-codec refuses or writes wrongly.
fn rmqtt_differs(packet: &Packet<'_>) -> bool {
    match packet {
        // [MQTT-3.1.3-6]: the server answers an empty identifier, with 0x02 in 3.1.1
        // ([MQTT-3.1.3-8]); rmqtt-codec refuses the packet itself.
        Packet::Connect(c) => c.client_id.is_empty() && !c.clean_start,
        // §3.15.2.1: a success without properties omits the property length. rmqtt-codec writes
        // one, and by §3.15.2.2.2 properties without a method are an error.
        Packet::Auth(a) => a.method.is_none(),
        _ => false,
    }
}

// Legal frames that mqtt-protocol-core refuses.
fn protocol_core_differs(packet: &Packet<'_>) -> bool {
    match packet {
        // §3.1.2.9: MQTT 5 allows a password without a user name.
        Packet::Connect(c) => c.password.is_some() && c.username.is_none(),
        _ => false,
    }
}

// Legal frames that both oracles refuse: each for its reason above, or [MQTT-3.1.2-2] of 3.1.1, the
// answer `20 02 00 01` to a CONNECT of MQTT 5, or the bridge bit, which no standard has.
fn both_wrong(packet: &Packet<'_>) -> bool {
    let old_server = matches!(packet, Packet::Connack(c)
        if c.reason == ReasonCode::UNSUPPORTED_PROTOCOL_VERSION && c.properties.is_empty());
    let bridge = matches!(packet, Packet::Connect(c) if c.bridge);
    old_server || bridge || (rmqtt_differs(packet) && protocol_core_differs(packet))
}

/// A packet in a canonical form: properties are sorted, since their order has no significance
/// except for user properties (§2.2.2.2), and properties with their default value are left out.
fn canon(packet: &Packet<'_>) -> String {
    let own = sorted(packets::properties_of(packet));
    match packet {
        Packet::Connect(c) => {
            let will = c
                .will
                .map(|w| (w.qos, w.retain, w.topic, w.payload, sorted(w.properties)));
            let login = (c.username, c.password);
            let fields = (
                c.version,
                c.clean_start,
                c.keep_alive,
                c.client_id,
                will,
                login,
            );
            format!("CONNECT {fields:?} {own:?}")
        }
        Packet::Connack(c) => format!("CONNACK {:?} {own:?}", (c.session_present, c.reason)),
        Packet::Publish(p) => {
            let fields = (p.dup, p.qos, p.retain, p.topic, p.packet_id, p.payload);
            format!("PUBLISH {fields:?} {own:?}")
        }
        Packet::Disconnect(d) => format!("DISCONNECT {:?} {own:?}", d.reason),
        other => format!("{:?} {own:?}", packets::bare(other.clone())),
    }
}

fn sorted(properties: Properties<'_>) -> Vec<Property<'_>> {
    use Property as P;
    let mut all: Vec<_> = properties
        .iter()
        .filter(|p| {
            !matches!(
                p,
                P::PayloadFormatIndicator(0)
                    | P::RequestProblemInformation(1)
                    | P::RequestResponseInformation(0)
                    | P::ReceiveMaximum(65_535)
                    | P::TopicAliasMaximum(0)
                    | P::SessionExpiryInterval(0)
                    | P::RetainAvailable(1)
                    | P::WildcardSubscriptionAvailable(1)
                    | P::SubscriptionIdentifierAvailable(1)
                    | P::SharedSubscriptionAvailable(1)
            )
        })
        .collect();
    // A stable sort keeps user properties in order.
    all.sort_by_key(Property::id);
    all
}
