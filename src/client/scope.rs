//! The scope that sets a client's topics and publishes apart: the listener's mount, and the user
//! properties that name the sender.

use std::net::SocketAddr;
use std::sync::Arc;

use crate::auth::{Identity, expand};
use crate::config::SenderProperty;
use crate::mqtt::{Property, has_discouraged};
use crate::session::Scope;

use crate::client::{Clients, ListenerContext};

/// The longest address. A client may move to an address that is longer than its first.
const ADDRESS_MAX_BYTES: usize = 39;

/// The listener's mount needs a name of the client that cannot be part of a topic.
pub(super) struct UnfitName;

/// The scope of an authenticated client, if it has one.
///
/// # Errors
/// See [`UnfitName`].
pub(super) fn scope_of(
    clients: &Clients,
    door: &ListenerContext,
    identity: &Identity,
    peer: SocketAddr,
) -> Result<Option<Arc<Scope>>, UnfitName> {
    if door.mount.is_empty() && clients.sender_properties.is_empty() {
        return Ok(None);
    }
    let mount = match door.mount.contains('%') {
        false => Some(door.mount.to_string()),
        true => {
            let whole = expand(&door.mount, identity);
            whole.and_then(|bytes| String::from_utf8(bytes.to_vec()).ok())
        }
    };
    let mount = mount.filter(|m| !has_discouraged(m)).ok_or(UnfitName)?;
    let sender = sender_of(&clients.sender_properties, &door.name, identity, peer);
    Ok(Some(Arc::new(Scope {
        mount: mount.into(),
        sender,
    })))
}

/// The raw user properties that name the sender in each publish.
fn sender_of(
    wanted: &[SenderProperty],
    listener: &str,
    identity: &Identity,
    peer: SocketAddr,
) -> Box<[u8]> {
    let mut sender = Vec::new();
    let mut add = |key, value: &str| Property::UserProperty(key, value).write(&mut sender);
    for what in wanted {
        match what {
            // A broker may close the connection for such characters.
            SenderProperty::ClientId if has_discouraged(&identity.client_id) => {}
            SenderProperty::ClientId => add("tidegate-client-id", &identity.client_id),
            SenderProperty::Username => {
                if let Some(user) = identity.verified_user().filter(|u| !has_discouraged(u)) {
                    add("tidegate-user", user);
                }
            }
            SenderProperty::Listener => add("tidegate-listener", listener),
            SenderProperty::Address => add("tidegate-address", &peer.ip().to_string()),
        }
    }
    sender.into()
}

/// The user properties that name a sender whose address has changed; `None`: they name no address.
pub(super) fn sender_moved(
    clients: &Clients,
    listener: &str,
    identity: &Identity,
    peer: SocketAddr,
) -> Option<Box<[u8]>> {
    let wanted = &clients.sender_properties;
    let names_address = wanted.contains(&SenderProperty::Address);
    names_address.then(|| sender_of(wanted, listener, identity, peer))
}

/// Bytes that are added to each publish of a client with this scope, at most, whatever its address.
pub(super) fn added_bytes(clients: &Clients, scope: Option<&Scope>) -> u32 {
    let names_address = clients.sender_properties.contains(&SenderProperty::Address);
    // The mount stands before the topic and before the Response Topic.
    let own = scope.map_or(0, |s| 2 * s.mount.len() + s.sender.len());
    let address = if names_address { ADDRESS_MAX_BYTES } else { 0 };
    // Mount and properties are each shorter than 64 KiB.
    (own + address) as u32
}
