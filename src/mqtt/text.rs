//! UTF-8 encoded strings (MQTT 5 §1.5.4).

use super::Error;

/// The longest string or binary field, in bytes.
pub(crate) const MAX_FIELD: usize = u16::MAX as usize;

/// Checks [MQTT-1.5.4-1] and [MQTT-1.5.4-2]. A BOM is data and stays ([MQTT-1.5.4-3]).
#[inline]
pub(crate) fn utf8(bytes: &[u8]) -> Result<&str, Error> {
    // U+0000 is the byte 0 and nothing else in UTF-8.
    if has_nul(bytes) {
        return Err(Error::Malformed("string with U+0000 [MQTT-1.5.4-2]"));
    }
    std::str::from_utf8(bytes).map_err(|_| Error::Malformed("string is not UTF-8 [MQTT-1.5.4-1]"))
}

/// Cuts a string of our own to what a length prefix can say, at a character boundary.
pub(crate) fn cut(s: &str) -> &str {
    &s[..s.floor_char_boundary(MAX_FIELD)]
}

/// Cuts binary data of our own to what a length prefix can say.
pub(crate) fn cut_bytes(b: &[u8]) -> &[u8] {
    &b[..b.len().min(MAX_FIELD)]
}

// A fold without early exit, so that the compiler vectorises it.
#[inline]
fn has_nul(bytes: &[u8]) -> bool {
    bytes.iter().fold(false, |found, &b| found | (b == 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_judged() {
        assert_eq!(
            utf8("\u{FEFF}a\u{10FFFF}".as_bytes()),
            Ok("\u{FEFF}a\u{10FFFF}")
        );
        for bad in [
            &b"a\0b"[..],
            b"\xC3\x28",
            b"\xED\xA0\x80",
            b"\xC0\x80",
            b"\xF4\x90\x80\x80",
        ] {
            assert!(matches!(utf8(bad), Err(Error::Malformed(_))), "{bad:?}");
        }
    }

    #[test]
    fn cuts_at_a_boundary() {
        let long = "é".repeat(40_000);
        let kept = cut(&long);
        assert_eq!(kept.len(), 65_534);
        assert_eq!(cut("short"), "short");
        assert_eq!(cut_bytes(&[0; 70_000]).len(), 65_535);
    }
}
