//! Operations that fail, a full disk, and the way back.

use std::time::Duration;

use super::*;
use crate::store::log::disk::sim::Fault;
use crate::store::log::files::Contents;
use crate::store::log::writer::clean;

/// The log must be durable in the end, and say what memory says.
fn judge_end(world: &mut World, name: &str) {
    world.rest();
    assert_eq!(world.log.mode(), Mode::Durable, "{name}");
    world.judge_claims();
    for disk in [
        world.disk.after_kill(),
        world.disk.after_power_cut(|n| n - 1),
    ] {
        let (again, rebuilt) = World::open(&disk).unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(again.report.damaged, 0, "{name}: {:?}", again.report);
        assert!(!again.report.stale, "{name}");
        world.judge_exactly(&rebuilt);
    }
}

fn operations(seed: u64) -> usize {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.run(50, &mut Rng::new(seed));
    disk.operations().len()
}

#[test]
fn after_any_failed_operation_the_log_returns_and_has_everything() {
    for seed in 1..=if is_full() { 30 } else { 3 } {
        for at in 0..operations(seed) {
            for fault in [Fault::Fail, Fault::Short(5)] {
                let disk = SimDisk::default();
                disk.fault(at, fault);
                let Ok((mut world, _)) = World::open(&disk) else {
                    continue;
                };
                world.run(50, &mut Rng::new(seed));
                judge_end(
                    &mut world,
                    &format!("seed {seed}, operation {at}, {fault:?}"),
                );
            }
        }
    }
}

#[test]
fn a_disk_that_is_full_at_any_byte_is_used_again_when_it_has_room() {
    let step = if is_full() { 7 } else { 167 };
    for capacity in (0..40_000).step_by(step) {
        let disk = SimDisk::with_sectors(32);
        let (mut world, _) = World::open(&disk).expect("empty");
        disk.set_capacity(Some(capacity));
        let mut rng = Rng::new(5);
        world.run(40, &mut rng);
        if world.degraded > 0 {
            assert_eq!(world.log.mode() == Mode::Durable, world.returned > 0);
        }
        let left = disk.after_power_cut(|n| rng.below(n));
        let (again, rebuilt) = World::open(&left).expect("opens");
        assert_eq!(world.judge(&rebuilt), Ok(()), "capacity {capacity}");
        assert_eq!(again.report.damaged, 0, "capacity {capacity}");
        disk.set_capacity(None);
        judge_end(&mut world, &format!("capacity {capacity}"));
    }
}

#[test]
fn a_crash_in_degraded_mode_leaves_a_stale_log_from_which_a_fresh_one_is_made() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.run(20, &mut Rng::new(3));
    disk.set_capacity(Some(0));
    world.run(20, &mut Rng::new(4));
    assert_eq!(world.log.mode(), Mode::Degraded);
    let disk = disk.after_power_cut(|_| 1);
    let (mut world, rebuilt) = World::open(&disk).expect("it opens");
    assert!(world.report.stale);
    assert_eq!(
        world.log.mode(),
        Mode::Degraded,
        "until memory is written again"
    );
    world.settle();
    assert_eq!((world.returned, world.log.mode()), (1, Mode::Durable));
    let (again, rebuilt_again) = World::open(&disk.after_kill()).expect("it opens");
    assert!(!again.report.stale);
    world.judge_exactly(&rebuilt_again);
    drop(rebuilt);
    let names = disk.list().expect("it lists");
    let kept = names.iter().filter(|name| !name.ends_with(".seg"));
    assert_eq!(kept.count(), 1, "one mark is left: {names:?}");
}

#[test]
fn a_failed_sync_is_never_tried_again_on_the_same_file() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.set(1, 1);
    world.settle();
    world.set(1, 2);
    // A write, then a sync.
    disk.fault(1, Fault::Fail);
    let failure = match world.step() {
        Step::Degraded(failure) => failure,
        step => panic!("{step:?}"),
    };
    assert_eq!(
        (failure.operation, &*failure.file),
        ("sync", "00000001.seg")
    );
    let before = disk.content("00000001.seg");
    world.set(1, 3);
    world.rest();
    assert_eq!(world.log.mode(), Mode::Durable);
    assert_eq!(disk.content("00000001.seg"), None, "the old log is deleted");
    assert!(before.is_some());
}

#[test]
fn bytes_that_are_only_in_memory_after_a_failed_sync_are_written_again_at_the_start() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.set(1, 1);
    world.settle();
    world.set(1, 2);
    // The sync fails, and the process dies before it has marked the log as stale.
    disk.fault(1, Fault::Fail);
    disk.fault(2, Fault::Cut(0));
    assert!(matches!(world.step(), Step::Degraded(_)));
    let (second, rebuilt) = World::open(&disk.after_kill()).expect("it opens");
    assert!(!second.report.stale);
    second.judge_exactly(&rebuilt);
    let disk = second.disk.after_power_cut(|n| n - 1);
    let (_, rebuilt) = World::open(&disk).expect("it opens");
    second.judge_exactly(&rebuilt);
}

