//! Rows that few data sets have, and that every one may have.

use super::*;

fn turns(turns: &[(&str, Value)]) -> Value {
    let turn = |(role, content): &(&str, Value)| json!({"role": role, "content": content});
    json!({"messages": turns.iter().map(turn).collect::<Vec<_>>()})
}

#[test]
fn one_row_of_two_tokens_is_enough_and_one_token_is_not() {
    let found = sample(json!({"input_ids": [7, 8]}), &bare());
    assert_eq!(found.trained_tokens(), 1);
    let found = refused(json!({"input_ids": [7]}), &bare());
    assert!(
        found.contains("rows.jsonl:1") || found.contains("no trained token"),
        "{found}"
    );
}

#[test]
fn rows_of_just_the_longest_length_are_whole() {
    for truncate in [Truncate::Drop, Truncate::Right, Truncate::Error] {
        let settings = Settings {
            max_length: 3,
            truncate,
            ..settings()
        };
        let found = prepare_rows(&[json!({"input_ids": [1, 2, 3]})], &settings, &bare());
        let found = found.expect("it fits");
        assert_eq!((found.total_tokens, found.dropped_rows), (3, 0));
    }
}

#[test]
fn unusual_text_comes_through_whole() {
    let encoder = smollm2();
    for text in [
        "👩‍👩‍👧 e\u{301} \u{200b}",
        "‏שלום مرحبا",
        "\u{0}\u{1}\u{7f}",
        "\u{feff}x\u{fffd}\u{10ffff}",
        "a\r\nb\rc\u{2028}d\u{85}",
        &"x".repeat(5000),
        " leading and trailing ",
        "ﬁ İ ß ǅ",
        "\u{f8e0}\u{f8e1}\u{f8e2}",
    ] {
        let row = turns(&[("user", json!(text)), ("assistant", json!(text))]);
        let settings = Settings {
            max_length: 100_000,
            ..settings()
        };
        let found = prepare_rows(&[row], &settings, &encoder)
            .expect(text)
            .samples
            .get(0);
        let expected = chat(&[SYSTEM, ("user", text), ("assistant", text)]);
        let trained = vec![format!("{text}<|im_end|>")];
        assert_eq!(show(&found, &encoder), (expected, trained));
    }
}

#[test]
fn lone_surrogates_are_refused_and_pairs_are_read() {
    let encoder = smollm2();
    let file = br#"{"question": "a", "answer": "\ud83d\ude00\u0000"}"#;
    let found = prepare_file("rows.jsonl", file, &settings(), &encoder).expect("it is a pair");
    assert_eq!(show(&found.samples.get(0), &encoder).1, ["😀\0<|im_end|>"]);
    let file = br#"{"question": "a", "answer": "\ud83d"}"#;
    let found = message(prepare_file("rows.jsonl", file, &settings(), &encoder));
    assert!(
        found.starts_with("rows.jsonl:1 is not valid JSON: "),
        "{found}"
    );
}

#[test]
fn the_last_of_two_equal_keys_counts() {
    let file = br#"{"input_ids": [1, 2], "input_ids": [3, 4]}"#;
    let found = prepare_file("rows.jsonl", file, &settings(), &bare()).expect("it is good");
    assert_eq!(found.samples.get(0).input_ids, [3, 4]);
}

#[test]
fn an_empty_answer_trains_its_end_marker() {
    let encoder = smollm2();
    for empty in [json!(""), json!([]), json!([{"type": "text", "text": ""}])] {
        let row = turns(&[("user", json!("a?")), ("assistant", empty)]);
        assert_eq!(show(&sample(row, &encoder), &encoder).1, ["<|im_end|>"]);
    }
}

#[test]
fn turns_that_nobody_answers_are_shown_and_not_trained() {
    let encoder = smollm2();
    let row = turns(&[
        ("user", json!("a?")),
        ("assistant", json!("A")),
        ("user", json!("b?")),
    ]);
    let (text, trained) = show(&sample(row, &encoder), &encoder);
    assert!(text.ends_with("<|im_start|>user\nb?<|im_end|>\n"), "{text}");
    assert_eq!(trained, ["A<|im_end|>"]);
    for role in ["system", "user", "tool"] {
        let row = turns(&[(role, json!("Be brief."))]);
        let found = refused(row, &encoder);
        let expected = format!("there is no assistant turn to train on, only {role}");
        assert_eq!(found, format!("rows.jsonl:1: {expected}"));
    }
}

