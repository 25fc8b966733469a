//! Tables, Parquet, patterns: the same rows in every kind of file.

use super::*;

fn parquet() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/parquet")
}

/// A tokenizer with a template that knows tools.
fn with_tools() -> Encoder {
    let template = fixtures().join("../templates/qwen_generation.jinja");
    Encoder {
        template: ChatTemplate::from_file(&template).ok(),
        ..smollm2()
    }
}

fn read(path: PathBuf, encoder: &Encoder) -> Vec<Sample> {
    let prepared = prepare(&[path], &settings(), encoder).expect("the rows are good");
    prepared.samples.iter().collect()
}

#[test]
fn parquet_rows_are_those_of_the_same_jsonl() {
    let encoder = with_tools();
    let found = read(parquet().join("chats.parquet"), &encoder);
    assert_eq!(found, read(parquet().join("chats.jsonl"), &encoder));
    assert_eq!(found.len(), 2);
    let call = "<tool_call>\n{\"name\": \"add\", \"arguments\": {\"x\": 1, \"y\": 2.5}}\n</tool_call><|im_end|>";
    assert_eq!(show(&found[1], &encoder).1, [call, "<|im_end|>"]);
    let expected = read(parquet().join("tokens_none.jsonl"), &bare());
    for codec in ["none", "gzip", "zstd", "brotli", "lz4"] {
        let found = read(parquet().join(format!("tokens_{codec}.parquet")), &bare());
        assert_eq!(found, expected, "{codec}");
    }
}

#[test]
fn a_bad_parquet_row_is_told_by_its_number() {
    let settings = Settings {
        format: Format::Text,
        ..settings()
    };
    let found = prepare(&[parquet().join("tokens_none.parquet")], &settings, &bare());
    let found = found.expect_err("there is no text").to_string();
    let expected = "tokens_none.parquet: row 1: a row of the format text needs the column text";
    assert!(found.contains(expected), "{found}");
    let encoder = Encoder {
        vocab_size: 30,
        ..bare()
    };
    let found = prepare(
        &[parquet().join("tokens_none.parquet")],
        &super::settings(),
        &encoder,
    );
    let found = found.expect_err("an id is too large").to_string();
    assert!(
        found.contains("tokens_none.parquet: row 26: input_ids has the id 30"),
        "{found}"
    );
}

/// Whatever is cut off or changed, there is an error or there are rows, but no panic.
#[test]
fn damaged_parquet_files_are_refused() {
    let whole = std::fs::read(parquet().join("tokens_zstd.parquet")).expect("it is there");
    let refused = |bytes: &[u8]| {
        let found = prepare_file("rows.parquet", bytes, &settings(), &bare());
        message(found)
    };
    for bytes in [
        &whole[..whole.len() - 1],
        &whole[..100],
        b"PAR1",
        b"no parquet at all",
    ] {
        assert!(refused(bytes).starts_with("rows.parquet cannot be read as Parquet < "));
    }
    let mut page = whole;
    page[4..60].fill(0xff);
    assert!(refused(&page).starts_with("rows.parquet cannot be read as Parquet < "));
    // the crate that reads them panics at some of these
    let whole = std::fs::read(parquet().join("tokens_lz4.parquet")).expect("it is there");
    for place in 1500..whole.len() - 8 {
        let mut damaged = whole.clone();
        damaged[place] = 0xff;
        let _ = prepare_file("rows.parquet", &damaged, &settings(), &bare());
    }
}

#[test]
fn cells_hold_text_or_the_json_of_lists() {
    let encoder = smollm2();
    let text = chat(&[SYSTEM, ("user", "2, \"2\"\n?"), ("assistant", "4")]);
    let expected = (text, vec!["4<|im_end|>".to_owned()]);
    let turns =
        r#"[{"role": "user", "content": "2, \"2\"\n?"}, {"role": "assistant", "content": "4"}]"#;
    let quoted = turns.replace('"', "\"\"");
    for (name, table) in [
        (
            "rows.csv",
            "question,answer\r\n\"2, \"\"2\"\"\n?\",4\r\n".to_owned(),
        ),
        (
            "rows.csv",
            "\u{feff}answer,question,other\n4,\"2, \"\"2\"\"\n?\",\n".to_owned(),
        ),
        (
            "rows.CSV",
            "instruction,input,output\n\"2, \"\"2\"\"\n?\",,4".to_owned(),
        ),
        (
            "rows.tsv",
            "prompt\tcompletion\n\"2, \"\"2\"\"\n?\"\t4\n".to_owned(),
        ),
        ("rows.csv", format!("id,messages\n7,\"{quoted}\"\n")),
        (
            "rows.csv",
            format!("messages,text\n\"{quoted}\",not this\n"),
        ),
        (
            "rows.csv",
            format!("messages,text,tools\n\"{quoted}\",not this,[]\n"),
        ),
    ] {
        let found = prepare_file(name, table.as_bytes(), &settings(), &encoder);
        let found = found.expect(&table);
        assert_eq!(show(&found.samples.get(0), &encoder), expected, "{table}");
        assert_eq!(found.rows, 1);
    }
    let table = b"input_ids,labels\n\"[1, 2, 3]\",\"[-100, 2, 3]\"\n\"[4, 5]\",\n";
    let found = prepare_file("rows.csv", table, &settings(), &bare()).expect("it is good");
    let labels: Vec<_> = found.samples.iter().map(|sample| sample.labels).collect();
    assert_eq!(labels, [vec![IGNORED, 2, 3], vec![4, 5]]);
}

