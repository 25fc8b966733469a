use std::path::Path;

use model::chat::{ChatTemplate, Message, TrainOn};
use model::tokenizer::Tokenizer;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

mod kinds;
mod surprises;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/chat")
}

fn fixture(name: &str) -> Value {
    let file = std::fs::read(fixtures().join(name)).expect("the fixture is there");
    serde_json::from_slice(&file).expect("the fixture parses")
}

fn settings() -> Settings {
    Settings {
        format: Format::Auto,
        max_length: 1024,
        truncate: Truncate::Drop,
        tasks: None,
        skip_untrained: false,
    }
}

/// SmolLM2's template on a small tokenizer of its kind.
fn smollm2() -> Encoder {
    let templates = &fixture("renderings.json")["templates"];
    let source = templates["smollm2"].as_str().expect("it is a string");
    Encoder {
        tokenizer: Tokenizer::from_folder(&fixtures().join("byte_level")).ok(),
        template: ChatTemplate::new("smollm2", source).ok(),
        end_markers: vec!["<|im_end|>".to_owned()],
        vocab_size: 640,
        train_on: TrainOn::Assistant,
        model: PathBuf::from("MODEL"),
    }
}

/// A tokenizer of Llama 2's kind, which adds a BOS, and no template.
fn llama2_base() -> Encoder {
    Encoder {
        tokenizer: Tokenizer::from_folder(&fixtures().join("metaspace")).ok(),
        template: None,
        end_markers: vec!["</s>".to_owned()],
        vocab_size: 520,
        ..smollm2()
    }
}

/// Neither tokenizer nor template.
fn bare() -> Encoder {
    Encoder {
        tokenizer: None,
        template: None,
        ..smollm2()
    }
}

fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().expect("there is a temporary folder");
    for (name, bytes) in files {
        std::fs::write(folder.path().join(name), bytes).expect("the folder can be written to");
    }
    folder
}

fn prepare_file(
    name: &str,
    bytes: &[u8],
    settings: &Settings,
    encoder: &Encoder,
) -> Result<Prepared> {
    let folder = folder(&[(name, bytes)]);
    prepare(&[folder.path().join(name)], settings, encoder)
}

fn prepare_rows(rows: &[Value], settings: &Settings, encoder: &Encoder) -> Result<Prepared> {
    let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
    prepare_file("rows.jsonl", lines.as_bytes(), settings, encoder)
}

fn sample(row: Value, encoder: &Encoder) -> Sample {
    let prepared = prepare_rows(&[row], &settings(), encoder);
    prepared.expect("the row is good").samples.get(0)
}

/// The message of the error, from the file's name on, and of its causes.
#[track_caller]
fn message(found: Result<Prepared>) -> String {
    let error = found.expect_err("this must be refused");
    let mut causes = vec![error.to_string()];
    let mut error: &dyn std::error::Error = &error;
    while let Some(source) = error.source() {
        causes.push(source.to_string());
        error = source;
    }
    let text = causes.join(" < ");
    match text.find("rows.") {
        Some(start) => text[start..].to_owned(),
        None => text,
    }
}

#[track_caller]
fn refused(row: Value, encoder: &Encoder) -> String {
    message(prepare_rows(&[row], &settings(), encoder))
}

/// All text of a sample, and its trained parts.
fn show(sample: &Sample, encoder: &Encoder) -> (String, Vec<String>) {
    let tokenizer = encoder.tokenizer.as_ref().expect("there is a tokenizer");
    let decode = |ids: &[u32]| tokenizer.decode(ids, false).expect("the ids decode");
    assert_eq!(sample.input_ids.len(), sample.labels.len());
    let pairs: Vec<_> = sample.input_ids.iter().zip(&sample.labels).collect();
    let parts = pairs.chunk_by(|a, b| (*a.1 == IGNORED) == (*b.1 == IGNORED));
    let trained = parts.filter(|part| *part[0].1 != IGNORED).map(|part| {
        assert!(part.iter().all(|(id, label)| **id as i32 == **label));
        decode(&part.iter().map(|(id, _)| **id).collect::<Vec<_>>())
    });
    (decode(&sample.input_ids), trained.collect())
}

fn chat(turns: &[(&str, &str)]) -> String {
    let turn = |(role, text): &(&str, &str)| format!("<|im_start|>{role}\n{text}<|im_end|>\n");
    turns.iter().map(turn).collect()
}

const SYSTEM: (&str, &str) = (
    "system",
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face",
);

