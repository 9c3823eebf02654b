//! An owner whose memory is a few keys, and the judge of what a replay may rebuild.

use std::collections::BTreeMap;
use std::time::Duration;

use super::*;

const SET: u8 = 1;
const DELETE: u8 = 2;
const NOTE: u8 = 3;

/// The keys of the model.
const KEYS: u64 = 5;

/// A change of the memory.
#[derive(Clone, Copy, Debug)]
struct Change {
    key: u8,
    /// `None`: the key was deleted.
    value: Option<u32>,
    position: Option<Position>,
    /// The log has promised that it will be there.
    safe: bool,
}

#[derive(Clone, Copy, Debug)]
struct Value {
    value: u32,
    claim: Option<Claim>,
}

/// The keys and their values, each with the claim of its last record.
#[derive(Debug, Default)]
pub(super) struct Memory {
    values: BTreeMap<u8, Value>,
    pass: Option<Pass>,
    /// The last key that the pass has written.
    written: Option<u8>,
    claims: Option<Arc<Claims>>,
}

impl Memory {
    fn replace(&mut self, key: u8, value: Option<Value>) {
        let old = match value {
            Some(value) => self.values.insert(key, value),
            None => self.values.remove(&key),
        };
        if let Some(claim) = old.and_then(|old| old.claim) {
            self.claims
                .as_ref()
                .expect("the log is open")
                .release(claim);
        }
    }
}

impl Owner for Memory {
    fn begin(&mut self, pass: Pass) {
        self.pass = Some(pass);
        self.written = None;
    }

    fn write(&mut self, piece: &mut Piece<'_>) -> Progress {
        let pass = self.pass.expect("a pass was begun");
        let keys: Vec<u8> = self.values.keys().copied().collect();
        for key in keys {
            if self.written.is_some_and(|written| key <= written) {
                continue;
            }
            if piece.is_full() {
                return Progress::More;
            }
            self.written = Some(key);
            let Value { value, claim } = self.values[&key];
            let belongs = match pass {
                Pass::All => true,
                Pass::Until(last) => claim.is_some_and(|claim| claim.segment <= last),
            };
            if belongs {
                let body = body(key, value, true);
                let position = piece.append(SET, &[&body]).expect("it is small");
                let claim = position.map(|at| Claim::new(at, body.len()));
                self.replace(key, Some(Value { value, claim }));
            }
        }
        Progress::Done
    }
}

fn body(key: u8, value: u32, again: bool) -> Vec<u8> {
    let mut body = vec![key, u8::from(again)];
    body.extend_from_slice(&value.to_le_bytes());
    body.resize(6 + value as usize * 7 % 50, value as u8);
    body
}

/// What a replay has rebuilt.
#[derive(Debug, Default)]
pub(super) struct Rebuilt {
    values: BTreeMap<u8, u32>,
    /// The changes in the order in which they were read, without records that were written again.
    read: Vec<u32>,
    notes: Vec<u32>,
}

/// A log with its owner, over a simulated disk.
#[derive(Debug)]
pub(super) struct World {
    pub(super) disk: SimDisk,
    pub(super) log: Log,
    pub(super) writer: Writer<SimDisk>,
    memory: Memory,
    changes: Vec<Change>,
    /// The least value of a change.
    pub(super) first_number: u32,
    pub(super) now: Millis,
    pub(super) report: Report,
    pub(super) returned: u32,
    pub(super) deleted: u32,
    pub(super) rewritten: u32,
    pub(super) degraded: u32,
}

impl World {
    /// Opens the log that is on the disk.
    pub(super) fn open(disk: &SimDisk) -> Result<(Self, Rebuilt), OpenError> {
        let recovery = Recovery::open(disk.clone(), small())?;
        let claims = recovery.claims().clone();
        let mut rebuilt = Rebuilt::default();
        let mut memory = Memory {
            claims: Some(claims.clone()),
            ..Memory::default()
        };
        let replayed = recovery.replay(|record| {
            let (key, again) = (record.body[0], record.body[1] == 1);
            let value = u32::from_le_bytes(record.body[2..6].try_into().expect("four bytes"));
            assert_eq!(record.body, body(key, value, again), "invented");
            match record.kind {
                SET => {
                    let claim = Claim::new(record.position, record.body.len());
                    claims.claim(claim);
                    let claim = Some(claim);
                    memory.replace(key, Some(Value { value, claim }));
                    rebuilt.values.insert(key, value);
                }
                DELETE => {
                    memory.replace(key, None);
                    rebuilt.values.remove(&key);
                }
                NOTE => rebuilt.notes.push(value),
                kind => panic!("kind {kind} was never written"),
            }
            if !again {
                rebuilt.read.push(value);
            }
        })?;
        let report = replayed.report.clone();
        let (log, writer) = replayed.start()?;
        let inherited = rebuilt.values.iter().map(|(key, value)| Change {
            key: *key,
            value: Some(*value),
            position: None,
            safe: true,
        });
        let world = Self {
            disk: disk.clone(),
            log,
            writer,
            memory,
            changes: inherited.collect(),
            first_number: 0,
            now: Millis::ZERO,
            report,
            returned: 0,
            deleted: 0,
            rewritten: 0,
            degraded: 0,
        };
        Ok((world, rebuilt))
    }

