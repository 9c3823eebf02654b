//! The probe against the embedded broker, with each of its quirks.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::config::Quirk;
use crate::embedded::{EmbeddedBroker, EmbeddedOptions};
use crate::mqtt::{Connect, Decoder, Packet, Receiver};
use crate::upstream::profile::Mapping;

async fn record(quirks: &[Quirk]) -> (BrokerProfile, EmbeddedBroker) {
    let broker = EmbeddedBroker::start(EmbeddedOptions::with_quirks(quirks));
    let mut io = broker.connect();
    let v3 = quirks.contains(&Quirk::V311);
    let version = if v3 { Version::V311 } else { Version::V5 };
    let mut out = Vec::new();
    Connect {
        version,
        clean_start: true,
        client_id: "probe",
        receive_maximum: Some(u16::MAX),
        ..Connect::default()
    }
    .encode(&mut out);
    io.write_all(&out).await.expect("a pipe");
    let mut rest = BytesMut::new();
    let decoder = Decoder {
        version,
        receiver: Receiver::Client,
        max: 1024,
    };
    let capabilities = loop {
        io.read_buf(&mut rest).await.expect("a pipe");
        if let Some((Packet::Connack(c), used)) = decoder.next(&rest).expect("legal") {
            let capabilities = Capabilities::of(version, &c);
            let _ = rest.split_to(used);
            break capabilities;
        }
    };
    let quirks = probe(&mut io, &capabilities, "tidegate/probe/t", rest).await;
    (quirks, broker)
}

#[tokio::test(start_paused = true)]
async fn a_broker_without_quirks() {
    let (seen, broker) = record(&[]).await;
    assert_eq!(seen.source, Source::Probed, "{seen}");
    assert_eq!(seen.quirks.copies, Some(Copies::Many));
    assert_eq!(seen.quirks.overlap_qos, Some(OverlapQos::Each));
    assert_eq!(seen.quirks.identifiers, Identifiers::Working);
    assert_eq!(seen.quirks.shared, SharedSubscriptions::Alive);
    assert_eq!(seen.quirks.window, Some(WINDOW_PROBED));
    for yes in [
        seen.quirks.retain_handling,
        seen.quirks.replaces,
        seen.quirks.retain_as_published,
        seen.quirks.retained_wildcard,
        seen.quirks.retained_marker,
        seen.quirks.properties,
    ] {
        assert_eq!(yes, Some(true), "{seen}");
    }
    assert!(seen.keeps_retain() && seen.keeps_properties() && seen.grants_shared());
    tokio::time::sleep(Duration::from_millis(10)).await;
    assert_eq!(broker.stats().retained, 0, "it cleans up");
    assert_eq!(broker.stats().sessions, 0);
}

#[tokio::test(start_paused = true)]
async fn each_quirk_is_seen() {
    let one = record(&[Quirk::One]).await.0;
    assert_eq!(one.quirks.copies, Some(Copies::One));
    assert_eq!(one.quirks.overlap_qos, Some(OverlapQos::Highest));
    assert_eq!(one.quirks.identifiers, Identifiers::Working);

    let lowest = record(&[Quirk::LowestQos]).await.0;
    assert_eq!(lowest.quirks.overlap_qos, Some(OverlapQos::Lower));
    assert_eq!(lowest.quirks.identifiers, Identifiers::Working);

    let queues = record(&[Quirk::TwoQueues, Quirk::V311]).await.0;
    assert_eq!(queues.quirks.copies, Some(Copies::Many));
    assert_eq!(queues.quirks.replaces, Some(false));
    assert!(!queues.replaces());

    let nameless = record(&[Quirk::NoIds]).await.0;
    assert_eq!(nameless.quirks.identifiers, Identifiers::None);
    assert_eq!(nameless.mapping(), Mapping::DisjointPlacement);

    let small = record(&[Quirk::SmallWindow]).await.0;
    assert_eq!(small.quirks.window, Some(10));
    assert_eq!(small.capabilities.receive_maximum, 10);

    let dead = record(&[Quirk::DeadShared]).await.0;
    assert_eq!(dead.quirks.shared, SharedSubscriptions::Dead);
    assert!(!dead.grants_shared());
    let refused = record(&[Quirk::NoShared]).await.0;
    assert_eq!(refused.quirks.shared, SharedSubscriptions::Refused);

    let forgetful = record(&[Quirk::NoRap]).await.0;
    assert_eq!(forgetful.quirks.retain_as_published, Some(false));
    assert!(!forgetful.keeps_retain());

    let late = record(&[Quirk::LateRetained]).await.0;
    assert_eq!(
        late.quirks.retained_marker,
        Some(false),
        "nothing came before it"
    );
    assert_eq!(late.quirks.retained_wildcard, Some(true));
    assert!(
        late.quirks
            .retained_within
            .is_some_and(|ms| (300..500).contains(&ms))
    );
    assert!(late.fetch_quiet() >= Duration::from_millis(1200));
    assert_eq!(late.source, Source::Probed);
}

#[tokio::test(start_paused = true)]
async fn a_broker_of_mqtt_3_1_1() {
    let (seen, broker) = record(&[Quirk::V311]).await;
    assert_eq!(seen.source, Source::Probed, "{seen}");
    assert_eq!(seen.capabilities.version, Version::V311);
    assert_eq!(seen.quirks.identifiers, Identifiers::None);
    assert_eq!(seen.quirks.copies, Some(Copies::Many));
    assert_eq!(seen.quirks.retained_marker, Some(true));
    assert!(!seen.keeps_retain() && !seen.keeps_properties());
    assert_eq!(broker.stats().retained, 0);
}

#[tokio::test(start_paused = true)]
async fn a_silent_broker_is_assumed_at_its_worst() {
    let (mut ours, theirs) = tokio::io::duplex(1 << 20);
    let capabilities = Capabilities {
        version: Version::V5,
        identifiers: true,
        shared: true,
        receive_maximum: 20,
        maximum_qos: QoS::ExactlyOnce,
        maximum_packet_size: None,
        retain_available: true,
    };
    let begun = Instant::now();
    let seen = probe(&mut ours, &capabilities, "p", BytesMut::new()).await;
    assert!(begun.elapsed() <= PROBE_TIME + Duration::from_secs(1));
    assert_eq!(seen.source, Source::Partly);
    assert_eq!(seen.quirks.identifiers, Identifiers::Assumed);
    assert!(!seen.grants_shared() && !seen.keeps_retain());
    assert_eq!(seen.missing.len(), 1, "{seen}");
    drop(theirs);
    let seen = probe(&mut ours, &capabilities, "p", BytesMut::new()).await;
    assert_eq!(seen.source, Source::Partly);
}
