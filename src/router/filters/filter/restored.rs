//! A filter that an earlier process has left at the broker.

use crate::mqtt::QoS;
use crate::router::filters::filter::{Filter, Phase, Placement, Standing};
use crate::store::records::FilterState;

impl Filter {
    /// A filter that nobody uses yet is at the broker, on this link, as its record says.
    pub(crate) fn restore(&mut self, link: u8, asked: QoS, state: FilterState) {
        self.placement = Placement::Link(link);
        self.wanted = asked;
        self.asked = Some(asked);
        let (phase, granted) = match state {
            FilterState::Asked => (Phase::Pending, None),
            FilterState::Granted(qos) => (Phase::Active { raising: false }, Some(qos)),
            FilterState::Rising(qos) => (Phase::Active { raising: true }, Some(qos)),
            FilterState::Leaving => (Phase::Unsubscribing, None),
        };
        self.phase = phase;
        self.granted = granted.and_then(QoS::from_u8);
        if self.granted.is_some() {
            self.standing = Standing::Granted;
        }
    }
}
