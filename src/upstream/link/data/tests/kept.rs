//! A data link where messages are kept in a log: its acknowledgements wait.

use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::router::Router;
use crate::store::log::disk::sim::SimDisk;
use crate::store::log::{Options, Recovery};
use crate::store::records::FoundSessions;

/// A link whose router keeps messages in a log that nobody writes.
fn kept() -> (Arc<Router>, DataLink) {
    let router = router();
    router.keep_sessions(Duration::ZERO);
    let recovery = Recovery::open(SimDisk::default(), Options::new(7)).expect("it opens");
    let none = FoundSessions::default();
    router.restore_all(&none, recovery.claims(), false, Millis::ZERO);
    let link = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
    (router, link)
}

#[test]
fn a_message_waits_for_its_receivers_although_one_that_was_skipped_came_with_it() {
    let (router, mut link) = kept();
    let reader = client(&router, "a");
    let mut out = Vec::new();
    link.connected(&up(false, 100), Millis::ZERO, &mut out);
    subscribe(&router, reader, "t");
    link.poll(Millis::ZERO, &mut out);
    for (_, packet_id) in read(&mut out) {
        grant(&mut link, packet_id, &mut out);
    }
    let normal = publish(5, QoS::AtLeastOnce, b"small", &[0x0B, 1]);
    link.packet(&Packet::Publish(normal), Millis::ZERO, &mut out)
        .expect("it is expected");
    link.oversized(&oversized(0x32, 6), Millis::ZERO, &mut out)
        .expect("it is skipped");
    link.batch_ended(Millis::ZERO, &mut out);
    assert_eq!(read(&mut out), [], "the client has not acknowledged it");
    let (session, connection_no) = (reader.session, reader.connection_no);
    let mut taken = Vec::new();
    router.take_output(session, connection_no, &mut taken, Millis::ZERO);
    packet_of(&router, reader, &[0x40, 2, 0, 1], Millis::ZERO);
    link.poll(Millis::ZERO, &mut out);
    let acks = [("puback", 5), ("puback", 6)];
    assert_eq!(read(&mut out), acks.map(|(what, id)| (what.to_owned(), id)));
}
