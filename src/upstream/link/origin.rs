//! The origin marks of publishes: they tell the session that published a message, for No Local.

use crate::mqtt::{Property, Publish};
use crate::session::Incarnation;

use crate::upstream::link::common::RESERVED_KEY;

/// The origin mark, if this process wrote it.
pub(super) fn origin_mark(publish: &Publish<'_>, instance: u64) -> Option<Incarnation> {
    if publish.properties.raw().len() < RESERVED_KEY.len() {
        return None;
    }
    for property in publish.properties.iter() {
        if let Property::UserProperty(key, value) = property
            && key == RESERVED_KEY
        {
            return parse_mark(value, instance);
        }
    }
    None
}

fn parse_mark(value: &str, instance: u64) -> Option<Incarnation> {
    let (of, mark) = value.split_once('.')?;
    if u64::from_str_radix(of, 16).ok()? != instance {
        return None;
    }
    Incarnation::new(u64::from_str_radix(mark, 16).ok()?)
}
