//! The access rules: the topics that a client may publish to and subscribe to.

use std::fmt;

use smallvec::SmallVec;

use crate::auth::Identity;
use crate::config::{AclMode, AclRule, Config};
use crate::topics::{covers, matches, overlaps, split_shared};

/// First level of the topics that Tidegate keeps for itself.
pub(super) const OWN_PREFIX: &str = "tidegate";

/// The access rules of a configuration, prepared for decisions.
///
/// Reserved topics begin with `$` or with a prefix of Tidegate's own. Only a rule that names them by
/// its own letters opens them; any rule that matches them can deny them.
#[derive(Debug)]
pub struct Acl {
    /// `None`: every topic but the reserved ones.
    rules: Option<Box<[AclRule]>>,
    /// `upstream.probe_topic`, the prefix of the probes.
    probe_topic: Box<str>,
}

/// A pattern with the client's names in place.
pub(crate) type Expanded = SmallVec<[u8; 128]>;

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Allow,
    Deny,
}

/// The part of the configuration that decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum DecidedBy {
    /// The rule with this number, counted from 0 as in error messages of the configuration.
    Rule(usize),
    /// No rule matches.
    NoRule,
    /// The topic is reserved, or the filter is invalid.
    Reserved,
}

impl fmt::Display for DecidedBy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(number) => write!(f, "acl[{number}]"),
            Self::NoRule => f.write_str("no rule allows it"),
            Self::Reserved => f.write_str("reserved topic"),
        }
    }
}

impl Acl {
    /// Rules, and `upstream.probe_topic`.
    fn new(mode: AclMode, rules: &[AclRule], probe_topic: &str) -> Self {
        Self {
            rules: match mode {
                AclMode::Open => None,
                AclMode::Rules => Some(rules.into()),
            },
            probe_topic: probe_topic.into(),
        }
    }

    /// The rules of a configuration.
    pub fn of(config: &Config) -> Self {
        let probe_topic = &config.upstream.probe_topic;
        Self::new(config.auth.acl, &config.acl, probe_topic)
    }

    /// Whether a client may publish to a topic. The topic is a valid name, and `mount` stands before it
    /// at the broker.
    pub fn may_publish(&self, identity: &Identity, mount: &str, topic: &str) -> bool {
        self.publish(identity, mount, topic).0 == Verdict::Allow
    }

    /// The rule that decides about a publish, for the log.
    pub(crate) fn publish_rule(&self, identity: &Identity, mount: &str, topic: &str) -> DecidedBy {
        self.publish(identity, mount, topic).1
    }

    fn publish(&self, identity: &Identity, mount: &str, topic: &str) -> (Verdict, DecidedBy) {
        self.decide(
            (identity, mount, topic),
            |rule| rule.allow.publish,
            |pattern, _| matches(pattern, topic),
        )
    }

    /// Whether a client may subscribe to a filter, `$share` included. The filter is valid, and `mount`
    /// stands before it at the broker. It is granted only if all of it lies inside one allowed pattern,
    /// and no earlier rule denies a part of it.
    pub fn may_subscribe(&self, identity: &Identity, mount: &str, filter: &str) -> bool {
        self.subscribe(identity, mount, filter).0 == Verdict::Allow
    }

    /// The rule that decides about a subscription, for the log.
    pub(crate) fn subscribe_rule(
        &self,
        identity: &Identity,
        mount: &str,
        filter: &str,
    ) -> DecidedBy {
        self.subscribe(identity, mount, filter).1
    }

    fn subscribe(&self, identity: &Identity, mount: &str, filter: &str) -> (Verdict, DecidedBy) {
        let filter = match split_shared(filter) {
            Some((_, inner)) => inner,
            None if filter.starts_with("$share/") => return (Verdict::Deny, DecidedBy::Reserved),
            None => filter,
        };
        self.decide(
            (identity, mount, filter),
            |rule| rule.allow.subscribe,
            |pattern, allowed| covers(pattern, filter) || (!allowed && overlaps(pattern, filter)),
        )
    }

