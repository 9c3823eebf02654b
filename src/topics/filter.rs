//! Topic names and topic filters (MQTT 5 §4.7, §4.8.2).

use super::MAX_FIELD;
use super::scan::has_nul_or_wildcard;

/// A name that a PUBLISH, a will or a response may carry: not empty, no wildcard, no U+0000.
#[inline]
pub fn valid_topic_name(topic: &str) -> bool {
    !topic.is_empty() && topic.len() <= MAX_FIELD && !has_nul_or_wildcard(topic.as_bytes())
}

/// A filter that a SUBSCRIBE or UNSUBSCRIBE may carry, `$share/group/filter` included
/// ([MQTT-4.7.1-1], [MQTT-4.7.1-2], [MQTT-4.7.3-1], [MQTT-4.8.2-1], [MQTT-4.8.2-2]).
pub fn valid_filter(filter: &str) -> bool {
    if filter.len() > MAX_FIELD {
        return false;
    }
    match filter.strip_prefix(SHARE) {
        Some(_) => split_shared(filter).is_some_and(|(_, rest)| well_formed(rest)),
        None => well_formed(filter),
    }
}

/// True when a `+` or `#` is in it.
pub fn has_wildcard(filter: &str) -> bool {
    filter.bytes().any(|b| b == b'+' || b == b'#')
}

/// Splits `$share/group/filter` into group and filter. `None`: not a valid shared subscription
/// ([MQTT-4.8.2-1], [MQTT-4.8.2-2]).
pub fn split_shared(filter: &str) -> Option<(&str, &str)> {
    let (group, rest) = filter.strip_prefix(SHARE)?.split_once('/')?;
    (!group.is_empty() && !has_wildcard(group) && !rest.is_empty()).then_some((group, rest))
}

/// Whether a mosquitto bridge with its defaults publishes its state to `topic`: a retained `1`, and a `0` as
/// its will.
pub fn is_bridge_state(topic: &str) -> bool {
    let name = topic.strip_prefix("$SYS/broker/connection/");
    let name = name.and_then(|rest| rest.strip_suffix("/state"));
    name.is_some_and(|name| !name.is_empty())
}

/// Whether a valid filter, without `$share`, matches a topic name. A filter that starts with a
/// wildcard matches no topic that starts with `$` ([MQTT-4.7.2-1]); `a/#` matches `a`.
pub fn matches(filter: &str, topic: &str) -> bool {
    #[cfg(test)]
    comparisons::count();
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let (mut filter, mut topic) = (Levels::of(filter), Levels::of(topic));
    loop {
        match (filter.next(), topic.next()) {
            (Some(b"#"), _) | (None, None) => return true,
            (Some(b"+"), Some(_)) => {}
            (Some(f), Some(t)) if f == t => {}
            _ => return false,
        }
    }
}

/// Whether some topic name matches both valid filters, given without `$share`.
pub fn overlaps(a: &str, b: &str) -> bool {
    #[cfg(test)]
    comparisons::count();
    if part_at_a_name(a.as_bytes(), b.as_bytes()) {
        return false;
    }
    let wild = |f: &str| f.starts_with(['+', '#']);
    if (a.starts_with('$') && wild(b)) || (b.starts_with('$') && wild(a)) {
        return false;
    }
    let (mut a, mut b) = (Levels::of(spelt_out(a)), Levels::of(spelt_out(b)));
    loop {
        match (a.next(), b.next()) {
            // `#` takes any rest, the empty one too, and a valid rest always matches something.
            (Some(b"#"), _) | (_, Some(b"#")) | (None, None) => return true,
            (Some(b"+"), Some(_)) | (Some(_), Some(b"+")) => {}
            (Some(x), Some(y)) if x == y => {}
            _ => return false,
        }
    }
}

/// Whether the first level in which two filters differ is a name in both: most that a client has do.
fn part_at_a_name(a: &[u8], b: &[u8]) -> bool {
    let same = a.iter().zip(b).take_while(|(x, y)| x == y).count();
    // The end of one may be the parent level of the other's `#`.
    let (Some(x), Some(y)) = (a.get(same), b.get(same)) else {
        return false;
    };
    let level = a[..same]
        .iter()
        .rposition(|c| *c == b'/')
        .map_or(0, |at| at + 1);
    let wild = |c: &u8| matches!(c, b'+' | b'#');
    !wild(x) && !wild(y) && !a[level..same].iter().any(wild)
}

/// Whether `pattern` matches every topic name that `filter` matches; both valid, without
/// `$share`.
pub fn covers(pattern: &str, filter: &str) -> bool {
    if filter.starts_with('$') && pattern.starts_with(['+', '#']) {
        return false;
    }
    let (mut pattern, mut filter) = (Levels::of(pattern), Levels::of(spelt_out(filter)));
    loop {
        match (pattern.next(), filter.next()) {
            (Some(b"#"), _) | (None, None) => return true,
            (_, Some(b"#")) => return false,
            (Some(b"+"), Some(_)) => {}
            (Some(p), Some(f)) if p == f => {}
            _ => return false,
        }
    }
}

// A topic name has at least one character ([MQTT-4.7.3-1]): so `#` never takes less than a level,
// nor `/#` less than two.
fn spelt_out(filter: &str) -> &str {
    match filter {
        "#" => "+/#",
        "/#" => "/+/#",
        other => other,
    }
}

const SHARE: &str = "$share/";

