use super::tests::{complete, plan, request, small, with_lookahead};
use super::*;
use crate::runtime::Session;

/// A request that goes on with what `conversation` says, in a session.
fn talk(session: u64, conversation: &[u32], max_new_tokens: usize) -> Request {
    let session = Some(Session(session));
    Request {
        id: session.map_or(0, |session| session.0),
        prompt: conversation.to_vec(),
        max_new_tokens,
        session,
        ..Request::default()
    }
}

/// Runs what is queued, with token 1 for everyone; gives the steps, and refused requests.
fn run_out(scheduler: &mut Scheduler) -> Vec<String> {
    let mut lines = Vec::new();
    loop {
        lines.extend(plan(scheduler));
        lines.extend(scheduler.refuse().map(|(index, error)| format!("{index} refused: {error}")));
        let Some(step) = scheduler.oldest() else {
            if scheduler.waiting() == 0 {
                return lines;
            }
            continue;
        };
        let chosen = vec![1; step.batch.rows.len()];
        complete(scheduler, &chosen);
    }
}

#[test]
fn a_session_runs_what_is_new() {
    let mut scheduler = small(None);
    scheduler.submit(0, talk(5, &[2, 3, 4], 3)).unwrap();
    assert_eq!(run_out(&mut scheduler), ["0: 0@0+3!", "2: 0@3+1!", "2: 0@4+1!"]);
    assert_eq!(scheduler.free(), (2, 5), "a slot, and the page of five rows");
    // 2 3 4 1 1 1: the last token was not run.
    let mut conversation = vec![2, 3, 4, 1, 1, 1];
    scheduler.submit(0, request(0, 2, 1)).unwrap();
    scheduler.submit(1, talk(5, &[&conversation[..], &[7, 8]].concat(), 20)).unwrap();
    assert_eq!(run_out(&mut scheduler)[0], "1: 1@0+2! 0@5+3!", "in its slot, beside another");
    assert_eq!(scheduler.free(), (2, 4), "27 rows");
    // Cut back past the pages of the answer, 21 rows: too far for the ring.
    conversation.extend([7, 8, 9]);
    scheduler.submit(0, talk(5, &conversation, 1)).unwrap();
    assert_eq!(run_out(&mut scheduler), ["1: 0@0+8", "0: 0@8+1!"]);
    assert_eq!(scheduler.free(), (2, 5));
    // Six rows are near enough, and a prompt that the pool holds whole runs its last row.
    scheduler.submit(0, talk(5, &conversation[..4], 1)).unwrap();
    assert_eq!(run_out(&mut scheduler), ["0: 0@3+1!"]);
    // What was written stays written: position 2 is seven before the last.
    scheduler.submit(0, talk(5, &conversation[..3], 1)).unwrap();
    assert_eq!(run_out(&mut scheduler), ["0: 0@0+3!"]);
    scheduler.forget(Session(5));
    scheduler.forget(Session(6));
    assert_eq!(scheduler.free(), (3, 6));
}

#[test]
fn rows_in_flight_count_as_written() {
    for (lookahead, expected) in [(1, "2: 0@1+1!"), (2, "0: 0@0+2!")] {
        let mut scheduler = with_lookahead(None, lookahead);
        scheduler.submit(0, Request { eos: vec![7], ..talk(0, &[2], 20) }).unwrap();
        for token in [1, 1, 1, 1, 1, 1, 7] {
            plan(&mut scheduler);
            complete(&mut scheduler, &[token]);
        }
        while scheduler.oldest().is_some() {
            complete(&mut scheduler, &[-1]);
        }
        // Rows 0 to 6 have run, and one more with two steps in flight.
        scheduler.submit(0, talk(0, &[2, 9], 1)).unwrap();
        let lines = plan(&mut scheduler);
        assert_eq!(lines, [expected.replace("2: ", "0: ")], "lookahead {lookahead}");
    }
}

#[test]
fn a_session_has_one_sequence_at_a_time() {
    let mut scheduler = small(None);
    for (index, prompt) in [&[2, 3][..], &[2, 3, 1, 4]].into_iter().enumerate() {
        scheduler.submit(index, talk(1, prompt, 1)).unwrap();
    }
    scheduler.submit(2, request(0, 1, 1)).unwrap();
    assert_eq!(
        run_out(&mut scheduler),
        ["0: 0@0+2!", "0: 0@2+2! 1@0+1!"],
        "the second waits for the first, and the third behind it"
    );
}

#[test]
fn who_waits_for_a_session_to_be_forgotten_is_refused() {
    let mut scheduler = small(None);
    for session in 0..3 {
        scheduler.submit(0, talk(session, &[2, 3], 1)).unwrap();
    }
    run_out(&mut scheduler);
    assert_eq!(scheduler.free(), (0, 3));
    scheduler.submit(0, request(4, 1, 1)).unwrap();
    scheduler.submit(1, talk(0, &[2, 3, 4], 61)).unwrap();
    scheduler.submit(2, talk(1, &[2, 3, 4], 60)).unwrap();
    let lines = run_out(&mut scheduler);
    let expected = "0 refused: request 4: expected a slot and 1 more pages for prompt and new tokens, found 0 free slots and 3 \
                    free pages beside 3 other sessions; end one of these";
    assert!(lines[0].starts_with(expected), "{lines:?}");
    assert_eq!(lines[1], "0: 0@2+1!", "three pages are enough for the second");
    assert!(lines.last().unwrap().starts_with("2 refused: request 1: expected a slot and 3 more pages"), "{lines:?}");
    for session in [2, 0] {
        scheduler.forget(Session(session));
    }
    scheduler.submit(2, talk(1, &[2, 3, 4], 60)).unwrap();
    assert_eq!(run_out(&mut scheduler)[0], "0: 1@2+1!", "a refused session goes on as if it had not asked");
    scheduler.clear();
    assert_eq!(scheduler.free(), (3, 6), "all is forgotten");
}
