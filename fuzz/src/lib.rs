//! The parsers alone, under the crate's own name, and the properties that they must have.
//!
//! The files of the crate are included by their paths, here and nowhere else. A dependency on the crate
//! would bring TLS, QUIC and their C code into every fuzz build, with sanitizers, and would need the
//! parsers of the transports to be public. The included parsers use nothing else of the crate.

extern crate self as tidegate;

// Inline modules, so that each file finds its own modules beside it.
#[allow(
    dead_code,
    reason = "the rest of the crate is not here to use all of it"
)]
#[path = "../../src"]
mod sources {
    pub mod budget;
    pub mod hashing;
    pub mod mqtt;
    pub mod qos;
    pub mod time;
    pub mod topics;
}

pub use sources::{budget, hashing, mqtt, qos, time, topics};

/// The properties that the tests of the codec hold too.
#[allow(dead_code, reason = "the tests use more of them")]
#[path = "../../tests/codec/properties"]
pub mod properties {
    pub mod packets;
    pub mod topics;
}

/// The parsers that see a client's bytes before MQTT does. Each function holds a property for any bytes.
#[allow(
    dead_code,
    reason = "the rest of the crate is not here to use all of it"
)]
#[path = "../../src/transport"]
pub mod transport {
    mod forwarded;
    mod proxy {
        mod header;

        use header::{Step, parse};

        /// More bytes never change a verdict.
        pub fn header(input: &[u8]) {
            let last = parse(input);
            for n in 0..input.len() {
                match parse(&input[..n]) {
                    Ok(Step::More(wanted)) => assert!(wanted > n),
                    verdict => {
                        assert_eq!(verdict, last);
                        break;
                    }
                }
            }
        }
    }
    mod quic {
        mod capsules;

        use capsules::{Capsules, Found};

        /// Any way to cut the bytes gives the same result.
        pub fn capsules(bytes: &[u8], step: usize) {
            let whole = Capsules::default().feed(bytes);
            let mut capsules = Capsules::default();
            let mut pieces = bytes.chunks(step).map(|piece| capsules.feed(piece));
            let cut = pieces.find(|found| *found != Found::Nothing);
            assert_eq!(cut.unwrap_or(Found::Nothing), whole);
        }
    }
    mod ws {
        mod frame;

        use frame::{Decoder, FrameError, Requests};

        fn decode(bytes: &[u8], step: usize) -> (Vec<u8>, Requests, Option<FrameError>) {
            let mut decoder = Decoder::new(1000);
            let (mut out, mut requests) = (Vec::new(), Requests::default());
            let mut input = bytes.to_vec();
            let fed = input
                .chunks_mut(step)
                .try_for_each(|piece| decoder.feed(piece, &mut out, &mut requests));
            (out, requests, fed.err().map(|stopped| stopped.fault))
        }

        /// Any way to cut the bytes gives the same result, and no more bytes than were received.
        pub fn frames(bytes: &[u8], step: usize) {
            let whole = decode(bytes, usize::MAX);
            assert!(whole.0.len() <= bytes.len());
            assert_eq!(decode(bytes, step), whole);
        }
    }

    pub use proxy::header;
    pub use quic::capsules;
    pub use ws::frames;

    /// The bytes that a client sends do not change the hop that its proxy adds, whether they stand before
    /// it or in a quoted value of it.
    pub fn hops(client: &[u8]) {
        let added = Some(Some(std::net::SocketAddr::from(([192, 0, 2, 7], 0))));
        let last = |lines: &[u8]| forwarded::forwarded([lines].into_iter()).pop();
        let before = last(&[client, b", for=192.0.2.7"].concat());
        assert!(before.is_none() || before == added);
        let mut quoted = b"for=192.0.2.7;host=\"".to_vec();
        for byte in client {
            if matches!(byte, b'"' | b'\\') {
                quoted.push(b'\\');
            }
            quoted.push(*byte);
        }
        quoted.push(b'"');
        let quoted = last(&quoted);
        assert!(quoted.is_none() || quoted == added);
        let forged = [client, b", 192.0.2.7"].concat();
        let last = forwarded::x_forwarded_for([forged.as_slice()].into_iter()).pop();
        assert_eq!(last, added);
    }
}
