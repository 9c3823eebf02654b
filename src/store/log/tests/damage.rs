//! Bytes of the log are damaged, files are missing, or of another version.

use super::*;
use crate::store::log::format::{COPY_BYTES, HEADER_COPIES_AT};
use proptest::collection::vec as vec_of;
use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

/// A record that was appended.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    position: Position,
    body: Vec<u8>,
}

/// A log of living records in several segments.
fn log(count: u32) -> (SimDisk, Vec<Wanted>) {
    log_of(small(), count)
}

fn log_of(options: Options, count: u32) -> (SimDisk, Vec<Wanted>) {
    let disk = SimDisk::default();
    let recovery = Recovery::open(disk.clone(), options).expect("it opens");
    let replayed = recovery.replay(|_| {}).expect("empty");
    let (log, mut writer) = replayed.start().expect("empty");
    let mut wanted = Vec::new();
    for n in 0..count {
        let body = vec![n as u8; n as usize * 13 % 60];
        let mut room = log.try_reserve(1000).expect("there is room");
        let position = log.append(&mut room, 1, &[&body], Life::Living);
        let position = position.expect("it fits").expect("the disk works");
        wanted.push(Wanted { position, body });
        if n % 3 == 0 {
            while !matches!(writer.step(&mut Nobody, Millis::ZERO), Step::Idle { .. }) {}
        }
    }
    while !matches!(writer.step(&mut Nobody, Millis::ZERO), Step::Idle { .. }) {}
    (disk, wanted)
}

fn recovery(disk: &SimDisk) -> Recovery<SimDisk> {
    Recovery::open(disk.clone(), small()).expect("it opens")
}

fn replay(disk: &SimDisk) -> (Report, Vec<Wanted>) {
    let mut found = Vec::new();
    let replayed = recovery(disk).replay(|record| {
        found.push(Wanted {
            position: record.position,
            body: record.body.to_vec(),
        });
    });
    (replayed.expect("it is read").report, found)
}

fn segments(disk: &SimDisk) -> Vec<String> {
    let names = disk.list().expect("it lists");
    names.into_iter().filter(|n| n.ends_with(".seg")).collect()
}

#[test]
fn a_flipped_bit_in_any_byte_costs_one_record_at_most_and_is_named() {
    let (disk, wanted) = log(40);
    let mut rng = Rng::new(9);
    for name in segments(&disk) {
        let number: u32 = name[..8].parse().expect("a number");
        let len = disk.content(&name).expect("it is there").len();
        let copies = HEADER_COPIES_AT.map(|at| at as usize);
        // The bytes between the copies of the header are not used.
        for at in (0..COPY_BYTES).chain(copies[1]..len) {
            let bits = if is_full() { 0..8 } else { 0..1 };
            for bit in bits {
                let bit = if is_full() { bit } else { rng.below(8) };
                let damaged = disk.after_kill();
                damaged.damage(&name, |bytes| bytes[at] ^= 1 << bit);
                let (report, found) = replay(&damaged);
                let case = format!("{name}, byte {at}, bit {bit}: {report:?}");
                let [damage] = report.damages[..] else {
                    panic!("{case}");
                };
                let from = damage.position.offset() as usize;
                assert_eq!(damage.position.segment(), number, "{case}");
                assert!((from..from + damage.bytes as usize).contains(&at), "{case}");
                let mut rest = wanted.clone();
                rest.retain(|record| record.position != damage.position);
                assert!(rest.len() + 1 >= wanted.len(), "{case}");
                assert_eq!(found, rest, "{case}");
                if at >= HEADER_BYTES as usize {
                    assert_eq!(rest.len() + 1, wanted.len(), "{case}");
                }
            }
        }
    }
}

