//! The trie against brute force.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;

/// Written apart from the code under test, level by level.
fn matches(filter: &str, topic: &str) -> bool {
    if topic.starts_with('$') && filter.starts_with(['+', '#']) {
        return false;
    }
    let (mut f, mut t) = (filter.split('/'), topic.split('/'));
    loop {
        match (f.next(), t.next()) {
            (Some("#"), _) => return true,
            (Some("+"), Some(_)) => {}
            (Some(a), Some(b)) if a == b => {}
            (None, None) => return true,
            _ => return false,
        }
    }
}

/// Every topic of up to four levels over the alphabet of `filter()`.
fn topics() -> Vec<String> {
    let names = ["", "a", "b", "$s"];
    let mut all: Vec<String> = names.iter().map(|s| s.to_string()).collect();
    let mut from = 0;
    for _ in 1..4 {
        let to = all.len();
        for i in from..to {
            for n in names {
                all.push(format!("{}/{n}", all[i]));
            }
        }
        from = to;
    }
    all.retain(|t| !t.is_empty());
    all
}

fn filter() -> impl Strategy<Value = String> {
    let level = prop::sample::select(vec!["", "a", "b", "+", "+", "$s"]);
    (prop::collection::vec(level, 0..4), any::<bool>())
        .prop_map(|(mut levels, multi)| {
            if multi {
                levels.push("#");
            }
            levels.join("/")
        })
        .prop_filter("a filter has at least one character", |f| !f.is_empty())
}

fn hits(trie: &FilterTrie<u32>, topic: &str) -> Vec<u32> {
    let mut out = Vec::new();
    trie.for_each_match(topic, |v| out.push(v));
    out.sort_unstable();
    out
}

fn overlapping(trie: &FilterTrie<u32>, filter: &str) -> Vec<u32> {
    let mut out = Vec::new();
    assert!(!trie.overlaps_any(filter, |v| {
        out.push(v);
        false
    }));
    out.sort_unstable();
    out
}

/// The one pair that meets only in the empty topic, which is none.
fn only_empty(a: &str, b: &str) -> bool {
    matches!((a, b), ("+", "/#") | ("/#", "+"))
}

proptest! {
    #[test]
    fn agrees_with_the_pairwise_functions(
        filters in prop::collection::btree_set(filter(), 1..40),
        topic in "[ab/$]{1,6}",
        probe in filter(),
    ) {
        let mut trie = FilterTrie::new();
        let filters: Vec<String> = filters.into_iter().collect();
        for (v, f) in filters.iter().enumerate() {
            trie.insert(f, v as u32);
        }
        let keep = |test: &dyn Fn(&str) -> bool| -> Vec<u32> {
            (0..).zip(&filters).filter(|(_, f)| test(f)).map(|(v, _)| v).collect()
        };
        prop_assert_eq!(hits(&trie, &topic), keep(&|f| crate::topics::matches(f, &topic)));
        let want = keep(&|f| crate::topics::overlaps(f, &probe) && !only_empty(f, &probe));
        prop_assert_eq!(overlapping(&trie, &probe), want);
    }

    #[test]
    fn agrees_with_brute_force(
        ops in prop::collection::vec((filter(), any::<bool>(), any::<u32>()), 1..60),
        probes in prop::collection::vec(filter(), 1..8),
    ) {
        let mut trie = FilterTrie::new();
        let mut model = BTreeMap::new();
        for (filter, add, v) in ops {
            if add {
                prop_assert_eq!(trie.insert(&filter, v), model.insert(filter, v));
            } else {
                prop_assert_eq!(trie.remove(&filter), model.remove(&filter));
            }
            prop_assert_eq!(trie.len(), model.len());
        }
        let topics = topics();
        for t in &topics {
            let mut want: Vec<u32> =
                model.iter().filter(|(f, _)| matches(f, t)).map(|(_, v)| *v).collect();
            want.sort_unstable();
            prop_assert_eq!(hits(&trie, t), want, "topic {}", t);
        }
        for p in probes.iter().chain(model.keys()) {
            let mine: Vec<&String> = topics.iter().filter(|t| matches(p, t)).collect();
            let mut want: Vec<u32> = model
                .iter()
                .filter(|(f, _)| mine.iter().any(|t| matches(f, t)))
                .map(|(_, v)| *v)
                .collect();
            want.sort_unstable();
            prop_assert_eq!(overlapping(&trie, p), want, "filter {}", p);
            prop_assert_eq!(trie.get(p), model.get(p).copied());
        }
        for f in model.keys() {
            prop_assert!(trie.remove(f).is_some());
        }
        prop_assert!(trie.is_empty());
        prop_assert_eq!((trie.nodes.len(), trie.edges.len()), (2, 0));
        prop_assert_eq!(trie.levels.by_name.len(), 0);
    }

    #[test]
    fn any_string_is_harmless(a in ".{0,12}", b in "[ab/#+$]{0,12}") {
        let mut trie = FilterTrie::new();
        for f in [&a, &b] {
            trie.insert(f, 1);
            trie.for_each_match(f, |_| {});
            trie.overlaps_any(f, |_| false);
        }
        for f in [&a, &b] {
            trie.remove(f);
        }
        prop_assert!(trie.is_empty());
    }
}