#[test]
fn a_role_that_the_template_shows_is_no_error() {
    let encoder = smollm2();
    let row = turns(&[("critic", json!("Hm.")), ("assistant", json!("A"))]);
    let (text, trained) = show(&sample(row, &encoder), &encoder);
    assert!(text.contains("<|im_start|>critic\nHm.<|im_end|>"), "{text}");
    assert_eq!(trained, ["A<|im_end|>"]);
}

#[test]
fn a_template_that_refuses_a_row_names_it_and_says_why() {
    let encoder = Encoder {
        template: ChatTemplate::builtin("llama2"),
        ..smollm2()
    };
    let good = turns(&[("user", json!("a?")), ("assistant", json!("A"))]);
    let bad = turns(&[
        ("user", json!("a?")),
        ("user", json!("b?")),
        ("assistant", json!("A")),
    ]);
    let found = message(prepare_rows(&[good, bad], &settings(), &encoder));
    assert!(
        found.starts_with("rows.jsonl:2 cannot be turned into tokens < "),
        "{found}"
    );
    assert!(found.contains("must alternate: user, assistant"), "{found}");
}

#[test]
fn tools_are_shown_by_the_template() {
    let template = fixtures().join("../templates/qwen_generation.jinja");
    let encoder = Encoder {
        template: ChatTemplate::from_file(&template).ok(),
        ..smollm2()
    };
    let tools = json!([{"type": "function", "function": {"name": "add", "parameters": {}}}]);
    for tools in [tools.clone(), json!(tools.to_string())] {
        let mut row = turns(&[("user", json!("a?")), ("assistant", json!("A"))]);
        row["tools"] = tools;
        let (text, trained) = show(&sample(row.clone(), &encoder), &encoder);
        let shown = "<tools>\n{\"type\": \"function\", \"function\": {\"name\": \"add\", \"parameters\": {}}}\n</tools>";
        assert!(text.contains(shown), "{text}");
        assert_eq!(trained, ["A<|im_end|>"]);
        let found = refused(row, &llama2_base());
        assert!(
            found.ends_with("the turns tools, user, assistant"),
            "{found}"
        );
    }
}

#[test]
fn tools_that_the_template_hides_are_told() {
    let call = json!({"function": {"name": "add", "arguments": {}}});
    let calls = json!({"messages": [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]});
    let mut tools = turns(&[("user", json!("a?")), ("assistant", json!("A"))]);
    let plain = tools.clone();
    tools["tools"] = json!([call]);
    let rows = [calls, tools, plain];
    let hidden = |encoder: &Encoder| {
        let found = prepare_rows(&rows, &settings(), encoder).expect("the rows are good");
        found.labels.hidden_tools.count
    };
    assert_eq!(hidden(&smollm2()), 2);
    let template = fixtures().join("../templates/qwen_generation.jinja");
    let showing = Encoder {
        template: ChatTemplate::from_file(&template).ok(),
        ..smollm2()
    };
    assert_eq!(hidden(&showing), 0);
}

#[test]
fn samples_too_many_for_the_memory_are_the_same() {
    // More words than are kept in memory; long rows, so that it is quick.
    let ids: Vec<u32> = (0..30_000).map(|id| id % 640).collect();
    let row = json!({ "input_ids": ids }).to_string() + "\n";
    let settings = Settings {
        max_length: 30_000,
        ..settings()
    };
    let found = prepare_file("rows.jsonl", row.repeat(300).as_bytes(), &settings, &bare());
    let found = found.expect("the rows are good");
    assert_eq!((found.samples.len(), found.total_tokens), (300, 9_000_000));
    assert!(found.samples.is_on_disk());
    assert!(found.samples.iter().all(|sample| sample.input_ids == ids));
}
