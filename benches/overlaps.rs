//! The cost of messages, and of an UNSUBSCRIBE, for one client with many overlapping filters of 100 levels:
//! the broker sends a copy of each message for each filter.
//!
//! `cargo bench --bench overlaps`

#![allow(clippy::print_stdout, reason = "it prints figures")]
#![allow(clippy::disallowed_methods, reason = "it measures real time")]

#[path = "harness/mod.rs"]
mod harness;

use std::task::Waker;
use std::time::{Duration, Instant};

use harness::{admit, context, router};
use tidegate::client::machine::{Context, Machine};
use tidegate::mqtt::{
    Message, MessageSpec, Properties, QoS, ReasonCode, SubscribeOptions, Version, encode_subscribe,
    encode_unsubscribe,
};
use tidegate::router::Arrived;
use tidegate::streams::StreamId;
use tidegate::time::Millis;
use tidegate::topics::FilterId;

const LEVELS: usize = 100;
const MESSAGES: u32 = 10;

fn main() {
    println!("filters  a message, ms  UNSUBSCRIBE of all, ms");
    for filters in [125, 250, 500, 1000, 2000] {
        let router = router();
        let cx = context(&router, Millis::ZERO);
        let mut machine = admit(&router, "client");
        let names: Vec<String> = (0..filters).map(filter).collect();
        let ids = subscribe(&cx, &mut machine, &names);
        assert_eq!(ids.len(), filters);
        let began = Instant::now();
        for number in 0..MESSAGES {
            let mut batch: Vec<Arrived> = ids.iter().map(|id| arrived(*id, number)).collect();
            router.fan_out(&mut batch, Millis::ZERO);
        }
        let message = began.elapsed() / MESSAGES;
        let mut bytes = Vec::new();
        let all = names.iter().map(String::as_str);
        encode_unsubscribe(Version::V5, 1, all, &mut bytes);
        let began = Instant::now();
        assert!(machine.woken(cx.limits, Waker::noop()).is_ok());
        assert!(machine.received(&cx, StreamId::CONTROL, &bytes).is_ok());
        let unsubscribe = began.elapsed();
        let ms = |time: Duration| time.as_secs_f64() * 1000.0;
        println!(
            "{filters:7}  {:13.3}  {:22.3}",
            ms(message),
            ms(unsubscribe)
        );
    }
}

/// A filter that matches the topic, another one for each number.
fn filter(number: usize) -> String {
    let level = |at: usize| match at >= 20 || number >> at & 1 == 0 {
        true => "a",
        false => "+",
    };
    (0..LEVELS).map(level).collect::<Vec<_>>().join("/")
}

fn arrived(filter: FilterId, number: u32) -> Arrived {
    Arrived {
        message: Message::new(&MessageSpec {
            topic: &["a"; LEVELS].join("/"),
            properties: Properties::default(),
            payload: &number.to_be_bytes(),
            qos: QoS::AtMostOnce,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: None,
        }),
        filters: [filter].as_slice().into(),
        link: 0,
        origin_mark: None,
        link_origin: None,
        skipped: false,
    }
}

/// Subscribes to all filters, which the broker grants. Returns their numbers.
fn subscribe(cx: &Context<'_>, machine: &mut Machine, names: &[String]) -> Vec<FilterId> {
    let mut ids = Vec::new();
    for some in names.chunks(100) {
        let options = SubscribeOptions {
            qos: QoS::AtLeastOnce,
            no_local: false,
            retain_as_published: false,
            retain_handling: 2,
        };
        let filters = some.iter().map(|name| (name.as_str(), options));
        let mut bytes = Vec::new();
        encode_subscribe(Version::V5, 1, None, filters, &mut bytes);
        assert!(machine.woken(cx.limits, Waker::noop()).is_ok());
        assert!(machine.received(cx, StreamId::CONTROL, &bytes).is_ok());
        for wanted in cx.router.next_subscribes(0, 1000) {
            let code = ReasonCode(wanted.qos as u8);
            cx.router.suback(wanted.filter, code, cx.now);
            ids.push(wanted.filter);
        }
    }
    ids
}
