//! Gaps of a link, shown in the sessions that they concern.

use crate::hashing::LookUpSet;
use crate::topics::FilterId;

use crate::router::sessions::Sessions;
use crate::router::sessions::members::Members;
use crate::router::types::SessionRef;

/// Filters that are looked at before a shard's lock is given back.
const CHUNK: usize = 512;

impl Sessions {
    /// Messages of these filters may have been missed: each session that has one of them gets one gap.
    pub(crate) fn note_gap(&self, filters: &[FilterId]) {
        for number in self.shards() {
            let mut noted: LookUpSet<(u32, u32)> = LookUpSet::default();
            for filters in filters.chunks(CHUNK) {
                let mut shard = self.shard(number);
                let shard = &mut *shard;
                let members = filters.iter().filter_map(|f| shard.members.get(f));
                for member in members.flat_map(Members::all) {
                    let slot = shard.slots.get_mut(member.slot as usize);
                    if member.qos.is_some()
                        && let Some(slot) = slot
                        && noted.insert((member.slot, slot.slot_version))
                    {
                        slot.session.gaps += 1;
                    }
                }
            }
        }
    }

    /// Messages for these sessions may have been missed: each gets one gap.
    pub(crate) fn note_gap_of(&self, sessions: &[SessionRef]) {
        let mut sessions = sessions.to_vec();
        sessions.sort_unstable();
        sessions.dedup();
        for session in sessions {
            self.with(session, |s, _| s.gaps += 1);
        }
    }
}
