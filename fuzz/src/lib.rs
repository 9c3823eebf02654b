//! The decoders alone, under the crate's own name, so that the targets and the shared properties
//! find `tidegate::mqtt`. The crate itself would bring TLS and QUIC into every fuzz build.

// An inline module, so that `mqtt.rs` finds its own modules beside it.
#[path = "../../src"]
mod sources {
    pub mod mqtt;
}

pub use sources::mqtt;
