//! The side of producers: room, waiting, and the thread.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Wake, Waker};

use super::*;

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
    assert!(log.committed() > Some(position));
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
    assert!(log.committed() > Some(last));
    let end = append(&log, 5).expect("the disk works");
    tokio::task::spawn_blocking(|| thread.stop())
        .await
        .expect("it ends");
    assert!(
        log.committed() > Some(end),
        "records that wait are written at the end"
    );
    assert_eq!(log.mode(), Mode::Closed);
    assert_eq!(append(&log, 5), None);
    assert_eq!(log.wait(Position::new(9999, 0)).await, Durability::Closed);
    assert_eq!(log.wait(end).await, Durability::Durable);
    assert!(steps.load(Ordering::Relaxed) > 0);
    let recovery = Recovery::open(disk.after_kill(), small()).expect("it opens");
    let report = recovery.replay(|_| {}).expect("it is read").report;
    assert_eq!(report.records, 301);
}

#[test]
fn a_reservation_pays_for_its_bytes_and_for_no_more() {
    let (log, _writer) = open(&SimDisk::default());
    let append = |room: &mut Room, len: usize| {
        let body = vec![1; len];
        log.append(room, 1, &[&body], Life::Passing)
    };
    // More than the bound: each record fits that was counted.
    let mut room = log.try_reserve(12_000).expect("nothing waits");
    for _ in 0..12 {
        assert!(append(&mut room, 989).expect("it was counted").is_some());
    }
    let refused = Refused::NoRoom {
        needed: 11,
        reserved: 0,
    };
    assert_eq!(append(&mut room, 0), Err(refused));
    let (log, _writer) = open(&SimDisk::default());
    let room = log.try_reserve(usize::MAX).expect("nothing waits");
    assert_eq!(room.bytes(), Log::record_bytes(BODY_BYTES_MAX));
}

#[test]
fn segments_are_at_most_a_gibibyte() {
    let options = Options {
        segment_bytes: u32::MAX,
        ..small()
    };
    let recovery = Recovery::open(SimDisk::default(), options).expect("it opens");
    let (log, _writer) = recovery
        .replay(|_| {})
        .expect("empty")
        .start()
        .expect("empty");
    assert_eq!(log.0.options.segment_bytes, 1 << 30);
}

#[test]
fn a_large_record_is_a_commit_of_its_own_and_is_not_copied_again() {
    let options = Options::new(7);
    let recovery = Recovery::open(SimDisk::default(), options).expect("it opens");
    let (log, _writer) = recovery
        .replay(|_| {})
        .expect("empty")
        .start()
        .expect("empty");
    for len in [10, 300_000, 10, 10] {
        append(&log, len).expect("the disk works");
    }
    let commits: Vec<_> = std::iter::from_fn(|| log.0.take()).collect();
    let records: Vec<_> = commits.iter().map(|commit| commit.records).collect();
    assert_eq!(records, [1, 1, 2]);
    let large = &commits[1].bytes;
    assert_eq!(
        large.capacity(),
        Log::record_bytes(300_000),
        "as it was made"
    );
}

#[test]
fn records_that_are_appended_after_the_stop_are_not_written() {
    let (log, mut writer) = open(&SimDisk::default());
    let before = append(&log, 20).expect("the disk works");
    log.0.stop();
    assert_eq!(
        append(&log, 20),
        None,
        "else a busy producer delays the end for ever"
    );
    assert!(!log.0.is_stopped());
    writer.step(&mut Nobody, Millis::ZERO);
    assert!(log.0.is_stopped() && log.committed() > Some(before));
}

/// A waker that uses the log when it is dropped.
struct Nosy(Log);

impl Wake for Nosy {
    fn wake(self: Arc<Self>) {}
}

impl Drop for Nosy {
    fn drop(&mut self) {
        self.0.mode();
    }
}

#[test]
fn a_waker_may_use_the_log_when_it_is_dropped() {
    let (log, _writer) = open(&SimDisk::default());
    let position = append(&log, 20).expect("the disk works");
    let (done, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut wait = log.wait(position);
        for _ in 0..2 {
            let waker = Waker::from(Arc::new(Nosy(log.clone())));
            let polled = Pin::new(&mut wait).poll(&mut Context::from_waker(&waker));
            assert_eq!(polled, Poll::Pending);
        }
        drop(wait);
        done.send(()).expect("the test waits");
    });
    let ended = ended.recv_timeout(std::time::Duration::from_secs(20));
    ended.expect("the log is not locked while a waker is dropped");
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
    let durability = log.wait(Position::new(9, 0)).await;
    assert_ne!(durability, Durability::Durable);
    tokio::task::spawn_blocking(|| thread.stop())
        .await
        .expect("it ends");
    assert_eq!(log.mode(), Mode::Closed);
}

#[tokio::test]
async fn a_panic_of_the_thread_marks_the_log_as_stale() {
    let disk = SimDisk::default();
    let (log, writer) = open(&disk);
    let report = |_: &Step, _, _: Sizes| panic!("the report has a fault");
    let thread = WriterThread::spawn(writer, Nobody, report).expect("a thread");
    let position = append(&log, 5).expect("the disk works");
    log.wait(position).await;
    tokio::task::spawn_blocking(|| thread.stop())
        .await
        .expect("it ends");
    assert_eq!(log.committed(), None);
    assert_eq!(log.wait(position).await, Durability::Closed);
    let recovery = Recovery::open(disk.after_kill(), small()).expect("it opens");
    assert!(recovery.replay(|_| {}).expect("it is read").report.stale);
}
