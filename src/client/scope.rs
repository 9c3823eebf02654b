//! What sets a client's topics and publishes apart: the listener's mount, the sender's properties.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::auth::{Identity, expand};
use crate::config::SenderProperty;
use crate::mqtt::{Property, has_discouraged};
use crate::session::Scope;

use crate::client::{Clients, ListenerContext};

/// Characters of the longest address; a moved client's may be longer than its first.
const ADDRESS_MAX: usize = 39;

/// The scope of a client that is who it says.
///
/// # Errors
/// Why its names cannot be part of a topic.
pub(super) fn scope_of(
    clients: &Clients,
    door: &ListenerContext,
    identity: &Identity,
    peer: SocketAddr,
) -> Result<Option<Arc<Scope>>, &'static str> {
    if door.mount.is_empty() && clients.sender_properties.is_empty() {
        return Ok(None);
    }
    const UNFIT: &str = "the listener's mount needs a user name or client identifier that can stand in a topic: not empty, no wildcard, no /";
    let mount = match door.mount.contains('%') {
        false => Some(door.mount.to_string()),
        true => {
            let whole = expand(&door.mount, identity);
            whole.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok())
        }
    };
    let mount = mount.filter(|m| !has_discouraged(m)).ok_or(UNFIT)?;
    let sender = sender_of(&clients.sender_properties, &door.name, identity, peer);
    Ok(Some(Arc::new(Scope {
        mount: mount.into(),
        sender,
    })))
}

/// What each publish tells of its sender: raw user properties.
fn sender_of(
    wanted: &[SenderProperty],
    listener: &str,
    identity: &Identity,
    peer: SocketAddr,
) -> Box<[u8]> {
    let mut sender = Vec::new();
    let mut tell = |key, value: &str| Property::UserProperty(key, value).write(&mut sender);
    for what in wanted {
        match what {
            // What a core may close the connection for does not go to it.
            SenderProperty::ClientId if has_discouraged(&identity.client_id) => {}
            SenderProperty::ClientId => tell("tidegate-client-id", &identity.client_id),
            SenderProperty::Username => {
                if let Some(user) = identity.verified_user().filter(|u| !has_discouraged(u)) {
                    tell("tidegate-user", user);
                }
            }
            SenderProperty::Listener => tell("tidegate-listener", listener),
            SenderProperty::Address => tell("tidegate-address", &peer.ip().to_string()),
        }
    }
    sender.into()
}

/// What publishes tell of a sender that is at another address now; `None`: nothing of addresses.
pub(super) fn sender_moved(
    clients: &Clients,
    listener: &str,
    identity: &Identity,
    peer: SocketAddr,
) -> Option<Box<[u8]>> {
    let wanted = &clients.sender_properties;
    let told = wanted.contains(&SenderProperty::Address);
    told.then(|| sender_of(wanted, listener, identity, peer))
}

/// Bytes that are added to each publish of a client with this scope, at whatever address.
pub(super) fn room_for(clients: &Clients, scope: Option<&Scope>) -> usize {
    let told = clients.sender_properties.contains(&SenderProperty::Address);
    let own = scope.map_or(0, |s| s.mount.len() + s.sender.len());
    own + if told { ADDRESS_MAX } else { 0 }
}

/// Who a session belongs to: behind another mount the same client is another.
pub(super) fn owner(principal: &Arc<str>, scope: Option<&Scope>) -> Arc<str> {
    match scope {
        Some(scope) if !scope.mount.is_empty() => format!("{principal}\0{}", scope.mount).into(),
        _ => principal.clone(),
    }
}
