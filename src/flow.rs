//! The messages of QoS 1 and 2 that one sender has in flight, in the order of sending.
//!
//! A session toward its client and a publish link toward the broker have the same duties: find a
//! message by its packet identifier, count the messages that use up the receiver's Receive Maximum,
//! and after a lost connection send everything unacknowledged again in the same order (MQTT 5 §4.3,
//! §4.4, §4.6, §4.9). Packets are encoded elsewhere.

use std::collections::VecDeque;

/// How far the exchange for one message has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// PUBLISH was sent on this connection.
    Sent,
    /// PUBLISH was sent on an earlier connection and is to be sent again.
    Resend,
    /// PUBREC was received, and PUBREL sent on this connection.
    Released,
    /// PUBREC was received on an earlier connection: PUBREL is to be sent again.
    ReleaseAgain,
    /// The exchange is complete. The entry stands until all entries before it are complete.
    Done,
}

impl Stage {
    /// Whether the message uses up a part of the receiver's Receive Maximum.
    fn is_open(self) -> bool {
        matches!(self, Self::Sent | Self::Released)
    }
}

/// A message in flight.
pub(crate) trait InFlight {
    /// Its packet identifier.
    fn packet_id(&self) -> u16;
    /// Its stage.
    fn stage(&self) -> Stage;
    /// Sets its stage.
    fn set_stage(&mut self, stage: Stage);
}

/// The messages in flight toward one receiver.
#[derive(Debug)]
pub(crate) struct Window<T> {
    /// The front is never done. Packet identifiers ascend, so an entry is found by its distance from
    /// the front.
    entries: VecDeque<T>,
    /// Entries before this index need no PUBLISH on this connection.
    resend_at: usize,
    last_id: u16,
    /// PUBLISHes and PUBRELs outstanding on this connection, those of forgotten entries included.
    open: u16,
    /// PUBRELs are to be sent again.
    releases_due: bool,
}

impl<T> Default for Window<T> {
    fn default() -> Self {
        Self::after(0)
    }
}

impl<T> Window<T> {
    /// An empty window that gives the identifiers after `last_id`.
    pub(crate) const fn after(last_id: u16) -> Self {
        Self {
            entries: VecDeque::new(),
            resend_at: 0,
            last_id,
            open: 0,
            releases_due: false,
        }
    }

    /// The messages that an earlier process had in flight, in the order of sending. Each is to be sent again.
    pub(crate) fn restored(entries: Vec<T>, last_id: u16) -> Self {
        Self {
            entries: entries.into(),
            releases_due: true,
            ..Self::after(last_id)
        }
    }

    /// The identifier that was given last; 0: none was.
    pub(crate) fn last_id(&self) -> u16 {
        self.last_id
    }
}

impl<T: InFlight> Window<T> {
    /// The entries, complete ones between others included.
    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether nothing is in flight.
    pub(crate) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The PUBLISHes and PUBRELs outstanding on this connection.
    pub(crate) fn open(&self) -> u16 {
        self.open
    }

    /// Whether messages may wait to be sent again. New ones must wait behind them.
    pub(crate) fn has_resends(&self) -> bool {
        self.resend_at < self.entries.len()
    }

    /// The identifier of the next message: ascending, and never 0 [MQTT-2.2.1-4]. It is free, because
    /// the entries hold a contiguous run behind it and are fewer than there are identifiers, which
    /// the caller sees to.
    pub(crate) fn next_id(&self) -> u16 {
        match self.last_id.wrapping_add(1) {
            0 => 1,
            id => id,
        }
    }

    /// Adds a message that was sent with [`Window::next_id`]. Nothing waits to be sent again.
    pub(crate) fn push(&mut self, entry: T) {
        debug_assert!(entry.stage() == Stage::Sent && !self.has_resends());
        self.last_id = entry.packet_id();
        self.open += 1;
        self.entries.push_back(entry);
        self.resend_at = self.entries.len();
    }

    /// The index of a message that is not complete. Indices are valid until an entry completes.
    pub(crate) fn find(&self, packet_id: u16) -> Option<usize> {
        let first = self.entries.front()?.packet_id();
        let distance = |id: u16| id.wrapping_sub(first);
        let index = self
            .entries
            .binary_search_by_key(&distance(packet_id), |e| distance(e.packet_id()))
            .ok()?;
        (self.entries[index].stage() != Stage::Done).then_some(index)
    }

    /// The entry at an index.
    pub(crate) fn get(&self, index: usize) -> &T {
        &self.entries[index]
    }

    /// The entry at an index; its stage and identifier must not be changed.
    pub(crate) fn get_mut(&mut self, index: usize) -> &mut T {
        &mut self.entries[index]
    }

