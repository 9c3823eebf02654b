//! What a client may publish and subscribe.

use smallvec::SmallVec;

use crate::auth::{ANONYMOUS, Identity};
use crate::config::{AclMode, AclRule};
use crate::topics::{covers, matches, overlaps, split_shared};

/// First level of the topics that Tidegate keeps for itself.
pub(super) const OWN_PREFIX: &str = "tidegate";
/// First levels that only a rule that names them opens.
const RESERVED: [&str; 2] = ["$SYS", OWN_PREFIX];

/// The rules, ready to be asked.
#[derive(Debug)]
pub struct Acl {
    /// `None`: every topic but the reserved ones.
    rules: Option<Box<[AclRule]>>,
}

/// A pattern with the client's names in place.
pub(crate) type Expanded = SmallVec<[u8; 128]>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    Deny,
}

impl Acl {
    /// The rules of a configuration.
    pub fn new(mode: AclMode, rules: &[AclRule]) -> Self {
        Self {
            rules: match mode {
                AclMode::Open => None,
                AclMode::Rules => Some(rules.into()),
            },
        }
    }

    /// Whether a client may publish to a topic; the topic is a valid name.
    pub fn may_publish(&self, identity: &Identity, topic: &str) -> bool {
        self.decide(identity, topic, |rule, pattern| {
            matches(pattern, topic).then_some(rule.allow.publish)
        })
    }

    /// Whether a client may subscribe to a filter, `$share` included; the
    /// filter is valid. Granted only if all of it lies inside one allowed
    /// pattern, and no earlier rule denies a part of it.
    pub fn may_subscribe(&self, identity: &Identity, filter: &str) -> bool {
        let filter = match split_shared(filter) {
            Some((_, inner)) => inner,
            None if filter.starts_with("$share/") => return false,
            None => filter,
        };
        self.decide(identity, filter, |rule, pattern| {
            if covers(pattern, filter) {
                Some(rule.allow.subscribe)
            } else if !rule.allow.subscribe && overlaps(pattern, filter) {
                Some(false)
            } else {
                None
            }
        })
    }

    /// The first rule that has something to say decides.
    fn decide(
        &self,
        identity: &Identity,
        topic: &str,
        judge: impl Fn(&AclRule, &str) -> Option<bool>,
    ) -> bool {
        let first = first_level(topic);
        let reserved = RESERVED.contains(&first);
        let Some(rules) = &self.rules else {
            return !reserved;
        };
        let verdict = rules
            .iter()
            .filter(|rule| glob(&rule.who, &identity.principal))
            .find_map(|rule| {
                // One pattern that allows is enough for its rule.
                let mut found = None;
                for pattern in &rule.topics {
                    // By its own letters: `%c` must not open it to a client of that name.
                    if reserved && first_level(pattern) != first {
                        continue;
                    }
                    let Some(expanded) = expand(pattern, identity) else {
                        continue;
                    };
                    let pattern =
                        std::str::from_utf8(&expanded).expect("put together from whole strings");
                    match judge(rule, pattern) {
                        Some(true) => return Some(Verdict::Allow),
                        Some(false) => found = Some(Verdict::Deny),
                        None => {}
                    }
                }
                found
            });
        verdict == Some(Verdict::Allow)
    }
}

fn first_level(topic: &str) -> &str {
    topic.split('/').next().unwrap_or(topic)
}

/// Puts the client id and the user name in; `None` if one is missing or could
/// mean more than itself.
pub(crate) fn expand(pattern: &str, identity: &Identity) -> Option<Expanded> {
    let mut out = Expanded::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('%') {
        out.extend_from_slice(before.as_bytes());
        let name: &str = if after.starts_with('c') {
            &identity.client_id
        } else if &*identity.principal == ANONYMOUS {
            return None;
        } else {
            identity.username.as_deref()?
        };
        let means_more = name.is_empty()
            || name.contains(['+', '#', '/', '\0'])
            || (out.is_empty() && name.starts_with('$'));
        if means_more {
            return None;
        }
        out.extend_from_slice(name.as_bytes());
        rest = after.get(1..).unwrap_or_default();
    }
    out.extend_from_slice(rest.as_bytes());
    Some(out)
}

