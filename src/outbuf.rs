//! Bytes that wait to be sent on one stream. Large parts may be shared with other streams instead of
//! being copied for each.

use std::collections::VecDeque;
use std::fmt::Debug;

/// Bytes that several outputs may refer to.
pub trait SharedBytes: Debug + Send + Sync {
    /// The bytes; always the same.
    fn bytes(&self) -> &[u8];
}

/// Bytes that wait to be sent on one stream, in order: own bytes, and shared ones among them.
#[derive(Debug, Default)]
pub struct OutBuf {
    /// The own bytes; more may be appended at any time.
    pub buf: Vec<u8>,
    /// Boxed, since most outputs share nothing and are taken whole.
    progress: Option<Box<Progress>>,
}

#[derive(Debug, Default)]
struct Progress {
    /// How many of the own bytes the transport has taken.
    at: usize,
    parts: VecDeque<Part>,
    /// Bytes of all parts that the transport has not taken.
    shared: usize,
}

#[derive(Debug)]
struct Part {
    /// The number of own bytes that precede it.
    at: usize,
    /// How many of its bytes the transport has taken.
    taken: usize,
    bytes: Box<dyn SharedBytes>,
}

impl Part {
    fn rest(&self) -> &[u8] {
        self.bytes.bytes().get(self.taken..).unwrap_or_default()
    }
}

/// A buffer with a larger capacity is freed once its bytes are written.
const KEPT_CAPACITY_BYTES: usize = 16 * 1024;

impl From<Vec<u8>> for OutBuf {
    fn from(buf: Vec<u8>) -> Self {
        Self {
            buf,
            ..Self::default()
        }
    }
}

impl OutBuf {
    /// Whether the transport has taken everything.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Bytes that the transport has not taken yet.
    pub fn len(&self) -> usize {
        self.own_len() + self.shared_len()
    }

    /// Shared bytes that the transport has not taken yet.
    pub fn shared_len(&self) -> usize {
        self.progress.as_ref().map_or(0, |p| p.shared)
    }

    /// Own bytes that the transport has not taken yet: the memory that this output costs.
    pub fn own_len(&self) -> usize {
        self.buf.len().saturating_sub(self.at())
    }

    fn at(&self) -> usize {
        self.progress.as_ref().map_or(0, |p| p.at)
    }

    /// The next bytes that the transport has not taken yet; all of them, if none is shared.
    pub fn rest(&self) -> &[u8] {
        let at = self.at();
        let next = self.progress.as_ref().and_then(|p| p.parts.front());
        let end = match next {
            Some(part) if part.at <= at => return part.rest(),
            Some(part) => part.at,
            None => self.buf.len(),
        };
        self.buf.get(at..end).unwrap_or_default()
    }

    /// The transport has taken `taken` bytes of [`OutBuf::rest`].
    pub fn advance(&mut self, taken: usize) {
        if self.progress.is_none() && taken >= self.buf.len() {
            return self.buf.clear();
        }
        let progress = self.progress.get_or_insert_default();
        match progress.parts.front_mut() {
            Some(part) if part.at <= progress.at => {
                part.taken += taken;
                progress.shared -= taken;
                if part.rest().is_empty() {
                    progress.parts.pop_front();
                }
            }
            _ => progress.at += taken,
        }
        if self.is_empty() {
            self.buf.clear();
            self.progress = None;
        }
    }

    /// Appends bytes without copying them.
    pub fn share(&mut self, bytes: Box<dyn SharedBytes>) {
        let part = Part {
            at: self.buf.len(),
            taken: 0,
            bytes,
        };
        if !part.rest().is_empty() {
            let progress = self.progress.get_or_insert_default();
            progress.shared += part.rest().len();
            progress.parts.push_back(part);
        }
    }

