//! The fields of packets: integers, strings and binary data, read and written.

use super::WireError;

/// A cursor over a packet's body.
pub(super) struct Reader<'a> {
    packet: &'static str,
    remaining: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(packet: &'static str, body: &'a [u8]) -> Self {
        Self {
            packet,
            remaining: body,
        }
    }

    pub(super) fn fault(&self, what: impl Into<String>) -> WireError {
        error(self.packet, what)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.remaining.is_empty()
    }

    pub(super) fn raw(&mut self, len: usize) -> Result<&'a [u8], WireError> {
        if len > self.remaining.len() {
            return Err(self.fault("it ends too early"));
        }
        let (head, rest) = self.remaining.split_at(len);
        self.remaining = rest;
        Ok(head)
    }

    pub(super) fn sub(&mut self, len: usize) -> Result<Reader<'a>, WireError> {
        Ok(Reader {
            packet: self.packet,
            remaining: self.raw(len)?,
        })
    }

    pub(super) fn remaining(&self) -> usize {
        self.remaining.len()
    }

    pub(super) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.remaining)
    }

    pub(super) fn byte(&mut self) -> Result<u8, WireError> {
        Ok(self.raw(1)?[0])
    }

    pub(super) fn two(&mut self) -> Result<u16, WireError> {
        let b = self.raw(2)?;
        Ok(u16::from_be_bytes([b[0], b[1]]))
    }

    pub(super) fn four(&mut self) -> Result<u32, WireError> {
        let b = self.raw(4)?;
        Ok(u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    pub(super) fn id(&mut self) -> Result<u16, WireError> {
        match self.two()? {
            0 => Err(self.fault("packet identifier 0")),
            id => Ok(id),
        }
    }

    pub(super) fn var(&mut self) -> Result<u32, WireError> {
        let mut n = 0u32;
        for i in 0..4 {
            let byte = self.byte()?;
            n |= u32::from(byte & 0x7F) << (7 * i);
            if byte & 0x80 == 0 {
                if i > 0 && byte == 0 {
                    return Err(self.fault("a variable byte integer is not minimal"));
                }
                return Ok(n);
            }
        }
        Err(self.fault("a variable byte integer is longer than four bytes"))
    }

    pub(super) fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let len = usize::from(self.two()?);
        self.raw(len)
    }

    pub(super) fn text(&mut self) -> Result<&'a str, WireError> {
        let bytes = self.bytes()?;
        match std::str::from_utf8(bytes) {
            Ok(text) if !text.contains('\0') => Ok(text),
            _ => Err(self.fault("a string is not legal UTF-8")),
        }
    }
}

/// Appends a variable byte integer.
pub(super) fn put_var(mut n: u32, out: &mut Vec<u8>) {
    assert!(n < 1 << 28, "a variable byte integer ends at 268,435,455");
    loop {
        let byte = (n & 0x7F) as u8;
        n >>= 7;
        if n == 0 {
            return out.push(byte);
        }
        out.push(byte | 0x80);
    }
}

/// Appends a string or binary data with its two byte length.
pub(super) fn put_bytes(bytes: &[u8], out: &mut Vec<u8>) {
    let len = u16::try_from(bytes.len()).expect("strings of MQTT end at 65,535 bytes");
    out.extend_from_slice(&len.to_be_bytes());
    out.extend_from_slice(bytes);
}

/// A fault of a packet, by the packet type's name.
pub(super) fn error(packet: &'static str, what: impl Into<String>) -> WireError {
    WireError {
        packet,
        what: what.into(),
    }
}
