//! The codec beside two others: decoding a QoS 1 PUBLISH of 100 bytes of payload and a topic of
//! 37 bytes, and writing it to many receivers. Times are for 1,000 packets in one buffer.
//!
//! `cargo bench --bench codec`; shorter: `-- --warm-up-time 0.5 --measurement-time 2`.
//! Instruction counts: see `benches/codec_count.rs`. Allocations: `benches/codec_allocations.rs`.

#[path = "codec/workload.rs"]
mod workload;

use criterion::{BatchSize, Criterion, Throughput};
use std::hint::black_box;
use tidegate::mqtt::*;
use workload::{Case, PACKETS};

fn main() {
    let mut c = Criterion::default().configure_from_args();
    for case in Case::ALL {
        decode(&mut c, case);
        write(&mut c, case);
    }
    c.final_summary();
}

fn decode(c: &mut Criterion, case: Case) {
    let stream = workload::stream(case);
    let mut group = c.benchmark_group(format!("decode/{}", case.name()));
    group.throughput(Throughput::Elements(PACKETS as u64));
    group.bench_function("tidegate", |b| {
        b.iter(|| workload::ours(case, black_box(&stream)));
    });
    group.bench_function("rmqtt-codec", |b| {
        b.iter_batched_ref(
            || bytes::BytesMut::from(&stream[..]),
            |buf| workload::rmqtt(case, buf),
            BatchSize::LargeInput,
        );
    });
    group.bench_function("mqtt-protocol-core", |b| {
        b.iter(|| workload::protocol_core(case, black_box(&stream)));
    });
    group.finish();
}

fn write(c: &mut Criterion, case: Case) {
    let frame = workload::frame(case);
    let message = workload::message(case, &frame);
    let delivery = workload::delivery(case);
    let mut out = Vec::with_capacity(frame.len() * PACKETS * 2);
    let mut group = c.benchmark_group(format!("write/{}", case.name()));
    group.throughput(Throughput::Elements(PACKETS as u64));
    group.bench_function("Delivery::encode", |b| {
        b.iter(|| {
            out.clear();
            for id in 1..=PACKETS as u16 {
                Delivery {
                    packet_id: id,
                    ..delivery
                }
                .encode(black_box(&message), &mut out);
            }
        });
    });
    group.bench_function("Message::new", |b| {
        b.iter(|| {
            for _ in 0..PACKETS {
                drop(black_box(workload::message(case, black_box(&frame))));
            }
        });
    });
    group.finish();
}
