//! The power fails, or the process is killed, at each operation and each byte.

use super::*;
use crate::store::log::disk::sim::Fault;

const RECORDS: u32 = 50;

/// Goes on after a crash: everything promised is there, and the log can be appended to and read again.
fn go_on(crashed: &World, disk: &SimDisk, name: &str) {
    let (mut world, rebuilt) = World::open(disk).unwrap_or_else(|e| panic!("{name}: {e}"));
    let judged = crashed.judge(&rebuilt);
    assert_eq!(judged, Ok(()), "{name}");
    assert_eq!(world.report.damaged, 0, "{name}: {:?}", world.report);
    world.judge_claims();
    let mut rng = Rng::new(1);
    for number in 1000..1008 {
        world.change(number, &mut rng);
    }
    world.rest();
    assert_eq!(world.log.mode(), Mode::Durable, "{name}");
    let (again, rebuilt) = World::open(&disk.after_power_cut(|n| n - 1))
        .unwrap_or_else(|e| panic!("{name}, again: {e}"));
    world.judge_exactly(&rebuilt);
    again.judge_claims();
    // Bytes that the crash has torn are not taken for damage when their segment is not the last one.
    assert_eq!(again.report.damaged, 0, "{name}: {:?}", again.report);
}

/// Crashes again at each operation of the start after a crash, and judges the log then. Returns the number
/// of crashes.
fn crash_at_the_start(crashed: &World, disk: &SimDisk, name: &str, rng: &mut Rng) -> usize {
    for at in 0.. {
        let second = disk.after_kill();
        second.fault(at, Fault::Cut(rng.below(40) as usize));
        // It does not open, or it begins degraded.
        drop(World::open(&second));
        if !second.is_cut() {
            return at;
        }
        for third in [
            second.after_kill(),
            second.after_power_cut(|n| rng.below(n)),
        ] {
            go_on(
                crashed,
                &third,
                &format!("{name}, operation {at} of the start"),
            );
        }
    }
    unreachable!("a start has an end")
}

/// Both kinds of crash after the disk was cut off.
fn crash(crashed: &World, name: &str, rng: &mut Rng) {
    go_on(
        crashed,
        &crashed.disk.after_kill(),
        &format!("{name}, killed"),
    );
    let disk = crashed.disk.after_power_cut(|n| rng.below(n));
    go_on(crashed, &disk, &format!("{name}, power cut"));
}

/// What else goes wrong in a run.
type Prepare = fn(&SimDisk);

fn begin(seed: u64, prepare: Prepare) -> (SimDisk, Rng) {
    // Smaller than most records.
    let disk = SimDisk::with_sectors(16 << (seed % 3));
    prepare(&disk);
    (disk, Rng::new(seed))
}

/// Runs the same changes again and again, cut off at another place each time. Returns the number of
/// places.
fn cut_everywhere(seed: u64, prepare: Prepare, every_byte: bool) -> usize {
    let run = |disk: &SimDisk, rng: &mut Rng| {
        let (mut world, _) = World::open(disk).ok()?;
        world.run(RECORDS, rng);
        // Time enough to return from degraded mode.
        for _ in 0..5 {
            world.now += std::time::Duration::from_secs(1);
            world.settle();
        }
        Some(world)
    };
    let (disk, mut rng) = begin(seed, prepare);
    let whole = run(&disk, &mut rng).expect("the disk works at first");
    assert!(whole.deleted > 0, "seed {seed}: nothing was deleted");
    let mut places = 0;
    for (at, operation) in disk.operations().iter().enumerate() {
        let last = if every_byte { operation.bytes } else { 0 };
        for bytes in 0..=last {
            let (disk, mut rng) = begin(seed, prepare);
            disk.fault(at, Fault::Cut(bytes));
            let name = format!("seed {seed}, {} {at}, byte {bytes}", operation.name);
            match run(&disk, &mut rng) {
                Some(world) => crash(&world, &name, &mut rng),
                // Not even opened: nothing was promised.
                None => drop(World::open(&disk.after_kill()).expect("it opens")),
            }
            places += 1;
        }
    }
    places
}

#[test]
fn a_crash_at_any_byte_loses_nothing_promised() {
    let seeds = if is_full() { 1..40 } else { 1..3 };
    let places: usize = seeds.map(|s| cut_everywhere(s, |_| {}, true)).sum();
    assert!(places > 2000, "{places} places are few");
}

#[test]
fn a_crash_during_the_start_after_a_crash_loses_nothing_promised_either() {
    let mut crashes = 0;
    for seed in 1..if is_full() { 30 } else { 4 } {
        let (disk, mut rng) = begin(seed, |_| {});
        let (mut world, _) = World::open(&disk).expect("empty");
        world.run(RECORDS, &mut rng);
        let operations = disk.operations().len();
        for at in (0..operations).step_by(5) {
            let (disk, mut rng) = begin(seed, |_| {});
            disk.fault(at, Fault::Cut(rng.below(200) as usize));
            let Ok((mut world, _)) = World::open(&disk) else {
                continue;
            };
            world.run(RECORDS, &mut rng);
            let left = disk.after_power_cut(|n| rng.below(n));
            let name = format!("seed {seed}, operation {at}");
            crashes += crash_at_the_start(&world, &left, &name, &mut rng);
        }
    }
    assert!(crashes > 300, "{crashes} crashes are few");
}

#[test]
fn crashes_one_after_the_other_lose_nothing_promised() {
    for seed in 1..if is_full() { 2000 } else { 100 } {
        let (mut disk, mut rng) = begin(seed, |_| {});
        let mut crashed: Option<World> = None;
        for generation in 0..8 {
            let name = format!("seed {seed}, generation {generation}");
            disk.fault(rng.below(40) as usize, Fault::Cut(rng.below(300) as usize));
            let opened = World::open(&disk);
            let (mut world, rebuilt) = opened.unwrap_or_else(|e| panic!("{name}: {e}"));
            if let Some(crashed) = &crashed {
                assert_eq!(crashed.judge(&rebuilt), Ok(()), "{name}");
            }
            assert_eq!(world.report.damaged, 0, "{name}: {:?}", world.report);
            world.first_number = 1000 * generation;
            world.run(RECORDS, &mut rng);
            disk = disk.after_power_cut(|n| rng.below(n));
            crashed = Some(world);
        }
    }
}

#[test]
fn a_crash_around_degraded_mode_leaves_one_consistent_log() {
    // The operation that fails lies in the middle of the run; the log returns a second later.
    let prepares: [Prepare; 4] = [
        |disk| disk.fault(60, Fault::Fail),
        |disk| {
            for at in 40..52 {
                disk.fault(at, Fault::Fail);
            }
        },
        |disk| disk.fault(71, Fault::Short(3)),
        |disk| {
            for at in (30..90).step_by(9) {
                disk.fault(at, Fault::Fail);
            }
        },
    ];
    let seeds = if is_full() { 10..20 } else { 10..13 };
    for seed in seeds {
        for prepare in prepares {
            cut_everywhere(seed, prepare, is_full());
        }
    }
}

#[test]
fn runs_rotate_rewrite_and_return() {
    let (disk, mut rng) = begin(1, |disk| disk.fault(60, Fault::Fail));
    let (mut world, _) = World::open(&disk).expect("empty");
    world.run(3 * RECORDS, &mut rng);
    world.rest();
    assert!(world.degraded > 0 && world.returned > 0 && world.rewritten > 0 && world.deleted > 2);
    world.judge_claims();
}