#[test]
fn a_log_with_damage_goes_on_and_names_the_damage_again() {
    let (disk, wanted) = log(20);
    let name = &segments(&disk)[0];
    disk.damage(name, |bytes| bytes[HEADER_BYTES as usize + 20] ^= 1);
    let recovery = recovery(&disk);
    let claims = recovery.claims().clone();
    let replayed = recovery.replay(|record| {
        claims.claim(Claim::new(record.position, record.body.len()));
    });
    let replayed = replayed.expect("it is read");
    assert_eq!(replayed.report.damaged, 1);
    let (log, mut writer) = replayed.start().expect("it starts");
    let mut room = log.try_reserve(100).expect("there is room");
    let position = log.append(&mut room, 1, &[b"later"], Life::Living);
    while !matches!(writer.step(&mut Nobody, Millis::ZERO), Step::Idle { .. }) {}
    let (report, found) = replay(&disk);
    assert_eq!(report.damaged, 1);
    assert_eq!(found.len(), wanted.len());
    assert_eq!(found.last().map(|r| Some(r.position)), position.ok());
}

#[test]
fn the_end_of_the_last_commit_may_be_unfinished_and_earlier_bytes_may_not() {
    let (disk, wanted) = log(40);
    let names = segments(&disk);
    let last = names.last().expect("there are segments");
    let cut = disk.after_kill();
    cut.damage(last, |bytes| bytes.truncate(bytes.len() - 1));
    let (report, found) = replay(&cut);
    assert_eq!((report.damaged, report.damages.len()), (0, 1));
    assert_eq!(report.damages[0].kind, DamageKind::Unfinished);
    assert_eq!(found.len() + 1, wanted.len());
    // The next segment tells how long this one was.
    let cut = disk.after_kill();
    cut.damage(&names[0], |bytes| bytes.truncate(bytes.len() - 1));
    let (report, _) = replay(&cut);
    assert_eq!(report.damages[0].kind, DamageKind::Content);
    let zeros = disk.after_kill();
    zeros.damage(last, |bytes| bytes.resize(bytes.len() + 5000, 0));
    let (report, found) = replay(&zeros);
    assert_eq!((report.damages, found), (vec![], wanted));
}

/// A log whose records fit into one segment, in several commits.
fn one_segment() -> (SimDisk, Vec<Wanted>) {
    let options = Options {
        segment_bytes: 20_000,
        ..small()
    };
    log_of(options, 40)
}

fn kinds(report: &Report) -> Vec<DamageKind> {
    report.damages.iter().map(|damage| damage.kind).collect()
}

#[test]
fn a_damaged_sector_of_a_header_costs_no_record() {
    for bytes in [512, 4096] {
        let (disk, wanted) = one_segment();
        disk.damage("00000001.seg", |content| content[..bytes].fill(0));
        let (report, found) = replay(&disk);
        assert_eq!((kinds(&report), found), (vec![DamageKind::Content], wanted));
    }
}

#[test]
fn more_bytes_than_one_commit_are_damage_and_not_unfinished() {
    for junk in [0, 0xA5] {
        let (disk, wanted) = one_segment();
        disk.damage("00000001.seg", |content| content.fill(junk));
        let (report, found) = replay(&disk);
        assert!(report.damaged > 0 && found.is_empty(), "{junk}: {report:?}");
        // The last commit, and one before it.
        let (disk, _) = one_segment();
        let from = wanted[30].position.offset() as usize;
        disk.damage("00000001.seg", |content| content[from..].fill(0xA5));
        let (report, found) = replay(&disk);
        assert_eq!(kinds(&report), [DamageKind::Content]);
        assert_eq!(found, wanted[..30]);
    }
    let one = Options {
        segment_bytes: 20_000,
        ..small()
    };
    let (disk, _) = log_of(one, 1);
    disk.damage("00000001.seg", |content| content.fill(0xA5));
    let (report, _) = replay(&disk);
    assert_eq!(report.damaged, 0, "a new file may be torn: {report:?}");
}

