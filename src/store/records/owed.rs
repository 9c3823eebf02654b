//! The messages that a session is owed, in its record.

use crate::time::UnixMillis;

use super::ContentRecord;
use super::fields::{Reader, Writer};

/// How far the delivery of a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwedStage {
    /// It waits.
    Waiting,
    /// It waits, and is a retained message that was fetched.
    Fetched,
    /// It was sent with this packet identifier.
    Sent(u16),
    /// The client has it, and PUBREL was sent with this packet identifier.
    Released(u16),
}

/// A message that a session is owed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OwedMessage<'a> {
    /// None: the client has it.
    Had,
    /// The message with this sequence number, which has a record of its own.
    Sequence(u64),
    /// A message that has no record of its own, and the time when it expires.
    Content(ContentRecord<'a>, Option<UnixMillis>),
}

/// A delivery that a session is owed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwedRecord<'a> {
    /// The message.
    pub message: OwedMessage<'a>,
    /// How far it is.
    pub stage: OwedStage,
    /// The QoS of the delivery: 0, 1 or 2.
    pub qos: u8,
    /// RETAIN of the delivery.
    pub retain: bool,
    /// The client's Subscription Identifiers.
    pub identifiers: Vec<u32>,
    /// The filter of the shared subscription that it is for.
    pub group: Option<&'a str>,
}

const RETAIN: u8 = 1 << 2;
const GROUP: u8 = 1 << 3;
const STAGE: u8 = 4;
const MESSAGE: u8 = 6;

const EXPIRES: u8 = 1;

impl<'a> OwedRecord<'a> {
    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        let (stage, id) = match self.stage {
            OwedStage::Waiting => (0, None),
            OwedStage::Fetched => (1, None),
            OwedStage::Sent(id) => (2, Some(id)),
            OwedStage::Released(id) => (3, Some(id)),
        };
        let message = match self.message {
            OwedMessage::Had => 0,
            OwedMessage::Sequence(_) => 1,
            OwedMessage::Content(..) => 2,
        };
        let retain = if self.retain { RETAIN } else { 0 };
        let group = self.group.map_or(0, |_| GROUP);
        w.u8(self.qos | retain | group | stage << STAGE | message << MESSAGE);
        if let Some(id) = id {
            w.u16(id);
        }
        match self.message {
            OwedMessage::Had => {}
            OwedMessage::Sequence(sequence) => w.u64(sequence),
            OwedMessage::Content(content, expires_at) => {
                w.u8(expires_at.map_or(0, |_| EXPIRES));
                if let Some(at) = expires_at {
                    w.u64(at.as_u64());
                }
                content.encode(w);
            }
        }
        w.u32(self.identifiers.len() as u32);
        for identifier in &self.identifiers {
            w.u32(*identifier);
        }
        if let Some(group) = self.group {
            w.bytes(group.as_bytes());
        }
    }

    pub(super) fn read(r: &mut Reader<'a>) -> Option<Self> {
        let flags = r.u8()?;
        let stage = match flags >> STAGE & 3 {
            0 => OwedStage::Waiting,
            1 => OwedStage::Fetched,
            2 => OwedStage::Sent(r.u16()?),
            _ => OwedStage::Released(r.u16()?),
        };
        let qos = Some(flags & 3).filter(|qos| *qos < 3)?;
        let message = match flags >> MESSAGE {
            0 => OwedMessage::Had,
            1 => OwedMessage::Sequence(r.u64()?),
            2 => {
                let flags = r.u8().filter(|flags| flags & !EXPIRES == 0)?;
                let expires_at = match flags {
                    0 => None,
                    _ => Some(UnixMillis::new(r.u64()?)),
                };
                OwedMessage::Content(ContentRecord::read(r)?, expires_at)
            }
            _ => return None,
        };
        let identifiers = r.u32()?;
        let identifiers = (0..identifiers).map(|_| r.u32());
        let identifiers = identifiers.collect::<Option<_>>()?;
        let group = match flags & GROUP {
            0 => None,
            _ => Some(r.text()?),
        };
        Some(Self {
            message,
            stage,
            qos,
            retain: flags & RETAIN != 0,
            identifiers,
            group,
        })
    }
}
