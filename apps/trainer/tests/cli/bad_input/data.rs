use serde_json::json;

use crate::support::{Dir, token_rows};

/// The rows are refused by everything that reads them, and no run begins.
#[track_caller]
fn refused(dir: &Dir, data: &str, parts: &[&str]) {
    let with = format!("--model model --data {data}");
    dir.trainer(&format!("train {with} --output run"))
        .fails(1, parts);
    dir.trainer(&format!("eval {with} --per-token out.jsonl --json"))
        .fails(1, parts);
    dir.trainer(&format!("plan {with}")).fails(1, parts);
    assert!(!dir.has("run") && !dir.has("out.jsonl"));
}

/// Three good rows, then this one.
#[track_caller]
fn refused_row(dir: &Dir, row: &str, parts: &[&str]) {
    dir.write("rows.jsonl", token_rows(3) + row + "\n");
    refused(dir, "rows.jsonl", &[&["rows.jsonl:4"], parts].concat());
}

#[test]
fn lines_that_are_no_rows() {
    let dir = Dir::with_tokens();
    for (row, parts) in [
        (r#"{"input_ids": [5, 6"#, &["not valid JSON", "column"][..]),
        ("nonsense", &["not valid JSON"]),
        (r#"{"text": "\ud83d"}"#, &["hex escape", "stand in pairs"]),
        ("[5, 6]", &["must be an object"]),
        ("null", &["must be an object", "null"]),
        (
            r#"{"input_ids": "5 6"}"#,
            &["input_ids must be a list of integers", "a string"],
        ),
        (
            r#"{"input_ids": [5, "6"]}"#,
            &["input_ids[1] must be a token id", "a string"],
        ),
        (
            r#"{"input_ids": [5, 6.5]}"#,
            &["input_ids[1]", "a fraction"],
        ),
        (r#"{"input_ids": [5, null]}"#, &["input_ids[1]", "null"]),
        (
            r#"{"input_ids": [5, 96]}"#,
            &["input_ids has the id 96", "96 tokens"],
        ),
        (r#"{"input_ids": [5, -1]}"#, &["input_ids has the id -1"]),
        (
            r#"{"input_ids": [5, 9007199254740993]}"#,
            &["9007199254740993"],
        ),
        (
            r#"{"input_ids": [5, 6], "labels": [5, 4000]}"#,
            &["labels has the id 4000"],
        ),
        (
            r#"{"input_ids": [5, 6], "labels": [5, -1]}"#,
            &["labels has the id -1"],
        ),
        (
            r#"{"input_ids": [5, 6], "labels": [5]}"#,
            &["2 input_ids and 1 labels"],
        ),
        (
            r#"{"ids": [5, 6]}"#,
            &["no format fits the columns ids", "input_ids"],
        ),
        ("{}", &["no format fits"]),
        (
            r#"{"text": "Hi"}"#,
            &["needs a tokenizer", "model/tokenizer.json"],
        ),
        (
            r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#,
            &["not supported"],
        ),
    ] {
        refused_row(&dir, row, parts);
    }
}

#[test]
fn rows_without_a_trained_token() {
    let dir = Dir::with_tokens();
    for row in [
        r#"{"input_ids": [5, 6], "labels": [-100, -100]}"#,
        r#"{"input_ids": [5, 6], "labels": [5, -100]}"#,
        r#"{"input_ids": [5]}"#,
        r#"{"input_ids": []}"#,
    ] {
        dir.write("rows.jsonl", token_rows(3) + row + "\n");
        let run = dir.trainer("train --model model --data rows.jsonl --output run");
        run.fails(1, &["1 of the rows have no trained token", "rows.jsonl:4"]);
    }
}

#[test]
fn conversations_that_cannot_be_rendered() {
    let dir = Dir::with_chat();
    for (row, parts) in [
        (
            json!({"messages": []}),
            &["messages must be a list of turns", "an empty list"][..],
        ),
        (
            json!({"messages": [{"role": "user", "content": "Hi"}]}),
            &["no assistant turn"],
        ),
        (
            json!({"messages": [{"role": "user"}]}),
            &["messages[0].content", "nothing"],
        ),
        (
            json!({"messages": [{"role": 3, "content": "Hi"}]}),
            &["messages[0].role", "an integer"],
        ),
        (
            json!({"messages": ["Hi"]}),
            &["messages[0] must be an object"],
        ),
        (
            json!({"messages": "Hi"}),
            &["messages must be a list of turns", "a string"],
        ),
        (
            json!({"conversations": [{"from": "nobody", "value": "Hi"}]}),
            &["\"nobody\"", "human"],
        ),
        (
            json!({"prompt": "Hi", "completion": 3}),
            &["completion", "an integer"],
        ),
        (json!({"question": "Hi", "answer": null}), &["answer"]),
    ] {
        refused_row(&dir, &row.to_string(), parts);
    }
}

#[test]
fn a_conversation_needs_a_template() {
    let dir = Dir::with_chat();
    std::fs::remove_file(dir.path("model/chat_template.jinja")).unwrap();
    dir.trainer("eval --model model --data rows.jsonl")
        .succeeds(); // the alpaca form
    let turns: Vec<_> = ["user", "assistant", "user", "assistant"]
        .map(|role| json!({"role": role, "content": "Hi"}))
        .into();
    dir.write("rows.jsonl", json!({ "messages": turns }).to_string());
    refused(
        &dir,
        "rows.jsonl",
        &["rows.jsonl:1", "no chat template", "data.chat_template"],
    );
    let line = "eval --model model --data rows.jsonl --set data.chat_template=";
    dir.trainer(&format!("{line}chatml")).succeeds();
    dir.trainer(&format!("{line}gone.jinja"))
        .fails(2, &["data.chat_template", "gone.jinja", "chatml"]);
    dir.write("bad.jinja", "{% for");
    dir.trainer(&format!("{line}bad.jinja"))
        .fails(1, &["bad.jinja"]);
}

#[test]
fn files_that_hold_no_text_or_no_rows() {
    let dir = Dir::with_tokens();
    dir.write("latin.jsonl", b"{\"text\": \"a\"}\n{\"text\": \"\xe9\"}\n");
    dir.write("latin.json", b"[{\"text\": \"\xe9\"}]");
    dir.write("binary.jsonl", [0u8, 159, 146, 150]);
    dir.write("empty.jsonl", "");
    dir.write("blank.jsonl", "\n  \n");
    dir.write("empty.json", "[]");
    dir.write("open.json", "[{\"input_ids\": [5, 6]}");
    dir.write("table.csv", "a,b\n");
    dir.write("long.csv", "text\na,b\n");
    dir.write("page.parquet", "PAR1");
    dir.write("rows.arrow", "");
    dir.write("folder/notes.txt", "no rows");
    for (data, parts) in [
        ("latin.jsonl", &["latin.jsonl:"][..]),
        ("latin.json", &["latin.json:1 is not UTF-8"]),
        ("binary.jsonl", &["binary.jsonl:1 is not UTF-8", "UTF-8"]),
        ("empty.jsonl", &["empty.jsonl is empty"]),
        ("blank.jsonl", &["blank.jsonl is empty"]),
        ("empty.json", &["empty.json is empty"]),
        ("open.json", &["open.json:1 is not valid JSON"]),
        ("table.csv", &["table.csv is empty"]),
        (
            "long.csv",
            &["long.csv:2: the row has 2 cells", "double quotes"],
        ),
        (
            "page.parquet",
            &["page.parquet cannot be read as Parquet", "again"],
        ),
        ("rows.arrow", &["rows.arrow is not read", "JSONL"]),
        ("*.jsonx", &["no file matches *.jsonx", "pattern"]),
        ("folder", &["the folder folder has no .jsonl"]),
        ("gone.jsonl", &["no data file or folder gone.jsonl"]),
    ] {
        refused(&dir, data, parts);
    }
}

#[test]
fn evaluation_rows_are_checked_before_training_too() {
    let dir = Dir::with_tokens();
    dir.write("eval.jsonl", "{\"input_ids\": [5, 600]}\n");
    let line = "train --model model --data rows.jsonl --eval-data eval.jsonl --output run";
    dir.trainer(line).fails(1, &["eval.jsonl:1", "600"]);
    dir.write("one.jsonl", token_rows(1));
    let line = "train --model model --data one.jsonl --set data.eval_fraction=0.5 --output run";
    dir.trainer(line)
        .fails(2, &["data.eval_fraction = 0.5 of 1 rows"]);
    assert!(!dir.has("run"));
}

#[test]
fn rows_that_are_too_long() {
    let dir = Dir::with_tokens(); // 6 to 10 tokens
    let set = "rows.jsonl --set data.max_length";
    refused(
        &dir,
        &format!("{set}=5"),
        &["all 8 rows are longer than data.max_length = 5"],
    );
    let parts = ["rows.jsonl:2 has 7 tokens", "data.max_length = 6"];
    refused(&dir, &format!("{set}=6 --set data.truncate=error"), &parts);
    let line = format!("train --json --model model --data {set}=8 --output run --max-steps 1");
    let run = dir.trainer(&line).succeeds();
    assert!(
        run.stderr
            .contains("2 of 8 rows are longer than data.max_length"),
        "{run}"
    );
}

#[test]
fn tables_that_only_look_like_some() {
    let dir = Dir::with_chat();
    dir.write("semicolons.csv", "prompt;completion\na;b\n");
    refused(
        &dir,
        "semicolons.csv",
        &["prompt;completion", "by commas (.csv)"],
    );
    dir.write("header.csv", "prompt,completion\n");
    refused(
        &dir,
        "header.csv",
        &["header.csv is empty", "put rows under its header"],
    );
    dir.write(
        "null.jsonl",
        json!({"prompt": "a", "completion": null}).to_string(),
    );
    refused(&dir, "null.jsonl", &["null.jsonl:1", "completion (null)"]);
}
