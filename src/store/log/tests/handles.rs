//! The side of producers: room, waiting, and the thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use super::*;

struct Nobody;

impl Owner for Nobody {
    fn begin(&mut self, _pass: Pass) {}

    fn write(&mut self, _piece: &mut Piece<'_>) -> Progress {
        Progress::Done
    }
}

fn open(disk: &SimDisk) -> (Log, Writer<SimDisk>) {
    let recovery = Recovery::open(disk.clone(), small()).expect("it opens");
    let replayed = recovery.replay(|_| {}).expect("it is read");
    replayed.start().expect("it starts")
}

fn append(log: &Log, len: usize) -> Option<Position> {
    let mut room = log.try_reserve(Log::record_bytes(len))?;
    let body = vec![7; len];
    log.append(&mut room, 1, &[&body], Life::Living)
        .expect("it fits")
}

#[derive(Default)]
struct Woken(AtomicUsize);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

fn poll(wait: &mut Wait<'_>, woken: &Arc<Woken>) -> Option<Durability> {
    let waker = Waker::from(woken.clone());
    match Pin::new(wait).poll(&mut Context::from_waker(&waker)) {
        Poll::Ready(durability) => Some(durability),
        Poll::Pending => None,
    }
}

#[test]
fn a_commit_wakes_the_tasks_whose_records_it_has_and_no_others() {
    let (log, mut writer) = open(&SimDisk::default());
    let positions: Vec<_> = (0..5).filter_map(|_| append(&log, 20)).collect();
    let mut waits: Vec<_> = positions.iter().map(|at| log.wait(*at)).collect();
    let woken: Vec<Arc<Woken>> = positions.iter().map(|_| Arc::default()).collect();
    for (wait, woken) in waits.iter_mut().zip(&woken) {
        assert_eq!(poll(wait, woken), None);
    }
    // A commit has four records here.
    let step = writer.step(&mut Nobody, Millis::ZERO);
    assert!(
        matches!(step, Step::Committed { records: 4, .. }),
        "{step:?}"
    );
    let counts: Vec<_> = woken.iter().map(|w| w.0.load(Ordering::Relaxed)).collect();
    assert_eq!(counts, [1, 1, 1, 1, 0]);
    assert_eq!(poll(&mut waits[3], &woken[3]), Some(Durability::Durable));
    assert_eq!(poll(&mut waits[4], &woken[4]), None);
    drop(waits);
    writer.step(&mut Nobody, Millis::ZERO);
    let last = woken[4].0.load(Ordering::Relaxed);
    assert_eq!(last, 0, "a task that has gone is not woken");
}

#[test]
fn waiting_ends_when_the_log_is_degraded_and_records_are_not_written_then() {
    let disk = SimDisk::default();
    let (log, mut writer) = open(&disk);
    let position = append(&log, 20).expect("the disk works");
    let mut wait = log.wait(position);
    let woken = Arc::default();
    assert_eq!(poll(&mut wait, &woken), None);
    disk.set_broken(true);
    assert!(matches!(
        writer.step(&mut Nobody, Millis::ZERO),
        Step::Degraded(_)
    ));
    assert_eq!(woken.0.load(Ordering::Relaxed), 1);
    assert_eq!(poll(&mut wait, &woken), Some(Durability::Degraded));
    assert_eq!(append(&log, 20), None);
    assert_eq!(log.0.rooms.free_bytes(), 10_000, "all room is back");
}

#[test]
fn the_waiting_bytes_are_bounded_and_come_back_with_the_commit() {
    let (log, mut writer) = open(&SimDisk::default());
    let mut room = log.try_reserve(9_990).expect("there is room");
    assert!(log.try_reserve(11).is_none());
    assert!(log.try_reserve(10).is_some());
    let short = log.append(&mut room, 1, &[&[0; 9_980]], Life::Passing);
    let needed = Refused::NoRoom {
        needed: 9_991,
        reserved: 9_990,
    };
    assert_eq!(short, Err(needed));
    let position = log.append(&mut room, 1, &[&[0; 9_979]], Life::Passing);
    assert!(position.expect("it fits").is_some());
    assert_eq!(room.bytes(), 0);
    drop(room);
    assert!(log.try_reserve(11).is_none());
    writer.step(&mut Nobody, Millis::ZERO);
    assert_eq!(log.0.rooms.free_bytes(), 10_000);
}