    /// Makes one random change. `number` is its value.
    pub(super) fn change(&mut self, number: u32, rng: &mut Rng) {
        let key = rng.below(KEYS) as u8;
        let (kind, life) = match rng.below(10) {
            0..6 => (SET, Life::Living),
            6..8 => (DELETE, Life::Passing),
            _ => (NOTE, Life::Passing),
        };
        self.append(number, key, kind, life);
    }

    /// Sets a key.
    pub(super) fn set(&mut self, key: u8, number: u32) {
        self.append(number, key, SET, Life::Living);
    }

    fn append(&mut self, number: u32, key: u8, kind: u8, life: Life) {
        let body = body(key, number, false);
        let bytes = Log::record_bytes(body.len());
        let mut room = self.log.try_reserve(bytes).expect("few records wait");
        let parts = body.split_at(3);
        let appended = self.log.append(&mut room, kind, &[parts.0, parts.1], life);
        let position = appended.expect("it fits");
        match kind {
            SET => {
                let claim = position.map(|at| Claim::new(at, body.len()));
                let value = number;
                self.memory.replace(key, Some(Value { value, claim }));
            }
            DELETE => self.memory.replace(key, None),
            _ => {}
        }
        if kind != NOTE {
            self.changes.push(Change {
                key,
                value: (kind == SET).then_some(number),
                position,
                safe: false,
            });
        }
    }

    /// One step of the writer.
    pub(super) fn step(&mut self) -> Step {
        let step = self.writer.step(&mut self.memory, self.now);
        match &step {
            Step::Returned => self.returned += 1,
            Step::Deleted { .. } => self.deleted += 1,
            Step::Rewritten => self.rewritten += 1,
            Step::Degraded(_) => self.degraded += 1,
            _ => {}
        }
        let committed = self.log.committed();
        let returned = matches!(step, Step::Returned);
        for change in &mut self.changes {
            change.safe |= match change.position {
                Some(at) => Some(at) < committed,
                // Memory has it, so a fresh log has it.
                None => returned,
            };
        }
        step
    }

    /// Steps until nothing is left to do now.
    pub(super) fn settle(&mut self) {
        for _ in 0..1000 {
            if matches!(self.step(), Step::Idle { .. }) || self.disk.is_cut() {
                return;
            }
        }
        panic!("the writer never rests");
    }

    /// Lets time pass until the log has had a chance to return.
    pub(super) fn rest(&mut self) {
        for _ in 0..70 {
            self.settle();
            self.now += Duration::from_secs(1);
        }
    }

    /// Makes `count` changes, with steps in between, until the power fails.
    pub(super) fn run(&mut self, count: u32, rng: &mut Rng) {
        let from = self.first_number + self.changes.len() as u32;
        for number in from..from + count {
            if self.disk.is_cut() {
                return;
            }
            self.change(number, rng);
            match rng.below(4) {
                0 => self.settle(),
                1 => drop(self.step()),
                _ => {}
            }
            self.now += Duration::from_millis(300);
        }
        self.settle();
    }

    /// Judges a log rebuilt after a crash of this world.
    pub(super) fn judge(&self, rebuilt: &Rebuilt) -> Result<(), String> {
        for key in 0..KEYS as u8 {
            let mut allowed = vec![None];
            for change in self.changes.iter().filter(|change| change.key == key) {
                if change.safe {
                    allowed.clear();
                }
                allowed.push(change.value);
            }
            let value = rebuilt.values.get(&key).copied();
            if !allowed.contains(&value) {
                return Err(format!("key {key} is {value:?}, not one of {allowed:?}"));
            }
        }
        for order in [&rebuilt.read, &rebuilt.notes] {
            if !order.is_sorted_by(|a, b| a < b) {
                return Err(format!("not in order: {order:?}"));
            }
        }
        Ok(())
    }

    /// Judges a log rebuilt after this world had settled: it must say what memory says.
    pub(super) fn judge_exactly(&self, rebuilt: &Rebuilt) {
        let values = self.memory.values.iter();
        let values: BTreeMap<u8, u32> = values.map(|(key, v)| (*key, v.value)).collect();
        assert_eq!(rebuilt.values, values);
        self.judge(rebuilt).expect("exact");
    }

    /// The size of the living records by the model's count.
    pub(super) fn judge_claims(&self) {
        let claims = self.memory.values.values().filter_map(|v| v.claim);
        let bytes: u64 = claims.map(|claim| u64::from(claim.bytes)).sum();
        assert_eq!(self.log.claims().living_bytes(), bytes);
    }
}
