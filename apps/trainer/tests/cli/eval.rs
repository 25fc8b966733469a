use serde_json::json;

use crate::support::{Dir, chat_rows};
#[cfg(unix)]
use crate::support::{interrupt, token_rows, words};

#[test]
fn the_loss_is_the_mean_of_the_tokens_written_per_token() {
    let dir = Dir::with_tokens();
    let line = "eval --model model --data rows.jsonl --json --per-token out.jsonl";
    let run = dir.trainer(line).succeeds();
    let json = run.json();
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    assert_eq!(keys, ["loss", "perplexity", "tokens", "rows"]);

    let rows = dir.lines("rows.jsonl");
    let written = dir.lines("out.jsonl");
    assert_eq!(written.len(), rows.len());
    let mut all = Vec::new();
    for (index, (row, written)) in rows.iter().zip(&written).enumerate() {
        assert_eq!(written["row"], json!(index));
        let logprobs = written["logprobs"].as_array().unwrap();
        // the first token has none before it
        assert_eq!(
            logprobs.len(),
            row["input_ids"].as_array().unwrap().len() - 1
        );
        all.extend(logprobs.iter().map(|x| x.as_f64().unwrap()));
    }
    assert!(all.iter().all(|x| *x < 0.0));
    let mean = -all.iter().sum::<f64>() / all.len() as f64;
    let loss = json["loss"].as_f64().unwrap();
    assert!((mean - loss).abs() < 1e-6 * loss, "{mean} {loss}"); // f32 written and read
    assert!((json["perplexity"].as_f64().unwrap() - loss.exp()).abs() < 1e-9);
    assert_eq!(json["tokens"], json!(all.len()));
    assert_eq!(json["rows"], json!(8));
}

#[test]
fn rows_without_a_trained_token_are_left_out_and_counted() {
    let dir = Dir::with_tokens();
    let good = dir.read("rows.jsonl");
    let bad = r#"{"input_ids": [5, 6], "labels": [-100, -100]}"#;
    dir.write("mixed.jsonl", format!("{bad}\n{good}"));
    let line =
        |data: &str| format!("eval --model model --data {data} --json --per-token out.jsonl");
    let plain = dir.trainer(&line("rows.jsonl")).succeeds().json();
    let mixed = dir.trainer(&line("mixed.jsonl")).succeeds();
    assert_eq!(mixed.json(), plain);
    let told = "1 of 9 rows have no trained token and are left out (mixed.jsonl:1)";
    assert!(mixed.stderr.contains(told), "{mixed}");
    assert_eq!(dir.lines("out.jsonl")[0]["row"], json!(1));
    dir.write("none.jsonl", format!("{bad}\n"));
    let run = dir.trainer(&line("none.jsonl"));
    run.fails(
        1,
        &["1 of the rows have no trained token", "data.max_length"],
    );
}

#[test]
fn a_folder_is_evaluated_by_its_held_out_split() {
    let dir = Dir::with_tokens();
    let rows = dir.read("rows.jsonl");
    let (first, second) = rows.split_at(rows.find('\n').unwrap() + 1);
    dir.write("set/data/test-0.jsonl", first);
    dir.write("set/data/train-0.jsonl", second);
    let run = dir
        .trainer("eval --model model --data set --json")
        .succeeds();
    assert_eq!(run.json()["rows"], json!(1));
    let told = "set: test-0.jsonl; not read: train-0.jsonl";
    assert!(run.stderr.contains(told), "{run}");
    let plan = dir
        .trainer("plan --model model --data set --json")
        .succeeds();
    assert_eq!(plan.json()["rows"], json!(7));
    assert!(plan.stderr.contains("not read: test-0.jsonl"), "{plan}");
}

#[test]
fn an_evaluation_writes_nothing_it_was_not_asked_for() {
    let dir = Dir::with_tokens();
    let before = dir.names(".");
    let run = dir
        .trainer("eval --model model --data rows.jsonl")
        .succeeds();
    assert!(
        run.stdout.starts_with("loss ") && run.stdout.lines().count() == 1,
        "{run}"
    );
    assert_eq!(dir.names("."), before);
}

#[test]
fn batch_size_and_several_files_change_nothing() {
    let dir = Dir::with_tokens();
    let rows = dir.read("rows.jsonl");
    let (first, second) = rows.split_at(rows.find('\n').unwrap() + 1);
    dir.write("parts/a.jsonl", first);
    dir.write("parts/b.jsonl", second);
    let loss = |line: &str| {
        let run = dir
            .trainer(&format!("eval --json --model model {line}"))
            .succeeds();
        run.json()["loss"].as_f64().unwrap()
    };
    let whole = loss("--data rows.jsonl");
    let single = loss("--data rows.jsonl --set train.micro_batch_size=1");
    assert!((whole - single).abs() < 1e-6, "{whole} {single}"); // sums in another order
    assert_eq!(whole, loss("--data parts"));
    assert_eq!(whole, loss("--data parts/a.jsonl --data parts/b.jsonl"));
}

#[test]
fn conversations_are_rendered_and_only_answers_count() {
    let dir = Dir::with_chat();
    let tokens = |set: &str| {
        let run = dir.trainer(&format!(
            "eval --json --model model --data rows.jsonl {set}"
        ));
        run.succeeds().json()["tokens"].as_u64().unwrap()
    };
    let (answers, all) = (tokens(""), tokens("--set data.train_on=all"));
    assert!(0 < answers && answers < all, "{answers} {all}");
    // a file that is one JSON array holds the same rows
    let rows: Vec<String> = chat_rows().lines().map(str::to_owned).collect();
    dir.write("rows.json", format!("[{}]", rows.join(",\n")));
    let run = dir
        .trainer("eval --json --model model --data rows.json")
        .succeeds();
    assert_eq!(run.json()["tokens"], json!(answers));
}

#[cfg(unix)]
#[test]
fn an_interrupted_evaluation_stops_between_batches() {
    let dir = Dir::with_tokens();
    dir.write("rows.jsonl", token_rows(50_000)); // far more than are evaluated in a second
    let line = "eval --json --model model --data rows.jsonl --per-token out.jsonl \
                --set train.micro_batch_size=1";
    let mut child = dir.piped(&words(line)).spawn().unwrap();
    let run = interrupt(&mut child, "evaluating 50000 rows");
    assert_eq!(run.code, Some(130), "{run}");
    assert!(run.stderr.contains("stopping after this batch"), "{run}");
    assert_eq!(run.json(), json!({"interrupted": true}));
    assert!(!dir.has("out.jsonl"));
}
