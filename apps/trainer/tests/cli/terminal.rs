//! What only a terminal shows: the dashboard, and a chat that is typed.

use crate::pty::Pty;
use crate::support::{Dir, words};

const ENDLESS: &str = "train --model model --data rows.jsonl --eval-data rows.jsonl --output run \
                       --max-steps 10000000 --set train.save_every=1000000";

/// A run that does not end by itself, in the dashboard.
#[track_caller]
fn dashboard(dir: &Dir) -> Pty {
    let mut pty = Pty::open(dir.command(&words(ENDLESS)), 80, 24);
    pty.waits_for("\x1b[?1049h");
    pty.waits_for("perplexity"); // after some steps
    pty
}

/// The run has saved what `--resume` needs.
#[track_caller]
fn has_saved(dir: &Dir, (code, seen): (Option<i32>, String)) {
    assert_eq!(code, Some(130), "{seen}");
    let after = &seen[seen.rfind("\x1b[?1049l").unwrap()..];
    assert!(
        after.contains("go on with: trainer train --resume run"),
        "{after}"
    );
    assert_eq!(dir.names("run/checkpoints").len(), 1);
}

#[test]
fn q_saves_and_stops_the_run() {
    let dir = Dir::with_tokens();
    let mut pty = dashboard(&dir);
    pty.types("\x1b[C"); // the next plot
    pty.waits_for("Learning");
    for (columns, rows) in [(20, 5), (1, 1), (200, 50)] {
        pty.resizes(columns, rows);
        std::thread::sleep(std::time::Duration::from_millis(600));
    }
    pty.waits_for("Gradient"); // the large screen has room for its plot
    pty.types("q");
    has_saved(&dir, pty.ends());
}

#[test]
fn ctrl_c_and_signals_save_and_stop_the_run() {
    let dir = Dir::with_tokens();
    let mut pty = dashboard(&dir);
    pty.types("\x03");
    has_saved(&dir, pty.ends());
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        let dir = Dir::with_tokens();
        let mut pty = dashboard(&dir);
        pty.kills(signal);
        has_saved(&dir, pty.ends());
    }
}

/// As when the system refuses memory, which no panic tells.
#[test]
fn an_abort_gives_the_terminal_back_and_says_what_to_do() {
    let dir = Dir::with_tokens();
    let mut pty = dashboard(&dir);
    pty.kills(libc::SIGABRT);
    let (code, seen) = pty.ends();
    assert_eq!(code, Some(1), "{seen}");
    let after = &seen[seen.rfind("\x1b[?1049l").unwrap()..];
    for part in [
        "\x1b[?25h",
        "error: ",
        "lack of memory",
        "help: ",
        "--resume",
    ] {
        assert!(after.contains(part), "{part}: {after}");
    }
}

#[test]
fn a_stop_can_be_taken_back_or_made_at_once() {
    let dir = Dir::with_tokens();
    let mut pty = dashboard(&dir);
    pty.types("q");
    pty.types("c");
    let steps = || dir.lines("run/metrics.jsonl").len();
    let before = steps();
    pty.waits_for_bytes(20_000); // it goes on for seconds
    assert!(steps() > before);
    pty.types("qk");
    was_left(&dir, pty.ends());
}

/// Who left at once was told what is complete and how to go on, and the run has a report.
#[track_caller]
fn was_left(dir: &Dir, (code, seen): (Option<i32>, String)) {
    assert_eq!(code, Some(130), "{seen}");
    let after = &seen[seen.rfind("\x1b[?1049l").unwrap()..];
    for part in [
        "left at once after step ",
        "run/best is complete",
        "trainer train run/recipe.toml --output ANOTHER", // there is no checkpoint to go on from
        "report: run/report.html",
    ] {
        assert!(after.contains(part), "{part}: {after}");
    }
    assert!(
        dir.read("run/report.html")
            .contains("interrupted after step ")
    );
    assert_eq!(
        dir.json("run/run.json")["sessions"][0]["end"],
        "interrupted"
    );
}

#[test]
fn a_closed_terminal_saves_and_stops_the_run() {
    let dir = Dir::with_tokens();
    let pty = dashboard(&dir);
    assert_eq!(pty.hangs_up(), Some(130));
    assert_eq!(dir.names("run/checkpoints").len(), 1);
}

#[test]
fn a_failure_is_said_on_the_terminals_own_screen() {
    let dir = Dir::with_tokens();
    let mut pty = dashboard(&dir);
    dir.write("run/checkpoints", "in the way");
    pty.types("q");
    let (code, seen) = pty.ends();
    assert_eq!(code, Some(1), "{seen}");
    let after = &seen[seen.rfind("\x1b[?1049l").unwrap()..];
    assert!(
        after.contains("error: ") && after.contains("help: "),
        "{after}"
    );
}

/// A chat in the middle of an answer that never ends by itself.
#[track_caller]
fn answering(dir: &Dir) -> Pty {
    let command = dir.command(&words("chat --model model --max-new-tokens 100000000"));
    let mut pty = Pty::open(command, 80, 24);
    pty.waits_for("\x1b[?2004h"); // the prompt
    pty.types("Hi\r");
    pty.waits_for("\x1b[?2004l");
    pty.waits_for_bytes(100);
    pty
}

#[test]
fn lines_are_edited_and_kept() {
    let dir = Dir::with_chat();
    let mut pty = Pty::open(dir.command(&words("chat --model model")), 80, 24);
    pty.waits_for("\x1b[?2004h");
    pty.types("/nonsemse\x1b[D\x1b[D\x7fn\r");
    pty.waits_for("there is no /nonsense");
    pty.waits_for("\x1b[?2004h");
    pty.types("\x1b[A\r"); // the line before
    pty.waits_for("there is no /nonsense");
    pty.waits_for("\x1b[?2004h");
    pty.types("\x04");
    assert_eq!(pty.ends().0, Some(0));
}

#[test]
fn ctrl_c_stops_a_typed_chats_answer_and_then_the_chat() {
    let dir = Dir::with_endless_chat();
    let mut pty = answering(&dir);
    pty.types("\x03");
    pty.waits_for("\x1b[?2004h"); // the next prompt
    pty.types("\x03");
    assert_eq!(pty.ends().0, Some(130));
}

#[test]
fn sigterm_ends_a_chat_anywhere_and_restores_the_terminal() {
    let dir = Dir::with_endless_chat();
    let mut pty = Pty::open(dir.command(&words("chat --model model")), 80, 24);
    pty.waits_for("\x1b[?2004h");
    pty.types("half a li");
    pty.waits_for("li");
    pty.kills(libc::SIGTERM);
    assert_eq!(pty.ends().0, Some(130));
    let mut pty = answering(&dir);
    pty.kills(libc::SIGTERM);
    assert_eq!(pty.ends().0, Some(130));
}
