//! Reading the files that a configuration names.

use std::io;
use std::path::Path;

/// The byte order mark that some editors put before UTF-8 text.
const BOM: &[u8] = "\u{feff}".as_bytes();

/// Text without the byte order mark that it may begin with.
pub(crate) fn without_bom(text: &[u8]) -> &[u8] {
    text.strip_prefix(BOM).unwrap_or(text)
}

/// The bytes of a file, without a byte order mark.
///
/// # Errors
/// When the file cannot be read.
pub(crate) fn read(file: &Path) -> io::Result<Vec<u8>> {
    let mut bytes = std::fs::read(file)?;
    if bytes.starts_with(BOM) {
        bytes.drain(..BOM.len());
    }
    Ok(bytes)
}

/// The text of a file, without a byte order mark.
///
/// # Errors
/// When the file cannot be read or is not UTF-8.
pub(crate) fn read_text(file: &Path) -> io::Result<String> {
    String::from_utf8(read(file)?).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_order_mark_is_not_a_part_of_the_text() {
        let file = std::env::temp_dir().join(format!("tidegate-bom-{}", std::process::id()));
        for (written, expected) in [("\u{feff}alice", "alice"), ("alice", "alice"), ("", "")] {
            std::fs::write(&file, written).expect("written");
            assert_eq!(read_text(&file).expect("read"), expected);
            assert_eq!(without_bom(written.as_bytes()), expected.as_bytes());
        }
        std::fs::write(&file, b"\xff").expect("written");
        assert!(read_text(&file).is_err());
        std::fs::remove_file(&file).expect("removed");
    }
}
