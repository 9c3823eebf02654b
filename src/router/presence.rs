//! Publishes to the broker's subscribers when clients come and go.

use parking_lot::Mutex;
use serde::Serialize;

use crate::mqtt::{Message, MessageSpec, Properties, QoS, has_discouraged};
use crate::telemetry::{RateLimited, clean};
use crate::time::{Millis, UnixMillis};

use crate::router::publish::Publishing;
use crate::router::sessions::{PresenceChange, Sessions};

/// Clients that cannot be named in a topic.
static UNFIT: RateLimited = RateLimited::new(std::time::Duration::from_secs(60));

/// The payload, as JSON.
#[derive(Serialize)]
struct Payload<'a> {
    client_id: &'a str,
    #[serde(skip_serializing_if = "str::is_empty")]
    mount: &'a str,
    online: bool,
    /// Unix time, milliseconds; rises with each payload of this process.
    at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    listener: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    transport: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

/// The publishing of clients' presence.
#[derive(Debug)]
pub(super) struct Presence {
    /// The topic, `%c` being the client identifier.
    topic: String,
    /// The time of day when the clock was at zero.
    started_at: UnixMillis,
    /// The time of day of the last presence that was published.
    last_presence_at: Mutex<UnixMillis>,
}

impl Presence {
    pub(super) fn new(topic: String, started_at: UnixMillis) -> Self {
        Self {
            topic,
            started_at,
            last_presence_at: Mutex::default(),
        }
    }

    /// Publishes that a client is here, or away, at `qos`.
    pub(super) fn publish(
        &self,
        sessions: &Sessions,
        publishing: &Publishing,
        change: &PresenceChange,
        qos: QoS,
        now: Millis,
    ) {
        let client_id = change.key.client_id();
        let online = change.peer.is_some();
        // Locked until the message is handed over: it is true then, and a later one has a later time.
        let mut last = self.last_presence_at.lock();
        // The client came back before its absence could be published, or the reverse.
        if online != sessions.is_attached(&change.key) {
            return;
        }
        if client_id.contains(['+', '#', '/']) || has_discouraged(client_id) {
            if let Some(suppressed) = UNFIT.permit(now) {
                tracing::warn!(
                    client_id = %clean(client_id, 256),
                    suppressed,
                    "A client's presence is not published: its identifier cannot be part of a topic"
                );
            }
            return;
        }
        if !publishing.has_room() {
            return;
        }
        *last = last.next().max(self.started_at.at(now));
        let payload = payload(change, *last);
        let message = Message::new(&MessageSpec {
            topic: &self.topic.replace("%c", client_id),
            properties: Properties::default(),
            payload: &payload,
            qos,
            retain: false,
            expires_at: None,
            strip_key: None,
            account: Some(publishing.account().clone()),
        });
        let (session, link) = (change.session, change.publish_link);
        publishing.publish_own(sessions, session, link, message, now);
    }
}

fn payload(change: &PresenceChange, at: UnixMillis) -> Vec<u8> {
    let peer = change.peer.as_deref();
    serde_json::to_vec(&Payload {
        client_id: change.key.client_id(),
        mount: change.key.mount(),
        online: peer.is_some(),
        at: at.as_u64(),
        listener: peer.map(|p| &*p.listener),
        transport: peer.map(|p| p.transport),
        address: peer.map(|p| p.address.ip().to_string()),
    })
    // Strings, a number and a truth value can always be written.
    .unwrap_or_default()
}
