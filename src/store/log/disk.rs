//! The operations on files that a log needs.

mod real;
#[cfg(any(test, feature = "sim"))]
pub mod sim;

use std::io;
use std::ops::Range;

use rustix::io::Errno;

pub use real::{DirectoryError, RealDisk};

/// The bytes that are read at once.
const BLOCK_BYTES: usize = 1 << 20;
/// The smallest range that is taken as unreadable: the page of a system's cache.
const PAGE_BYTES: usize = 4096;

/// A directory with the files of a log. Every operation may fail with the system's error, and none is
/// tried again behind the caller's back unless a signal has interrupted it.
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
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// The bytes of a file that could be read.
#[derive(Debug)]
pub(super) struct Content {
    /// The first bytes, as many as were asked for. Zeros stand for bytes that cannot be read.
    pub(super) bytes: Vec<u8>,
    /// The length of the file in bytes.
    pub(super) len: u64,
    /// The ranges of `bytes` that cannot be read. An empty range at 0: not even the length is known.
    pub(super) unreadable: Vec<Range<usize>>,
}

/// Reads the first `limit` bytes of a file, or all of a shorter one, past blocks that the disk cannot read.
pub(super) fn read<D: Disk>(disk: &D, name: &str, limit: usize) -> io::Result<Content> {
    let opened = disk
        .open(name)
        .and_then(|file| Ok((disk.len(&file)?, file)));
    let (len, file) = match opened {
        Err(error) if is_damage(&error) => {
            return Ok(Content {
                bytes: Vec::new(),
                len: 0,
                unreadable: vec![Range::default()],
            });
        }
        opened => opened?,
    };
    let mut bytes = vec![0; usize::try_from(len).unwrap_or(usize::MAX).min(limit)];
    let mut unreadable: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    // A block with damage is read in pages to its end, so that little is read twice: a disk may try for
    // seconds before it fails.
    let mut pages_until = 0;
    while at < bytes.len() {
        let unit = if at < pages_until {
            PAGE_BYTES
        } else {
            BLOCK_BYTES
        };
        let end = ((at / unit + 1) * unit).min(bytes.len());
        match disk.read_at(&file, at as u64, &mut bytes[at..end]) {
            Ok(0) => {
                bytes.truncate(at);
                break;
            }
            Ok(n) => at += n,
            Err(error) if is_damage(&error) && unit == BLOCK_BYTES => pages_until = end,
            Err(error) if is_damage(&error) => {
                bytes[at..end].fill(0);
                match unreadable.last_mut() {
                    Some(last) if last.end == at => last.end = end,
                    _ => unreadable.push(at..end),
                }
                at = end;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(Content {
        bytes,
        len,
        unreadable,
    })
}

/// Whether an error of the system says that bytes on the disk are damaged, so that others may be readable.
fn is_damage(error: &io::Error) -> bool {
    let damages = [
        Errno::IO,
        Errno::BADMSG,
        Errno::ILSEQ,
        #[cfg(target_os = "linux")]
        Errno::UCLEAN,
        #[cfg(target_os = "linux")]
        Errno::NODATA,
    ];
    let code = error.raw_os_error();
    damages
        .iter()
        .any(|errno| code == Some(errno.raw_os_error()))
}

/// Removes a name. Success if it has gone already: an operator may have removed it.
pub(super) fn remove<D: Disk>(disk: &D, name: &str) -> io::Result<()> {
    match disk.remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}
