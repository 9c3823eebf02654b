//! Heap allocations per packet, for our codec and two others. This is a bench of its own because
//! counting slows codecs that allocate. `cargo bench --bench codec_allocations`; it fails when our
//! count is not 0.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "results are printed"
)]

#[path = "codec/workload.rs"]
mod workload;

use allocation_counter::measure;
use tidegate::mqtt::Delivery;
use workload::{Case, PACKETS};

fn main() {
    println!(
        "{:<22}{:>10}{:>14}{:>20}",
        "decode", "tidegate", "rmqtt-codec", "mqtt-protocol-core"
    );
    for case in Case::ALL {
        let stream = workload::stream(case);
        let mut buf = bytes::BytesMut::from(&stream[..]);
        let ours = measure(|| workload::ours(case, &stream)).count_total;
        let rmqtt = measure(|| workload::rmqtt(case, &mut buf)).count_total;
        let protocol_core = measure(|| workload::protocol_core(case, &stream)).count_total;
        let each = |count: u64| count as f64 / PACKETS as f64;
        println!(
            "{:<22}{:>10}{:>14}{:>20}",
            case.name(),
            each(ours),
            each(rmqtt),
            each(protocol_core)
        );
        assert_eq!(ours, 0, "decoding allocates");

        let message = workload::message(case, &stream);
        let delivery = workload::delivery(case);
        let mut out = Vec::with_capacity(stream.len() * 4);
        let written = measure(|| {
            for packet_id in 1..=PACKETS as u16 {
                Delivery {
                    packet_id,
                    ..delivery
                }
                .encode(&message, &mut out);
            }
        });
        assert_eq!(written.count_total, 0, "writing allocates");
        let made = measure(|| drop(workload::message(case, &stream)));
        assert_eq!(made.count_total, 1, "a message is one allocation");
    }
}
