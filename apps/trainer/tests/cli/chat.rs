use std::io::Write;
use std::process::Stdio;
#[cfg(unix)]
use std::process::{Child, ChildStdin};

use serde_json::json;

#[cfg(unix)]
use crate::support::send;
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
    let all = all_counts(run);
    all.try_into().unwrap_or_else(|_| panic!("{run}"))
}

/// The same of any number of answers.
#[track_caller]
fn all_counts(run: &Run) -> Vec<[usize; 2]> {
    let told = run.stderr.lines();
    let told = told.filter_map(|line| line.split_once("read "));
    let numbers = told.map(|(_, rest)| {
        let words = rest.split(' ').filter_map(|word| word.parse().ok());
        words.collect::<Vec<usize>>().try_into().unwrap()
    });
    numbers.collect()
}

/// The demo's model and two adapters, which answer `a` and `b` to everything.
fn demo_with_adapters() -> Dir {
    let dir = demo();
    for answer in ["a", "b"] {
        let row = json!({"prompt": "spell: house", "completion": answer});
        dir.write("rows.jsonl", row.to_string());
        dir.trainer(&format!(
            "train -q --model model --data rows.jsonl --output runs/{answer} --rank 4 \
             --max-steps 30 --set train.learning_rate=5e-3"
        ))
        .succeeds();
    }
    dir
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
    for part in [
        "/reset",
        "/adapter NAME",
        "/save FILE",
        "Ctrl-D",
        "there is no /nonsense",
    ] {
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

/// A chat that has read some lines and waits for more.
#[cfg(unix)]
fn with_lines(dir: &Dir, line: &str, lines: &[u8]) -> (Child, ChildStdin) {
    let mut command = dir.piped(&words(line));
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(lines).unwrap();
    (child, stdin)
}

/// A chat whose answer has begun and would take hours.
#[cfg(unix)]
fn in_an_answer(dir: &Dir) -> (Child, ChildStdin) {
    use std::io::Read;

    let line = "chat --model model --max-new-tokens 100000000";
    let (mut child, stdin) = with_lines(dir, line, b"Hi\n");
    let stdout = child.stdout.as_mut().unwrap();
    stdout.read_exact(&mut [0]).unwrap();
    (child, stdin)
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_an_answer_and_not_the_program() {
    let dir = Dir::with_endless_chat();
    let (child, mut stdin) = in_an_answer(&dir);
    send(&child, libc::SIGINT);
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
    let (mut child, _stdin) = with_lines(&dir, line, b"spell: sea\n/nonsense\n");
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut said = String::new();
    stderr.read_line(&mut said).unwrap();
    assert!(said.contains("/nonsense"), "{said}"); // it waits for the next line
    send(&child, libc::SIGINT);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[cfg(unix)]
#[test]
fn sigterm_ends_the_program_even_in_an_answer() {
    let dir = Dir::with_endless_chat();
    let (mut child, _stdin) = in_an_answer(&dir);
    send(&child, libc::SIGTERM);
    assert_eq!(child.wait().unwrap().code(), Some(130));
}

#[test]
fn adapters_are_changed_in_the_middle_of_a_chat() {
    let dir = demo_with_adapters();
    let [a, b] = ["runs/a/adapter", "runs/b/adapter"];
    for quant in ["", "--quant nf4"] {
        let alone = format!("generate --model model {quant} --chat --prompt");
        let alone = dir.trainer_with(&alone, "spell: house").succeeds().stdout;
        let lines = "spell: house\n/reset\n/adapter b\nspell: house\n/reset\n/adapter off\n\
                     spell: house\n/reset\n/adapter runs/a/adapter/\nspell: house\n/adapter\n";
        let run = chat(&dir, &format!("{quant} --adapter {a} --adapter {b}"), lines).succeeds();
        assert_eq!(run.stdout, format!("a\nb\n{alone}a\n"), "{run}");
        for said in [
            "using runs/b/adapter\n",
            "using the model alone",
            "* runs/a/adapter",
        ] {
            assert!(run.stderr.contains(said), "{run}");
        }
        assert_eq!(run.stderr.matches("error").count(), 0, "{run}");
    }
    // several at once, and one with a weight
    let lines = "spell: house\n/reset\n/adapter a=0 b\nspell: house\n/reset\n/adapter\n\
                 /adapter runs/a/adapter=1 b=0\nspell: house\n/adapter b=x\n/adapter b c\n";
    let run = chat(&dir, &format!("--adapter {a}=0 --adapter {b}"), lines).succeeds();
    let alone = dir.trainer_with("generate --model model --chat --prompt", "spell: house");
    let alone = alone.succeeds().stdout;
    assert_eq!(run.stdout, format!("{alone}b\na\n"), "{run}");
    for said in [
        "using runs/a/adapter=0 and runs/b/adapter\n",
        "* runs/a/adapter=0\n* runs/b/adapter\n",
        "is not a weight",
        "there is no adapter c",
    ] {
        assert!(run.stderr.contains(said), "{said}: {run}");
    }
    // one that was not given; the conversation goes on, and nothing of it is known any more
    let lines = "spell: house\n/adapter runs/b/adapter\nspell: house\n/save chat.jsonl\n";
    let run = chat(&dir, &format!("-v --adapter {a}"), lines).succeeds();
    assert!(run.stdout.starts_with("a\n"), "{run}");
    assert!(
        run.stderr
            .contains("using runs/b/adapter; the conversation goes on"),
        "{run}"
    );
    let [_, [read, all]] = all_counts(&run)[..] else {
        panic!("{run}");
    };
    assert_eq!(read, all);
    assert_eq!(
        dir.lines("chat.jsonl")[0]["messages"]
            .as_array()
            .unwrap()
            .len(),
        4
    );
}

#[test]
fn an_adapter_that_cannot_be_used_leaves_the_one_in_use() {
    let dir = demo_with_adapters();
    dir.edit_json("runs/b/adapter/adapter_config.json", |json| {
        json["r"] = json!(5)
    });
    let lines = "/adapter c\n/adapter adapter\n/adapter b\n/adapter runs/a\nspell: house\n";
    let flags = "--adapter runs/a/adapter --adapter runs/b/adapter";
    let run = chat(&dir, flags, lines).succeeds();
    assert_eq!(run.stdout, "a\n", "{run}");
    for said in [
        "there is no adapter c",
        "several adapters are called adapter: runs/a/adapter, runs/b/adapter",
        "lora_A.weight",
        "help: use the base model that the adapter was trained on",
    ] {
        assert!(run.stderr.contains(said), "{said}: {run}");
    }
    dir.trainer("chat --model model --adapter runs/a")
        .fails(1, &["runs/a is the folder of a run", "runs/a/adapter"]);
}

#[test]
fn an_adapters_own_template_is_used_with_it() {
    let dir = demo_with_adapters();
    let template =
        "{% for m in messages %}{{ m.content }}{{ raise_exception('too odd') }}{% endfor %}";
    dir.write("runs/b/adapter/chat_template.jinja", template);
    let flags = "--adapter runs/a/adapter --adapter runs/b/adapter";
    let run = chat(&dir, flags, "spell: house\n/adapter b\nspell: house\n");
    assert_eq!((run.code, &*run.stdout), (Some(1), "a\n"), "{run}");
    assert!(run.stderr.contains("too odd"), "{run}");
    // a named template holds for all
    let flags = format!("{flags} --chat-template model/chat_template.jinja");
    let run = chat(
        &dir,
        &flags,
        "spell: house\n/reset\n/adapter b\nspell: house\n",
    )
    .succeeds();
    assert_eq!(run.stdout, "a\nb\n", "{run}");
}

#[test]
fn a_saved_conversation_is_a_row_to_train_on() {
    let dir = demo();
    dir.write(
        "chats.jsonl",
        r#"{"messages":[{"role":"user","content":"Hi"}]}"#,
    ); // no line end
    let lines = "/save none.jsonl\nspell: house\nspell: tree\n/save chats.jsonl\n/reset\n\
                 spell: sea\n/save chats.jsonl\n/save chats.txt\n/save no/such/folder/x.jsonl\n";
    let run = chat(&dir, "", lines).succeeds();
    let answers: Vec<&str> = run.stdout.lines().collect();
    let turn = |role: &str, content: &str| json!({"role": role, "content": content});
    let rows = dir.lines("chats.jsonl");
    assert_eq!(rows.len(), 3, "{rows:?}");
    let first = [
        turn("user", "spell: house"),
        turn("assistant", answers[0]),
        turn("user", "spell: tree"),
        turn("assistant", answers[1]),
    ];
    assert_eq!(rows[1], json!({ "messages": first }));
    let second = [turn("user", "spell: sea"), turn("assistant", answers[2])];
    assert_eq!(rows[2], json!({ "messages": second }));
    assert!(!dir.has("none.jsonl") && !dir.has("chats.txt"));
    for said in [
        "nothing has been said",
        "not the name of a .jsonl file",
        "cannot write no/such",
    ] {
        assert!(run.stderr.contains(said), "{said}: {run}");
    }
    let text: Vec<String> = dir
        .read("chats.jsonl")
        .lines()
        .skip(1)
        .map(str::to_owned)
        .collect();
    dir.write("rows.jsonl", text.join("\n"));
    let plan = "plan --json --model model --data rows.jsonl";
    assert_eq!(dir.trainer(plan).succeeds().json()["rows"], json!(2));
}

#[test]
fn a_system_turn_is_saved_too() {
    let dir = demo();
    let mut command = dir.command(&words("chat --model model --system"));
    let lines = "spell: sea\n/save chats.jsonl\n";
    finish_with_input(command.arg("Be brief."), lines).succeeds();
    let system = json!({"role": "system", "content": "Be brief."});
    assert_eq!(dir.lines("chats.jsonl")[0]["messages"][0], system);
}

#[test]
fn the_oldest_turns_make_room_for_new_ones() {
    let dir = demo();
    let lines = "spell: house\n".repeat(12) + "/save chats.jsonl\n";
    let set_context = |tokens: usize| {
        dir.edit_json("model/config.json", |json| {
            json["max_position_embeddings"] = json!(tokens)
        });
    };
    set_context(1000);
    let free = chat(&dir, "-v --max-new-tokens 30", &lines).succeeds();
    set_context(200);
    let run = chat(&dir, "-v --max-new-tokens 30", &lines).succeeds();
    let (free, tight) = (all_counts(&free), all_counts(&run));
    assert_eq!((free.len(), tight.len()), (12, 12), "{run}");
    assert!(free[11][1] > 200, "{free:?}");
    assert!(tight.iter().all(|[_, all]| all + 30 <= 200), "{tight:?}");
    let same = free.iter().zip(&tight).take_while(|(a, b)| a == b).count();
    assert!((3..12).contains(&same), "{free:?} {tight:?}");
    assert!(
        tight[same][1] > 100,
        "no more is left out than must be: {tight:?}"
    );
    let note = "(the oldest 2 turns are left out: the model reads at most 200 tokens)";
    assert!(run.stderr.contains(note), "{run}");
    // what is left out is part of the conversation all the same
    let rows = dir.lines("chats.jsonl"); // of both chats
    assert_eq!(rows[1]["messages"].as_array().unwrap().len(), 24);
    assert!(!run.stderr.contains("cut off"), "{run}");
}

#[test]
fn a_line_that_is_too_long_is_not_said() {
    let dir = demo();
    dir.edit_json("model/config.json", |json| {
        json["max_position_embeddings"] = json!(64)
    });
    let long = "long ".repeat(200);
    let run = chat(&dir, "-v", &format!("spell: sea\n{long}\nspell: sea\n")).succeeds();
    assert_eq!(run.stdout.lines().count(), 2, "{run}");
    assert!(
        run.stderr
            .contains("this is too long: the model reads at most 64 tokens"),
        "{run}"
    );
    let [[_, first], [_, second]] = all_counts(&run)[..] else {
        panic!("{run}");
    };
    assert!(second > first && second < 64, "{run}");
    let mut command = dir.command(&words("chat --model model --system"));
    finish_with_input(command.arg(&long), "Hi\n").fails(2, &["--system is too long", "64 tokens"]);
}

#[test]
fn an_answer_ends_where_the_context_does() {
    let dir = Dir::with_endless_chat();
    dir.edit_json("model/config.json", |json| {
        json["max_position_embeddings"] = json!(256)
    });
    let run = chat(&dir, "-v --max-new-tokens 1000", "Hi\n").succeeds();
    let cut = "(cut off: the model reads and writes at most 256 tokens)";
    assert!(run.stderr.contains(cut), "{run}");
    let [_, all] = all_counts(&run)[0];
    assert!(
        run.stderr.contains(&format!("{} tokens, ", 256 - all)),
        "{run}"
    );
}
