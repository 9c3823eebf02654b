//! Permits for handshakes that run at the same time, shared so that no network can take all of them.

use std::sync::Arc;

use crate::shares::Shares;

/// The limit on handshakes that run at the same time, over all listeners; TLS over TCP and QUIC have
/// one each.
#[derive(Clone, Debug)]
pub struct Handshakes {
    pub(in crate::transport) tls: Arc<Shares>,
    pub(in crate::transport) quic: Arc<Shares>,
}

impl Handshakes {
    /// At most `max` handshakes of each kind at once; at least one.
    pub fn new(max: usize) -> Self {
        Self {
            tls: Arc::new(Shares::new(max)),
            quic: Arc::new(Shares::new(max)),
        }
    }

    /// How many handshakes run now.
    pub fn running(&self) -> usize {
        self.tls.running() + self.quic.running()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shares::at;

    #[test]
    fn pressure_begins_past_half() {
        let handshakes = Handshakes::new(4);
        let from = at("192.0.2.1");
        let take = || handshakes.quic.try_acquire(from);
        let kept = [take(), take()];
        assert!(!handshakes.quic.pressed());
        let third = take();
        assert!(handshakes.quic.pressed() && !handshakes.tls.pressed());
        assert_eq!(handshakes.running(), 3);
        drop((kept, third));
        assert_eq!(handshakes.running(), 0);
    }
}
