use std::io::Write;
use std::process::Stdio;

use serde_json::json;

use crate::support::{Dir, Run, finish_with_input, words};

/// The demo's model, which answers in words.
fn demo() -> Dir {
    let dir = Dir::new();
    dir.add_demo_model("model");
    dir
}

fn chat(dir: &Dir, flags: &str, input: &str) -> Run {
    let line = format!("chat --model model {flags}");
    finish_with_input(&mut dir.command(&words(&line)), input)
}

/// What `-v` tells of three answers: how many tokens of the conversation were read, and of how many.
#[track_caller]
fn counts(run: &Run) -> [[usize; 2]; 3] {
    let told = run.stderr.lines();
    let told = told.filter_map(|line| line.split_once("read "));
    let numbers = told.map(|(_, rest)| {
        let words = rest.split(' ').filter_map(|word| word.parse().ok());
        words.collect::<Vec<usize>>().try_into().unwrap()
    });
    let all: Vec<[usize; 2]> = numbers.collect();
    all.try_into().unwrap_or_else(|_| panic!("{run}"))
}

#[test]
fn every_line_is_answered_with_what_was_said_before() {
    let dir = demo();
    let first = dir
        .trainer_with("generate --model model --chat --prompt", "spell: house")
        .succeeds()
        .stdout;
    let input = "spell: house\n\n  spell: house  \r\n/reset\nspell: house\n/exit\nspell: house\n";
    let run = chat(&dir, "", input).succeeds();
    let answers: Vec<&str> = run.stdout.split_inclusive('\n').collect();
    assert_eq!(answers.len(), 3, "{run}");
    assert_eq!((answers[0], answers[2]), (&*first, &*first), "{run}");
    // the second time is another conversation, though the answer may be the same
    let all = counts(&chat(&dir, "-v", input)).map(|[_, all]| all);
    assert!(all[0] < all[1] && all[0] == all[2], "{all:?}");
}

#[test]
fn only_what_is_new_is_read() {
    let dir = demo();
    let run = chat(&dir, "-v", "spell: house\nspell: tree\nspell: sea\n").succeeds();
    let [first, second, third] = counts(&run);
    assert_eq!(first[0], first[1]);
    for (now, before) in [(second, first), (third, second)] {
        // the end of the last answer, the new line and what leads to an answer
        assert!(now[1] > before[1] && now[0] < now[1] - before[1], "{run}");
    }
}

#[test]
fn a_system_turn_comes_first() {
    let dir = Dir::with_chat();
    let lines = "Hi\nHi\n/reset\nHi\n";
    let plain = chat(&dir, "-v --max-new-tokens 8", lines).succeeds();
    let mut command = dir.command(&words("chat -v --model model --max-new-tokens 8 --system"));
    let told = finish_with_input(command.arg("Be kind and brief."), lines).succeeds();
    let (plain_counts, told_counts) = (counts(&plain), counts(&told));
    let more = told_counts[0][1] - plain_counts[0][1];
    assert!(more > 10, "{told}"); // a turn of its own
    assert_eq!(told_counts[2][1] - plain_counts[2][1], more, "{told}");
    let cut = "cut off after --max-new-tokens 8";
    assert!(plain.stderr.contains(cut), "{plain}");
}

#[test]
fn commands_are_no_turns() {
    let dir = demo();
    let run = chat(&dir, "-v", "/help\n/nonsense\n/quit\n").succeeds();
    assert_eq!(run.stdout, "");
    for part in ["/reset", "Ctrl-D", "there is no /nonsense"] {
        assert!(run.stderr.contains(part), "{run}");
    }
    assert!(!run.stderr.contains("tokens/s"), "{run}");
    assert_eq!(chat(&dir, "", "").succeeds().stdout, "");
}

#[test]
fn a_chat_needs_a_tokenizer_and_a_template() {
    let dir = Dir::with_tokens();
    let line = "chat --model model";
    dir.trainer(line).fails(1, &["model has no tokenizer.json"]);
    dir.trainer(&format!("{line} --json"))
        .fails(2, &["a chat has no JSON form", "generate --chat --json"]);
    dir.trainer(&format!("{line} --top-k 3"))
        .fails(2, &["--top-k needs --temperature above 0"]);
    let dir = Dir::with_chat();
    std::fs::remove_file(dir.path("model/chat_template.jinja")).unwrap();
    dir.trainer(line).fails(
        1,
        &["model has no chat template", "--chat-template", "llama3"],
    );
    let run = chat(&dir, "--chat-template chatml --max-new-tokens 2", "Hi\n").succeeds();
    assert!(!run.stdout.is_empty());
    dir.write("odd.jinja", "{{ raise_exception('no turns, please') }}");
    dir.trainer(&format!("{line} --chat-template odd.jinja"))
        .fails(1, &["odd.jinja", "no turns, please"]);
    dir.trainer(&format!("{line} --chat-template none.jinja"))
        .fails(2, &["none.jinja"]);
    let mut command = dir.command(&words(&format!("{line} --chat-template chatml")));
    let mut child = command
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(b"\xff\xfe\n")
        .unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("stdin is not UTF-8"));
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_answer_and_not_the_program() {
    use std::io::Read;

    let dir = Dir::with_chat();
    dir.edit_json("model/config.json", |json| {
        json["eos_token_id"] = json!(639)
    });
    let line = "chat --model model --max-new-tokens 100000000"; // would take hours
    let mut child = dir
        .piped(&words(line))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"Hi\n").unwrap();
    let mut byte = [0];
    child
        .stdout
        .as_mut()
        .unwrap()
        .read_exact(&mut byte)
        .unwrap(); // the answer has begun
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: `kill` only sends a signal, to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    stdin.write_all(b"/reset\n/exit\n").unwrap();
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(0));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(stderr.contains("the conversation is forgotten"), "{stderr}");
}

#[cfg(unix)]
#[test]
fn ctrl_c_between_answers_ends_the_program() {
    use std::io::{BufRead, BufReader};

    let dir = demo();
    let line = "chat -q --model model";
    let mut child = dir
        .piped(&words(line))
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(b"spell: sea\n/nonsense\n").unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    stderr.read_line(&mut said).unwrap();
    assert!(said.contains("/nonsense"), "{said}"); // it waits for the next line
    let pid = i32::try_from(child.id()).unwrap();
    // SAFETY: `kill` only sends a signal, to a child that has not been waited for.
    assert_eq!(unsafe { libc::kill(pid, libc::SIGINT) }, 0);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}
