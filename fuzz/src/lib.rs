//! The parsers alone, under the crate's own name, so that the targets and the shared properties
//! find `tidegate::mqtt`. The crate itself would bring TLS and QUIC into every fuzz build.

// Inline modules, so that each file finds its own modules beside it.
// What they offer to the rest of the crate is not all used.
#[allow(dead_code)]
#[path = "../../src"]
mod sources {
    pub mod budget;
    pub mod mqtt;
    pub mod topics;
}

pub use sources::{budget, mqtt, topics};

/// What stands before MQTT on the way in. Each function holds a property for any bytes.
#[allow(dead_code)]
#[path = "../../src/transport"]
pub mod transport {
    mod forwarded;
    mod proxy {
        mod header;

        use header::{Step, parse};

        /// More bytes change no verdict.
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

        /// However the bytes are cut, they come to the same.
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

        /// However the bytes are cut, they come to the same, and to no more than came.
        pub fn frames(bytes: &[u8], step: usize) {
            let whole = decode(bytes, usize::MAX);
            assert!(whole.0.len() <= bytes.len());
            assert_eq!(decode(bytes, step), whole);
        }
    }

    pub use proxy::header;
    pub use quic::capsules;
    pub use ws::frames;

    /// What a client sends, `line`, does not change what its proxy adds.
    pub fn hops(line: &[u8]) {
        let mut forged = line.to_vec();
        forged.extend_from_slice(b", for=192.0.2.7");
        let last = forwarded::forwarded([forged.as_slice()].into_iter()).pop();
        let told = std::net::SocketAddr::from(([192, 0, 2, 7], 0));
        assert!(last.is_none_or(|hop| hop == Some(told)));
        let mut forged = line.to_vec();
        forged.extend_from_slice(b", 192.0.2.7");
        let last = forwarded::x_forwarded_for([forged.as_slice()].into_iter()).pop();
        assert_eq!(last, Some(Some(told)));
    }
}