    /// Appends the bytes of another output.
    pub fn append(&mut self, other: Self) {
        if self.is_empty() {
            *self = other;
            return;
        }
        let (before, taken) = (self.buf.len(), other.at());
        let rest = other.buf.get(taken..);
        self.buf.extend_from_slice(rest.unwrap_or_default());
        if let Some(more) = other.progress {
            let progress = self.progress.get_or_insert_default();
            progress.shared += more.shared;
            progress
                .parts
                .extend(more.parts.into_iter().map(|part| Part {
                    at: part.at.saturating_sub(taken) + before,
                    ..part
                }));
        }
    }

    /// A copy of the bytes that the transport has not taken yet.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut all = Vec::with_capacity(self.len());
        let mut at = self.at();
        let parts = self.progress.as_ref().map(|p| &p.parts);
        for part in parts.into_iter().flatten() {
            all.extend_from_slice(self.buf.get(at..part.at).unwrap_or_default());
            all.extend_from_slice(part.rest());
            at = at.max(part.at);
        }
        all.extend_from_slice(self.buf.get(at..).unwrap_or_default());
        all
    }

    /// Drops the written bytes, and the allocation if it is large.
    pub(crate) fn reset(&mut self) {
        self.progress = None;
        if self.buf.capacity() > KEPT_CAPACITY_BYTES {
            self.buf = Vec::new();
        } else {
            self.buf.clear();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Text(&'static str);

    impl SharedBytes for Text {
        fn bytes(&self) -> &[u8] {
            self.0.as_bytes()
        }
    }

    /// An output whose bytes are `text`; the parts in upper case are shared.
    fn output(text: &[&'static str]) -> OutBuf {
        let mut out = OutBuf::default();
        for part in text {
            match part.chars().all(char::is_uppercase) {
                true => out.share(Box::new(Text(part))),
                false => out.buf.extend_from_slice(part.as_bytes()),
            }
        }
        out
    }

    /// Takes everything, at most `most` bytes at a time.
    fn taken(mut out: OutBuf, most: usize) -> String {
        let mut all = Vec::new();
        while !out.is_empty() {
            let len = out.len();
            let next = out.rest();
            let next = &next[..next.len().min(most)];
            assert!(!next.is_empty());
            all.extend_from_slice(next);
            let n = next.len();
            out.advance(n);
            assert_eq!(out.len(), len - n);
        }
        String::from_utf8(all).expect("text")
    }

    #[test]
    fn shared_bytes_keep_their_place() {
        for most in 1..9 {
            for text in [
                &["ab", "CDE", "f", "GH", "IJ"][..],
                &["ABC", "de"],
                &["", "", "ABC"],
                &["abc"],
            ] {
                assert_eq!(taken(output(text), most), text.concat());
            }
        }
        assert_eq!(output(&["ab", "CDE"]).own_len(), 2);
    }

    #[test]
    fn outputs_are_joined_in_order() {
        for skipped in 0..7 {
            let (first, second) = (["ab", "CDE", "f"], ["GH", "ij", "KL"]);
            let mut out = output(&first);
            for _ in 0..skipped.min(6) {
                out.advance(1);
            }
            out.append(output(&second));
            let all = first.concat() + &second.concat();
            assert_eq!(taken(out, 2), all[skipped.min(6)..]);
            // The second one may be taken in part too.
            let (mut out, mut more) = (output(&second), output(&first));
            for _ in 0..skipped.min(6) {
                more.advance(1);
            }
            out.append(more);
            let all = second.concat() + &first.concat()[skipped.min(6)..];
            assert_eq!(out.to_vec(), all.as_bytes());
            assert_eq!(taken(out, 3), all);
        }
    }

    #[test]
    fn small_buffers_are_kept_and_large_ones_freed() {
        let mut out = OutBuf::from(Vec::with_capacity(1024));
        out.buf.extend_from_slice(b"abc");
        out.advance(3);
        assert!(out.is_empty());
        out.reset();
        assert_eq!((out.buf.capacity(), out.len()), (1024, 0));
        out.buf.reserve(KEPT_CAPACITY_BYTES + 1);
        out.reset();
        assert_eq!(out.buf.capacity(), 0);
    }
}
