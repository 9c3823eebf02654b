//! Tells the router the time.

use std::time::Duration;

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use crate::clock::Clock;
use crate::router::Router;

const TICK: Duration = Duration::from_millis(100);
/// Ticks between two walks over all sessions.
const TICKS_PER_WALK: u32 = 20;

/// Runs until `stop` is cancelled.
pub(super) async fn run(router: &Router, clock: Clock, stop: CancellationToken) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut count: u32 = 0;
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = stop.cancelled() => return,
        }
        let now = clock.now();
        router.tick(now);
        count = count.wrapping_add(1);
        if count.is_multiple_of(TICKS_PER_WALK) {
            router.close_stalled(now);
            router.ping_idle(now);
        }
    }
}
