//! The names of a log's files, and the log that a directory contains.
//!
//! `00000012.seg` is segment 12. Beside the segments, one empty file names the log's first segment and
//! its state: `00000012.live`, or `00000012.stale` for a log that was degraded. While a fresh log is
//! written, there is also `00000020.new`: segments from 20 on do not count until it is called
//! `00000020.live`, and older segments do not count from then on. `00000013.damaged` was segment 13: it had
//! no readable record, and is kept for an operator. A change of a name needs no room on the
//! disk, and it happens or does not happen.

use std::collections::BTreeSet;

/// The greatest number of a file. Greater ones are not a log's: segments get numbers behind the greatest one,
/// and those must not run out.
const NUMBER_MAX: u32 = 4_000_000_000;

/// What a file is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum File {
    Segment(u32),
    Live(u32),
    Stale(u32),
    New(u32),
    /// A segment without a readable record, which does not count any more.
    Damaged(u32),
    /// Shows whether the disk can be written.
    Probe,
}

impl File {
    pub(super) fn name(self) -> String {
        match self {
            Self::Segment(n) => format!("{n:08}.seg"),
            Self::Live(n) => format!("{n:08}.live"),
            Self::Stale(n) => format!("{n:08}.stale"),
            Self::New(n) => format!("{n:08}.new"),
            Self::Damaged(n) => format!("{n:08}.damaged"),
            Self::Probe => "probe".to_owned(),
        }
    }

    /// The meaning of a name, if it is one of a log's.
    pub(super) fn of(name: &str) -> Option<Self> {
        if name == "probe" {
            return Some(Self::Probe);
        }
        let (number, ending) = name.split_once('.')?;
        let number = number.parse().ok().filter(|n| *n <= NUMBER_MAX)?;
        let file = match ending {
            "seg" => Self::Segment(number),
            "live" => Self::Live(number),
            "stale" => Self::Stale(number),
            "new" => Self::New(number),
            "damaged" => Self::Damaged(number),
            _ => return None,
        };
        (file.name() == name).then_some(file)
    }
}

/// Whether a name consists of digits and a segment's ending.
fn is_like_segment(name: &str) -> bool {
    let number = name.strip_suffix(".seg");
    number.is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
}

/// The log that a directory contains.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Contents {
    /// The log's first segment, which may be deleted already. `None`: the directory has no log.
    pub(super) first: Option<u32>,
    /// The log was degraded: it lacks records.
    pub(super) stale: bool,
    /// The log's segments, in order.
    pub(super) segments: Vec<u32>,
    /// Segments that were set aside, in order.
    pub(super) set_aside: Vec<u32>,
    /// Names like those of a log with a number that no log gives: such a file is not read and not removed.
    pub(super) foreign: Vec<String>,
    /// Files that do not count, in the order in which they must be removed. The names must be on the disk
    /// before a file of another kind is removed.
    pub(super) garbage: Vec<File>,
    /// A number that no segment had.
    pub(super) unused: u32,
}

impl Contents {
    /// Finds the log among the names of a directory.
    pub(super) fn of<'a>(names: impl IntoIterator<Item = &'a str>) -> Self {
        let mut foreign = Vec::new();
        let mut files = BTreeSet::new();
        for name in names {
            match File::of(name) {
                Some(file) => drop(files.insert(file)),
                None if is_like_segment(name) => foreign.push(name.to_owned()),
                None => {}
            }
        }
        let number = |file: &File| match file {
            File::Segment(n) | File::Live(n) | File::Stale(n) | File::New(n) | File::Damaged(n) => {
                Some(*n)
            }
            File::Probe => None,
        };
        let unused = files.iter().filter_map(number).max().map_or(1, |n| n + 1);
        let marked = files.iter().filter_map(|file| match file {
            File::Live(n) => Some((*n, false)),
            File::Stale(n) => Some((*n, true)),
            _ => None,
        });
        let first_segment = files.iter().find_map(|file| match file {
            File::Segment(n) => Some((*n, true)),
            _ => None,
        });
        // Segments that nothing calls live are not trusted, but better than nothing.
        let (first, stale) = match marked.max().or(first_segment) {
            Some((first, stale)) => (Some(first), stale),
            None => (None, false),
        };
        let trusted = files
            .iter()
            .any(|f| matches!(f, File::Live(_) | File::Stale(_)));
        let fresh = files.iter().find_map(|file| match file {
            File::New(n) if trusted && first.is_some_and(|first| *n > first) => Some(*n),
            _ => None,
        });
        let counts =
            |n: u32| first.is_some_and(|first| n >= first) && fresh.is_none_or(|fresh| n < fresh);
        let mut segments = Vec::new();
        let mut set_aside = Vec::new();
        let mut garbage = Vec::new();
        for file in files {
            match file {
                File::Damaged(n) => set_aside.push(n),
                File::Segment(n) if counts(n) => segments.push(n),
                File::Live(n) if Some(n) == first && !stale => {}
                File::Stale(n) if Some(n) == first && stale => {}
                other => garbage.push(other),
            }
        }
        Self {
            first,
            stale,
            segments,
            set_aside,
            foreign,
            garbage,
            unused,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contents(names: &[&str]) -> Contents {
        Contents::of(names.iter().copied())
    }

    #[test]
    fn names_have_one_meaning() {
        for file in [
            File::Segment(7),
            File::Live(1),
            File::Stale(123_456_789),
            File::New(2),
            File::Damaged(3),
            File::Probe,
        ] {
            assert_eq!(File::of(&file.name()), Some(file));
        }
        for name in [
            "7.seg",
            "+0000007.seg",
            "00000007.seg.bak",
            "lock",
            ".seg",
            "4294967295.seg",
        ] {
            assert_eq!(File::of(name), None, "{name}");
        }
    }

    #[test]
    fn an_empty_directory_has_no_log() {
        let empty = Contents {
            unused: 1,
            ..Contents::default()
        };
        assert_eq!(contents(&["lock", "notes.txt"]), empty);
    }

    #[test]
    fn a_segment_with_a_number_that_no_log_gives_is_named_and_not_counted() {
        let with = contents(&["00000003.live", "00000003.seg", "4294967295.seg", "7.seg"]);
        assert_eq!((&*with.segments, with.unused), (&[3][..], 4));
        assert_eq!(with.foreign, ["4294967295.seg", "7.seg"]);
        assert_eq!(with.garbage, []);
    }

    #[test]
    fn a_log_begins_at_the_last_live_name() {
        let old = contents(&[
            "00000001.stale",
            "00000002.seg",
            "00000009.live",
            "00000010.seg",
        ]);
        assert_eq!(old.first, Some(9));
        assert!(!old.stale);
        assert_eq!(old.segments, [10]);
        assert_eq!(old.garbage, [File::Segment(2), File::Stale(1)]);
        assert_eq!(old.unused, 11);
    }

    #[test]
    fn segments_of_an_incomplete_log_do_not_count() {
        let names = [
            "00000001.stale",
            "00000003.seg",
            "00000004.new",
            "00000004.seg",
        ];
        let both = contents(&names);
        assert_eq!((both.first, both.stale), (Some(1), true));
        assert_eq!(both.segments, [3]);
        assert_eq!(both.garbage, [File::Segment(4), File::New(4)]);
        assert_eq!(both.unused, 5);
    }

    #[test]
    fn segments_without_a_live_name_are_stale() {
        let lost = contents(&["00000003.seg", "00000004.seg"]);
        assert_eq!((lost.first, lost.stale), (Some(3), true));
        assert_eq!(lost.segments, [3, 4]);
    }
}
