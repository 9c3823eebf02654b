//! Connections whose socket takes too little, is silent, or is to be closed.

use std::time::Duration;

use crate::session::CloseReason;
use crate::time::Millis;

use crate::router::sessions::Sessions;

/// The rate at which a client must take output that has waited for `limits.write_stall`.
const SLOWEST_BYTES_PER_SECOND: u64 = 8192;

impl Sessions {
    /// The time by which `bytes` that are offered from `since` on must be taken. A client may take
    /// them slowly but steadily; a byte now and then is not enough.
    pub(crate) fn stalled_at(&self, since: Millis, bytes: usize) -> Millis {
        let more = Duration::from_millis(bytes as u64 * 1000 / SLOWEST_BYTES_PER_SECOND);
        since + self.budgets.write_stall + more
    }

    /// Ends connections whose socket takes too little. Walks over all sessions, so it is not called at
    /// each tick.
    pub(crate) fn close_stalled(&self, now: Millis) {
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                let connection = slot.session.connection_ref();
                let (Some(handle), Some(connection)) = (&slot.handle, connection) else {
                    continue;
                };
                let taken = &connection.taken;
                let moved = taken.at.max(handle.moved_at());
                let stands = moved + self.budgets.write_stall < now;
                let drags = self.stalled_at(taken.at, taken.offered_bytes) < now;
                if taken.offered_bytes > 0 && (stands || drags) {
                    handle.close(CloseReason::WriteStall);
                }
            }
        }
    }

    /// Asks for a WebSocket ping on silent connections, because proxies cut those. Whether the client
    /// is still there is decided by its keep alive, and by TCP.
    pub(crate) fn ping_idle(&self, now: Millis) {
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                let Some(handle) = &slot.handle else {
                    continue;
                };
                let (Some(after), Some(connection)) =
                    (handle.ping_after(), slot.session.connection_ref())
                else {
                    continue;
                };
                let last = connection.last_seen.max(handle.sent_at());
                if last + after <= now {
                    handle.ping(now);
                }
            }
        }
    }

    /// Ends the connections of principals that lost the right to connect. Returns their number.
    pub(crate) fn close_of(&self, is_removed: impl Fn(&str) -> bool) -> usize {
        let mut closed = 0;
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                if let Some(handle) = &slot.handle
                    && slot.session.attached()
                    && is_removed(&slot.session.principal)
                {
                    handle.close(CloseReason::NotAuthorized);
                    closed += 1;
                }
            }
        }
        closed
    }

    /// Asks up to `most` connections to end.
    pub(crate) fn close_some(&self, reason: CloseReason, most: usize) {
        let mut remaining = most;
        for shard in &self.shards {
            for (_, slot) in &shard.lock().slots {
                if remaining == 0 {
                    return;
                }
                if let Some(handle) = &slot.handle
                    && slot.session.attached()
                    && handle.closing().is_none()
                {
                    handle.close(reason);
                    remaining -= 1;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::mqtt::Version;
    use crate::router::handle::ConnectionHandle;
    use crate::router::testing;
    use crate::router::{Connect, Peer, Router};
    use crate::session::ConnectionSpec;

    /// A client that has been offered 1 MiB at 1 s, and last took some of it at `moved`.
    fn offered(router: &Router, moved: Millis) -> Arc<ConnectionHandle> {
        let client = testing::client(router, "c");
        let mut shard = router.sessions.shard(client.session.shard);
        let slot = shard.get(client.session).expect("there");
        let handle = Arc::new(ConnectionHandle::default());
        let taken = &mut slot.session.connection().expect("it is connected").taken;
        (taken.offered_bytes, taken.at) = (1 << 20, Millis::new(1000));
        slot.handle = Some(handle.clone());
        handle.moved(moved);
        handle
    }

    fn ends_after(router: &Router, handle: &ConnectionHandle, last: Millis) {
        router.close_stalled(last);
        assert!(handle.closing().is_none());
        router.close_stalled(last + Duration::from_millis(1));
        assert_eq!(handle.closing(), Some(CloseReason::WriteStall));
    }

    #[test]
    fn a_client_that_takes_its_output_slowly_has_time_for_all_of_it() {
        let router = testing::router();
        let slowest = Duration::from_secs((1 << 20) / SLOWEST_BYTES_PER_SECOND);
        let last = Millis::new(1000) + router.config.write_stall + slowest;
        ends_after(
            &router,
            &offered(&router, last - Duration::from_millis(5)),
            last,
        );
    }

    #[test]
    fn a_client_that_takes_nothing_has_no_more_time_for_more_bytes() {
        let router = testing::router();
        let moved = Millis::new(2000);
        let last = moved + router.config.write_stall;
        ends_after(&router, &offered(&router, moved), last);
    }

    #[test]
    fn a_websocket_is_pinged_once_for_each_interval_of_silence() {
        let router = testing::router();
        let handles = [Some(Duration::from_secs(45)), None].map(|ping_after| {
            let handle = Arc::new(ConnectionHandle::new(ping_after));
            let connect = Connect {
                key: format!("{ping_after:?}").as_str().into(),
                principal: "anonymous".into(),
                anonymous: true,
                clean_start: true,
                expiry: 0,
                spec: ConnectionSpec {
                    version: Version::V5,
                    bridge: false,
                    receive_maximum: 1,
                    maximum_packet_size: None,
                    topic_alias_maximum: 0,
                    keep_alive: None,
                    scope: None,
                },
                will: None,
                handle: handle.clone(),
                peer: Arc::new(Peer {
                    listener: "test".into(),
                    transport: "ws",
                    address: ([127, 0, 0, 1], 1).into(),
                }),
            };
            let connected = router.connect(connect, Millis::new(1000), |_, out| out.push(0));
            (handle, connected.ok().map(|c| (c.session, c.connection_no)))
        });
        let [(pinged, session), (left_alone, _)] = &handles;
        let (session, connection_no) = session.expect("connected");
        let walks = |from: u64, to: u64| {
            let times = (from..=to).step_by(2000);
            let pings = times.filter(|&now| {
                router.ping_idle(Millis::new(now));
                assert!(!left_alone.take_ping());
                pinged.take_ping()
            });
            pings.collect::<Vec<_>>()
        };
        assert_eq!(walks(1000, 140_000), [47_000, 93_000, 139_000]);
        // Output sent to it ends the silence.
        let mut out = Vec::new();
        router.take_output(session, connection_no, &mut out, Millis::new(150_000));
        assert!(!out.is_empty());
        assert_eq!(walks(150_000, 200_000), [196_000]);
        // A look for output that is not there does not.
        router.take_output(
            session,
            connection_no,
            &mut Vec::new(),
            Millis::new(200_000),
        );
        assert_eq!(walks(202_000, 245_000), [242_000]);
    }
}
