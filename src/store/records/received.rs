//! The messages of QoS 2 that links have received from the broker, in the log.

use super::fields::{Reader, Writer};
use super::{RECORDS_VERSION, RecordError, versioned};

/// A link has received a message of QoS 2, which the broker may send again until it releases it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkReceived {
    /// The number of the link.
    pub link: u16,
    /// The packet identifier.
    pub packet_id: u16,
    /// A digest of the message.
    pub digest: u64,
}

/// The broker has released a message of QoS 2 of a link, or has forgotten all of the link's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkReleased {
    /// The number of the link.
    pub link: u16,
    /// The packet identifier; `None`: all.
    pub packet_id: Option<u16>,
}

impl LinkReceived {
    pub(super) fn encode(&self, w: &mut Writer<'_>) {
        w.u16(self.link);
        w.u16(self.packet_id);
        w.u64(self.digest);
    }

    pub(super) fn read(r: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            link: r.u16()?,
            packet_id: r.u16()?,
            digest: r.u64()?,
        })
    }
}

impl LinkReleased {
    /// The body of the record. No message has the packet identifier 0.
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::with_capacity(5);
        let mut w = Writer(&mut body);
        w.u8(RECORDS_VERSION);
        w.u16(self.link);
        w.u16(self.packet_id.unwrap_or(0));
        body
    }

    /// Reads the body of a record.
    ///
    /// # Errors
    /// [`RecordError`].
    pub fn decode(body: &[u8]) -> Result<Self, RecordError> {
        let mut r = versioned(body)?;
        let (Some(link), Some(packet_id)) = (r.u16(), r.u16()) else {
            return Err(RecordError::Malformed);
        };
        match r.is_empty() {
            true => Ok(Self {
                link,
                packet_id: (packet_id != 0).then_some(packet_id),
            }),
            false => Err(RecordError::Malformed),
        }
    }
}
