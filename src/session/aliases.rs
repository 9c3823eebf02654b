//! The topic aliases of one connection, in both directions (MQTT 5 §3.3.2.3.4).
//!
//! Streams keep no order with each other, so an alias is valid only on the stream that defined it.

use std::sync::Arc;

use crate::hashing::LookUp;
use crate::mqtt::Alias;
use crate::streams::StreamId;

use crate::session::CloseReason;

/// The most aliases toward one client, whatever it accepts: each costs the bytes of its topic.
const ALIASES_OUT_MAX: u16 = 64;
/// The topics behind the aliases that one client defined.
const TOPICS_MAX_BYTES: usize = 128 * 1024;

/// The aliases of one connection.
#[derive(Debug)]
pub(super) struct Aliases {
    /// Boxed, because few clients define or accept any.
    tables: Option<Box<Tables>>,
    outbound_max: u16,
}

#[derive(Debug, Default)]
struct Tables {
    /// The client's, by stream and by alias minus one.
    inbound: Vec<Vec<Option<Arc<str>>>>,
    /// Ours: the alias of each topic, and the stream that defined it.
    outbound: LookUp<Box<str>, (u16, StreamId)>,
    /// How many of ours are defined.
    given: u16,
}

impl Aliases {
    /// For a client with this Topic Alias Maximum.
    pub(super) fn new(topic_alias_maximum: u16) -> Self {
        Self {
            tables: None,
            outbound_max: topic_alias_maximum.min(ALIASES_OUT_MAX),
        }
    }

    /// Whether the client accepts aliases.
    pub(super) fn are_accepted(&self) -> bool {
        self.outbound_max > 0
    }

    /// The topic of a PUBLISH that has an alias: defines the alias if `topic` is not empty.
    ///
    /// # Errors
    /// The alias was never defined on this stream, or the topics of all aliases together are too
    /// long to keep.
    pub(super) fn resolve(
        &mut self,
        stream: StreamId,
        alias: u16,
        topic: &str,
    ) -> Result<Arc<str>, CloseReason> {
        let undefined = CloseReason::TopicAliasUndefined;
        let index = usize::from(alias).checked_sub(1).ok_or(undefined)?;
        let stream = stream.index();
        if topic.is_empty() {
            let streams = self.tables.as_ref().map(|tables| &tables.inbound);
            let known = streams.and_then(|s| s.get(stream)?.get(index)?.clone());
            return known.ok_or(undefined);
        }
        let inbound = &mut self.tables.get_or_insert_default().inbound;
        if inbound.len() <= stream {
            inbound.resize(stream + 1, Vec::new());
        }
        if inbound[stream].len() <= index {
            inbound[stream].resize(index + 1, None);
        }
        let all = inbound.iter().flatten().flatten();
        let others: usize = all.map(|t| t.len()).sum();
        if others + topic.len() > TOPICS_MAX_BYTES {
            return Err(CloseReason::TopicAliasBytes);
        }
        let topic: Arc<str> = topic.into();
        inbound[stream][index] = Some(topic.clone());
        Ok(topic)
    }

    /// The alias for a delivery of `topic` on a stream. Topics get aliases in the order of their
    /// first delivery, up to the client's maximum [MQTT-3.1.2-26].
    pub(super) fn for_delivery(&mut self, topic: &str, stream: StreamId) -> Alias {
        if self.outbound_max == 0 {
            return Alias::None;
        }
        let tables = self.tables.get_or_insert_default();
        match tables.outbound.get(topic) {
            Some((alias, on)) if *on == stream => return Alias::Use(*alias),
            Some(_) => return Alias::None,
            None => {}
        }
        // An alias is not reused after its stream ended, since the client may still know it.
        if tables.given == self.outbound_max {
            return Alias::None;
        }
        tables.given += 1;
        (tables.outbound).insert(topic.into(), (tables.given, stream));
        Alias::Define(tables.given)
    }

    /// A data stream ended, and its aliases with it.
    pub(super) fn stream_ended(&mut self, stream: StreamId) {
        let Some(tables) = &mut self.tables else {
            return;
        };
        if let Some(aliases) = tables.inbound.get_mut(stream.index()) {
            *aliases = Vec::new();
        }
        tables.outbound.retain(|_, (_, on)| *on != stream);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_alias_is_valid_on_its_own_stream_only() {
        let mut aliases = Aliases::new(0);
        let undefined = Err(CloseReason::TopicAliasUndefined);
        assert_eq!(aliases.resolve(StreamId::CONTROL, 0, "a"), undefined);
        assert_eq!(aliases.resolve(StreamId::CONTROL, 1, ""), undefined);
        assert_eq!(
            aliases.resolve(StreamId::CONTROL, 1, "a").as_deref(),
            Ok("a")
        );
        assert_eq!(
            aliases.resolve(StreamId::CONTROL, 1, "").as_deref(),
            Ok("a")
        );
        assert_eq!(aliases.resolve(StreamId::new(2), 1, ""), undefined);
        assert_eq!(
            aliases.resolve(StreamId::new(2), 1, "b").as_deref(),
            Ok("b")
        );
        aliases.stream_ended(StreamId::new(2));
        assert_eq!(aliases.resolve(StreamId::new(2), 1, ""), undefined);
        assert_eq!(
            aliases.resolve(StreamId::CONTROL, 1, "").as_deref(),
            Ok("a")
        );
    }

    #[test]
    fn topics_behind_aliases_are_bounded_in_bytes() {
        let mut aliases = Aliases::new(0);
        let half = "x".repeat(TOPICS_MAX_BYTES / 2);
        assert!(aliases.resolve(StreamId::CONTROL, 1, &half).is_ok());
        assert!(aliases.resolve(StreamId::new(1), 1, &half).is_ok());
        assert_eq!(
            aliases.resolve(StreamId::new(1), 2, "x"),
            Err(CloseReason::TopicAliasBytes)
        );
    }

    #[test]
    fn deliveries_define_aliases_up_to_the_maximum() {
        assert_eq!(
            Aliases::new(0).for_delivery("a", StreamId::CONTROL),
            Alias::None
        );
        let mut aliases = Aliases::new(2);
        assert_eq!(
            aliases.for_delivery("a", StreamId::CONTROL),
            Alias::Define(1)
        );
        assert_eq!(aliases.for_delivery("a", StreamId::CONTROL), Alias::Use(1));
        assert_eq!(aliases.for_delivery("a", StreamId::new(3)), Alias::None);
        assert_eq!(
            aliases.for_delivery("b", StreamId::new(3)),
            Alias::Define(2)
        );
        assert_eq!(aliases.for_delivery("c", StreamId::CONTROL), Alias::None);
        aliases.stream_ended(StreamId::new(3));
        assert_eq!(aliases.for_delivery("b", StreamId::CONTROL), Alias::None);
    }
}
