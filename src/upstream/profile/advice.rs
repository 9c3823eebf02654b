//! Advice to the operator: settings at the broker that are worth a change.

use crate::upstream::profile::{BrokerProfile, Mapping, WINDOW_PROBED};

/// A broker that takes fewer unacknowledged publishes limits the throughput of a publish link.
const RECEIVE_MAXIMUM_AMPLE: u16 = 100;

impl BrokerProfile {
    /// Settings of the broker that are worth a change, with what each prevents.
    pub(crate) fn advice(&self) -> Vec<String> {
        let mut advice = Vec::new();
        let software = self.software.as_deref().map(str::to_lowercase);
        let unknown = software.is_none();
        let mosquitto = software.is_some_and(|name| name.contains("mosquitto"));
        let mut add = |text: &str| advice.push(text.to_owned());
        if self.quirks.window.is_some_and(|w| w < WINDOW_PROBED) {
            add(match mosquitto {
                true => {
                    "max_inflight_messages 65535 (mosquitto.conf): the broker sends few messages at a time, and drops messages that do not fit its queue"
                }
                false => {
                    "the broker's send window is small; raise it: mosquitto max_inflight_messages 65535, EMQX mqtt.max_inflight 65535, RabbitMQ mqtt.prefetch 1000, VerneMQ max_inflight_messages 0"
                }
            });
        }
        if mosquitto || unknown {
            add(
                "mosquitto: max_queued_messages 0 and max_queued_bytes 0 (or ample): a message that does not fit the queue of a link is dropped though its publisher was acknowledged",
            );
            add(
                "mosquitto: persistence true, and persistent_client_expiration at least 1h: the links' sessions then outlive a restart",
            );
        }
        if self.quirks.nodelay == Some(false) {
            add(match mosquitto {
                true => "set_tcp_nodelay true (mosquitto.conf): lower latency under light load",
                false => {
                    "the broker holds small packets back until earlier ones are acknowledged; mosquitto: set_tcp_nodelay true"
                }
            });
        }
        if unknown {
            add("EMQX: mqtt.max_mqueue_len infinity, mqtt.session_expiry_interval at least 1h");
            add(
                "HiveMQ: mqtt.queued-messages above 1000; VerneMQ: max_online_messages -1, max_offline_messages -1, topic_max_depth",
            );
            add(
                "RabbitMQ: mqtt.prefetch 1000; no shared subscriptions, no retained messages for wildcards, QoS 2 becomes 1",
            );
            add("AWS IoT Core: upstream.roots, for 50 filters a connection; QoS 2 does not exist");
        }
        let receive_maximum = self.capabilities.receive_maximum;
        if receive_maximum < RECEIVE_MAXIMUM_AMPLE {
            add(&format!(
                "the broker takes {receive_maximum} unacknowledged publishes a connection; upstream.publish_links multiplies it"
            ));
        }
        if self.mapping() == Mapping::DisjointPlacement {
            add(
                "without working Subscription Identifiers filters that overlap one another need links of their own: upstream.data_links \"auto\", or upstream.roots",
            );
        }
        advice
    }
}