    /// The decision of the first rule with a pattern for which `hits` returns true.
    fn decide(
        &self,
        (identity, mount, topic): (&Identity, &str, &str),
        allows: impl Fn(&AclRule) -> bool,
        hits: impl Fn(&str, bool) -> bool,
    ) -> (Verdict, DecidedBy) {
        // A client's names can complete a mount to a prefix of Tidegate's own. No rule can name it,
        // because rules name topics as clients do.
        if !mount.is_empty() && self.is_own_when_mounted(mount, topic) {
            return (Verdict::Deny, DecidedBy::Reserved);
        }
        let reserved = self.reserved_prefix(topic);
        let Some(rules) = &self.rules else {
            return match reserved {
                Some(_) => (Verdict::Deny, DecidedBy::Reserved),
                None => (Verdict::Allow, DecidedBy::NoRule),
            };
        };
        let decided = rules
            .iter()
            .enumerate()
            .filter(|(_, rule)| glob(&rule.who, &identity.principal))
            .find_map(|(number, rule)| {
                let allowed = allows(rule);
                let hit = |pattern: &String| {
                    match (expand(pattern, identity), allowed) {
                        // The pattern itself must name it: `%c` must not open it to a client of that
                        // name.
                        (Some(expanded), true) => {
                            reserved.is_none_or(|prefix| is_below(pattern, prefix))
                                && hits(text(&expanded), true)
                        }
                        (Some(expanded), false) => hits(text(&expanded), false),
                        (None, true) => false,
                        (None, false) => fails_closed(pattern, |wider| hits(wider, false)),
                    }
                };
                let verdict = if allowed {
                    Verdict::Allow
                } else {
                    Verdict::Deny
                };
                let hit = rule.topics.iter().any(hit);
                hit.then_some((verdict, DecidedBy::Rule(number)))
            });
        decided.unwrap_or((Verdict::Deny, DecidedBy::NoRule))
    }

    /// The reserved prefix that a topic or filter lies below.
    fn reserved_prefix<'a>(&'a self, topic: &'a str) -> Option<&'a str> {
        if topic.starts_with('$') {
            return Some(first_level(topic));
        }
        let own = [OWN_PREFIX, &self.probe_topic];
        own.into_iter().find(|prefix| is_below(topic, prefix))
    }

    /// Whether `mount` followed by `topic` lies below a prefix of Tidegate's own.
    fn is_own_when_mounted(&self, mount: &str, topic: &str) -> bool {
        let own = [OWN_PREFIX, &self.probe_topic];
        own.into_iter().any(|prefix| {
            let rest = prefix.strip_prefix(mount);
            is_below(mount, prefix) || rest.is_some_and(|rest| is_below(topic, rest))
        })
    }
}

fn text(expanded: &Expanded) -> &str {
    std::str::from_utf8(expanded).expect("put together from whole strings")
}

/// Judges a pattern that denies and whose names cannot stand in a topic. Nobody can say which topics it
/// means, so it means all that it could mean with any text in the names' place.
fn fails_closed(pattern: &str, hits: impl Fn(&str) -> bool) -> bool {
    let before = pattern.split('%').next().unwrap_or_default();
    match before.rfind('/') {
        Some(slash) => hits(&format!("{}#", &before[..=slash])),
        None => true,
    }
}

