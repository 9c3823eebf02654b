//! One direction of a connection.

use std::collections::VecDeque;
use std::time::Duration;

use tidegate::time::Millis;

use tidegate_kit::rng::Rng;

#[derive(Default)]
pub(crate) struct Pipe {
    pub chunks: VecDeque<(Millis, Vec<u8>)>,
    pub last: Millis,
    pub bytes: usize,
    /// The sender sends nothing more.
    pub stopped: bool,
}

impl Pipe {
    pub(crate) fn send(&mut self, bytes: Vec<u8>, rng: &mut Rng, now: Millis) {
        if bytes.is_empty() || self.stopped {
            return;
        }
        let delay = Duration::from_millis(match rng.below(8) {
            0..5 => 0,
            5..7 => rng.below(30),
            _ => rng.below(400),
        });
        self.last = self.last.max(now + delay);
        self.bytes += bytes.len();
        self.chunks.push_back((self.last, bytes));
    }

    /// Cuts off the end of the last packet on the way, and everything after it. Whether there was one.
    pub(crate) fn stop(&mut self) -> bool {
        let Some((_, chunk)) = self.chunks.back_mut() else {
            return false;
        };
        if chunk.pop().is_some() {
            self.bytes -= 1;
        }
        self.stopped = true;
        true
    }

    /// Whether nothing more has arrived now.
    pub(crate) fn is_read(&self, now: Millis) -> bool {
        self.chunks.front().is_none_or(|(at, _)| *at > now)
    }

    /// What arrives now: often not all of it, so that a cut may come at any byte.
    pub(crate) fn receive(&mut self, rng: &mut Rng, now: Millis) -> Vec<u8> {
        let mut out = Vec::new();
        while self.chunks.front().is_some_and(|(at, _)| *at <= now) {
            let Some((_, chunk)) = self.chunks.front_mut() else {
                break;
            };
            if rng.chance(15) {
                let part = rng.below(chunk.len() as u64) as usize;
                out.extend(chunk.drain(..part));
                break;
            }
            if let Some((_, chunk)) = self.chunks.pop_front() {
                out.extend(chunk);
            }
        }
        self.bytes -= out.len();
        out
    }
}
