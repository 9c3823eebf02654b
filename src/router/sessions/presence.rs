//! Tells the core's subscribers when clients come and go.

use serde::Serialize;

use crate::mqtt::{Message, MessageSpec, Properties, QoS, has_discouraged};
use crate::telemetry::{RateLimited, clean, metrics};
use crate::time::Millis;

use crate::router::Router;
use crate::router::publish::ClientPublish;
use crate::router::types::{Peer, SessionRef};

/// Clients that cannot be named in a topic.
static UNFIT: RateLimited = RateLimited::new(std::time::Duration::from_secs(60));

/// The payload, as JSON.
#[derive(Serialize)]
struct Presence<'a> {
    client_id: &'a str,
    online: bool,
    /// Unix time, milliseconds; rises with each that this process tells.
    at: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    listener: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    transport: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    address: Option<String>,
}

impl Router {
    /// Publishes that a client is here, at `place`, or away.
    pub(in crate::router) fn tell_presence(
        &self,
        session: SessionRef,
        link: u8,
        client_id: &str,
        place: Option<&Peer>,
        now: Millis,
    ) {
        // Held until it is handed over: what is true then is told, and the later one has the later time.
        let mut told = self.told.lock();
        // It came back before its absence could be told, or the reverse.
        if place.is_some() != self.session(client_id).is_some_and(|s| s.attached) {
            return;
        }
        if client_id.contains(['+', '#', '/']) || has_discouraged(client_id) {
            if let Some(suppressed) = UNFIT.permit(now) {
                tracing::warn!(
                    client_id = %clean(client_id, 256),
                    suppressed,
                    "A client's coming and going is not told: its identifier cannot be part of a topic"
                );
            }
            return;
        }
        let account = &self.limits.publish_account;
        if account.used() > self.config.publishes_waiting {
            metrics().messages_dropped[crate::telemetry::DropReason::UpstreamBudget].increment(1);
            return;
        }
        *told = (*told + 1).max(self.config.started_at + now);
        let payload = serde_json::to_vec(&Presence {
            client_id,
            online: place.is_some(),
            at: *told,
            listener: place.map(|p| &*p.listener),
            transport: place.map(|p| p.transport),
            address: place.map(|p| p.address.ip().to_string()),
        })
        // Strings and a truth value.
        .unwrap_or_default();
        let message = Message::new(&MessageSpec {
            topic: &self.config.presence_topic.replace("%c", client_id),
            properties: Properties::default(),
            payload: &payload,
            qos: QoS::AtLeastOnce.min(self.maximum_qos()),
            retain: false,
            expires_at: u64::MAX,
            strip_key: None,
            account: Some(account.clone()),
        });
        let publish = ClientPublish {
            token: None,
            message,
            origin_mark: None,
        };
        self.publish(session, link, publish, now);
    }
}
