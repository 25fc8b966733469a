use serde_json::{Value, json};

#[cfg(unix)]
use crate::support::words;
use crate::support::{CHAT_VOCAB, Dir, Run};

fn ids(json: &Value) -> Vec<u64> {
    let ids = json["token_ids"].as_array().unwrap();
    ids.iter().map(|id| id.as_u64().unwrap()).collect()
}

#[test]
fn token_ids_are_continued_without_a_tokenizer() {
    let dir = Dir::with_tokens();
    let line = "generate --model model --prompt-ids 5,6,7 --max-new-tokens 4";
    let run = dir.trainer(&format!("{line} --json")).succeeds();
    let json = run.json();
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        ["text", "token_ids", "finish_reason", "tokens_per_second"]
    );
    assert_eq!(
        (ids(&json).len(), &json["finish_reason"]),
        (4, &json!("length"))
    );
    assert!(json["tokens_per_second"].as_f64().unwrap() > 0.0);
    let text = dir.trainer(line).succeeds().stdout;
    let numbers: Vec<String> = ids(&json).iter().map(u64::to_string).collect();
    assert_eq!(text, numbers.join(",") + "\n");
}

#[test]
fn every_eos_token_stops() {
    let dir = Dir::with_tokens();
    let line = "generate --model model --prompt-ids 5,6,7 --max-new-tokens 4 --json";
    let all = ids(&dir.trainer(line).succeeds().json());
    dir.edit_json("model/generation_config.json", |json| {
        json["eos_token_id"] = json!([95, all[1]]);
    });
    let json = dir.trainer(line).succeeds().json();
    let end = all.iter().position(|id| *id == all[1]).unwrap();
    assert_eq!(
        (ids(&json), &json["finish_reason"]),
        (all[..=end].to_vec(), &json!("stop"))
    );
}

#[test]
fn a_prompt_is_text_or_a_turn_of_the_template() {
    let dir = Dir::with_chat();
    let run = |line: &str| {
        let line = format!("generate --json --model model --max-new-tokens 3 {line} --prompt");
        dir.trainer_with(&line, "Hi you").succeeds().json()
    };
    let (text, chat) = (run(""), run("--chat"));
    assert_eq!(ids(&text).len(), 3);
    assert!(text["text"].is_string());
    assert!(ids(&chat).iter().all(|id| *id < CHAT_VOCAB as u64));
    assert_ne!(ids(&text), ids(&chat), "the template is part of the prompt");
    assert_eq!(text["token_ids"], run("")["token_ids"]);
}

#[test]
fn the_text_that_is_printed_is_the_text_of_the_json() {
    let dir = Dir::with_chat();
    for line in [
        "generate --model model --max-new-tokens 60 --prompt Hi",
        "generate --model model --max-new-tokens 60 --prompt Hi --temperature 3 --seed 5",
    ] {
        let whole = dir.trainer(&format!("{line} --json")).succeeds().json();
        let printed = dir.trainer(line).succeeds().stdout;
        assert_eq!(printed, whole["text"].as_str().unwrap().to_owned() + "\n");
        assert!(printed.chars().count() > 20, "{printed}");
    }
}

