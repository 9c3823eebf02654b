//! Rules for `[session]` and `[limits]`.

use std::time::Duration;

use crate::config::check::checker::{Checker, HOUR, KEEPALIVE, SECOND, YEAR};
use crate::config::check::topics::plain_topic;
use crate::config::types::Config;

/// The largest remaining length of an MQTT packet and its fixed header.
const MQTT_PACKET_MAX_BYTES: u32 = 268_435_455 + 5;

impl Checker<'_, '_> {
    pub(super) fn session(&mut self, config: &Config) {
        let session = &config.session;
        // 0xFFFFFFFF is "never" on the wire [MQTT5 3.1.2.11.2].
        let longest = Duration::from_secs(u64::from(u32::MAX) - 1);
        self.range_time(
            "session.expiry_max",
            session.expiry_max,
            Duration::ZERO..=longest,
        );
        for (key, value) in [
            ("session.expiry_max", Some(session.expiry_max)),
            ("session.expiry_v3", Some(session.expiry_v3)),
            ("session.keepalive_max", session.keepalive_max),
            ("session.keepalive_default", session.keepalive_default),
        ] {
            if let Some(value) = value {
                self.whole_seconds(key, value);
            }
        }
        if session.expiry_v3 > session.expiry_max {
            self.say("session.expiry_v3", "longer than session.expiry_max");
        }
        self.range(
            "session.queue_messages_max",
            session.queue_messages_max,
            1..=1_000_000,
        );
        let least = 1024;
        self.range(
            "session.queue_bytes_max",
            session.queue_bytes_max,
            least..=u64::from(u32::MAX),
        );
        for (key, value) in [
            ("session.keepalive_max", session.keepalive_max),
            ("session.keepalive_default", session.keepalive_default),
        ] {
            if let Some(value) = value {
                self.range_time(key, value, KEEPALIVE);
            }
        }
        if let (Some(default), Some(max)) = (session.keepalive_default, session.keepalive_max)
            && default > max
        {
            self.say(
                "session.keepalive_default",
                "longer than session.keepalive_max",
            );
        }
        let minute = Duration::from_secs(60);
        self.range_time(
            "session.will_grace",
            session.will_grace,
            Duration::ZERO..=minute,
        );
        self.range_time(
            "session.restart_grace",
            session.restart_grace,
            SECOND..=HOUR,
        );
        let topic = &session.presence_topic;
        let fit = topic.is_empty()
            || (topic.contains("%c")
                && plain_topic(&topic.replace("%c", "c"))
                && !topic.contains("%u"));
        if !fit {
            self.say(
                "session.presence_topic",
                "must be a topic name without wildcards in which %c stands for the client id",
            );
        }
        self.range_time(
            "session.shared_redeliver_after",
            session.shared_redeliver_after,
            Duration::ZERO..=YEAR,
        );
        if let Some(age) = session.queue_age_max {
            self.range_time("session.queue_age_max", age, SECOND..=YEAR * 100);
        }
        if let Some(after) = session.evict_after {
            self.range_time("session.evict_after", after, SECOND..=YEAR * 100);
            if after >= session.expiry_max {
                let message = "not shorter than session.expiry_max, after which every session ends";
                self.say("session.evict_after", message);
            }
        }
    }

    pub(super) fn limits(&mut self, config: &Config) {
        let limits = &config.limits;
        self.range(
            "limits.packet_max",
            limits.packet_max,
            1024..=MQTT_PACKET_MAX_BYTES,
        );
        self.range("limits.connect_max", limits.connect_max, 1024..=1 << 20);
        self.range(
            "limits.connections_max",
            limits.connections_max.value(),
            1..=10_000_000,
        );
        self.range(
            "limits.connect_rate_max",
            limits.connect_rate_max,
            1..=10_000_000,
        );
        self.range("limits.receive_max", limits.receive_max, 1..=65535);
        self.range(
            "limits.receive_max_hard",
            limits.receive_max_hard,
            1..=65535,
        );
        let subscriptions = limits.subscriptions_per_client_max;
        self.range(
            "limits.subscriptions_per_client_max",
            subscriptions,
            1..=1_000_000,
        );
        self.range(
            "limits.topic_levels_max",
            limits.topic_levels_max,
            1..=65535,
        );
        self.range(
            "limits.handshakes_max",
            limits.handshakes_max,
            1..=1_000_000,
        );
        let ms = Duration::from_millis(1);
        for (key, value) in [
            ("limits.accept_deadline", limits.accept_deadline),
            ("limits.packet_deadline", limits.packet_deadline),
            ("limits.write_stall", limits.write_stall),
        ] {
            self.range_time(key, value, ms..=HOUR);
        }
        self.range(
            "limits.output_buffer",
            limits.output_buffer,
            1024..=16 << 20,
        );
    }
}