    /// All entries in the order of sending.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.entries.iter()
    }

    /// All entries in the order of sending; their stages and identifiers must not be changed.
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.entries.iter_mut()
    }

    /// Completes a message.
    pub(crate) fn finish(&mut self, index: usize) {
        self.move_to(index, Stage::Done);
        self.trim();
    }

    /// Completes the messages for which `which` is true.
    pub(crate) fn finish_where(&mut self, mut which: impl FnMut(&mut T) -> bool) {
        for index in 0..self.entries.len() {
            let entry = &mut self.entries[index];
            if entry.stage() != Stage::Done && which(entry) {
                self.move_to(index, Stage::Done);
            }
        }
        self.trim();
    }

    /// PUBREC arrived for a message, and PUBREL is sent.
    pub(crate) fn release(&mut self, index: usize) {
        self.move_to(index, Stage::Released);
    }

    /// The next message to be sent again, in the order of sending [MQTT-4.6.0-1]. After it was sent,
    /// call [`Window::resent`] or [`Window::finish_resend`].
    pub(crate) fn next_resend(&mut self) -> Option<usize> {
        while let Some(entry) = self.entries.get(self.resend_at) {
            if entry.stage() == Stage::Resend {
                return Some(self.resend_at);
            }
            self.resend_at += 1;
        }
        None
    }

    /// The PUBLISH of [`Window::next_resend`] was sent.
    pub(crate) fn resent(&mut self, index: usize) {
        self.move_to(index, Stage::Sent);
        self.resend_at = index + 1;
    }

    /// Completes a message of [`Window::next_resend`], which cannot be sent again or needs no answer.
    pub(crate) fn finish_resend(&mut self, index: usize) {
        self.resend_at = index + 1;
        self.finish(index);
    }

    /// Sends PUBRELs again that the last connection left without PUBCOMP. They need no send quota
    /// [MQTT-3.3.4-10] and do not wait behind a PUBLISH that does; they keep the order of the PUBRECs
    /// [MQTT-4.6.0-4]. `write` gets the packet identifiers.
    pub(crate) fn release_again(&mut self, mut write: impl FnMut(u16)) {
        if !std::mem::take(&mut self.releases_due) {
            return;
        }
        for index in 0..self.entries.len() {
            let entry = &self.entries[index];
            if entry.stage() == Stage::ReleaseAgain {
                write(entry.packet_id());
                self.move_to(index, Stage::Released);
            }
        }
    }

    /// The connection ended: everything unacknowledged is to be sent again. `each` sees all entries.
    pub(crate) fn connection_ended(&mut self, mut each: impl FnMut(&mut T)) {
        self.unsend(|entry| {
            each(entry);
            true
        });
        self.open = 0;
    }

    /// The packets of entries for which `which` is true are lost with their stream, and are to be sent
    /// again.
    pub(crate) fn unsend(&mut self, mut which: impl FnMut(&mut T) -> bool) {
        for index in 0..self.entries.len() {
            let entry = &mut self.entries[index];
            if !which(entry) {
                continue;
            }
            match entry.stage() {
                Stage::Sent => self.move_to(index, Stage::Resend),
                Stage::Released => {
                    self.move_to(index, Stage::ReleaseAgain);
                    self.releases_due = true;
                }
                Stage::Resend | Stage::ReleaseAgain | Stage::Done => continue,
            }
            self.resend_at = self.resend_at.min(index);
        }
    }

    /// Forgets the entries for which `keep` is false. While the connection lasts they still use up the
    /// receiver's Receive Maximum, since it has not acknowledged them.
    pub(crate) fn retain(&mut self, keep: impl FnMut(&T) -> bool) {
        self.entries.retain(keep);
        let due = |e: &T| e.stage() == Stage::Resend;
        let first = self.entries.iter().position(due);
        self.resend_at = first.unwrap_or(self.entries.len());
        self.trim();
    }

    /// Gives the memory of an empty window back if it has room for more than `keep` entries.
    pub(crate) fn shrink(&mut self, keep: usize) {
        if self.entries.is_empty() && self.entries.capacity() > keep {
            self.entries = VecDeque::new();
        }
    }

    fn move_to(&mut self, index: usize, stage: Stage) {
        let entry = &mut self.entries[index];
        self.open -= u16::from(entry.stage().is_open());
        self.open += u16::from(stage.is_open());
        entry.set_stage(stage);
    }

    fn trim(&mut self) {
        let done = |e: &T| e.stage() == Stage::Done;
        while self.entries.front().is_some_and(done) {
            self.entries.pop_front();
            self.resend_at = self.resend_at.saturating_sub(1);
        }
    }
}

#[cfg(test)]
mod tests;