#[test]
fn a_segment_without_a_readable_record_is_set_aside_and_named() {
    let (disk, wanted) = log(40);
    let name = segments(&disk)[0].clone();
    disk.damage(&name, |bytes| bytes.fill(0xA5));
    let damaged = disk.content(&name);
    let recovery = recovery(&disk);
    let claims = recovery.claims().clone();
    let replayed = recovery.replay(|record| {
        claims.claim(Claim::new(record.position, record.body.len()));
    });
    let (_, mut writer) = replayed.expect("it is read").start().expect("it starts");
    let step = writer.step(&mut Nobody, Millis::ZERO);
    assert!(matches!(step, Step::Deleted { last: 1 }), "{step:?}");
    assert_eq!(disk.content(&name), None);
    assert_eq!(disk.content("00000001.damaged"), damaged);
    let (report, found) = replay(&disk);
    let names = "segment 00000001 has no readable record and is kept as 00000001.damaged";
    assert_eq!(report.damages[0].to_string(), names);
    assert_eq!((report.damaged, report.damages.len()), (1, 1));
    let rest = wanted.iter().filter(|r| r.position.segment() > 1);
    assert_eq!(found, rest.cloned().collect::<Vec<_>>());
}

#[test]
fn a_stale_log_keeps_a_segment_without_a_readable_record_when_a_fresh_one_replaces_it() {
    let (disk, _) = log(40);
    disk.damage("00000002.seg", |bytes| bytes.fill(0xA5));
    disk.rename("00000001.live", "00000001.stale")
        .expect("it works");
    let replayed = recovery(&disk).replay(|_| {}).expect("it is read");
    let (_, mut writer) = replayed.start().expect("it starts");
    while !matches!(writer.step(&mut Nobody, Millis::ZERO), Step::Idle { .. }) {}
    let mut names = disk.list().expect("it lists");
    names.retain(|name| !name.ends_with(".live"));
    assert_eq!(names, ["00000002.damaged"]);
}

#[test]
fn blocks_that_the_disk_does_not_read_are_named_and_the_records_beside_them_are_read() {
    let options = Options {
        segment_bytes: 40_000,
        ..small()
    };
    let (disk, wanted) = log_of(options, 600);
    let unreadable = 8192..12_288;
    disk.make_unreadable("00000001.seg", 9000..9010);
    let (report, found) = replay(&disk);
    let named: Vec<_> = report.damages.iter().map(Damage::to_string).collect();
    assert_eq!(
        named,
        ["segment 00000001, offset 8192: the disk cannot read 4096 bytes"]
    );
    let rest = wanted.iter().filter(|record| {
        let from = record.position.offset() as usize;
        let end = from + Log::record_bytes(record.body.len());
        end <= unreadable.start || from >= unreadable.end
    });
    assert_eq!(found, rest.cloned().collect::<Vec<_>>());
    assert!(found.len() > 300);
    // Not even the file's length is known.
    let (disk, wanted) = log(40);
    disk.make_unreadable("00000002.seg", 0..usize::MAX);
    let (report, found) = replay(&disk);
    assert_eq!(
        report.damages[0].to_string(),
        "segment 00000002, offset 0: the disk cannot read the file"
    );
    assert_eq!(report.damaged, 1);
    let rest = wanted.iter().filter(|r| r.position.segment() != 2);
    assert_eq!(found, rest.cloned().collect::<Vec<_>>());
}

#[test]
fn the_end_of_a_log_that_the_disk_does_not_read_is_damage() {
    let (disk, wanted) = one_segment();
    let last = wanted[39].position.offset() as usize;
    disk.make_unreadable("00000001.seg", last..last + 1);
    let (report, _) = replay(&disk);
    assert_eq!(
        (kinds(&report), report.damaged),
        (vec![DamageKind::Unreadable], 1)
    );
}

#[test]
fn a_missing_segment_is_named() {
    let (disk, _) = log(40);
    disk.remove(&segments(&disk)[1]).expect("it is removed");
    let (report, _) = replay(&disk);
    let missing = Damage {
        kind: DamageKind::Missing,
        position: Position::new(2, 0),
        bytes: 0,
    };
    assert_eq!(report.damages, [missing]);
    assert_eq!(missing.to_string(), "segment 00000002 is missing");
}