/// Whether a pattern, in which `*` stands for any text, is the whole name.
fn glob(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    let mut star: Option<(usize, usize)> = None;
    while n < name.len() {
        if pattern.get(p) == Some(&b'*') {
            star = Some((p, n));
            p += 1;
        } else if pattern.get(p) == Some(&name[n]) {
            p += 1;
            n += 1;
        } else if let Some((at, from)) = star {
            // The star takes one byte more.
            star = Some((at, from + 1));
            p = at + 1;
            n = from + 1;
        } else {
            return false;
        }
    }
    pattern[p..].iter().all(|b| *b == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::AclAllow;

    fn rule(who: &str, allow: &str, topics: &[&str]) -> AclRule {
        AclRule {
            who: who.to_owned(),
            allow: AclAllow {
                publish: allow.contains('p'),
                subscribe: allow.contains('s'),
            },
            topics: topics.iter().map(|t| (*t).to_owned()).collect(),
        }
    }

    fn client(user: &str, id: &str) -> Identity {
        Identity::new(user.into(), id.into())
    }

    #[test]
    fn open_is_all_but_what_is_reserved() {
        let acl = Acl::new(AclMode::Open, &[]);
        let who = client(ANONYMOUS, "c");
        for topic in ["a/b", "$other/x", "tidegates/x", "/"] {
            assert!(
                acl.may_publish(&who, topic) && acl.may_subscribe(&who, topic),
                "{topic}"
            );
        }
        for topic in ["$SYS/broker", "tidegate/probe", "tidegate", "$SYS"] {
            assert!(
                !acl.may_publish(&who, topic) && !acl.may_subscribe(&who, topic),
                "{topic}"
            );
        }
        for filter in ["#", "+/x", "$share/g/#", "$share/g/a"] {
            assert!(acl.may_subscribe(&who, filter), "{filter}");
        }
        for filter in [
            "$SYS/#",
            "tidegate/#",
            "$share/g/$SYS/#",
            "$share/g/tidegate/+",
            "$share/g",
        ] {
            assert!(!acl.may_subscribe(&who, filter), "{filter}");
        }
    }

    /// Rules, user, client id, p or s, topic, whether it is allowed.
    #[test]
    fn the_first_match_decides() {
        let rules = [
            rule("mallory", "", &["#"]),
            rule("*", "", &["secret/#"]),
            rule("sensor-*", "p", &["data/%c/#", "data/shared"]),
            rule("admin", "ps", &["#", "$SYS/#"]),
            rule("*", "s", &["data/#", "home/%u/#", "dev/+/state"]),
            rule("*", "p", &["home/%u/#"]),
            rule("gate", "s", &["tidegate/#"]),
        ];
        let acl = Acl::new(AclMode::Rules, &rules);
        let table = [
            ("mallory", "m", 's', "data/x", false),
            ("sensor-1", "s1", 'p', "data/s1/t", true),
            ("sensor-1", "s1", 'p', "data/s1", true),
            ("sensor-1", "s1", 'p', "data/s2/t", false),
            ("sensor-1", "s1", 'p', "data/shared", true),
            ("sensor-1", "s1", 's', "data/s1/t", false), // its first match only lets it publish
            ("sensor-1", "s1", 's', "data/s2/t", true),
            ("sensor-1", "s1", 's', "data/#", false), // a part of it is denied
            ("sensor", "s1", 'p', "data/s1/t", false),
            ("admin", "a", 'p', "any/thing", true),
            ("admin", "a", 's', "#", false), // secret/# is inside
            ("admin", "a", 's', "any/#", true),
            ("admin", "a", 'p', "secret/x", false),
            ("admin", "a", 's', "$SYS/#", true),
            ("admin", "a", 's', "$SYS/broker/+", true),
            ("admin", "a", 's', "tidegate/x", false), // # does not name it
            ("bob", "b", 's', "data/x", true),
            ("bob", "b", 's', "$share/g/data/x", true),
            ("bob", "b", 's', "data/#", true),
            ("bob", "b", 's', "+/x", false),
            ("bob", "b", 's', "#", false),
            ("bob", "b", 'p', "data/x", false),
            ("bob", "b", 's', "home/bob/+", true),
            ("bob", "b", 'p', "home/bob/x", false), // the rule above names the same topics
            ("bob", "b", 's', "home/+/x", false),
            ("bob", "b", 's', "home/ann/x", false),
            ("bob", "b", 's', "dev/+/state", true),
            ("bob", "b", 's', "dev/7/state", true),
            ("bob", "b", 's', "dev/#", false),
            ("bob", "b", 's', "$SYS/x", false),
            ("gate", "g", 's', "tidegate/#", true),
            ("gate", "g", 's', "tidegate/a/b", true),
            ("gate", "g", 'p', "tidegate/a", false),
        ];
        for (user, id, what, topic, expected) in table {
            let who = client(user, id);
            let allowed = match what {
                'p' => acl.may_publish(&who, topic),
                _ => acl.may_subscribe(&who, topic),
            };
            assert_eq!(allowed, expected, "{user} {what} {topic}");
        }
    }

    #[test]
    fn names_that_mean_more_than_themselves_match_nothing() {
        let rules = [rule("*", "ps", &["%c/#", "u/%u/#", "x/a%cb/y"])];
        let acl = Acl::new(AclMode::Rules, &rules);
        for id in ["#", "+", "a/b", "", "$SYS", "a+"] {
            let who = client("bob", id);
            for topic in ["x", "a/b/c", "$SYS/x", "+/x", "a/b", "/x"] {
                assert!(!acl.may_subscribe(&who, topic), "{id} {topic}");
            }
            assert!(!acl.may_subscribe(&who, "#"));
        }
        assert!(acl.may_publish(&client("bob", "c1"), "c1/x"));
        assert!(acl.may_publish(&client("bob", "c1"), "x/ac1b/y"));
        // Nor does a client of that name get what is reserved.
        assert!(!acl.may_subscribe(&client("bob", "tidegate"), "tidegate/x"));
        // %c inside a user name is text.
        assert!(acl.may_publish(&client("%c", "z"), "u/%c/x"));
        assert!(!acl.may_publish(&client("%c", "z"), "u/z/x"));
    }

    #[test]
    fn an_unverified_user_name_is_no_user_name() {
        let acl = Acl::new(AclMode::Rules, &[rule("*", "ps", &["u/%u/#"])]);
        let forged = Identity {
            username: Some("alice".into()),
            ..client(ANONYMOUS, "c")
        };
        assert!(!acl.may_publish(&forged, "u/alice/x"));
        assert!(acl.may_publish(&client("alice", "c"), "u/alice/x"));
    }

    #[test]
    fn no_rule_no_right() {
        let acl = Acl::new(AclMode::Rules, &[]);
        assert!(!acl.may_publish(&client("a", "b"), "x"));
        assert!(!acl.may_subscribe(&client("a", "b"), "x"));
    }

    #[test]
    fn globs() {
        for (pattern, name, expected) in [
            ("*", "", true),
            ("*", "abc", true),
            ("a*", "abc", true),
            ("*c", "abc", true),
            ("a*c*", "abcd", true),
            ("a*bc", "abbc", true),
            ("a*bc", "abcb", false),
            ("abc", "abc", true),
            ("abc", "abcd", false),
            ("ab", "", false),
            ("*ü*", "grün", true),
        ] {
            assert_eq!(glob(pattern, name), expected, "{pattern} {name}");
        }
    }
}