#[test]
fn a_disk_that_fails_at_the_start_begins_a_degraded_log_that_returns() {
    for used in [false, true] {
        for at in 0..12 {
            let disk = SimDisk::default();
            if used {
                World::open(&disk)
                    .expect("empty")
                    .0
                    .run(20, &mut Rng::new(7));
            }
            let before = disk.operations().len();
            disk.fault(at, Fault::Error(std::io::ErrorKind::StorageFull));
            let (mut world, _) = World::open(&disk).expect("it starts");
            if disk.operations().len() - before <= at {
                break;
            }
            assert_eq!(world.log.mode(), Mode::Degraded, "operation {at}");
            let Step::Degraded(failure) = world.step() else {
                panic!("the first step says why");
            };
            assert_eq!(failure.error.kind(), std::io::ErrorKind::StorageFull);
            world.run(20, &mut Rng::new(8));
            judge_end(&mut world, &format!("operation {at}"));
            assert_eq!(world.returned, 1);
        }
    }
}

#[test]
fn a_crash_after_a_degraded_start_leaves_a_stale_log() {
    let disk = SimDisk::default();
    World::open(&disk)
        .expect("empty")
        .0
        .run(20, &mut Rng::new(7));
    disk.fault(0, Fault::Error(std::io::ErrorKind::StorageFull));
    drop(World::open(&disk).expect("it starts"));
    let (world, _) = World::open(&disk.after_power_cut(|n| n - 1)).expect("it opens");
    assert!(world.report.stale);
}

#[test]
fn a_directory_that_must_not_be_written_is_an_error_at_the_start() {
    for kind in [
        std::io::ErrorKind::PermissionDenied,
        std::io::ErrorKind::ReadOnlyFilesystem,
    ] {
        let disk = SimDisk::default();
        disk.fault(0, Fault::Error(kind));
        let error = World::open(&disk).expect_err("it is refused");
        assert!(
            error
                .to_string()
                .starts_with("cannot create 00000001.live: ")
        );
    }
}

#[test]
fn a_segment_that_an_operator_has_removed_counts_as_deleted() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.set(2, 0);
    for number in 1..10 {
        world.set(1, number);
    }
    world.settle();
    assert_eq!(
        world.deleted, 0,
        "the second key lives in the first segment"
    );
    disk.remove("00000001.seg").expect("it is there");
    world.set(2, 10);
    world.settle();
    assert!(world.deleted > 0);
    assert_eq!(world.log.mode(), Mode::Durable);
    judge_end(&mut world, "removed");
}

#[test]
fn places_that_were_given_while_the_log_became_degraded_are_not_given_again() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.set(1, 1);
    world.settle();
    world.set(1, 2);
    // Producers go on while the log is marked as stale: until a segment is full.
    let (log, given) = (
        world.log.clone(),
        Arc::new(parking_lot::Mutex::new(Vec::new())),
    );
    let places = given.clone();
    disk.during("rename", move || {
        for _ in 0..10 {
            let mut room = log.try_reserve(200).expect("there is room");
            let place = log.append(&mut room, 1, &[&[0; 60]], Life::Passing);
            places.lock().extend(place.expect("it fits"));
        }
    });
    disk.fault(0, Fault::Fail);
    assert!(matches!(world.step(), Step::Degraded(_)));
    let last = given.lock().last().copied();
    assert!(last >= Some(Position::new(3, 0)), "{last:?}");
    world.rest();
    assert_eq!(world.log.mode(), Mode::Durable);
    let mut room = world.log.try_reserve(200).expect("there is room");
    let next = world.log.append(&mut room, 1, &[&[0; 60]], Life::Passing);
    assert!(next.expect("it fits") > last);
    let first = world
        .disk
        .list()
        .expect("it lists")
        .into_iter()
        .find(|n| n.ends_with(".live"));
    let first: u32 = first.expect("a mark")[..8].parse().expect("a number");
    assert!(Some(Position::new(first, 0)) > last, "{first}, {last:?}");
}

#[test]
fn attempts_on_a_broken_disk_come_every_second() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.set(1, 1);
    world.settle();
    disk.set_broken(true);
    world.set(1, 2);
    world.settle();
    assert_eq!(world.log.mode(), Mode::Degraded);
    for _ in 0..5 {
        let Step::Idle { until: Some(until) } = world.step() else {
            panic!("not yet due");
        };
        assert_eq!(until, world.now + Duration::from_secs(1));
        world.now = until;
        assert!(matches!(world.step(), Step::StillDegraded(_)));
    }
    disk.set_broken(false);
    world.now += Duration::from_secs(1);
    assert!(matches!(world.step(), Step::Returning));
    world.settle();
    assert_eq!(world.returned, 1);
}

