//! Searches of short strings, a word at a time.

/// Whether U+0000, `+` or `#` is among the bytes: a topic name has none of them.
#[inline(always)]
pub(crate) fn has_nul_or_wildcard(bytes: &[u8]) -> bool {
    // `+` and `#` differ in one bit.
    const BIT: u8 = b'+' ^ b'#';
    const BOTH: u8 = b'+' | b'#';
    scan(
        bytes,
        |word| zero_bytes(word) | zero_bytes((word | splat(BIT)) ^ splat(BOTH)),
        |byte| byte == 0 || byte | BIT == BOTH,
    )
}

/// Whether U+0000 is among the bytes of a string.
#[inline(always)]
pub(crate) fn has_nul(bytes: &[u8]) -> bool {
    scan(bytes, zero_bytes, |byte| byte == 0)
}

/// Whether any byte is found, eight at a time and without an early exit, because such bytes are
/// rare. `find` marks in a word the bytes for which `one` is true.
#[inline(always)]
pub(crate) fn scan(bytes: &[u8], find: impl Fn(u64) -> u64, one: impl Fn(u8) -> bool) -> bool {
    let Some(last) = bytes.last_chunk() else {
        return bytes.iter().fold(false, |found, &byte| found | one(byte));
    };
    let (words, _) = bytes.as_chunks();
    let mut found = 0;
    for word in words {
        found |= find(u64::from_ne_bytes(*word));
    }
    // The last word may repeat bytes that were looked at already.
    found | find(u64::from_ne_bytes(*last)) != 0
}

/// A word of eight copies of `byte`.
pub(crate) const fn splat(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

/// Not zero if and only if a byte of `word` is zero.
#[inline(always)]
pub(crate) const fn zero_bytes(word: u64) -> u64 {
    word.wrapping_sub(splat(0x01)) & !word & splat(0x80)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_found_wherever_they_are() {
        for len in 0..40 {
            for fill in (1..=u8::MAX).filter(|b| !b"+#".contains(b)) {
                let bytes = vec![fill; len];
                assert!(!has_nul(&bytes) && !has_nul_or_wildcard(&bytes));
            }
            let mut bytes = vec![0x80; len];
            for at in 0..len {
                for want in [0, b'+', b'#'] {
                    bytes[at] = want;
                    assert!(has_nul_or_wildcard(&bytes), "{want} at {at} of {len}");
                    assert_eq!(has_nul(&bytes), want == 0);
                }
                bytes[at] = 0x80;
            }
        }
    }
}