// `#` last and a whole level, `+` a whole level, at least one character, no U+0000.
fn well_formed(filter: &str) -> bool {
    let bytes = filter.as_bytes();
    let mut starts = true;
    for (i, &b) in bytes.iter().enumerate() {
        match b {
            0 => return false,
            b'#' if !starts || i + 1 != bytes.len() => return false,
            b'+' if !starts || bytes.get(i + 1).is_some_and(|&next| next != b'/') => return false,
            _ => {}
        }
        starts = b == b'/';
    }
    !bytes.is_empty()
}

/// The levels of a name or filter, split at `/`; there is always at least one.
struct Levels<'a>(Option<&'a [u8]>);

impl<'a> Levels<'a> {
    fn of(name: &'a str) -> Levels<'a> {
        Levels(Some(name.as_bytes()))
    }
}

impl<'a> Iterator for Levels<'a> {
    type Item = &'a [u8];

    #[inline]
    fn next(&mut self) -> Option<&'a [u8]> {
        let rest = self.0?;
        match rest.iter().position(|&b| b == b'/') {
            Some(at) => {
                self.0 = Some(&rest[at + 1..]);
                Some(&rest[..at])
            }
            None => {
                self.0 = None;
                Some(rest)
            }
        }
    }
}

/// Counts the comparisons of a filter with a topic or with another filter, for tests.
#[cfg(test)]
pub(crate) mod comparisons {
    use std::cell::Cell;

    thread_local! {
        static MADE: Cell<usize> = const { Cell::new(0) };
    }

    /// A comparison is about to be made.
    pub(super) fn count() {
        MADE.with(|made| made.update(|n| n + 1));
    }

    /// How many comparisons `f` makes on this thread.
    pub(crate) fn made_by(f: impl FnOnce()) -> usize {
        MADE.with(|made| made.set(0));
        f();
        MADE.with(Cell::get)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        for good in ["a", "/", "a//b", "$SYS/x", " ", "é"] {
            assert!(valid_topic_name(good), "{good}");
        }
        for bad in ["", "a/+", "#", "a\0b", "a+b"] {
            assert!(!valid_topic_name(bad), "{bad}");
        }
        assert!(valid_topic_name(&"x".repeat(65_535)));
        assert!(!valid_topic_name(&"x".repeat(65_536)));
    }

    #[test]
    fn filters() {
        for good in [
            "a",
            "#",
            "+",
            "+/+",
            "/+",
            "a/#",
            "+/#",
            "$share/g/a",
            "$share/g/#",
            "$share/g//",
            "$share",
            "$shared/x",
            "/",
        ] {
            assert!(valid_filter(good), "{good}");
        }
        for bad in [
            "",
            "a/#/b",
            "a+/b",
            "+a",
            "a#",
            "#/a",
            "##",
            "++",
            "a\0",
            "$share/",
            "$share/g",
            "$share/g/",
            "$share//a",
            "$share/+/a",
            "$share/a#/b",
            "$share/g/a#",
        ] {
            assert!(!valid_filter(bad), "{bad}");
        }
    }

    #[test]
    fn shared() {
        assert_eq!(split_shared("$share/g/a/b"), Some(("g", "a/b")));
        assert_eq!(split_shared("$share/g//a"), Some(("g", "/a")));
        assert_eq!(split_shared("$share/g"), None);
        assert_eq!(split_shared("a/b"), None);
    }

    #[test]
    fn matching() {
        for (filter, topic) in [
            ("a/#", "a"),
            ("a/#", "a/b/c"),
            ("#", "a"),
            ("+", "a"),
            ("+/b", "a/b"),
            ("+/b", "/b"),
            ("a/+", "a/"),
            ("/+", "/x"),
            ("$SYS/#", "$SYS/a"),
            ("$SYS/+", "$SYS/a"),
            ("a/$x", "a/$x"),
            ("+/+", "a/$x"),
            ("#", "/"),
        ] {
            assert!(matches(filter, topic), "{filter} {topic}");
        }
        for (filter, topic) in [
            ("a/+", "a"),
            ("+", "/x"),
            ("#", "$SYS/a"),
            ("+/a", "$SYS/a"),
            ("a", "A"),
            ("a/b", "a"),
            ("a", "a/b"),
            ("a/#", "ab"),
            ("a/+/c", "a/b/d"),
        ] {
            assert!(!matches(filter, topic), "{filter} {topic}");
        }
    }

    #[test]
    fn relations() {
        assert!(overlaps("a/+", "+/b") && overlaps("a/#", "a") && overlaps("#", "+/x"));
        assert!(!overlaps("#", "$SYS/#") && !overlaps("a/+", "a") && !overlaps("a", "b"));
        assert!(!overlaps("+/x", "$SYS/x") && overlaps("$SYS/#", "$SYS/+"));
        assert!(covers("#", "a/#") && covers("a/#", "a") && covers("a/+", "a/b"));
        assert!(covers("+/#", "#") && covers("#", "+/#") && !covers("a/+/#", "a/#"));
        assert!(!covers("a/+", "a/#") && !covers("#", "$SYS/a") && covers("$SYS/#", "$SYS/+"));
        assert!(!overlaps("+", "/#") && covers("+/+/#", "/#") && overlaps("/", "/#"));
        assert!(!covers("+/+", "#") && !covers("a", "+") && !covers("a", "a/#"));
    }
}
