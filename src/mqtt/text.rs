//! UTF-8 encoded strings (MQTT 5 §1.5.4).

use crate::mqtt::Error;
use crate::topics::MAX_FIELD;
use crate::topics::scan::{has_nul, scan, splat, zero_bytes};

pub(crate) const NOT_UTF8: Error = Error::Malformed("string is not UTF-8 [MQTT-1.5.4-1]");

/// Whether a string has a control character or a Unicode non-character. They are legal, but
/// §1.5.4 lets a receiver treat them as malformed, and some brokers close the connection because of
/// them. They must not reach a broker on a connection that clients share.
pub fn has_discouraged(text: &str) -> bool {
    // The C1 controls and all non-characters are above ASCII.
    let suspect = |b: u8| !(0x20..0x7F).contains(&b);
    text.bytes().any(suspect)
        && text.chars().any(|c| {
            c.is_control() || matches!(c, '\u{FDD0}'..='\u{FDEF}') || c as u32 & 0xFFFE == 0xFFFE
        })
}

/// Checks [MQTT-1.5.4-1] and [MQTT-1.5.4-2]. A BOM is data and stays ([MQTT-1.5.4-3]).
#[inline]
pub(crate) fn utf8(bytes: &[u8]) -> Result<&str, Error> {
    // In UTF-8 the byte 0 occurs only as U+0000.
    if has_nul(bytes) {
        return Err(Error::Malformed("string with U+0000 [MQTT-1.5.4-2]"));
    }
    std::str::from_utf8(bytes).map_err(|_| NOT_UTF8)
}

/// Cuts one of our own strings to the largest length that a prefix can state, at a character
/// boundary.
pub(crate) fn cut(s: &str) -> &str {
    &s[..s.floor_char_boundary(MAX_FIELD)]
}

/// Cuts our own binary data to the largest length that a prefix can state.
pub(crate) fn cut_bytes(b: &[u8]) -> &[u8] {
    &b[..b.len().min(MAX_FIELD)]
}

/// Checks a string as [`utf8`] does, without returning it: plain ASCII needs no second pass.
#[inline]
pub(crate) fn check(bytes: &[u8]) -> Result<(), Error> {
    let plain = !scan(
        bytes,
        |word| zero_bytes(word) | word & splat(0x80),
        |byte| byte == 0 || byte >= 0x80,
    );
    if plain {
        return Ok(());
    }
    utf8(bytes).map(|_| ())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strings_are_judged() {
        for text in ["", "a", "é", "abcdefgh", "abcdefghé"] {
            assert_eq!(
                (check(text.as_bytes()), utf8(text.as_bytes())),
                (Ok(()), Ok(text))
            );
        }
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
            assert_eq!(check(bad), utf8(bad).map(|_| ()));
            let long = [b"abcdefghijkl", bad].concat();
            assert_eq!(check(&long), utf8(bad).map(|_| ()));
        }
    }

    #[test]
    fn what_servers_dislike_is_found() {
        for bad in [
            "a\n",
            "\u{7F}",
            "\u{9F}",
            "\u{FDD0}",
            "\u{FFFE}",
            "x\u{1FFFF}",
            "\u{10FFFF}",
        ] {
            assert!(has_discouraged(bad), "{bad:?}");
        }
        for good in [
            "",
            "a b/~",
            "é",
            "\u{FEFF}",
            "\u{FFFD}",
            "\u{A0}",
            "\u{10FFFD}",
        ] {
            assert!(!has_discouraged(good), "{good:?}");
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
