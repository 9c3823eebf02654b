//! The operations on files that a log needs.

mod real;
#[cfg(any(test, feature = "sim"))]
pub mod sim;

use std::io;

pub use real::{DirectoryError, RealDisk};

/// A directory with the files of a log. Every operation may fail with the system's error, and none is
/// tried again behind the caller's back.
///
/// A written byte is safe once [`sync_data`](Self::sync_data) has succeeded; a name that was created,
/// removed or changed is safe once [`sync_names`](Self::sync_names) has.
pub trait Disk: Send {
    /// An open file.
    type File: Send;

    /// The names of all files.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Creates a file for writing. It fails if the file exists.
    fn create(&self, name: &str) -> io::Result<Self::File>;

    /// Opens a file for reading.
    fn open(&self, name: &str) -> io::Result<Self::File>;

    /// Opens a file for reading and writing.
    fn open_to_write(&self, name: &str) -> io::Result<Self::File>;

    /// The length of a file in bytes.
    fn len(&self, file: &Self::File) -> io::Result<u64>;

    /// Reads from `offset` on into `buffer`, perhaps less than it takes. Returns the number of bytes; 0 is
    /// the end of the file.
    fn read_at(&self, file: &Self::File, offset: u64, buffer: &mut [u8]) -> io::Result<usize>;

    /// Writes `bytes` at `offset`, perhaps only the first of them. Returns the number of bytes written.
    fn write_at(&self, file: &Self::File, offset: u64, bytes: &[u8]) -> io::Result<usize>;

    /// Puts the written bytes of a file on the disk. After an error, written bytes may be lost although a
    /// second call succeeds.
    fn sync_data(&self, file: &Self::File) -> io::Result<()>;

    /// Reserves room for a file of `bytes` without changing its length. It does nothing on a file system that
    /// cannot reserve.
    fn reserve(&self, file: &Self::File, bytes: u64) -> io::Result<()>;

    /// Gives back room that was reserved behind the end of a file.
    fn trim(&self, file: &Self::File) -> io::Result<()>;

    /// Removes a name.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Gives a file another name.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Puts created, removed and changed names on the disk.
    fn sync_names(&self) -> io::Result<()>;
}

/// Writes all bytes.
pub(super) fn write_all<D: Disk>(
    disk: &D,
    file: &D::File,
    mut offset: u64,
    mut bytes: &[u8],
) -> io::Result<()> {
    while !bytes.is_empty() {
        match disk.write_at(file, offset, bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => {
                offset += n as u64;
                bytes = &bytes[n..];
            }
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The first `limit` bytes of a file, or all of a shorter one.
pub(super) fn read<D: Disk>(disk: &D, name: &str, limit: usize) -> io::Result<Vec<u8>> {
    let file = disk.open(name)?;
    let len = usize::try_from(disk.len(&file)?).unwrap_or(usize::MAX);
    let mut bytes = vec![0; len.min(limit)];
    let mut filled = 0;
    while filled < bytes.len() {
        match disk.read_at(&file, filled as u64, &mut bytes[filled..]) {
            Ok(0) => break,
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    bytes.truncate(filled);
    Ok(bytes)
}
