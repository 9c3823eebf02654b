//! From filters to members.

pub mod trie;