#[test]
fn a_record_larger_than_the_bound_takes_all_room() {
    let (log, mut writer) = open(&SimDisk::default());
    let body = vec![1; 400_000];
    let mut room = log
        .try_reserve(Log::record_bytes(body.len()))
        .expect("nothing waits");
    assert!(log.try_reserve(1).is_none());
    let position = log.append(&mut room, 1, &[&body[..1000], &body[1000..]], Life::Living);
    let position = position.expect("it fits").expect("the disk works");
    drop(room);
    writer.step(&mut Nobody, Millis::ZERO);
    assert!(log.committed() > position);
    let tail = append(&log, 9).expect("the disk works");
    assert_eq!(
        tail,
        Position::new(2, HEADER_BYTES),
        "its segment has no other record"
    );
    let huge = vec![0; 1 << 20];
    let parts = vec![&huge[..]; 258];
    let mut room = log.try_reserve(usize::MAX).or_else(|| {
        writer.step(&mut Nobody, Millis::ZERO);
        log.try_reserve(usize::MAX)
    });
    let room = room.as_mut().expect("nothing waits");
    let refused = log.append(room, 1, &parts, Life::Living);
    assert_eq!(refused, Err(Refused::TooLarge(258 << 20)));
}

#[tokio::test]
async fn producers_wait_for_room_and_the_thread_gives_it() {
    let disk = SimDisk::default();
    let (log, writer) = open(&disk);
    let steps = Arc::new(AtomicUsize::new(0));
    let counted = steps.clone();
    let report = move |step: &Step, _, sizes: Sizes| {
        assert!(matches!(
            step,
            Step::Committed { .. } | Step::Deleted { .. } | Step::Rewritten
        ));
        assert!(sizes.bytes > 0);
        counted.fetch_add(1, Ordering::Relaxed);
    };
    let thread = WriterThread::spawn(writer, Nobody, report).expect("a thread");
    let mut last = Position::new(0, 0);
    for _ in 0..300 {
        let mut room = log.reserve(Log::record_bytes(100)).await;
        let position = log.append(&mut room, 1, &[&[5; 100]], Life::Living);
        last = position.expect("it fits").expect("the disk works");
    }
    assert_eq!(log.wait(last).await, Durability::Durable);
    assert!(log.committed() > last);
    let end = append(&log, 5).expect("the disk works");
    tokio::task::spawn_blocking(|| thread.stop())
        .await
        .expect("it ends");
    assert!(
        log.committed() > end,
        "records that wait are written at the end"
    );
    assert_eq!(log.mode(), Mode::Closed);
    assert_eq!(append(&log, 5), None);
    assert_eq!(log.wait(Position::new(99, 0)).await, Durability::Degraded);
    assert!(steps.load(Ordering::Relaxed) > 0);
    let recovery = Recovery::open(disk.after_kill(), small()).expect("it opens");
    let report = recovery.replay(|_| {}).expect("it is read").report;
    assert_eq!(report.records, 301);
}

struct Panics;

impl Owner for Panics {
    fn begin(&mut self, _pass: Pass) {}

    fn write(&mut self, _piece: &mut Piece<'_>) -> Progress {
        panic!("the owner has a fault");
    }
}

#[tokio::test]
async fn waiting_tasks_go_on_when_the_thread_panics() {
    let disk = SimDisk::default();
    disk.create("00000001.stale").expect("it works");
    let (log, writer) = open(&disk);
    let report = |_: &Step, _, _: Sizes| {};
    let thread = WriterThread::spawn(writer, Panics, report).expect("a thread");
    assert_eq!(log.wait(Position::new(9, 0)).await, Durability::Degraded);
    tokio::task::spawn_blocking(|| thread.stop())
        .await
        .expect("it ends");
    assert_eq!(log.mode(), Mode::Closed);
}