#[test]
fn a_segment_that_cannot_be_deleted_is_tried_again_and_costs_no_durability() {
    let run = |disk: &SimDisk| {
        let (mut world, _) = World::open(disk).expect("empty");
        for number in 0..20 {
            world.set(1, number);
        }
        let mut failed = 0;
        while world.deleted < 3 {
            failed += usize::from(matches!(world.step(), Step::NotDeleted(_)));
            world.now += Duration::from_millis(400);
        }
        assert_eq!(world.log.mode(), Mode::Durable);
        judge_end(&mut world, "deletion");
        failed
    };
    let disk = SimDisk::default();
    assert_eq!(run(&disk), 0);
    let operations = disk.operations();
    let removal = operations.iter().position(|o| o.name == "remove");
    let disk = SimDisk::default();
    disk.fault(removal.expect("segments are deleted"), Fault::Fail);
    assert_eq!(run(&disk), 1);
}

#[test]
fn a_fresh_log_that_fails_is_removed_and_tried_again_after_longer_waits() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    for key in 0..5 {
        // Values whose records are long.
        world.set(key, 7 * u32::from(key + 1));
    }
    world.settle();
    let sizes = world.writer.sizes();
    disk.set_broken(true);
    world.set(1, 40);
    world.settle();
    disk.set_broken(false);
    // The probe passes, and the fresh log does not fit.
    disk.set_capacity(Some(disk.used() + small().segment_bytes as usize));
    let mut waits = Vec::new();
    for _ in 0..4 {
        world.now += Duration::from_secs(60);
        assert!(matches!(world.step(), Step::Returning));
        let before = disk.list().expect("it lists");
        assert!(
            before.iter().any(|name| name.ends_with(".new")),
            "{before:?}"
        );
        world.settle();
        assert_eq!(world.log.mode(), Mode::Degraded);
        assert_eq!(world.writer.sizes().segments, sizes.segments);
        let Step::Idle { until: Some(until) } = world.step() else {
            panic!("not due yet");
        };
        waits.push(until.since(world.now).as_secs());
    }
    assert_eq!(waits, [2, 4, 8, 16]);
    disk.set_capacity(None);
    judge_end(&mut world, "room again");
}

#[test]
fn a_return_that_fails_at_its_last_operation_leaves_a_stale_log() {
    let disk = SimDisk::default();
    let (mut world, _) = World::open(&disk).expect("empty");
    world.set(1, 1);
    world.settle();
    disk.set_broken(true);
    world.set(1, 2);
    world.settle();
    disk.set_broken(false);
    world.now += Duration::from_secs(1);
    let is_new = |name: &String| name.ends_with(".new");
    while !matches!(world.step(), Step::Committed { .. }) {}
    assert!(disk.list().expect("it lists").iter().any(is_new));
    // The fresh log gets its name. The sync fails, and so does the change back.
    disk.fault(1, Fault::Fail);
    disk.fault(2, Fault::Fail);
    assert!(matches!(world.step(), Step::Degraded(_)));
    world.set(1, 3);
    // Names can be changed again, and nothing can be written.
    disk.set_capacity(Some(0));
    world.now += Duration::from_secs(2);
    assert!(matches!(world.step(), Step::StillDegraded(_)));
    let (again, _) = World::open(&disk.after_kill()).expect("it opens");
    assert!(again.report.stale, "the log lacks the last change");
    disk.set_capacity(None);
    judge_end(&mut world, "returned at last");
}

#[test]
fn an_incomplete_log_is_removed_before_the_name_that_calls_it_so() {
    let names = [
        "00000001.stale",
        "00000001.seg",
        "00000002.new",
        "00000002.seg",
        "00000003.seg",
    ];
    let mut rng = Rng::new(2);
    for cut in 0..8 {
        for _ in 0..20 {
            let disk = SimDisk::default();
            for name in names {
                disk.create(name).expect("it works");
            }
            disk.sync_names().expect("it works");
            disk.fault(cut, Fault::Cut(0));
            let cleaned = clean(&disk);
            assert_eq!(cleaned.is_ok(), !disk.is_cut());
            let left = disk
                .after_power_cut(|n| rng.below(n))
                .list()
                .expect("it lists");
            let left = Contents::of(left.iter().map(String::as_str));
            assert_eq!(left.segments, [1], "cut at {cut}");
        }
    }
}