#[test]
fn an_empty_cell_is_an_empty_answer() {
    let encoder = smollm2();
    let found = prepare_file("rows.csv", b"question,answer\na,\n", &settings(), &encoder);
    let found = found.expect("it is good").samples.get(0);
    assert_eq!(show(&found, &encoder).1, ["<|im_end|>"]);
}

#[test]
fn bad_tables_are_told_with_line_and_column() {
    for (table, expected) in [
        (
            &b"text\na\n\"b\nb\"\nc,d\n"[..],
            "rows.csv:5: the row has 2 cells, and the header has 1",
        ),
        (
            b"text,label\na\n",
            "rows.csv:2: the row has 1 cells, and the header has 2",
        ),
        (
            b"text,text\na,b\n",
            "rows.csv:1: two columns are called \"text\"",
        ),
        (b"text\na\n\xff\n", "rows.csv:3 is not UTF-8"),
        (b"text\n", "rows.csv is empty: it has no rows"),
        (b"", "rows.csv is empty: it has no rows"),
        (
            b"messages\n[{]\n",
            "rows.csv:2: messages is not valid JSON: key must be a string",
        ),
        (
            b"messages\nhello\n",
            "rows.csv:2: messages is not valid JSON: expected value",
        ),
        (
            b"messages\n4\n",
            "rows.csv:2: messages must be a list of turns, found an integer",
        ),
    ] {
        let found = message(prepare_file("rows.csv", table, &settings(), &smollm2()));
        assert_eq!(found, expected);
    }
    let table = b"instruction;output\na;b\n";
    let found = message(prepare_file("rows.csv", table, &settings(), &smollm2()));
    assert!(found.starts_with("rows.csv:2: no format fits the columns instruction;output"));
}

#[test]
fn patterns_and_folders_of_mixed_kinds_are_read_in_order() {
    let folder = folder(&[
        ("1.csv", b"input_ids\n\"[1, 1]\"\n"),
        ("2.jsonl", b"{\"input_ids\": [2, 2]}\n"),
        ("4.tsv", b"input_ids\n[4, 4]\n"),
        ("5.ndjson", b"{\"input_ids\": [5, 5]}\n"),
        ("notes.txt", b"no rows"),
    ]);
    let from = parquet().join("tokens_none.parquet");
    std::fs::copy(from, folder.path().join("3.parquet")).expect("it can be copied");
    let ids = |name: &str| {
        let samples = read(folder.path().join(name), &bare());
        let mut ids: Vec<_> = samples.iter().map(|sample| sample.input_ids[0]).collect();
        ids.retain(|id| *id > 0 && *id < 6);
        ids
    };
    assert_eq!(ids("*.*sv"), [1, 4]);
    assert_eq!(ids("[25].*json*"), [2, 5]);
    assert_eq!(ids("3.par?uet"), [1, 2, 3, 4, 5]);
    assert_eq!(ids(""), [1, 2, 1, 2, 3, 4, 5, 4, 5]);
    let refused = |name: &str| message(prepare(&[folder.path().join(name)], &settings(), &bare()));
    assert!(refused("*.json").starts_with("no file matches "));
    assert!(refused("[.json").contains("it is no pattern either"));
    assert!(refused("6.jsonl").starts_with("there is no data file or folder "));
    // A name with the characters of a pattern is a name when there is such a file.
    std::fs::write(folder.path().join("[x].jsonl"), "{\"input_ids\": [3, 3]}").expect("it can");
    assert_eq!(ids("[x].jsonl"), [3]);
}

#[test]
fn rows_say_which_task_they_are_of() {
    let encoder = smollm2();
    let several = |tasks| Settings {
        tasks: Some(tasks),
        ..settings()
    };
    let tasks = |name: &str, text: &str, settings: &Settings| {
        let prepared = prepare_file(name, text.as_bytes(), settings, &encoder);
        let tasks = prepared.map(|prepared| prepared.samples.iter().map(|row| row.task).collect());
        tasks.map_err(|error| error.to_string())
    };
    let rows = "{\"text\": \"a b\", \"task_id\": 2}\n{\"text\": \"c d\", \"task_id\": 0}\n";
    assert_eq!(tasks("rows.jsonl", rows, &several(3)), Ok(vec![2, 0]));
    assert_eq!(tasks("rows.jsonl", rows, &settings()), Ok(vec![0, 0]));
    let table = "text,task_id\na b,1\nc d,2\n";
    assert_eq!(tasks("rows.csv", table, &several(3)), Ok(vec![1, 2]));
    let none = "{\"text\": \"a b\"}\n";
    assert_eq!(tasks("rows.jsonl", none, &several(1)), Ok(vec![0]));
    for (row, tasks_, found) in [
        ("{\"text\": \"a b\"}", 2, "found nothing"),
        ("{\"text\": \"a b\", \"task_id\": 2}", 2, "found 2"),
        ("{\"text\": \"a b\", \"task_id\": -1}", 2, "found -1"),
        ("{\"text\": \"a b\", \"task_id\": \"x\"}", 2, "found \"x\""),
        ("{\"text\": \"a b\", \"task_id\": 0.5}", 2, "found 0.5"),
    ] {
        let told = tasks("rows.jsonl", row, &several(tasks_)).unwrap_err();
        assert!(
            told.contains("rows.jsonl:1: task_id") && told.ends_with(found),
            "{told}"
        );
        assert!(told.contains("num_tasks = 2"), "{told}");
    }
}
