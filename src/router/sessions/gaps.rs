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
                let awake = |f: &FilterId| shard.members.get(f).map_or(&[][..], Members::awake);
                let awake = filters.iter().flat_map(awake);
                let awake = awake.filter(|m| m.qos.is_some()).map(|m| m.slot);
                let asleep = filters.iter().flat_map(|f| shard.asleep(*f));
                let members: Vec<u32> = awake.chain(asleep).collect();
                for at in members {
                    if let Some(slot) = shard.slots.get_mut(at as usize)
                        && noted.insert((at, slot.slot_version))
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
