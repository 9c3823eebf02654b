//! The cost of a message for an audience that is away: sessions without a client, each with a subscription
//! on one filter.
//!
//! `cargo bench --bench audience` prints times; `-- SESSIONS MESSAGES` runs one case. For instructions:
//!
//! ```text
//! cargo bench --bench audience --no-run
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null <the path that it prints> 1000 1000
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null <the path that it prints> 1000 2000
//! ```
//! The difference between the counts of the two runs, divided by 1,000, is the cost of one message.

#![allow(clippy::print_stdout, reason = "it prints figures")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

#[path = "harness/mod.rs"]
mod harness;

use std::sync::Arc;
use std::task::Waker;
use std::time::{Duration, Instant};

use harness::{admit, context, router};
use tidegate::client::End;
use tidegate::mqtt::{
    Message, MessageSpec, Properties, QoS, ReasonCode, SubscribeOptions, Version, encode_subscribe,
};
use tidegate::router::{Arrived, Router};
use tidegate::streams::StreamId;
use tidegate::time::Millis;
use tidegate::topics::FilterId;
use tidegate::transport::Closed;

/// The clients have been away for longer than a flap takes.
const NOW: Millis = Millis::new(60_000);
/// Messages until every session sleeps.
const FIRST: usize = 3;

fn main() {
    let given: Vec<usize> = std::env::args()
        .skip(1)
        .filter_map(|a| a.parse().ok())
        .collect();
    if let [sessions, messages] = given[..] {
        let (router, filter) = audience(sessions);
        bring(&router, filter, messages);
        return;
    }
    println!("sessions  a message, us  bytes of queues for 1,000 messages");
    for sessions in [100, 1000, 10_000, 100_000, 1_000_000] {
        let (router, filter) = audience(sessions);
        let before = router.queue_used();
        let message = bring(&router, filter, 1000) / 1000;
        let bytes = router.queue_used() - before;
        let us = message.as_secs_f64() * 1e6;
        println!("{sessions:8}  {us:13.2}  {bytes}");
    }
}

/// Sessions that sleep.
fn audience(sessions: usize) -> (Arc<Router>, FilterId) {
    let router = router();
    let cx = context(&router, Millis::ZERO);
    let options = SubscribeOptions {
        qos: QoS::AtLeastOnce,
        no_local: false,
        retain_as_published: false,
        retain_handling: 2,
    };
    let mut bytes = Vec::new();
    encode_subscribe(
        Version::V5,
        1,
        None,
        std::iter::once(("t", options)),
        &mut bytes,
    );
    let mut filter = None;
    for number in 0..sessions {
        let mut machine = admit(&router, &number.to_string());
        assert!(machine.woken(cx.limits, Waker::noop()).is_ok());
        assert!(machine.received(&cx, StreamId::CONTROL, &bytes).is_ok());
        for wanted in router.next_subscribes(0, 10) {
            router.suback(wanted.filter, ReasonCode(1), cx.now);
            filter = Some(wanted.filter);
        }
        machine.ended(&router, &End::Transport(Closed::Eof), cx.now);
    }
    let filter = filter.expect("the first client asks the broker");
    bring(&router, filter, FIRST);
    assert!(router.totals().asleep + 32 > sessions.max(32), "they sleep");
    (router, filter)
}

/// The data link brings messages.
fn bring(router: &Router, filter: FilterId, messages: usize) -> Duration {
    let began = Instant::now();
    for _ in 0..messages {
        let message = Message::new(&MessageSpec {
            topic: "t",
            properties: Properties::default(),
            payload: &[0; 64],
            qos: QoS::AtLeastOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: Some(router.queue_account().clone()),
        });
        let mut batch = [Arrived {
            message,
            filters: [filter].as_slice().into(),
            link: 0,
            origin_mark: None,
            link_origin: None,
            skipped: false,
        }];
        router.fan_out(&mut batch, NOW);
    }
    began.elapsed()
}