/// Whether a topic or filter is `prefix`, or begins with it and `/`.
fn is_below(topic: &str, prefix: &str) -> bool {
    let rest = topic.strip_prefix(prefix);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn first_level(topic: &str) -> &str {
    topic.split('/').next().unwrap_or(topic)
}

/// Replaces `%c` and `%u` by the client identifier and the user name. `None`: a name is missing or
/// empty, or it would change the meaning of the pattern, as one with `/`, `+` or `#` would.
pub(crate) fn expand(pattern: &str, identity: &Identity) -> Option<Expanded> {
    let mut out = Expanded::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('%') {
        out.extend_from_slice(before.as_bytes());
        let name: &str = if after.starts_with('c') {
            &identity.client_id
        } else {
            identity.verified_user()?
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

/// Whether a name matches a pattern, in which `*` stands for any text.
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
    use crate::auth::ANONYMOUS;
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

    fn with(mode: AclMode, rules: &[AclRule]) -> Acl {
        Acl::new(mode, rules, "tidegate/probe")
    }

    fn client(user: &str, id: &str) -> Identity {
        Identity::new(user.into(), id.into())
    }

    #[test]
    fn the_rule_that_decides_is_named() {
        let rules = [
            rule("bob", "ps", &["a/#"]),
            rule("*", "p", &["b/+", "b/x/y"]),
        ];
        let acl = with(AclMode::Rules, &rules);
        let bob = client("bob", "c");
        assert_eq!(acl.publish_rule(&bob, "", "a/x"), DecidedBy::Rule(0));
        assert_eq!(acl.publish_rule(&bob, "", "c"), DecidedBy::NoRule);
        assert_eq!(acl.subscribe_rule(&bob, "", "b/#"), DecidedBy::Rule(1));
        assert_eq!(acl.subscribe_rule(&bob, "", "b/#").to_string(), "acl[1]");
        let open = with(AclMode::Open, &[]);
        assert_eq!(open.publish_rule(&bob, "", "$SYS/x"), DecidedBy::Reserved);
        assert_eq!(
            open.subscribe_rule(&bob, "", "$share/x"),
            DecidedBy::Reserved
        );
    }

    #[test]
    fn open_allows_all_but_the_reserved_topics() {
        let acl = with(AclMode::Open, &[]);
        let who = client(ANONYMOUS, "c");
        for topic in ["a/b", "a/$SYS", "tidegates/x", "/"] {
            assert!(
                acl.may_publish(&who, "", topic) && acl.may_subscribe(&who, "", topic),
                "{topic}"
            );
        }
        for topic in [
            "$SYS/broker",
            "$CONTROL/dynamic-security/v1",
            "$aws/things/x/shadow/update",
            "$delayed/5/a",
            "$",
            "tidegate/probe",
            "tidegate",
            "$SYS",
        ] {
            assert!(
                !acl.may_publish(&who, "", topic) && !acl.may_subscribe(&who, "", topic),
                "{topic}"
            );
        }
        for filter in ["#", "+/x", "$share/g/#", "$share/g/a"] {
            assert!(acl.may_subscribe(&who, "", filter), "{filter}");
        }
        for filter in [
            "$SYS/#",
            "tidegate/#",
            "$share/g/$SYS/#",
            "$share/g/$CONTROL/#",
            "$queue/a",
            "$share/g/$queue/a",
            "$share/g/tidegate/+",
            "$share/g",
        ] {
            assert!(!acl.may_subscribe(&who, "", filter), "{filter}");
        }
    }

    /// Each row: rules, user, client identifier, publish or subscribe, topic, whether the rules allow it.
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
        let acl = with(AclMode::Rules, &rules);
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
                'p' => acl.may_publish(&who, "", topic),
                _ => acl.may_subscribe(&who, "", topic),
            };
            assert_eq!(allowed, expected, "{user} {what} {topic}");
        }
    }

    #[test]
    fn a_rule_denies_topics_of_tidegate_that_it_does_not_name() {
        let rules = [
            rule("mallory", "", &["#"]),
            rule("*", "", &["%c/#", "+/secret/#"]),
            rule("*", "ps", &["tidegate/#"]),
        ];
        let acl = with(AclMode::Rules, &rules);
        let may = |user, id, topic| {
            let who = client(user, id);
            let publish = acl.may_publish(&who, "", topic);
            assert_eq!(
                acl.may_subscribe(&who, "", topic),
                publish,
                "{user} {topic}"
            );
            publish
        };
        assert!(may("bob", "c", "tidegate/x"));
        assert!(!may("mallory", "c", "tidegate/x"));
        assert!(!may("bob", "tidegate", "tidegate/x"));
        assert!(!may("bob", "c", "tidegate/secret/x"));
        assert!(!acl.may_subscribe(&client("bob", "c"), "", "tidegate/#"));
    }

    #[test]
    fn dollar_topics_need_a_rule_that_names_them() {
        let rules = [
            rule("*", "ps", &["$aws/things/%c/#", "%c/#", "+/#", "#"]),
            rule("*", "p", &["$CONTROL/dynamic-security/v1"]),
        ];
        let acl = with(AclMode::Rules, &rules);
        let who = client("alice", "$CONTROL");
        assert!(acl.may_publish(&client("alice", "t1"), "", "$aws/things/t1/x"));
        assert!(!acl.may_publish(&client("alice", "t2"), "", "$aws/things/t1/x"));
        assert!(acl.may_publish(&who, "", "$CONTROL/dynamic-security/v1"));
        for topic in ["$CONTROL/x", "$delayed/5/a", "$SYS/x"] {
            assert!(!acl.may_publish(&who, "", topic), "{topic}");
            assert!(!acl.may_subscribe(&who, "", topic), "{topic}");
        }
    }

    #[test]
    fn a_mount_does_not_lead_into_the_own_prefixes() {
        let own = |acl: &Acl| {
            let who = client("alice", "tidegate");
            for (mount, topic) in [
                ("tidegate/", "x"),
                ("tidegate/", "probe/x"),
                ("tidegate/alice/", "x"),
                ("outer/", "probe"),
                ("outer/", "probe/n/1"),
                ("outer/probe/", "n"),
            ] {
                assert!(!acl.may_publish(&who, mount, topic), "{mount}{topic}");
                assert!(!acl.may_subscribe(&who, mount, topic), "{mount}{topic}");
                let shared = format!("$share/g/{topic}");
                assert!(!acl.may_subscribe(&who, mount, &shared), "{mount}{topic}");
            }
            for (mount, topic) in [("tidegates/", "x"), ("outer/", "probes"), ("a/", "b")] {
                assert!(acl.may_publish(&who, mount, topic), "{mount}{topic}");
            }
        };
        own(&Acl::new(AclMode::Open, &[], "outer/probe"));
        let rules = [rule("*", "ps", &["#", "tidegate/#"])];
        own(&Acl::new(AclMode::Rules, &rules, "outer/probe"));
    }

    #[test]
    fn the_probes_have_a_place_of_their_own() {
        let open = Acl::new(AclMode::Open, &[], "outer/probe");
        let who = client("alice", "c");
        assert!(!open.may_publish(&who, "", "outer/probe/n/1"));
        assert!(!open.may_subscribe(&who, "", "outer/probe/#"));
        assert!(open.may_publish(&who, "", "outer/x"));
        let rules = [
            rule("*", "p", &["outer/#"]),
            rule("gate", "p", &["outer/probe/#"]),
        ];
        let named = Acl::new(AclMode::Rules, &rules, "outer/probe");
        assert!(!named.may_publish(&who, "", "outer/probe/n/1"));
        assert!(named.may_publish(&who, "", "outer/x"));
        assert!(named.may_publish(&client("gate", "c"), "", "outer/probe/n/1"));
    }

    #[test]
    fn a_rule_that_denies_by_an_unusable_name_fails_closed() {
        let rules = [
            rule("*", "", &["private/%c/#", "x%u"]),
            rule("*", "s", &["inbox/%c"]),
            rule("*", "ps", &["#"]),
        ];
        let acl = with(AclMode::Rules, &rules);
        for id in ["a/b", "+", "#", "", "a#"] {
            let who = client("bob", id);
            for topic in ["private/a/b/x", "private/x", "private", "xbob", "inbox/a/b"] {
                assert!(!acl.may_publish(&who, "", topic), "{id} {topic}");
            }
            for filter in [
                "private/a/b/x",
                "#",
                "+/a/b",
                "private/#",
                "$share/g/private/a/x",
            ] {
                assert!(!acl.may_subscribe(&who, "", filter), "{id} {filter}");
            }
            // The rules that a later allow is to decide about.
            for topic in ["public/x", "privat"] {
                assert!(acl.may_publish(&who, "", topic), "{id} {topic}");
                assert!(acl.may_subscribe(&who, "", topic), "{id} {topic}");
            }
            assert!(acl.may_subscribe(&who, "", "inbox/a/b"));
        }
        // A name in the first level: the rule may mean any topic, reserved ones included.
        let rules = [rule("*", "", &["%c/#"]), rule("*", "ps", &["$SYS/#", "#"])];
        let acl = with(AclMode::Rules, &rules);
        for topic in ["x", "$SYS/x"] {
            assert!(
                !acl.may_publish(&client("bob", "$SYS"), "", topic),
                "{topic}"
            );
            assert!(acl.may_publish(&client("bob", "ok"), "", topic), "{topic}");
        }
        // A client without a user name: `%u` has no text at all.
        let rules = [rule("*", "", &["u/%u/#"]), rule("*", "ps", &["#"])];
        let acl = with(AclMode::Rules, &rules);
        assert!(!acl.may_publish(&client(ANONYMOUS, "c"), "", "u/alice/x"));
        assert!(acl.may_publish(&client("bob", "c"), "", "u/alice/x"));
    }

    #[test]
    fn names_that_mean_more_than_themselves_match_nothing() {
        let rules = [rule("*", "ps", &["%c/#", "u/%u/#", "x/a%cb/y"])];
        let acl = with(AclMode::Rules, &rules);
        for id in ["#", "+", "a/b", "", "$SYS", "a+"] {
            let who = client("bob", id);
            for topic in ["x", "a/b/c", "$SYS/x", "+/x", "a/b", "/x"] {
                assert!(!acl.may_subscribe(&who, "", topic), "{id} {topic}");
            }
            assert!(!acl.may_subscribe(&who, "", "#"));
        }
        assert!(acl.may_publish(&client("bob", "c1"), "", "c1/x"));
        assert!(acl.may_publish(&client("bob", "c1"), "", "x/ac1b/y"));
        // A client of that name does not get the reserved topics either.
        assert!(!acl.may_subscribe(&client("bob", "tidegate"), "", "tidegate/x"));
        // %c inside a user name is text.
        assert!(acl.may_publish(&client("%c", "z"), "", "u/%c/x"));
        assert!(!acl.may_publish(&client("%c", "z"), "", "u/z/x"));
    }

    #[test]
    fn an_unverified_user_name_is_no_user_name() {
        let acl = with(AclMode::Rules, &[rule("*", "ps", &["u/%u/#"])]);
        for topic in ["u/alice/x", "u/anonymous/x"] {
            assert!(!acl.may_publish(&client(ANONYMOUS, "c"), "", topic));
        }
        assert!(acl.may_publish(&client("alice", "c"), "", "u/alice/x"));
    }

    #[test]
    fn no_rule_no_right() {
        let acl = with(AclMode::Rules, &[]);
        assert!(!acl.may_publish(&client("a", "b"), "", "x"));
        assert!(!acl.may_subscribe(&client("a", "b"), "", "x"));
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
