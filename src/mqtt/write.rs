//! The pieces that every encoder appends; strings too long for a length prefix are cut.

use crate::mqtt::head::{MAX_REMAINING_BYTES, varint_len};
use crate::mqtt::text::{cut, cut_bytes};

#[inline]
pub(crate) fn put_varint(mut value: usize, out: &mut Vec<u8>) {
    debug_assert!(value <= MAX_REMAINING_BYTES);
    while value > 0x7F {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[inline]
pub(crate) fn put_u16(value: u16, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_be_bytes());
}

#[inline]
pub(crate) fn put_u32(value: u32, out: &mut Vec<u8>) {
    out.extend_from_slice(&value.to_be_bytes());
}

#[inline]
pub(crate) fn put_str(s: &str, out: &mut Vec<u8>) {
    put_bytes(cut(s).as_bytes(), out);
}

#[inline]
pub(crate) fn put_bytes(b: &[u8], out: &mut Vec<u8>) {
    let b = cut_bytes(b);
    put_u16(b.len() as u16, out);
    out.extend_from_slice(b);
}

/// Bytes of a string with its length prefix.
#[inline]
pub(crate) fn str_len(s: &str) -> usize {
    2 + cut(s).len()
}

/// Bytes of binary data with its length prefix.
#[inline]
pub(crate) fn bytes_len(b: &[u8]) -> usize {
    2 + cut_bytes(b).len()
}

/// First byte and remaining length; makes room for the whole packet at once.
/// False, with nothing written, if no packet can be that long.
#[inline]
#[must_use]
pub(crate) fn put_head(first: u8, remaining: usize, out: &mut Vec<u8>) -> bool {
    if remaining > MAX_REMAINING_BYTES {
        return false;
    }
    out.reserve(1 + varint_len(remaining) + remaining);
    out.push(first);
    put_varint(remaining, out);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_make_room_at_once() {
        let mut out = Vec::new();
        assert!(put_head(0x30, 300, &mut out));
        assert_eq!(out, [0x30, 0xAC, 0x02]);
        assert!(out.capacity() >= 303);
        assert!(!put_head(0x30, MAX_REMAINING_BYTES + 1, &mut out));
        assert_eq!(out.len(), 3);
    }

    #[test]
    fn too_long_is_cut_not_broken() {
        let mut out = Vec::new();
        put_str(&"x".repeat(70_000), &mut out);
        assert_eq!((out.len(), &out[..2]), (65_537, &[0xFF, 0xFF][..]));
        assert_eq!(str_len(&"x".repeat(70_000)), 65_537);
        assert_eq!(bytes_len(&[0; 3]), 5);
    }
}
