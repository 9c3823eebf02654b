//! A data link that lags slows the clients that publish most.

use super::*;
use crate::router::{Connected, Router};
use crate::sim::testing::publish as publish_of;
use crate::upstream::link::publish::PublishLink;
use std::sync::Arc;

/// A data link and a publish link of one router.
struct Rig {
    router: Arc<Router>,
    data: DataLink,
    publish: PublishLink,
    out: Vec<u8>,
}

impl Rig {
    fn new() -> Self {
        let router = router();
        let mut data = DataLink::new(router.clone(), 0, 1, PROBES.into(), &Memory);
        let mut publish = PublishLink::new(router.clone(), 0, 1);
        let mut out = Vec::new();
        data.connected(&up(false, 100), Millis::ZERO, &mut out);
        publish.connected(&up(false, 60_000), Millis::ZERO, &mut out);
        out.clear();
        Self {
            router,
            data,
            publish,
            out,
        }
    }

    /// The data link brings so many messages at once. Returns whether it sends a PINGREQ.
    fn arrive(&mut self, messages: u16, now: u64) -> bool {
        let now = Millis::new(now);
        for _ in 0..messages {
            let message = publish(0, QoS::AtMostOnce, b"x", b"");
            let taken = self
                .data
                .packet(&Packet::Publish(message), now, &mut self.out);
            taken.expect("it is legal");
        }
        self.data.batch_ended(now, &mut self.out);
        self.data.wants_ping()
    }

    /// The numbers of the publishes that the publish link sends now.
    fn sent(&mut self, now: u64) -> Vec<u32> {
        self.out.clear();
        self.publish.poll(Millis::new(now), &mut self.out);
        let all = read(&mut self.out).into_iter();
        let number = |(what, _): (String, u16)| what.trim_start_matches("publish ").parse();
        all.map(|packet| number(packet).expect("a publish"))
            .collect()
    }

    fn queue(&self, who: Connected, numbers: std::ops::Range<u32>) {
        numbers.for_each(|n| publish_of(&self.router, who, n));
    }
}

#[test]
fn a_lag_slows_the_client_that_floods_and_no_other() {
    let mut rig = Rig::new();
    let [flooder, other] = ["a", "b"].map(|id| client(&rig.router, id));
    assert!(rig.arrive(128, 100), "a busy link asks how long it lags");
    rig.queue(flooder, 0..500);
    assert_eq!(rig.sent(101).len(), 500, "nothing is known against it");
    // The answer does not come while messages do.
    rig.arrive(100, 130);
    assert!(
        !rig.router.publishes_limited(),
        "the broker may be far away"
    );
    rig.arrive(100, 600);
    assert!(rig.router.publishes_limited());
    rig.queue(flooder, 500..1000);
    rig.queue(other, 5000..5002);
    let sent = rig.sent(601);
    assert_eq!(sent.len(), 8);
    let of_other: Vec<u32> = sent.iter().copied().filter(|n| *n >= 5000).collect();
    assert_eq!(of_other, [5000, 5001]);
    assert!(rig.sent(602).is_empty(), "until the next round");
    // Publishes may follow the PINGREQ. Then a round catches up: 1,000 messages in 100 ms. The next one
    // measures an empty link: 5 ms. The third has room for 15 ms.
    for (answered, window, pinged, messages) in
        [(700, 8, 705, 1000), (805, 8, 810, 0), (815, 150, 820, 0)]
    {
        rig.data.ping_answered(Millis::new(answered));
        assert_eq!(rig.sent(answered).len(), window);
        assert!(rig.arrive(1, pinged));
        rig.arrive(messages, pinged + 1);
    }
}

#[test]
fn a_lost_data_link_limits_nothing() {
    let mut rig = Rig::new();
    let flooder = client(&rig.router, "a");
    rig.arrive(128, 100);
    rig.arrive(100, 600);
    assert!(rig.router.publishes_limited());
    rig.data.disconnected(&LinkEnd::Closed, Millis::new(601));
    rig.queue(flooder, 0..500);
    assert_eq!(rig.sent(602).len(), 500);
}