#[cfg(unix)]
#[test]
fn the_text_is_printed_while_it_is_made() {
    use std::io::{BufReader, Read};

    let dir = Dir::with_tokens();
    dir.edit_json("model/generation_config.json", |json| {
        json["eos_token_id"] = json!(null);
    });
    dir.edit_json("model/config.json", |json| {
        json["eos_token_id"] = json!(null)
    });
    // would take hours
    let line = "generate --model model --prompt-ids 5 --max-new-tokens 100000000";
    let mut child = dir.piped(&words(line)).spawn().unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut first = [0; 20];
    stdout.read_exact(&mut first).unwrap();
    assert!(first.contains(&b','), "{first:?}");
    drop(stdout); // as `| head -c 20` does
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_seed_decides_what_is_sampled() {
    let dir = Dir::with_tokens();
    let run = |more: &str| {
        let line =
            format!("generate --json --model model --prompt-ids 9 --max-new-tokens 12 {more}");
        ids(&dir.trainer(&line).succeeds().json())
    };
    let warm = |seed: u64| run(&format!("--temperature 1.5 --seed {seed}"));
    assert_eq!(warm(1), warm(1));
    assert_ne!(warm(1), warm(2));
    assert_eq!(run("--temperature 1.5 --top-k 1"), run(""));
    assert_eq!(run("--temperature 1.5 --top-p 0.000001"), run(""));
}

#[test]
fn a_text_beyond_the_models_context_is_made_with_a_warning() {
    let dir = Dir::with_tokens(); // max_position_embeddings is 128
    let warning = |run: Run| run.succeeds().stderr.contains("the model was made for 128");
    let ids: Vec<String> = (0..200).map(|i| (3 + i % 90).to_string()).collect();
    let line = "generate --model model --max-new-tokens 2 --prompt-ids";
    assert!(warning(dir.trainer_with(line, &ids.join(","))));
    assert!(!warning(dir.trainer_with(line, &ids[..126].join(","))));
    assert!(warning(dir.trainer_with(line, &ids[..127].join(","))));
    let json = dir.trainer_with(&line.replace("generate", "generate --json"), &ids.join(","));
    assert_eq!(json.json()["token_ids"].as_array().unwrap().len(), 2);
    assert!(warning(json));
}

#[test]
fn what_cuts_a_text_off_is_said() {
    let dir = Dir::with_tokens();
    let line = "generate --model model --prompt-ids 5,6,7 --max-new-tokens 4";
    let run = dir.trainer(line).succeeds();
    assert!(
        run.stderr.contains("(cut off after --max-new-tokens 4)"),
        "{run}"
    );
    let first = run
        .stdout
        .split(',')
        .next()
        .unwrap()
        .parse::<u64>()
        .unwrap();
    assert_eq!(dir.trainer(&format!("{line} -q")).succeeds().stderr, "");
    assert!(
        !dir.trainer(&format!("{line} --json"))
            .stderr
            .contains("cut off")
    );
    dir.edit_json("model/generation_config.json", |json| {
        json["eos_token_id"] = json!(first)
    });
    assert!(!dir.trainer(line).succeeds().stderr.contains("cut off"));
}

#[test]
fn a_seed_that_decides_nothing_is_said() {
    let dir = Dir::with_tokens();
    let line = "generate --model model --prompt-ids 5,6,7 --max-new-tokens 4";
    let said = |flags: &str| {
        let run = dir.trainer(&format!("{line} {flags}")).succeeds();
        run.stderr.contains("--seed decides nothing")
    };
    assert!(said("--seed 7"));
    assert!(!said("--seed 7 --temperature 1") && !said(""));
    dir.trainer(&format!("{line} --top-p 0.5"))
        .fails(2, &["--top-p needs --temperature above 0"]);
}

#[cfg(unix)]
#[test]
fn an_interrupted_text_ends_with_130() {
    use std::io::Read;

    let dir = Dir::with_tokens();
    dir.edit_json("model/generation_config.json", |json| {
        json["eos_token_id"] = json!(null)
    });
    dir.edit_json("model/config.json", |json| {
        json["eos_token_id"] = json!(null)
    });
    for signal in [libc::SIGINT, libc::SIGTERM] {
        let line = "generate --model model --prompt-ids 5 --max-new-tokens 100000000";
        let mut child = dir.piped(&words(line)).spawn().unwrap();
        let stdout = child.stdout.as_mut().unwrap();
        stdout.read_exact(&mut [0]).unwrap(); // the text has begun
        let pid = i32::try_from(child.id()).unwrap();
        // SAFETY: `kill` only sends a signal, to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
        assert_eq!(child.wait().unwrap().code(), Some(130));
    }
}
