//! Rules for topic names and filters in configuration values.

/// Whether `topic` is a topic name that can have others below it.
pub(super) fn plain_topic(topic: &str) -> bool {
    !topic.is_empty()
        && topic.len() < 1024
        && !topic.starts_with(['$', '/'])
        && !topic.ends_with('/')
        && !topic.contains(['+', '#', '\0'])
}

/// The reason why `pattern` is not a topic filter.
pub(super) fn bad_filter(pattern: &str) -> Option<&'static str> {
    if pattern.is_empty() || pattern.len() > 65535 || pattern.contains('\0') {
        return Some("a topic filter has 1 to 65535 bytes and no U+0000");
    }
    if pattern.starts_with("$share/") {
        return Some("write the filter behind the share name; it holds for shared ones too");
    }
    let levels: Vec<&str> = pattern.split('/').collect();
    for (i, level) in levels.iter().enumerate() {
        if level.contains('#') && (*level != "#" || i + 1 != levels.len()) {
            return Some("# stands alone and last");
        }
        if level.contains('+') && *level != "+" {
            return Some("+ stands alone between slashes");
        }
    }
    None
}

/// The reason why `pattern` is not a topic pattern of an access rule.
pub(super) fn bad_pattern(pattern: &str) -> Option<&'static str> {
    if let Some(why) = bad_filter(pattern) {
        return Some(why);
    }
    let mut rest = pattern;
    while let Some((_, after)) = rest.split_once('%') {
        if !after.starts_with(['c', 'u']) {
            return Some("after % comes c (the client id) or u (the user name)");
        }
        rest = after;
    }
    None
}
