//! Properties that must hold for any topic names and filters.

use tidegate::topics::*;

/// Relations between two filters and a name, any of them possibly invalid.
pub fn relations(a: &str, b: &str, topic: &str) {
    // None of these functions may panic, whatever the input.
    let _ = (
        matches(a, topic),
        overlaps(a, b),
        covers(a, b),
        split_shared(a),
        has_wildcard(a),
    );
    if valid_topic_name(topic) {
        assert!(!has_wildcard(topic) && valid_filter_or_share(topic));
        assert!(matches(topic, topic));
    }
    for f in [a, b] {
        if let Some((group, rest)) = split_shared(f) {
            assert_eq!(format!("$share/{group}/{rest}"), f);
        }
    }
    if !plain(a) || !plain(b) {
        return;
    }
    assert!(covers(a, a) && overlaps(a, a));
    assert_eq!(overlaps(a, b), overlaps(b, a));
    assert!(
        !covers(a, b) || overlaps(a, b),
        "{a} covers {b} but does not overlap it"
    );
    if valid_topic_name(topic) {
        let (in_a, in_b) = (matches(a, topic), matches(b, topic));
        assert!(
            !(in_a && in_b) || overlaps(a, b),
            "{topic} is in {a} and {b}"
        );
        assert!(
            !(covers(a, b) && in_b) || in_a,
            "{topic} is in {b}, not in {a}"
        );
        assert_eq!(covers(a, topic), in_a, "{a} {topic}");
        assert_eq!(overlaps(a, topic), in_a, "{a} {topic}");
    }
}

/// Whether the text is a valid filter and not a shared subscription.
fn plain(filter: &str) -> bool {
    valid_filter(filter) && !filter.starts_with("$share/")
}

// `$share/x` is a legal topic name, but no legal filter.
fn valid_filter_or_share(topic: &str) -> bool {
    valid_filter(topic) || topic.starts_with("$share/")
}