#[test]
fn labels_are_those_of_the_reference() {
    for row in fixture("rows.json").as_array().expect("it is a list") {
        let found = sample(json!({"messages": row["messages"]}), &smollm2());
        assert_eq!(json!(found.input_ids), row["ids"]);
        let bounds = (row["trained"][0].as_u64(), row["trained"][1].as_u64());
        let (Some(start), Some(end)) = bounds else {
            panic!("the fixture has two bounds");
        };
        for (place, (&id, &label)) in found.input_ids.iter().zip(&found.labels).enumerate() {
            let is_trained = (start..end).contains(&(place as u64));
            assert_eq!(label, if is_trained { id as i32 } else { IGNORED });
        }
        assert_eq!(found.trained_tokens() as u64, end - start);
    }
}

#[test]
fn every_one_turn_format_says_the_same() {
    let encoder = smollm2();
    let text = chat(&[SYSTEM, ("user", "2 + 2?"), ("assistant", "4")]);
    let expected = (text, vec!["4<|im_end|>".to_owned()]);
    let parts = json!([{"type": "text", "text": "2 + "}, {"type": "text", "text": "2?"}]);
    for row in [
        json!({"messages": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}),
        json!({"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "4"}], "text": "x"}),
        json!({"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "id": 7}),
        json!({"conversations": [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]}),
        json!({"instruction": "2 + 2?", "output": "4"}),
        json!({"instruction": "2 + 2?", "input": "", "output": "4"}),
        json!({"instruction": "2 + 2?", "input": null, "output": "4", "messages": null}),
        json!({"prompt": "2 + 2?", "completion": "4"}),
        json!({"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": [{"role": "assistant", "content": "4"}]}),
        json!({"prompt": [{"role": "user", "content": "2 + 2?"}], "completion": "4", "system": "", "tools": []}),
        json!({"question": "2 + 2?", "answer": "4"}),
    ] {
        assert_eq!(
            show(&sample(row.clone(), &encoder), &encoder),
            expected,
            "{row}"
        );
    }
}

#[test]
fn an_alpaca_input_and_a_system_column_are_shown() {
    let encoder = smollm2();
    let row = json!({"instruction": "Add.", "input": "2, 2", "output": "4", "system": "Be brief."});
    let turns = [
        ("system", "Be brief."),
        ("user", "Add.\n\n2, 2"),
        ("assistant", "4"),
    ];
    assert_eq!(show(&sample(row, &encoder), &encoder).0, chat(&turns));
    let row = json!({"system": "No.", "conversations": [
        {"from": "system", "value": "Yes."}, {"from": "observation", "value": "4"}, {"from": "bing", "value": "4"}]});
    let turns = [("system", "Yes."), ("tool", "4"), ("assistant", "4")];
    assert_eq!(show(&sample(row, &encoder), &encoder).0, chat(&turns));
}

fn two_answers() -> Value {
    json!([
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": "A"},
        {"role": "user", "content": "b?"}, {"role": "assistant", "content": "B"},
    ])
}

#[test]
fn train_on_chooses_the_turns() {
    let row = json!({"messages": two_answers()});
    for (train_on, expected) in [
        (
            TrainOn::Assistant,
            vec!["A<|im_end|>".to_owned(), "B<|im_end|>".to_owned()],
        ),
        (TrainOn::Last, vec!["B<|im_end|>".to_owned()]),
        (
            TrainOn::All,
            vec![chat(&[
                SYSTEM,
                ("user", "a?"),
                ("assistant", "A"),
                ("user", "b?"),
                ("assistant", "B"),
            ])],
        ),
    ] {
        let encoder = Encoder {
            train_on,
            ..smollm2()
        };
        assert_eq!(show(&sample(row.clone(), &encoder), &encoder).1, expected);
    }
}

#[test]
fn the_answers_in_a_prompt_are_not_trained() {
    let mut turns = two_answers();
    let turns = turns.as_array_mut().expect("it is a list");
    let completion = turns.split_off(3);
    for system in ["", "Be brief."] {
        let row = json!({"prompt": turns, "completion": completion, "system": system});
        for train_on in [TrainOn::Assistant, TrainOn::Last] {
            let encoder = Encoder {
                train_on,
                ..smollm2()
            };
            assert_eq!(
                show(&sample(row.clone(), &encoder), &encoder).1,
                ["B<|im_end|>"]
            );
        }
    }
    let row = json!({"prompt": turns, "completion": [{"role": "user", "content": "c?"}]});
    assert_eq!(
        refused(row, &smollm2()),
        "rows.jsonl:1: there is no assistant turn to train on, only user"
    );
}

#[test]
fn a_model_without_template_gets_one_turn_in_the_alpaca_form() {
    let mut encoder = llama2_base();
    let row = json!({"prompt": "Two?", "completion": "2"});
    let text = "Below is an instruction that describes a task. Write a response that appropriately completes \
                the request.\n\n### Instruction:\nTwo?\n\n### Response:\n2</s>";
    let found = sample(row.clone(), &encoder);
    assert_eq!(show(&found, &encoder).1, ["2</s>"]);
    let plain = encoder
        .tokenizer
        .as_ref()
        .map(|tokenizer| tokenizer.encode(text, true));
    assert_eq!(
        found.input_ids,
        plain.expect("it is there").expect("it encodes").ids
    );
    assert_eq!(found.input_ids[0], 1, "the tokenizer's BOS is kept");

    // A tokenizer that adds an EOS as well: the template has written one already.
    let model = folder(&[("tokenizer_config.json", br#"{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true, "add_eos_token": true}"#)]);
    std::fs::copy(
        fixtures().join("metaspace/tokenizer.json"),
        model.path().join("tokenizer.json"),
    )
    .expect("it can be copied");
    encoder.tokenizer = Tokenizer::from_folder(model.path()).ok();
    assert_eq!(sample(row, &encoder), found);

    let message = refused(json!({"messages": two_answers()}), &encoder);
    assert!(
        message.starts_with("rows.jsonl:1: the model MODEL has no chat template"),
        "{message}"
    );
    assert!(message.contains("data.chat_template"), "{message}");
    assert!(
        message.ends_with("the turns user, assistant, user, assistant"),
        "{message}"
    );
}

#[test]
fn a_text_is_trained_whole_with_one_bos_and_one_eos() {
    let encoder = llama2_base();
    let found = sample(json!({"text": "one two"}), &encoder);
    assert_eq!((found.input_ids[0], found.input_ids.last()), (1, Some(&2)));
    assert!(
        found
            .input_ids
            .iter()
            .zip(&found.labels)
            .all(|(&id, &label)| id as i32 == label)
    );
    assert_eq!(found.trained_tokens(), found.input_ids.len() - 1);
    let tokenizer = encoder.tokenizer.as_ref().expect("there is one");
    for text in ["<s>one two", "one two</s>", "<s>one two</s>"] {
        let found = sample(json!({"text": text}), &encoder);
        assert_eq!(
            found.input_ids,
            tokenizer.encode_text(text).expect("it encodes")
        );
        let specials = found.input_ids.iter().filter(|id| **id < 3).count();
        assert_eq!(specials, 2, "{text}: {:?}", found.input_ids);
    }
}

#[test]
fn tokens_need_no_tokenizer() {
    let found = sample(json!({"input_ids": [5, 6, 7]}), &bare());
    assert_eq!(
        (found.input_ids, found.labels),
        (vec![5, 6, 7], vec![5, 6, 7])
    );
    let found = sample(
        json!({"input_ids": [5, 6, 7], "labels": [5, -100, 639]}),
        &bare(),
    );
    assert_eq!(found.labels, [5, IGNORED, 639]);
    assert_eq!(found.trained_tokens(), 1);
}

#[test]
fn tokens_that_do_not_fit_are_refused() {
    for (row, expected) in [
        (
            json!({"input_ids": [1, 640]}),
            "rows.jsonl:1: input_ids has the id 640, which is outside of the vocabulary of 640 tokens",
        ),
        (
            json!({"input_ids": [1, -1]}),
            "rows.jsonl:1: input_ids has the id -1, which is outside of the vocabulary of 640 tokens",
        ),
        (
            json!({"input_ids": [1, 9_000_000_000_i64]}),
            "rows.jsonl:1: input_ids has the id 9000000000, which is outside of the vocabulary of 640 tokens",
        ),
        (
            json!({"input_ids": [1, 2], "labels": [-100, -99]}),
            "rows.jsonl:1: labels has the id -99, which is outside of the vocabulary of 640 tokens",
        ),
        (
            json!({"input_ids": [1, 2], "labels": [1]}),
            "rows.jsonl:1: there are 2 input_ids and 1 labels",
        ),
        (
            json!({"input_ids": [1, 2.5]}),
            "rows.jsonl:1: input_ids[1] must be a token id, found a fraction",
        ),
        (
            json!({"input_ids": "1 2"}),
            "rows.jsonl:1: input_ids must be a list of integers, found a string",
        ),
        (
            json!({"input_ids": [1, 2], "labels": {}}),
            "rows.jsonl:1: labels must be a list of integers, found an object",
        ),
    ] {
        assert_eq!(refused(row, &bare()), expected);
    }
    let encoder = Encoder {
        vocab_size: 300,
        ..smollm2()
    };
    let message = refused(json!({"text": "The sales of the store"}), &encoder);
    assert!(
        message.starts_with("rows.jsonl:1: the text has the id "),
        "{message}"
    );
}

#[test]
fn rows_of_the_wrong_shape_are_refused() {
    let turn = |turn: Value| json!({"messages": [{"role": "user", "content": "a?"}, turn]});
    for (row, expected) in [
        (json!([1]), "the row must be an object, found a list"),
        (
            json!({"messages": []}),
            "messages must be a list of turns, found an empty list",
        ),
        (
            json!({"messages": "a?"}),
            "messages must be a list of turns, found a string",
        ),
        (
            turn(json!("a")),
            "messages[1] must be an object, found a string",
        ),
        (
            turn(json!({"content": "a"})),
            "messages[1].role must be a string, found nothing",
        ),
        (
            turn(json!({"role": "assistant"})),
            "messages[1].content must be a string or a list of text parts, found nothing",
        ),
        (
            turn(json!({"role": "assistant", "content": 4})),
            "messages[1].content must be a string or a list of text parts, found an integer",
        ),
        (
            turn(json!({"role": "assistant", "content": [{"type": "image"}]})),
            "messages[1].content[0].text must be a string (only text parts are read), found nothing",
        ),
        (
            turn(json!({"role": "user", "content": "b?"})),
            "there is no assistant turn to train on, only user",
        ),
        (
            json!({"conversations": [{"from": "human"}]}),
            "conversations[0].value must be a string or a list of text parts, found nothing",
        ),
        (
            json!({"conversations": [{"value": "a"}]}),
            "conversations[0].from must be a string, found nothing",
        ),
        (
            json!({"instruction": "a", "input": ["b"], "output": "c"}),
            "input must be a string, found a list",
        ),
        (
            json!({"prompt": 1, "completion": "c"}),
            "prompt must be a string or a list of turns, found an integer",
        ),
        (
            json!({"question": "a", "answer": true}),
            "answer must be a string, found a boolean",
        ),
        (
            json!({"question": "a", "answer": "b", "system": 1.5}),
            "system must be a string, found a fraction",
        ),
        (
            json!({"text": ["a"]}),
            "text must be a string, found a list",
        ),
        (
            json!({"prompt": "a", "chosen": "b", "rejected": "c"}),
            "preference rows (chosen, rejected) are not supported yet",
        ),
        (
            json!({"messages": two_answers(), "tools": [{"name": "f"}, 3]}),
            "tools must be a list of tool definitions, found a list",
        ),
        (
            json!({"messages": two_answers(), "tools": "[{"}),
            "tools is not valid JSON: EOF while parsing an object",
        ),
    ] {
        assert_eq!(
            refused(row, &smollm2()),
            format!("rows.jsonl:1: {expected}")
        );
    }
    let message = refused(
        json!({"conversations": [{"from": "alien", "value": "a"}]}),
        &smollm2(),
    );
    assert!(
        message.starts_with("rows.jsonl:1: conversations[0].from is \"alien\""),
        "{message}"
    );
    let all = Encoder {
        train_on: TrainOn::All,
        ..smollm2()
    };
    sample(turn(json!({"role": "user", "content": "b?"})), &all);
}

#[test]
fn unknown_columns_are_listed_with_the_formats() {
    let rows = [
        json!({"text": "a"}),
        json!({"body": "b", "title": "c", "text": null}),
    ];
    let message = message(prepare_rows(&rows, &settings(), &smollm2()));
    assert_eq!(
        message,
        "rows.jsonl:2: no format fits the columns body, title, text (null); the formats are messages (messages), \
         sharegpt (conversations), alpaca (instruction, output), completion (prompt, completion), \
         qa (question, answer), text (text), tokens (input_ids)"
    );
}

#[test]
fn a_chosen_format_needs_its_columns() {
    for (format, name, column) in [
        (Format::Messages, "messages", "messages"),
        (Format::Sharegpt, "sharegpt", "conversations"),
        (Format::Alpaca, "alpaca", "instruction"),
        (Format::Completion, "completion", "completion"),
        (Format::Qa, "qa", "question"),
        (Format::Text, "text", "text"),
        (Format::Tokens, "tokens", "input_ids"),
    ] {
        let chosen = Settings {
            format,
            ..settings()
        };
        let found = prepare_rows(
            &[json!({"prompt": "a", "output": "b"})],
            &chosen,
            &smollm2(),
        );
        let expected = format!(
            "rows.jsonl:1: a row of the format {name} needs the column {column}, found prompt, output"
        );
        assert_eq!(message(found), expected);
        assert_eq!(serde_json::to_value(format).ok(), Some(json!(name)));
    }
    let chosen = Settings {
        format: Format::Text,
        ..settings()
    };
    let rows = [json!({"messages": 1, "text": "a"})];
    assert_eq!(
        prepare_rows(&rows, &chosen, &smollm2())
            .map(|found| found.rows)
            .ok(),
        Some(1)
    );
    let rows = [json!({"chosen": "a", "rejected": "b"})];
    let message = message(prepare_rows(&rows, &chosen, &smollm2()));
    assert!(message.contains("preference"), "{message}");
}

#[test]
fn text_without_tokenizer_names_the_file_that_lacks() {
    for row in [
        json!({"text": "a"}),
        json!({"question": "a", "answer": "b"}),
    ] {
        let expected = Path::new("MODEL").join("tokenizer.json");
        let expected = format!(
            "rows.jsonl:1: a row of text needs a tokenizer, and there is no {}",
            expected.display()
        );
        assert_eq!(refused(row, &bare()), expected);
    }
}

#[test]
fn what_the_template_refuses_is_told_with_the_row() {
    let mut encoder = smollm2();
    encoder.template = ChatTemplate::builtin("llama2");
    let row = json!({"messages": [{"role": "assistant", "content": "a"}]});
    let message = refused(row, &encoder);
    assert!(
        message.starts_with("rows.jsonl:1 cannot be turned into tokens < chat template llama2"),
        "{message}"
    );
}

#[test]
fn broken_files_are_refused_with_the_line() {
    for (name, bytes, expected) in [
        (
            "rows.jsonl",
            &b""[..],
            "rows.jsonl is empty: it has no rows",
        ),
        (
            "rows.jsonl",
            b"\xef\xbb\xbf \n\n",
            "rows.jsonl is empty: it has no rows",
        ),
        ("rows.json", b"[]", "rows.json is empty: it has no rows"),
        (
            "rows.jsonl",
            b"\n{\"text\": \"a\"}\n\n{\"text\": \n",
            "rows.jsonl:4 is not valid JSON: EOF while parsing a value (column 8)",
        ),
        (
            "rows.jsonl",
            b"{\"text\": \"a\"}{\"text\": \"b\"}",
            "rows.jsonl:1 is not valid JSON: trailing characters (column 14)",
        ),
        (
            "rows.jsonl",
            b"{\"text\": \"a\"}\n{\"text\": \"\xff\"}\n",
            "rows.jsonl:2 is not UTF-8",
        ),
        ("rows.jsonl", b"\xff\xfe{\0}\0", "rows.jsonl:1 is not UTF-8"),
        (
            "rows.jsonl",
            b"[{\"text\": \"a\"}]",
            "rows.jsonl:1: the row must be an object, found a list",
        ),
        (
            "rows.json",
            b"[\n{\"text\": \"a\"},\n{\"text\": \"\xff\"}]",
            "rows.json:3 is not UTF-8",
        ),
        (
            "rows.json",
            b"\n[{\"text\": \"a\"},\n {\"text\" 1}]",
            "rows.json:3 is not valid JSON: expected `:` (column 10)",
        ),
        (
            "rows.json",
            b"[{\"text\": \"a\"}",
            "rows.json:1 is not valid JSON: EOF while parsing a list (column 14)",
        ),
        (
            "rows.json",
            b"[{\"text\": \"a\"}] x",
            "rows.json:1 is not valid JSON: trailing characters (column 17)",
        ),
        (
            "rows.json",
            b"[{\"text\": \"a\"}, 3]",
            "rows.json: element 2: the row must be an object, found an integer",
        ),
        (
            "rows.json",
            b"[{\"text\": \"a\"}, {\"text\": 3}]",
            "rows.json: element 2: text must be a string, found an integer",
        ),
        (
            "rows.arrow",
            b"text",
            "rows.arrow is not read: data files are .jsonl, .json, .csv, .tsv or .parquet",
        ),
    ] {
        assert_eq!(
            message(prepare_file(name, bytes, &settings(), &smollm2())),
            expected
        );
    }
}

#[test]
fn the_first_bad_row_in_file_order_is_told() {
    let file = b"{\"text\": \"a\"}\n{\"text\": 1}\n{\"text\": 2}\nbroken\n";
    let found = message(prepare_file("rows.jsonl", file, &settings(), &smollm2()));
    assert_eq!(
        found,
        "rows.jsonl:2: text must be a string, found an integer"
    );
}

#[test]
fn files_folders_and_several_paths_are_read_in_order() {
    let row = |id: u32| format!("{{\"input_ids\": [{id}, {id}]}}\n");
    let array = format!("\u{feff}[{},\r\n{}]\n", row(3), row(4));
    let folder = folder(&[
        (
            "b.jsonl",
            format!("\u{feff}{}\r\n{}", row(1), row(2)).as_bytes(),
        ),
        ("c.json", array.as_bytes()),
        ("a.json", row(0).as_bytes()),
        ("readme.txt", b"no data"),
        ("none.xlsx", b"no data"),
    ]);
    let ids = |paths: &[PathBuf]| {
        let prepared = prepare(paths, &settings(), &bare()).expect("the rows are good");
        let ids = prepared.samples.iter().map(|sample| sample.input_ids[0]);
        ids.collect::<Vec<_>>()
    };
    let path = folder.path().to_path_buf();
    assert_eq!(ids(std::slice::from_ref(&path)), [0, 1, 2, 3, 4]);
    assert_eq!(
        ids(&[path.join("c.json"), path.clone()]),
        [3, 4, 0, 1, 2, 3, 4]
    );

    let found = message(prepare(&[path.join("d.jsonl")], &settings(), &bare()));
    assert!(
        found.starts_with("there is no data file or folder "),
        "{found}"
    );
    assert!(found.ends_with("d.jsonl"), "{found}");
    let empty = self::folder(&[("readme.txt", b"no data")]);
    let found = message(prepare(&[empty.path().to_path_buf()], &settings(), &bare()));
    assert!(
        found.ends_with(" has no .jsonl, .json, .csv, .tsv or .parquet file"),
        "{found}"
    );
    assert_eq!(
        message(prepare(&[], &settings(), &bare())),
        "no data file is given"
    );
}

#[test]
fn a_folder_is_read_with_its_folders_and_by_its_splits() {
    let folder = tempfile::tempdir().expect("there is a temporary folder");
    let path = folder.path();
    let write = |name: &str, id: u32| {
        let file = path.join(name);
        std::fs::create_dir_all(file.parent().expect("it is in a folder")).expect("it is new");
        let row = format!("{{\"input_ids\": [{id}, {id}]}}\n");
        std::fs::write(file, row).expect("the folder can be written to");
    };
    write("b/c/rows.jsonl", 2);
    write("a.jsonl", 1);
    write(".cache/rows.jsonl", 9);
    write("b/dataset_infos.json", 9);
    #[cfg(unix)]
    std::os::unix::fs::symlink(path, path.join("b/again")).expect("links can be made");
    let ids = |split| {
        let [files, others] = folder_files(path, split).expect("there are files");
        let found = prepare(&files, &settings(), &bare()).expect("the rows are good");
        let ids: Vec<u32> = found.samples.iter().map(|row| row.input_ids[0]).collect();
        (ids, others.len())
    };
    assert_eq!(ids(Split::Train), (vec![1, 2], 0));
    assert_eq!(ids(Split::HeldOut), (vec![1, 2], 0)); // no name tells
    write("data/test-00000.jsonl", 4);
    assert_eq!(ids(Split::Train), (vec![1, 2], 1));
    write("data/train-00000.jsonl", 3);
    write("validation/0.jsonl", 5);
    assert_eq!(ids(Split::Train), (vec![3], 4));
    assert_eq!(ids(Split::HeldOut), (vec![5], 4));
    let found = prepare(&[path.to_path_buf()], &settings(), &bare()).expect("the row is good");
    assert_eq!(found.samples.get(0).input_ids, [3, 3]);
}

#[test]
fn rows_without_a_trained_token_are_refused_or_left_out() {
    let good = json!({"input_ids": [1, 2]});
    let bad = json!({"input_ids": [1, 2], "labels": [1, -100]});
    let skip = Settings {
        skip_untrained: true,
        ..settings()
    };
    let rows = [bad.clone(), good.clone(), bad.clone(), good];
    assert!(prepare_rows(&rows, &settings(), &bare()).is_err());
    let found = prepare_rows(&rows, &skip, &bare()).expect("rows are left");
    assert_eq!(found.samples.row_numbers().collect::<Vec<_>>(), [1, 3]);
    assert_eq!((found.rows, found.labels.untrained.count), (4, 2));
    let repeated = found
        .labels
        .repeated(&found.samples)
        .expect("a row repeats");
    assert_eq!(
        (repeated.count, repeated.row.row, repeated.of.row),
        (1, RowNumber::Line(4), RowNumber::Line(2))
    );
    let found = prepare_rows(&[bad], &skip, &bare());
    assert!(matches!(found, Err(Error::NothingTrained { .. })));
}

#[test]
fn the_order_of_many_rows_is_kept() {
    let rows = 2 * CHUNK_ROWS + 100;
    let rows: Vec<_> = (0..rows)
        .map(|row| json!({"input_ids": [0, row % 640]}))
        .collect();
    let prepared = prepare_rows(&rows, &settings(), &bare()).expect("the rows are good");
    assert_eq!(prepared.rows, rows.len());
    assert_eq!(
        (prepared.trained_tokens, prepared.total_tokens),
        (rows.len() as u64, 2 * rows.len() as u64)
    );
    for (row, sample) in prepared.samples.iter().enumerate() {
        assert_eq!(sample.input_ids[1] as usize, row % 640);
    }
}

#[test]
fn long_rows_are_dropped_cut_or_refused() {
    let rows = [
        json!({"input_ids": [1, 2, 3]}),
        json!({"input_ids": [1, 2, 3, 4]}),
        json!({"input_ids": [1, 2]}),
    ];
    let with = |truncate| Settings {
        max_length: 3,
        truncate,
        ..settings()
    };
    let found = prepare_rows(&rows, &with(Truncate::Drop), &bare()).expect("two rows are left");
    assert_eq!(
        (found.rows, found.dropped_rows, found.samples.len()),
        (3, 1, 2)
    );
    assert_eq!((found.total_tokens, found.trained_tokens), (5, 3));
    let found = prepare_rows(&rows, &with(Truncate::Right), &bare()).expect("all rows are left");
    assert_eq!(
        (found.dropped_rows, found.samples.get(1)),
        (0, found.samples.get(0))
    );
    let found = prepare_rows(&rows, &with(Truncate::Error), &bare());
    assert_eq!(
        message(found),
        "rows.jsonl:2 has 4 tokens, more than data.max_length = 3"
    );
    let found = prepare_rows(&rows[1..2], &with(Truncate::Drop), &bare());
    assert_eq!(
        message(found),
        "the only row is longer than data.max_length = 3 tokens"
    );
}

#[test]
fn rows_without_a_trained_token_are_refused() {
    let rows = [
        json!({"input_ids": [1, 2], "labels": [-100, 2]}),
        json!({"input_ids": [1, 2], "labels": [1, -100]}),
        json!({"input_ids": [], "labels": []}),
        json!({"input_ids": [1, 2, 3], "labels": [1, -100, 3]}),
    ];
    let right = Settings {
        max_length: 2,
        truncate: Truncate::Right,
        ..settings()
    };
    let expected = "3 of the rows have no trained token within data.max_length = 2: ";
    let error = prepare_rows(&rows, &right, &bare()).expect_err("three rows are not trained");
    assert!(error.to_string().starts_with(expected), "{error}");
    assert!(error.to_string().contains("rows.jsonl:2, "), "{error}");
    assert!(error.to_string().ends_with("rows.jsonl:4"), "{error}");
    // An answer that is cut off whole.
    let found = prepare_rows(
        &[json!({"question": "a long question", "answer": "b"})],
        &right,
        &smollm2(),
    );
    assert!(
        matches!(&found, Err(Error::NothingTrained { rows, .. }) if rows.count == 1),
        "{found:?}"
    );
}

#[test]
fn rows_without_end_marker_are_counted() {
    let mut encoder = smollm2();
    let rows = [
        json!({"question": "a", "answer": "b"}),
        json!({"text": "b"}),
        json!({"input_ids": [3, 4]}),
    ];
    let count = |encoder: &Encoder, settings: &Settings| {
        let prepared = prepare_rows(&rows, settings, encoder);
        prepared.expect("the rows are good").rows_without_end_marker
    };
    assert_eq!(count(&encoder, &settings()), 0);
    let full = sample(rows[0].clone(), &encoder).input_ids.len();
    let cut = |max_length| Settings {
        max_length,
        truncate: Truncate::Right,
        ..settings()
    };
    // The last token is the line feed after the marker.
    assert_eq!(count(&encoder, &cut(full - 1)), 0);
    assert_eq!(count(&encoder, &cut(full - 2)), 1);
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}";
    encoder.template = ChatTemplate::new("plain", source).ok();
    assert_eq!(count(&encoder, &settings()), 1);
    encoder.end_markers = vec!["<|endoftext|>".to_owned()];
    assert_eq!(count(&encoder, &settings()), 2);
}

#[test]
fn a_turn_that_only_calls_a_tool_has_no_text() {
    let call = json!([{"function": {"name": "add", "arguments": {"x": 1}}}]);
    let row = json!({"messages": [
        {"role": "user", "content": "a?"}, {"role": "assistant", "content": null, "tool_calls": call}]});
    let place = Place {
        path: Path::new("rows.jsonl").into(),
        row: RowNumber::Line(1),
    };
    let Value::Object(columns) = row else {
        panic!("it is an object");
    };
    let content =
        rows::read_content(&read::Row { place, columns }, Format::Auto).expect("the row is good");
    let mut assistant = Message::new("assistant", "");
    assistant.content = Value::Null;
    assistant.extra.insert("tool_calls".to_owned(), call);
    let turns = vec![Message::new("user", "a?"), assistant];
    let prompt_turns = 0;
    assert_eq!(
        content,
        rows::Content::Conversation {
            turns,
            prompt_turns,
            tools: Vec::new()
        }
    );
}

#[test]
fn labels_are_looked_at_while_rows_are_read() {
    let rows = [
        json!({"question": "a", "answer": "b"}),
        json!({"question": "a", "answer": "b"}),
        json!({"question": "a", "answer": "a much longer answer than the others"}),
    ];
    let prepared = prepare_rows(&rows, &settings(), &smollm2()).expect("the rows are good");
    let labels = &prepared.labels;
    let spread = labels.spread().expect("there are rows");
    assert_eq!((spread.min, spread.median), (2, 2)); // the answer and its end
    assert_eq!(
        spread.max as usize,
        prepared.samples.get(2).trained_tokens()
    );
    let line = |place: &Place| place.row;
    let repeated = labels
        .repeated(&prepared.samples)
        .expect("the second row is the first");
    assert_eq!(repeated.count, 1);
    assert_eq!(
        (line(&repeated.row), line(&repeated.of)),
        (RowNumber::Line(2), RowNumber::Line(1))
    );
    let part = |rows: &[usize]| prepared.samples.select(rows.iter().copied()).unwrap();
    let (train, eval) = (part(&[0]), part(&[1, 2]));
    let shared = labels
        .shared(&train, labels, &eval)
        .expect("a row is on both sides");
    assert_eq!((shared.count, line(&shared.row)), (1, RowNumber::Line(2)));
    assert_eq!(labels.shared(&train, labels, &part(&[2])), None);
    let smollm2 = smollm2();
    let tokenizer = smollm2.tokenizer.as_ref().expect("there is a tokenizer");
    let end = tokenizer.token_to_id("<|im_end|>").expect("it is a token");
    assert_eq!(labels.ends.iter().collect::<Vec<_>>(), [(&end, &3)]);
    for found in [
        &labels.cut,
        &labels.endless,
        &labels.double_bos,
        &labels.alpaca,
    ] {
        assert_eq!(found.count, 0);
    }
    // an answer that is cut, and one that is left out
    let short = |truncate| Settings {
        max_length: prepared.samples.get(0).input_ids.len(),
        truncate,
        ..settings()
    };
    let cut = prepare_rows(&rows, &short(Truncate::Right), &smollm2).expect("the rows are good");
    assert_eq!(cut.labels.cut.count, 1);
    assert!(cut.labels.cut.to_string().ends_with("rows.jsonl:3"));
    let left_out = prepare_rows(&rows, &short(Truncate::Drop), &smollm2).expect("two are left");
    assert_eq!(
        left_out.labels.dropped.first,
        cut.labels
            .cut
            .first
            .iter()
            .map(|place| Place {
                path: left_out.labels.dropped.first[0].path.clone(),
                row: place.row,
            })
            .collect::<Vec<_>>()
    );
    assert_eq!(left_out.labels.cut.count, 0);
    // the alpaca form and two BOS tokens
    let alpaca = prepare_rows(&rows[..1], &settings(), &llama2_base()).expect("the row is good");
    assert_eq!(alpaca.labels.alpaca.count, 1);
    let bos = json!({"input_ids": [1, 1, 5]});
    let twice = prepare_rows(&[bos], &settings(), &llama2_base()).expect("the row is good");
    assert_eq!(twice.labels.double_bos.count, 1);
}

#[test]
fn a_sample_is_shown_as_text_with_its_trained_parts() {
    let encoder = smollm2();
    let row = json!({"question": "Wie geht's?", "answer": "Gut, größer 🦀!"});
    let sample = sample(row, &encoder);
    let shown = check::show(&sample, encoder.tokenizer.as_ref()).expect("it decodes");
    let (text, parts) = show(&sample, &encoder);
    assert_eq!(shown.text, text);
    let trained = shown
        .trained
        .iter()
        .map(|range| shown.text[range.clone()].to_owned());
    assert_eq!(trained.collect::<Vec<_>>(), parts);
    let ids = Sample {
        task: 0,
        input_ids: vec![7, 8, 90],
        labels: vec![7, IGNORED, 90],
    };
    let shown = check::show(&ids, None).expect("there is nothing to decode");
    assert_eq!(shown.text, "7 8 90");
    assert_eq!(shown.trained.first(), Some(&(3..6)));
}

#[test]
fn markers_that_are_no_tokens_are_found() {
    let encoder = smollm2();
    let tokenizer = encoder.tokenizer.as_ref().expect("there is a tokenizer");
    let find = |text: &str| check::unknown_markers(text, tokenizer);
    assert_eq!(find("<|im_start|>user\na <| b |> <|im_end|>"), [""; 0]);
    assert_eq!(
        find("<|user|>\n<|user|> <|turn_2|> <|"),
        ["<|user|>", "<|turn_2|>"]
    );
}

#[test]
fn many_places_are_told_by_the_first_few() {
    let rows = vec![json!({"input_ids": [1, 2], "labels": [1, -100]}); 9];
    let told = message(prepare_rows(&rows, &settings(), &bare()));
    assert!(told.starts_with("rows.jsonl:1, "), "{told}");
    assert!(told.ends_with("rows.jsonl:3 and 6 more"), "{told}");
}
