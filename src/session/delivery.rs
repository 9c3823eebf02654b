//! One PUBLISH toward the client.

use crate::budget::Allowance;
use crate::mqtt::{Alias, Delivery, Message};
use crate::outbuf::SharedBytes;
use crate::time::Millis;

use crate::session::connection::Connection;
use crate::session::entry::Offer;

/// A part of a message of this size is shared by the connections that send it, and copied for none.
const SHARED_MIN_BYTES: usize = 16 * 1024;

/// While the budget of all output is exhausted, smaller parts are shared too.
const PRESSED_SHARED_MIN_BYTES: usize = 512;

/// The output that each connection may have while the budget of all output is exhausted, before the
/// last message is added: no client waits for others that do not read.
const PRESSED_OUTPUT_BYTES: usize = 1024;

/// Room for a packet's head beside the topic.
const HEAD_BYTES: usize = 64;

/// The end of a message that is shared by the outputs of several connections.
#[derive(Debug)]
struct MessageEnd {
    message: Message,
    bytes: usize,
}

impl SharedBytes for MessageEnd {
    fn bytes(&self) -> &[u8] {
        self.message.end(self.bytes)
    }
}

/// The leave to add one message to a connection's output.
#[derive(Clone, Copy, Debug)]
pub(super) struct Leave {
    /// A part of the message with as many bytes is shared.
    shared_min_bytes: usize,
}

/// Asks the budget of all output for the bytes of a message. `None`: the message has to wait.
pub(super) fn leave_for(
    connection: &Connection,
    message: &Message,
    output: &mut Allowance,
) -> Option<Leave> {
    let (whole, end) = (message.size(), message.tail().len());
    let copied = match end >= SHARED_MIN_BYTES {
        true => whole - end,
        false => whole,
    };
    if output.ask(copied + HEAD_BYTES) {
        return Some(Leave {
            shared_min_bytes: SHARED_MIN_BYTES,
        });
    }
    (connection.own_output_len() < PRESSED_OUTPUT_BYTES).then_some(Leave {
        shared_min_bytes: PRESSED_SHARED_MIN_BYTES,
    })
}

/// Encodes one PUBLISH. False: it is larger than the client's Maximum Packet Size [MQTT-3.1.2-24].
pub(super) fn write_to(
    connection: &mut Connection,
    now: Millis,
    offer: &Offer<'_>,
    (packet_id, dup): (u16, bool),
    leave: Leave,
) -> bool {
    let Offer {
        message,
        qos,
        retain,
        ids,
        group: _,
        stream,
        fetched: _,
        position: _,
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
    if nameless || !connection.accepts(|| delivery.size(message)) {
        return false;
    }
    if connection.aliases.are_accepted() {
        // The definition of an alias enlarges the packet, and with it perhaps a length field.
        delivery.alias = Alias::Define(1);
        delivery.alias = match connection.accepts(|| delivery.size(message)) {
            true => connection.aliases.for_delivery(message.topic(), stream),
            false => Alias::None,
        };
    }
    let output = connection.outbuf_on(stream);
    if message.tail().len() < leave.shared_min_bytes {
        delivery.encode(message, &mut output.buf);
        return true;
    }
    let bytes = delivery.encode_head(message, &mut output.buf);
    let message = message.clone();
    output.share(Box::new(MessageEnd { message, bytes }));
    true
}