#[test]
fn a_log_of_a_newer_version_is_refused_and_named() {
    let (disk, _) = log(40);
    let name = segments(&disk)[1].clone();
    disk.damage(&name, |bytes| {
        for copy in HEADER_COPIES_AT.map(|at| at as usize) {
            bytes[copy + 8] = VERSION as u8 + 1;
            let crc = crc32c::crc32c(&bytes[copy..copy + 12]);
            bytes[copy + 12..copy + 16].copy_from_slice(&crc.to_le_bytes());
        }
    });
    let error = Recovery::open(disk, small()).expect_err("another version");
    assert_eq!(
        error.to_string(),
        "00000002.seg has version 2 of the log's format, and this program reads version 1: use the program that wrote it"
    );
}

#[test]
fn records_inside_a_body_are_not_found_when_that_body_is_damaged() {
    // A client that chooses a body copies the bytes of another record into it.
    let (disk, wanted) = log(20);
    let name = segments(&disk)[0].clone();
    let inner = disk.content(&name).expect("it is there")[HEADER_BYTES as usize..].to_vec();
    let other = SimDisk::default();
    let options = Options {
        segment_bytes: 9000,
        commit_bytes_max: 9000,
        salt: 77,
        ..small()
    };
    let open = || Recovery::open(other.clone(), options.clone()).expect("it opens");
    let (log, mut writer) = open()
        .replay(|_| {})
        .expect("empty")
        .start()
        .expect("empty");
    let mut room = log.try_reserve(2000).expect("there is room");
    for body in [&inner[..], b"next"] {
        let appended = log.append(&mut room, 1, &[body], Life::Living);
        appended.expect("it fits").expect("the disk works");
    }
    while !matches!(writer.step(&mut Nobody, Millis::ZERO), Step::Idle { .. }) {}
    for at in HEADER_BYTES as usize..HEADER_BYTES as usize + 11 {
        let damaged = other.after_kill();
        damaged.damage("00000001.seg", |bytes| bytes[at] ^= 0x55);
        let mut found = Vec::new();
        let replayed = Recovery::open(damaged, options.clone()).expect("it opens");
        let replayed = replayed.replay(|record| found.push(record.body.to_vec()));
        assert_eq!(replayed.expect("it is read").report.damages.len(), 1);
        assert_eq!(found, [b"next".to_vec()], "byte {at}");
    }
    assert!(!wanted.is_empty());
}

proptest! {
    /// Whatever is damaged, the other records are read, in order, and nothing else is.
    #[test]
    fn records_beside_damage_are_read(
        from in 0usize..2000,
        len in 1usize..300,
        seed in any::<u64>(),
    ) {
        let (disk, wanted) = log(40);
        let name = segments(&disk)[1].clone();
        let mut range = 0..0;
        let mut rng = Rng::new(seed);
        disk.damage(&name, |bytes| {
            let first = HEADER_BYTES as usize;
            let from = first + from % (bytes.len() - first);
            range = from..(from + len).min(bytes.len());
            for at in range.clone() {
                bytes[at] = rng.next() as u8;
            }
        });
        let (_, found) = replay(&disk);
        let mut rest = wanted.clone();
        rest.retain(|record| {
            let from = record.position.offset() as usize;
            let end = from + Log::record_bytes(record.body.len());
            record.position.segment() != 2 || end <= range.start || from >= range.end
        });
        // A byte may have been replaced by itself.
        let mut kept = found.clone();
        kept.retain(|record| rest.contains(record));
        prop_assert_eq!(kept, rest);
        prop_assert!(found.iter().all(|record| wanted.contains(record)));
    }

    /// Any bytes are read to their end without a panic, each byte at most once.
    #[test]
    fn any_bytes_are_a_segment(bytes in vec_of(any::<u8>(), 0..2000), end: Option<u16>) {
        let bytes = [vec![0; HEADER_BYTES as usize], bytes].concat();
        let end = end.map(u32::from);
        let mut at = HEADER_BYTES;
        for part in SegmentReader::new(&bytes, 1, 7, end) {
            let (position, len) = match part {
                Part::Record(record) => (record.position, record.bytes()),
                Part::Filler { position, bytes } | Part::Damaged { position, bytes } => {
                    (position, bytes)
                }
            };
            prop_assert_eq!(position.offset(), at);
            at += len;
        }
        prop_assert!(at <= (bytes.len() as u32).max(end.unwrap_or(0)).max(HEADER_BYTES));
    }
}
