//! Instruction counts of the codec. Unlike times, they do not depend on the load of the machine.
//!
//! ```text
//! cargo bench --bench codec_count --no-run
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null \
//!     <the path that it prints> <what> <case> [rounds]
//! ```
//! `what`: ours, rmqtt, protocol-core, encode, message, none; `case`: v3.1.1, v5,
//! "v5 with 2 properties"; a round is 1,000 packets. Valgrind prints `Collected`; take away what
//! `none` gives for the same rounds, and divide by 1,000 times the rounds.

#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "results are printed"
)]

#[path = "codec/workload.rs"]
mod workload;

use std::hint::black_box;
use std::process::ExitCode;
use tidegate::mqtt::Delivery;
use workload::{Case, PACKETS};

fn main() -> ExitCode {
    // `cargo bench` runs every bench without arguments: do nothing then.
    let args: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| a != "--bench")
        .collect();
    if args.is_empty() {
        usage();
        return ExitCode::SUCCESS;
    }
    let what = args.first().map_or("", String::as_str);
    let case = args
        .get(1)
        .and_then(|name| Case::ALL.into_iter().find(|c| c.name() == name));
    let rounds = args.get(2).map_or(Ok(10), |n| n.parse::<usize>());
    let (Some(case), Ok(rounds)) = (case, rounds) else {
        return usage();
    };
    let stream = workload::stream(case);
    let message = workload::message(case, &stream);
    let delivery = workload::delivery(case);
    let mut out = Vec::with_capacity(stream.len() * 2);
    for _ in 0..rounds {
        // Every variant makes this copy, so the difference to `none` does not contain it.
        let mut buf = bytes::BytesMut::from(&stream[..]);
        out.clear();
        match what {
            "none" => drop(black_box(&buf)),
            "ours" => workload::ours(case, black_box(&buf)),
            "rmqtt" => workload::rmqtt(case, &mut buf),
            "protocol-core" => workload::protocol_core(case, black_box(&buf)),
            "encode" => (1..=PACKETS as u16).for_each(|packet_id| {
                Delivery {
                    packet_id,
                    ..delivery
                }
                .encode(black_box(&message), &mut out);
            }),
            "message" => (0..PACKETS).for_each(|_| {
                drop(black_box(workload::message(case, black_box(&stream))));
            }),
            _ => return usage(),
        }
        black_box(&out);
    }
    println!("{} packets", rounds * PACKETS);
    ExitCode::SUCCESS
}

fn usage() -> ExitCode {
    eprintln!(
        "codec_count <ours|rmqtt|protocol-core|encode|message|none> <v3.1.1|v5|v5 with 2 properties> [rounds]"
    );
    ExitCode::from(64)
}