#[test]
fn empty_levels_and_dollar() {
    let mut trie = FilterTrie::new();
    for (v, f) in ["a//b", "/a", "+/+", "/+", "#", "a/#", "$s/#", "+/a/#", "/"]
        .iter()
        .enumerate()
    {
        assert_eq!(trie.insert(f, v as u32), None);
    }
    assert_eq!(hits(&trie, "a//b"), [0, 4, 5]);
    assert_eq!(hits(&trie, "/a"), [1, 2, 3, 4, 7]);
    assert_eq!(hits(&trie, "/"), [2, 3, 4, 8]);
    assert_eq!(hits(&trie, "a"), [4, 5]);
    assert_eq!(hits(&trie, "$s/a"), [6]);
    assert_eq!(hits(&trie, "$s"), [6]);
    assert_eq!(overlapping(&trie, "$s/+/a"), [6]);
    assert_eq!(overlapping(&trie, "+/a"), [1, 2, 3, 4, 5, 7]);
}

#[test]
fn stops_when_told() {
    let mut trie = FilterTrie::new();
    for i in 0..100u32 {
        trie.insert(&format!("a/{i}"), i);
    }
    let mut calls = 0;
    assert!(trie.overlaps_any("a/+", |_| {
        calls += 1;
        calls == 3
    }));
    assert_eq!(calls, 3);
}

#[test]
fn nodes_and_levels_are_reused() {
    let mut trie = FilterTrie::new();
    trie.insert("keep", 0);
    for i in 0..10_000u32 {
        let f = format!("dev/{i}/+/cmd");
        trie.insert(&f, i);
        assert_eq!(trie.remove(&f), Some(i));
    }
    assert!(trie.nodes.len() < 10 && trie.levels.given < 10);
}

proptest! {
    #[test]
    fn covers_agree_with_the_pairwise_function(
        filters in prop::collection::vec(filter(), 1..12),
        of in filter(),
    ) {
        let mut trie = FilterTrie::new();
        for (at, filter) in filters.iter().enumerate() {
            trie.insert(filter, at);
        }
        let mut found = Vec::new();
        trie.for_each_cover(&of, |at| found.push(filters[at].clone()));
        for filter in &filters {
            let covers = crate::topics::covers(filter, &of);
            // These are equal to other filters only because no topic is empty.
            let equal = matches!(&*of, "#" | "/#");
            if found.contains(filter) {
                prop_assert!(covers, "{filter} does not cover {of}");
            } else {
                prop_assert!(!covers || equal, "{filter} covers {of}");
            }
        }
    }
}
