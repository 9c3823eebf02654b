//! The messages that a backlog has dropped, by the limit.

use crate::telemetry::DropReason;

/// Why a message of a filter is not in its backlog, or not any longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::router::sessions) enum Reason {
    /// `session.queue_messages_max`.
    Messages,
    /// `session.queue_bytes_max`.
    Bytes,
    /// The budget of all queues.
    Budget,
    Expired,
    /// `session.queue_age_max`.
    Age,
    /// Messages of QoS 0 are not kept.
    Qos0,
}

const REASONS: [Reason; 6] = [
    Reason::Messages,
    Reason::Bytes,
    Reason::Budget,
    Reason::Expired,
    Reason::Age,
    Reason::Qos0,
];

impl Reason {
    fn label(self) -> DropReason {
        match self {
            Self::Messages => DropReason::QueueFull,
            Self::Bytes => DropReason::QueueBytes,
            Self::Budget => DropReason::Budget,
            Self::Expired => DropReason::Expired,
            Self::Age => DropReason::Age,
            Self::Qos0 => DropReason::Qos0Offline,
        }
    }
}

/// Numbers of messages, by the reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(in crate::router::sessions) struct Lost([u64; REASONS.len()]);

impl Lost {
    pub(in crate::router::sessions) fn add(&mut self, reason: Reason, count: u64) {
        self.0[reason as usize] += count;
    }

    pub(in crate::router::sessions) fn add_all(&mut self, other: Self) {
        for (sum, count) in self.0.iter_mut().zip(other.0) {
            *sum += count;
        }
    }

    pub(in crate::router::sessions) fn sum(&self) -> u64 {
        self.0.iter().sum()
    }

    /// The numbers by the labels of the metrics.
    pub(in crate::router::sessions) fn by_label(&self) -> impl Iterator<Item = (DropReason, u64)> {
        REASONS.iter().map(|r| r.label()).zip(self.0)
    }

    /// These messages are among `total`: about how many are among `part` of those.
    pub(super) fn part(&self, part: u64, total: u64) -> Self {
        let mut counts = [0; REASONS.len()];
        // The sums are rounded, so that nothing is left over if all are among these.
        let (mut sum, mut given) = (0, 0);
        for (part_of, count) in counts.iter_mut().zip(self.0) {
            sum += count;
            let part = part.min(total);
            let next = u128::from(sum) * u128::from(part) / u128::from(total.max(1));
            // No more than `part`.
            let next = next as u64;
            *part_of = next - given;
            given = next;
        }
        Self(counts)
    }
}
