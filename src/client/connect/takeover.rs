//! Before a takeover, the bytes that the client sent on its older connection are read: its DISCONNECT
//! may be among them.

use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;

use tokio::time::{Instant, timeout_at};

use crate::router::Router;
use crate::session::SessionKey;

/// How long a CONNECT waits for the older connection at most. Usually everything is read within one turn
/// of its task; a SUBSCRIBE that the broker has not answered makes it wait longer.
const READ_OUT_MAX: Duration = Duration::from_secs(1);
/// The connections that a CONNECT waits for, one after the other: another CONNECT of the same client may
/// take the session meanwhile.
const PREDECESSORS_MAX: usize = 4;

/// Waits until everything is read that the client had sent on the connection that its CONNECT is about to
/// take over, but not beyond `deadline`, nor longer than [`READ_OUT_MAX`].
pub(super) async fn read_out(
    router: &Router,
    key: &SessionKey,
    principal: &str,
    deadline: Instant,
) {
    let deadline = deadline.min(Instant::now() + READ_OUT_MAX);
    let mut known = None;
    for _ in 0..PREDECESSORS_MAX {
        let Some(predecessor) = router.predecessor(key, principal, known) else {
            return;
        };
        let is_read = poll_fn(|cx| match predecessor.is_read.take(cx.waker()) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        });
        if timeout_at(deadline, is_read).await.is_err() {
            return;
        }
        known = Some(predecessor.connection);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::client::End;
    use crate::mqtt::Version;
    use crate::sim::testing;
    use crate::time::Millis;

    const DEADLINE: Duration = Duration::from_secs(10);
    const MILLISECOND: Duration = Duration::from_millis(1);

    /// How long a CONNECT of this principal waits, in whole milliseconds.
    async fn waited(router: &Router, principal: &str, deadline: Duration) -> Duration {
        let began = Instant::now();
        read_out(router, &"c".into(), principal, began + deadline).await;
        Duration::from_millis(began.elapsed().as_millis() as u64)
    }

    #[tokio::test(start_paused = true)]
    async fn a_task_that_hangs_delays_a_connect_by_the_bound() {
        let router = testing::router();
        let nothing = Duration::ZERO;
        assert_eq!(waited(&router, "anonymous", DEADLINE).await, nothing);
        let machine = testing::machine(&router, "c", Version::V5, Millis::ZERO);
        assert_eq!(waited(&router, "another", DEADLINE).await, nothing);
        let bound = waited(&router, "anonymous", DEADLINE).await;
        assert!((READ_OUT_MAX..READ_OUT_MAX + 2 * MILLISECOND).contains(&bound));
        let sooner = waited(&router, "anonymous", 5 * MILLISECOND).await;
        assert!((5 * MILLISECOND..7 * MILLISECOND).contains(&sooner));
        drop(machine);
    }

    #[tokio::test(start_paused = true)]
    async fn a_connect_waits_until_the_bytes_are_read_or_the_connection_has_ended() {
        let router = testing::router();
        let machine = testing::machine(&router, "c", Version::V5, Millis::ZERO);
        let mut wait = Box::pin(waited(&router, "anonymous", DEADLINE));
        assert!(futures_util::poll!(&mut wait).is_pending());
        let successors = machine.handle().take_successors().expect("one waits");
        assert!(machine.handle().take_successors().is_none(), "only once");
        assert!(futures_util::poll!(&mut wait).is_pending());
        drop(successors);
        assert_eq!(wait.await, Duration::ZERO);
        let mut wait = Box::pin(waited(&router, "anonymous", DEADLINE));
        assert!(futures_util::poll!(&mut wait).is_pending());
        machine.ended(&router, &End::Panicked, Millis::ZERO);
        assert_eq!(wait.await, Duration::ZERO);
    }
}
