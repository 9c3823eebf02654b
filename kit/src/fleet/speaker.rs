//! A steady publisher.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use super::{SPEAKERS, Shared};
use crate::audit::{Stamp, now_ns};
use crate::dial::Dialer;
use crate::load::peer::Peer;
use crate::wire::Connect;

/// Publishes that may be unacknowledged at a time.
const WINDOW: u64 = 50;

pub(super) struct Speaker {
    number: usize,
    peer: Peer,
    window: u64,
    in_flight: u64,
    shared: Arc<Shared>,
}

impl Speaker {
    pub(super) async fn connect(
        number: usize,
        dialer: &Dialer,
        shared: Arc<Shared>,
    ) -> io::Result<Self> {
        let connect = Connect::new(format!("{}-speaker{number}", shared.plan.prefix));
        let (peer, _, receive_max) = Peer::connect(dialer, &connect.keep_alive(0), None)
            .await
            .map_err(io::Error::other)?;
        let window = WINDOW.min(u64::from(receive_max));
        Ok(Self {
            number,
            peer,
            window,
            in_flight: 0,
            shared,
        })
    }

    /// Publishes to all topics in turn at its share of the planned rate, and at once to aimed
    /// topics, until the fleet stops it; then waits for the last acknowledgement.
    pub(super) async fn speak(mut self, mut aimed: mpsc::Receiver<usize>) -> io::Result<()> {
        let shared = self.shared.clone();
        let topics = shared.plan.topics();
        let every = Duration::from_secs_f64(SPEAKERS as f64 / shared.plan.rate);
        let mut due = Instant::now() + every.mul_f64(self.number as f64 / SPEAKERS as f64);
        let mut turn = self.number;
        while !shared.speakers_stop.load(Relaxed) {
            let free = self.in_flight < self.window;
            tokio::select! {
                waited = self.peer.wait() => {
                    waited?;
                    self.take()?;
                }
                Some(topic) = aimed.recv(), if free => self.say(topic).await?,
                () = sleep_until(due), if free => {
                    self.say(turn % topics).await?;
                    turn += SPEAKERS;
                    // The remainder keeps the speakers from dividing the topics among themselves.
                    turn += usize::from(turn % topics < SPEAKERS);
                    due += every;
                }
                () = tokio::time::sleep(Duration::from_millis(100)) => {}
            }
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.in_flight > 0 {
            let waited = tokio::time::timeout_at(deadline, self.peer.wait()).await;
            waited.map_err(|_| {
                io::Error::other(format!("{} never acknowledged", self.in_flight))
            })??;
            self.take()?;
        }
        self.peer.disconnect().await;
        Ok(())
    }

    async fn say(&mut self, topic: usize) -> io::Result<()> {
        let plan = &self.shared.plan;
        let stream = plan.stream(self.number, topic);
        let seq = self.shared.sent[stream as usize].fetch_add(1, Relaxed) + 1;
        let payload = Stamp {
            stream,
            seq,
            sent_ns: now_ns(),
        }
        .payload(64);
        self.peer.publish(&plan.topic(topic), &payload, 1);
        self.in_flight += 1;
        let turn = self.peer.flush(|_| {}).await?;
        self.account(turn)
    }

    fn take(&mut self) -> io::Result<()> {
        let turn = self.peer.take(|_| {})?;
        self.account(turn)
    }

    fn account(&mut self, turn: crate::load::peer::Turn) -> io::Result<()> {
        self.in_flight -= u64::from(turn.completed);
        match turn.refused {
            0 => Ok(()),
            n => Err(io::Error::other(format!("{n} publishes refused"))),
        }
    }
}
