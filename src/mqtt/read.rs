//! A cursor over a packet's body; nothing is copied.

use crate::mqtt::Error;
use crate::mqtt::head::read_varint;
use crate::mqtt::text;

const SHORT: Error = Error::Malformed("packet ends inside a field");

/// The rest of a body. Every read takes from the front.
#[derive(Clone, Copy)]
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    #[inline]
    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    #[inline]
    pub(crate) fn take(&mut self, n: usize) -> Result<&'a [u8], Error> {
        let (taken, rest) = self.0.split_at_checked(n).ok_or(SHORT)?;
        self.0 = rest;
        Ok(taken)
    }

    /// The rest of the body.
    #[inline]
    pub(crate) fn rest(&mut self) -> &'a [u8] {
        std::mem::take(&mut self.0)
    }

    #[inline]
    pub(crate) fn u8(&mut self) -> Result<u8, Error> {
        let (&byte, rest) = self.0.split_first().ok_or(SHORT)?;
        self.0 = rest;
        Ok(byte)
    }

    #[inline]
    pub(crate) fn u16(&mut self) -> Result<u16, Error> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(SHORT)?;
        self.0 = rest;
        Ok(u16::from_be_bytes(*bytes))
    }

    #[inline]
    pub(crate) fn u32(&mut self) -> Result<u32, Error> {
        let (bytes, rest) = self.0.split_first_chunk().ok_or(SHORT)?;
        self.0 = rest;
        Ok(u32::from_be_bytes(*bytes))
    }

    /// A variable byte integer of MQTT 5, which is always minimal.
    #[inline]
    pub(crate) fn varint(&mut self) -> Result<u32, Error> {
        let read = read_varint(self.0)?.ok_or(SHORT)?;
        if !read.is_minimal() {
            return Err(Error::Malformed(
                "variable byte integer is not minimal [MQTT-1.5.5-1]",
            ));
        }
        self.0 = &self.0[read.len..];
        Ok(read.value)
    }

    /// Binary data with its two byte length.
    #[inline]
    pub(crate) fn binary(&mut self) -> Result<&'a [u8], Error> {
        let len = self.u16()?;
        self.take(usize::from(len))
    }

    /// A UTF-8 encoded string with its two byte length.
    #[inline]
    pub(crate) fn string(&mut self) -> Result<&'a str, Error> {
        text::utf8(self.binary()?)
    }

    /// A string that is checked, but not wanted now.
    #[inline]
    pub(crate) fn skip_string(&mut self) -> Result<(), Error> {
        text::check(self.binary()?)
    }

    /// A packet identifier, never zero ([MQTT-2.2.1-3], [MQTT-2.2.1-4]).
    #[inline]
    pub(crate) fn packet_id(&mut self) -> Result<u16, Error> {
        match self.u16()? {
            0 => Err(Error::Protocol("packet identifier 0 [MQTT-2.2.1-3]")),
            id => Ok(id),
        }
    }

    /// Checks that no bytes follow the last field.
    #[inline]
    pub(crate) fn end(&self) -> Result<(), Error> {
        if self.is_empty() {
            Ok(())
        } else {
            Err(Error::Malformed("bytes after the last field"))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_from_the_front() {
        let mut r = Reader(b"\x01\x02\x03\0\0\0\x04\x80\x01\0\x01a\0\x02\xFF\0rest");
        assert_eq!((r.u8(), r.u16(), r.u32()), (Ok(1), Ok(0x0203), Ok(4)));
        assert_eq!((r.varint(), r.string()), (Ok(128), Ok("a")));
        assert_eq!(r.binary(), Ok(&b"\xFF\0"[..]));
        assert!(r.end().is_err());
        assert_eq!(r.rest(), b"rest");
        assert!(r.end().is_ok() && r.u8().is_err() && r.varint().is_err());
    }

    #[test]
    fn short_fields_are_malformed() {
        assert_eq!(Reader(b"\0").u16(), Err(SHORT));
        assert_eq!(Reader(b"\0\0\0").u32(), Err(SHORT));
        assert_eq!(Reader(b"\0\x02a").binary(), Err(SHORT));
        assert_eq!(Reader(b"\x80").varint(), Err(SHORT));
        assert!(Reader(b"\x80\0").varint().is_err() && Reader(b"\0\0").packet_id().is_err());
    }
}
