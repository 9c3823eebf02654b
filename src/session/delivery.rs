//! One PUBLISH toward the client.

use crate::mqtt::{Alias, Delivery};
use crate::time::Millis;

use crate::session::connection::Connection;
use crate::session::entry::Offer;

/// Encodes one PUBLISH. False: it is larger than the client's Maximum Packet Size [MQTT-3.1.2-24].
pub(super) fn write_to(
    connection: &mut Connection,
    now: Millis,
    offer: &Offer<'_>,
    packet_id: u16,
    dup: bool,
) -> bool {
    let Offer {
        message,
        qos,
        retain,
        ids,
        group: _,
        stream,
        fetched: _,
    } = *offer;
    let mut delivery = Delivery {
        version: connection.version,
        dup,
        qos,
        retain,
        packet_id,
        alias: Alias::None,
        message_expiry: message.remaining_expiry(now),
        subscription_ids: ids,
        user_property: None,
        hidden: connection
            .scope
            .as_ref()
            .map_or(0, |s| s.mount.len() as u16),
    };
    // `#` below the mount also matches the mount itself, which has no name in the client's view.
    let hidden = usize::from(delivery.hidden);
    let nameless = hidden > 0 && message.topic().len() <= hidden;
    if nameless || !connection.accepts(delivery.size(message)) {
        return false;
    }
    // The definition of an alias enlarges the packet, and with it perhaps a length field.
    delivery.alias = Alias::Define(1);
    delivery.alias = match connection.accepts(delivery.size(message)) {
        true => connection.aliases.for_delivery(message.topic(), stream),
        false => Alias::None,
    };
    delivery.encode(message, connection.output_on(stream));
    true
}
