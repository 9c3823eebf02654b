use proptest::prelude::*;

use super::*;

#[derive(Clone, Debug, PartialEq)]
struct Message {
    id: u16,
    stage: Stage,
}

impl InFlight for Message {
    fn packet_id(&self) -> u16 {
        self.id
    }

    fn stage(&self) -> Stage {
        self.stage
    }

    fn set_stage(&mut self, stage: Stage) {
        self.stage = stage;
    }
}

fn send(window: &mut Window<Message>) -> u16 {
    let id = window.next_id();
    let stage = Stage::Sent;
    window.push(Message { id, stage });
    id
}

fn sent(count: usize) -> Window<Message> {
    let mut window = Window::default();
    for _ in 0..count {
        send(&mut window);
    }
    window
}

fn finish(window: &mut Window<Message>, id: u16) {
    let index = window.find(id).expect("it is in flight");
    window.finish(index);
}

fn stages(window: &Window<Message>) -> Vec<Stage> {
    window.iter().map(|m| m.stage).collect()
}

#[test]
fn identifiers_ascend_and_skip_zero() {
    let mut window = sent(0);
    window.last_id = u16::MAX - 1;
    assert_eq!(send(&mut window), u16::MAX);
    assert_eq!(send(&mut window), 1);
    // Across the end of the numbers, too.
    assert_eq!((window.find(u16::MAX), window.find(1)), (Some(0), Some(1)));
    assert_eq!((window.find(0), window.find(2)), (None, None));
}

#[test]
fn entries_stand_until_all_before_them_are_done() {
    let mut window = sent(3);
    finish(&mut window, 2);
    assert_eq!((window.len(), window.open()), (3, 2));
    assert_eq!(window.find(2), None);
    finish(&mut window, 1);
    assert_eq!((window.len(), window.open()), (1, 1));
    finish(&mut window, 3);
    assert!(window.is_empty() && !window.has_resends());
    window.shrink(0);
    assert_eq!(window.entries.capacity(), 0);
}

#[test]
fn after_a_lost_connection_everything_is_sent_again_in_order() {
    let mut window = sent(4);
    window.release(1);
    finish(&mut window, 3);
    window.connection_ended(|_| {});
    use Stage::{Done, ReleaseAgain, Released, Resend, Sent};
    assert_eq!(stages(&window), [Resend, ReleaseAgain, Done, Resend]);
    assert_eq!(window.open(), 0);
    let mut released = Vec::new();
    window.release_again(|id| released.push(id));
    window.release_again(|_| panic!("once for each connection"));
    assert_eq!((released, window.open()), (vec![2], 1));
    assert_eq!(window.next_resend(), Some(0));
    assert_eq!(window.next_resend(), Some(0), "until it is sent");
    window.resent(0);
    assert!(window.has_resends());
    assert_eq!(window.next_resend(), Some(3));
    window.finish_resend(3);
    assert_eq!(window.next_resend(), None);
    assert!(!window.has_resends());
    assert_eq!(stages(&window), [Sent, Released, Done, Done]);
}

#[test]
fn a_part_may_be_lost_with_a_stream() {
    let mut window = sent(3);
    window.unsend(|m| m.id == 2);
    assert_eq!(window.open(), 2);
    assert_eq!(window.next_resend(), Some(1));
    window.resent(1);
    assert_eq!((window.open(), window.next_resend()), (3, None));
}

#[test]
fn an_answer_may_precede_the_second_sending() {
    let mut window = sent(2);
    window.connection_ended(|_| {});
    window.release(0);
    assert_eq!(window.open(), 1);
    finish(&mut window, 2);
    assert_eq!((window.open(), window.next_resend()), (1, None));
}

#[test]
fn forgotten_entries_are_open_until_the_connection_ends() {
    let mut window = sent(4);
    window.release(0);
    window.retain(|m| m.stage == Stage::Released || m.id == 4);
    assert_eq!((window.len(), window.open()), (2, 4));
    window.finish_where(|m| m.stage == Stage::Released);
    assert_eq!((window.len(), window.open()), (1, 3));
    window.connection_ended(|_| {});
    assert_eq!((window.len(), window.open()), (1, 0));
}

proptest! {
    #[test]
    fn a_window_is_consistent_whatever_happens(
        first in any::<u16>(),
        steps in prop::collection::vec((0..8u8, 0..12usize), 0..200),
    ) {
        let mut window: Window<Message> = Window { last_id: first, ..Window::default() };
        let mut model: Vec<Message> = Vec::new();
        for (step, at) in steps {
            let alive: Vec<usize> = (0..model.len()).filter(|i| model[*i].stage != Stage::Done).collect();
            let picked = alive.get(at).copied();
            match (step, picked) {
                (0 | 1, _) if !window.has_resends() => {
                    let id = send(&mut window);
                    prop_assert!(model.iter().all(|m| m.stage == Stage::Done || m.id != id));
                    model.push(Message { id, stage: Stage::Sent });
                }
                (2, Some(i)) => {
                    finish(&mut window, model[i].id);
                    model[i].stage = Stage::Done;
                }
                (3, Some(i)) => {
                    let index = window.find(model[i].id).expect("it is in flight");
                    window.release(index);
                    model[i].stage = Stage::Released;
                }
                (4, _) => {
                    let every = at + 1;
                    window.unsend(|m| usize::from(m.id) % every == 0);
                    for m in model.iter_mut().filter(|m| usize::from(m.id) % every == 0) {
                        m.stage = match m.stage {
                            Stage::Sent => Stage::Resend,
                            Stage::Released => Stage::ReleaseAgain,
                            other => other,
                        };
                    }
                }
                (5, _) => window.release_again(|id| {
                    let due = model.iter_mut().find(|m| m.id == id && m.stage == Stage::ReleaseAgain);
                    due.expect("a release is due").stage = Stage::Released;
                }),
                (6 | 7, _) => if let Some(index) = window.next_resend() {
                    let due = model.iter_mut().find(|m| m.stage == Stage::Resend).expect("one is due");
                    prop_assert_eq!(due.id, window.get(index).id);
                    if step == 6 {
                        window.resent(index);
                        due.stage = Stage::Sent;
                    } else {
                        window.finish_resend(index);
                        due.stage = Stage::Done;
                    }
                },
                _ => {}
            }
            while model.first().is_some_and(|m| m.stage == Stage::Done) {
                model.remove(0);
            }
            prop_assert!(window.iter().eq(model.iter()));
            let open = model.iter().filter(|m| matches!(m.stage, Stage::Sent | Stage::Released));
            prop_assert_eq!(usize::from(window.open()), open.count());
            let resends = model.iter().any(|m| m.stage == Stage::Resend);
            prop_assert!(window.has_resends() || !resends);
            for m in &model {
                prop_assert_eq!(window.find(m.id).is_some(), m.stage != Stage::Done);
            }
        }
    }
}

#[test]
fn entries_that_are_kept_and_need_no_second_sending_are_not_sent_again() {
    let mut window = sent(3);
    for id in [1, 2] {
        let index = window.find(id).expect("it is in flight");
        window.release(index);
    }
    window.retain(|m| m.stage == Stage::Released);
    assert_eq!(stages(&window), [Stage::Released; 2]);
    assert!(!window.has_resends());
    window.unsend(|_| true);
    window.retain(|_| true);
    assert_eq!(window.next_resend(), None, "only PUBREL is due");
    let mut window = sent(3);
    window.unsend(|m| m.id == 2);
    window.retain(|m| m.id != 1);
    assert_eq!(window.next_resend(), Some(0));
}
