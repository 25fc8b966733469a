//! What templates show and what of it is trained, beside what transformers shows and trains.

use std::path::PathBuf;

use super::*;
use crate::tokenizer::{Encoding, Tokenizer};

type Anything = std::result::Result<(), Box<dyn std::error::Error>>;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/chat")
}

#[derive(Deserialize)]
struct Fixture {
    templates: BTreeMap<String, String>,
    conversations: BTreeMap<String, Vec<Message>>,
    renderings: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    template: String,
    special_tokens: SpecialTokens,
    conversation: String,
    add_generation_prompt: bool,
    text: Option<String>,
}

fn fixture() -> Fixture {
    let file = std::fs::read(fixtures().join("renderings.json")).expect("the fixture is there");
    serde_json::from_slice(&file).expect("the fixture parses")
}

fn template(name: &str) -> ChatTemplate {
    ChatTemplate::new(name, &*fixture().templates[name]).expect("the fixture's template parses")
}

fn two_turns() -> Vec<Message> {
    vec![
        Message::new("user", "q1"),
        Message::new("assistant", "a1"),
        Message::new("user", "q2"),
        Message::new("assistant", "a2"),
    ]
}

fn tokens(bos: &str, eos: &str) -> SpecialTokens {
    let pairs = [("bos_token", bos), ("eos_token", eos)];
    pairs
        .map(|(key, token)| (key.to_owned(), token.to_owned()))
        .into()
}

fn trained(source: &str, messages: &[Message], end_marker: &str) -> Result<Vec<String>> {
    let tokens = tokens("<s>", end_marker);
    let template = ChatTemplate::new("test", source)?;
    let markers = [end_marker.to_owned()];
    let rendered =
        template.render_trained(messages.into(), 0, TrainOn::Assistant, &tokens, &markers)?;
    Ok(rendered
        .trained
        .iter()
        .map(|range| rendered.text[range.clone()].to_owned())
        .collect())
}

#[test]
fn renderings_are_those_of_transformers() {
    let fixture = fixture();
    for case in &fixture.renderings {
        let template = template(&case.template);
        let messages = &fixture.conversations[&case.conversation];
        let found = template.render(messages, case.add_generation_prompt, &case.special_tokens);
        let place = format!("{} {}", case.template, case.conversation);
        match &case.text {
            Some(text) => assert_eq!(&found.expect(&place), text, "{place}"),
            None => assert!(found.is_err(), "{place}: {found:?}"),
        }
    }
}

#[derive(Deserialize)]
struct FamilyFixture {
    special_tokens: SpecialTokens,
    rows: BTreeMap<String, FamilyRow>,
    cases: Vec<FamilyCase>,
}

#[derive(Deserialize)]
struct FamilyRow {
    messages: Vec<Message>,
    #[serde(default)]
    tools: Vec<Value>,
}

#[derive(Deserialize)]
struct FamilyCase {
    template: String,
    row: String,
    add_generation_prompt: bool,
    text: Option<String>,
    error: Option<String>,
    /// The tokens, and which of them are the assistant's.
    #[serde(default)]
    ids: Vec<u32>,
    #[serde(default)]
    trained: Vec<u32>,
}

/// Templates with tools, system turns and generation blocks, in the forms of many families.
#[test]
fn families_render_and_train_as_in_transformers() -> Anything {
    let folder = fixtures().join("../templates");
    let file = std::fs::read(folder.join("cases.json"))?;
    let fixture: FamilyFixture = serde_json::from_slice(&file)?;
    let tokenizer = Tokenizer::from_folder(&fixtures().join("byte_level"))?;
    let tokens = &fixture.special_tokens;
    let (mut wrong, mut masks) = (Vec::new(), 0);
    for case in &fixture.cases {
        let template = ChatTemplate::from_file(&folder.join(format!("{}.jinja", case.template)))?;
        let row = &fixture.rows[&case.row];
        let conversation = Conversation {
            turns: &row.messages,
            tools: &row.tools,
        };
        let place = format!("{} {}", case.template, case.row);
        match (
            template.render(conversation, case.add_generation_prompt, tokens),
            &case.text,
        ) {
            (Ok(found), Some(text)) if found == *text => {}
            (Err(Error::Template { source, .. }), None)
                if case
                    .error
                    .as_ref()
                    .is_some_and(|error| source.to_string().contains(error)) => {}
            (found, expected) => wrong.push(format!("{place}\n{found:?}\n{expected:?}")),
        }
        if case.ids.is_empty() || case.add_generation_prompt {
            continue;
        }
        let markers = ["<|im_end|>".to_owned()];
        let found =
            template.render_trained(conversation, 0, TrainOn::Assistant, tokens, &markers)?;
        let encoding = tokenizer.encode(&found.text, false)?;
        let mask = trained_tokens(&encoding, &found.trained);
        let expected: Vec<bool> = case.trained.iter().map(|trained| *trained == 1).collect();
        if encoding.ids != case.ids || mask != expected {
            wrong.push(format!("{place}: mask\n{mask:?}\n{expected:?}"));
        }
        masks += 1;
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
    assert!(masks >= 20, "{masks}");
    Ok(())
}

#[test]
fn built_in_templates_are_those_the_models_ship() {
    let fixture = fixture();
    let mut compared = 0;
    for case in &fixture.renderings {
        let Some(template) = ChatTemplate::builtin(&case.template) else {
            continue;
        };
        let messages = &fixture.conversations[&case.conversation];
        let Some(text) = &case.text else { continue };
        if case.conversation == "parts" {
            continue; // The models print the list itself.
        }
        let found = template.render(messages, case.add_generation_prompt, &case.special_tokens);
        assert_eq!(
            &found.expect("it renders"),
            text,
            "{} {}",
            case.template,
            case.conversation
        );
        compared += 1;
    }
    assert!(compared > 30, "{compared}");
}

#[test]
fn alpaca_is_the_plain_form() -> Anything {
    let alpaca = ChatTemplate::builtin("alpaca").ok_or("alpaca is built in")?;
    let tokens = tokens("<s>", "</s>");
    let intro = "Below is an instruction that describes a task. Write a response that \
                 appropriately completes the request.\n\n";
    let turns = "### Instruction:\nq1\n\n### Response:\na1</s>\n\n\
                 ### Instruction:\nq2\n\n### Response:\n";
    let mut messages = two_turns();
    assert_eq!(
        alpaca.render(&messages, false, &tokens)?,
        format!("{intro}{turns}a2</s>")
    );
    assert_eq!(
        alpaca.render(&messages[..3], true, &tokens)?,
        format!("{intro}{turns}")
    );
    messages.insert(0, Message::new("system", "Be kind."));
    assert_eq!(
        alpaca.render(&messages, false, &tokens)?,
        format!("Be kind.\n\n{turns}a2</s>")
    );
    Ok(())
}

#[test]
fn every_built_in_template_parses_and_reads_parts() -> Anything {
    let parts = serde_json::json!({"role": "user", "content": [{"type": "text", "text": "q1"}]});
    let mut messages = two_turns();
    messages[0] = serde_json::from_value(parts)?;
    for name in ChatTemplate::BUILTIN {
        let template = ChatTemplate::builtin(name).ok_or(name)?;
        let plain = template.render(&two_turns(), true, &tokens("<s>", "</s>"))?;
        assert_eq!(
            template.render(&messages, true, &tokens("<s>", "</s>"))?,
            plain
        );
    }
    assert_eq!(ChatTemplate::builtin("nonsense"), None);
    Ok(())
}

/// The labels are those of a Python program that splits the tokens at the generation prompt.
#[test]
fn mask_is_the_one_of_the_reference() -> Anything {
    #[derive(Deserialize)]
    struct Row {
        messages: Vec<Message>,
        ids: Vec<u32>,
        trained: [usize; 2],
    }
    let rows: Vec<Row> = serde_json::from_slice(&std::fs::read(fixtures().join("rows.json"))?)?;
    let tokenizer = Tokenizer::from_folder(&fixtures().join("byte_level"))?;
    let template = template("smollm2");
    for row in rows {
        let markers = ["<|im_end|>".to_owned()];
        let tokens = tokenizer.special_tokens();
        let found = template.render_trained(
            (&row.messages).into(),
            0,
            TrainOn::Assistant,
            tokens,
            &markers,
        )?;
        let encoding = tokenizer.encode(&found.text, false)?;
        let mask = trained_tokens(&encoding, &found.trained);
        let expected = (0..row.ids.len()).map(|i| (row.trained[0]..row.trained[1]).contains(&i));
        assert_eq!(encoding.ids, row.ids);
        assert_eq!(mask, expected.collect::<Vec<_>>());
        assert!(found.ends_with_marker);
    }
    Ok(())
}

/// The blank before an answer and the answer are one token here.
#[test]
fn tokens_that_reach_into_a_turn_are_trained() -> Anything {
    let tokenizer = Tokenizer::from_folder(&fixtures().join("metaspace"))?;
    let template = ChatTemplate::builtin("llama2").ok_or("llama2 is built in")?;
    let messages = [
        Message::new("user", "How many?"),
        Message::new("assistant", "the 24é "),
    ];
    let markers = ["</s>".to_owned()];
    let tokens = tokenizer.special_tokens();
    let found =
        template.render_trained((&messages).into(), 0, TrainOn::Assistant, tokens, &markers)?;
    let encoding = tokenizer.encode(&found.text, false)?;
    let mask = trained_tokens(&encoding, &found.trained);
    let ids = encoding
        .ids
        .iter()
        .zip(&mask)
        .filter(|(_, trained)| **trained);
    let ids = ids.map(|(id, _)| *id).collect::<Vec<_>>();
    assert_eq!(tokenizer.decode(&ids, false)?, "the 24é </s>");
    assert_eq!(mask.last(), Some(&true));
    Ok(())
}

#[test]
fn a_token_without_text_is_trained_inside_of_a_range() {
    let encoding = Encoding {
        ids: vec![0; 5],
        spans: vec![0..0, 0..2, 2..2, 2..4, 4..4],
    };
    let ranges = std::iter::once(2..4).collect::<Vec<_>>();
    assert_eq!(
        trained_tokens(&encoding, &ranges),
        [false, false, true, true, false]
    );
}

#[test]
fn every_turn_is_trained_with_its_marker_and_without_what_follows() -> Anything {
    for (name, tokens, expected) in [
        (
            "chatml",
            tokens("", "<|im_end|>"),
            ["a1<|im_end|>", "a2<|im_end|>"],
        ),
        ("llama2", tokens("<s>", "</s>"), ["a1 </s>", "a2 </s>"]),
        (
            "llama3",
            tokens("<|begin_of_text|>", "<|eot_id|>"),
            ["a1<|eot_id|>", "a2<|eot_id|>"],
        ),
        ("alpaca", tokens("<s>", "</s>"), ["a1</s>", "a2</s>"]),
    ] {
        let template = ChatTemplate::builtin(name).ok_or(name)?;
        let markers = [tokens["eos_token"].clone(), String::new()];
        for (train_on, expected) in [
            (TrainOn::Assistant, &expected[..]),
            (TrainOn::Last, &expected[1..]),
        ] {
            let found =
                template.render_trained((&two_turns()).into(), 0, train_on, &tokens, &markers)?;
            let parts = found.trained.iter().map(|range| &found.text[range.clone()]);
            assert_eq!(parts.collect::<Vec<_>>(), expected, "{name}");
            assert!(found.ends_with_marker, "{name}");
        }
        let all =
            template.render_trained((&two_turns()).into(), 0, TrainOn::All, &tokens, &markers)?;
        assert_eq!(
            all.trained,
            std::iter::once(0..all.text.len()).collect::<Vec<_>>()
        );
        assert!(all.ends_with_marker, "{name}");
    }
    Ok(())
}

#[test]
fn a_turn_without_marker_is_trained_and_reported() -> Anything {
    let template = ChatTemplate::new(
        "test",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    )?;
    let markers = ["</s>".to_owned()];
    let tokens = SpecialTokens::new();
    let found = template.render_trained(
        (&two_turns()).into(),
        0,
        TrainOn::Assistant,
        &tokens,
        &markers,
    )?;
    assert_eq!(found.text, "q1\na1\nq2\na2\n");
    assert_eq!(found.trained, [3..5, 9..11]);
    assert!(!found.ends_with_marker);
    Ok(())
}

#[test]
fn trimmed_and_shortened_contents_are_found() -> Anything {
    let loop_over =
        |shown: &str| format!("{{% for m in messages %}}[{{{{ {shown} }}}}]</s>\n{{% endfor %}}");
    let messages = [
        Message::new("user", "]"),
        Message::new("assistant", " ]x</think> ]\n"),
    ];
    let cases = [
        ("m.content", " ]x</think> ]\n"),
        ("m.content | trim", "]x</think> ]"),
        ("m.content.split('</think>')[-1].strip()", "]"),
    ];
    for (shown, expected) in cases {
        let found = trained(&loop_over(shown), &messages, "]</s>")?;
        assert_eq!(found, [format!("{expected}]</s>")], "{shown}");
    }
    Ok(())
}

#[test]
fn a_turn_that_cannot_be_found_for_certain_is_an_error() {
    let messages = [
        Message::new("user", "yes"),
        Message::new("assistant", "yes"),
    ];
    for shown in [
        "nothing",                                                    // The content is hidden,
        "{{ m.content }}{{ m.content }}",                             // twice there,
        "{{ 'Right' if m.content == 'yes' else m.content }}",         // replaced,
        "{{ m.content }}{% if 'y' in m.content %} indeed{% endif %}", // added to,
        "{% if 'y' in m.content %}(+){% endif %}{{ m.content }}", // or changes its surroundings.
        "{% if 'y' in m.content %}(+){% else %}(-){% endif %}{{ m.content }}",
        "{{ m.content if m.content != 'yes' }}",
    ] {
        let source = format!("{{% for m in messages %}}{shown}</s>{{% endfor %}}");
        let found = trained(&source, &messages, "</s>");
        assert!(
            matches!(found, Err(Error::TurnNotRendered { turn: 2, .. })),
            "{shown}: {found:?}"
        );
    }
}

#[test]
fn turns_that_call_tools_are_trained_whole() -> Anything {
    let fixture = fixture();
    let messages = &fixture.conversations["tools"];
    let found = trained(&fixture.templates["llama3.1"], messages, "<|eot_id|>")?;
    let call = r#"{"name": "add", "parameters": {"y": 2, "x": [1.5, "é<"]}}<|eot_id|>"#;
    assert_eq!(found, [call, "4.<|eot_id|>"]);
    let found = trained(&fixture.templates["qwen2.5"], messages, "<|im_end|>")?;
    assert!(
        found[0].starts_with("<tool_call>\n{\"name\": \"add\""),
        "{found:?}"
    );
    assert!(found[0].ends_with("}\n</tool_call><|im_end|>"), "{found:?}");
    Ok(())
}

#[test]
fn a_call_is_found_where_tools_are_shown_in_front_of_the_last_question() -> Anything {
    let template = fixtures().join("../templates/mistral_tools.jinja");
    let template = ChatTemplate::from_file(&template)?;
    let tools = [serde_json::json!({"type": "function", "function": {"name": "add"}})];
    let call = serde_json::json!({"role": "assistant", "tool_calls": [
        {"type": "function", "id": "abcdefgh1", "function": {"name": "add", "arguments": {}}},
    ]});
    let result = serde_json::json!({"role": "tool", "content": "4", "tool_call_id": "abcdefgh1"});
    let turns = [
        Message::new("user", "2 + 2?"),
        serde_json::from_value(call)?,
        serde_json::from_value(result)?,
        Message::new("assistant", "4."),
        Message::new("user", "Sure?"),
        Message::new("assistant", "Yes."),
    ];
    let conversation = Conversation {
        turns: &turns,
        tools: &tools,
    };
    let markers = ["</s>".to_owned()];
    let tokens = tokens("<s>", "</s>");
    let found = template.render_trained(conversation, 0, TrainOn::Assistant, &tokens, &markers)?;
    let found: Vec<_> = found
        .trained
        .iter()
        .map(|range| &found.text[range.clone()])
        .collect();
    let call = r#"[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "abcdefgh1"}]</s>"#;
    assert_eq!(found, [call, "4.</s>", "Yes.</s>"]);
    Ok(())
}

#[test]
fn text_methods_are_those_of_python() -> Anything {
    for (source, expected) in [
        ("{{ '\x1c a\x1f' | trim }}", "a"),
        (
            "{{ ' xax' | trim('x ') }}|{{ 5 | trim }}|{{ missing | trim }}",
            "a|5|",
        ),
        (
            "{{ '\x1d a ' .strip() }}|{{ ' a'.lstrip() }}|{{ 'a\x1e'.rstrip() }}",
            "a|a|a",
        ),
        ("{{ 'xa'.lstrip('x') }}|{{ ' a '.strip(none) }}", "a|a"),
        (
            "{{ 'a\r\nb\x0b\u{2028}c\n'.splitlines() }}",
            "['a', 'b', '', 'c']",
        ),
        ("{{ \"they're BACK\".title() }}", "They'Re Back"),
    ] {
        let template = ChatTemplate::new("test", source)?;
        let found = template.render(&two_turns(), false, &tokens("", ""))?;
        assert_eq!(found, expected, "{source}");
    }
    let messages = [
        Message::new("user", "a"),
        Message::new("assistant", "\u{1c}\n"),
    ];
    let trimming = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}";
    assert_eq!(trained(trimming, &messages, "</s>")?, ["</s>"]);
    Ok(())
}

#[test]
fn reasoning_that_is_shown_is_trained() -> Anything {
    let reasoned = serde_json::json!({"role": "assistant", "content": "4", "reasoning": "Hm."});
    let messages = [
        Message::new("user", "2 + 2?"),
        serde_json::from_value(reasoned)?,
    ];
    let fixture = fixture();
    let found = trained(&fixture.templates["qwen3"], &messages, "<|im_end|>")?;
    assert_eq!(found, ["<think>\nHm.\n</think>\n\n4<|im_end|>"]);
    let found = trained(&fixture.templates["chatml"], &messages, "<|im_end|>")?;
    assert_eq!(found, ["4<|im_end|>"]);
    Ok(())
}

#[test]
fn an_empty_turn_and_a_list_of_parts_are_found() -> Anything {
    let fixture = fixture();
    let chatml = &fixture.templates["chatml"];
    let found = trained(chatml, &fixture.conversations["empty_answer"], "<|im_end|>")?;
    assert_eq!(found, ["<|im_end|>"]);
    let source =
        "{% for m in messages %}{{ m.content | map(attribute='text') | join }}</s>{% endfor %}";
    let mut messages = fixture.conversations["parts"].clone();
    messages[1].content = messages[0].content.clone();
    assert_eq!(trained(source, &messages, "</s>")?, ["One two</s>"]);
    Ok(())
}

#[test]
fn generation_blocks_say_what_is_trained() -> Anything {
    let source = "{% for m in messages %}<{{ m.role }}>\n{%- if m.role == 'assistant' %}\n\
                  {%- generation -%}\n {{ m.content }}</s>\n{%- endgeneration %}\n{% else %}\n\
                  {{ m.content }}{% endif %}{% endfor %}";
    let template = ChatTemplate::new("test", source)?;
    let markers = ["</s>".to_owned()];
    let tokens = SpecialTokens::new();
    let turns = two_turns();
    for (train_on, prompt_turns, expected) in [
        (TrainOn::Assistant, 0, &["a1</s>", "a2</s>"][..]),
        (TrainOn::Assistant, 2, &["a2</s>"]),
        (TrainOn::Last, 0, &["a2</s>"]),
        (TrainOn::Assistant, 4, &[]),
    ] {
        let found =
            template.render_trained((&turns).into(), prompt_turns, train_on, &tokens, &markers)?;
        assert_eq!(found.text, template.render(&turns, false, &tokens)?);
        let parts = found.trained.iter().map(|range| &found.text[range.clone()]);
        assert_eq!(parts.collect::<Vec<_>>(), expected);
    }
    Ok(())
}

#[test]
fn a_refusal_is_told_in_the_template_s_words() {
    let messages = [Message::new("user", "a"), Message::new("user", "b")];
    let found = template("llama2").render(&messages, false, &tokens("<s>", "</s>"));
    let message = found.expect_err("the roles do not alternate").to_string();
    assert!(message.contains("chat template llama2: "), "{message}");
    assert!(
        message.contains("Conversation roles must alternate"),
        "{message}"
    );
}

#[test]
fn the_template_of_a_folder_is_found_in_any_of_its_places() -> Anything {
    let folder = tempfile::tempdir()?;
    let found = || ChatTemplate::from_folder(folder.path()).map(|found| found.map(|t| t.source));
    let write = |file: &str, text: &str| std::fs::write(folder.path().join(file), text);
    assert_eq!(found()?, None);
    write("chat_template.json", r#"{"chat_template": "one"}"#)?;
    assert_eq!(found()?.as_deref(), Some("one"));
    write("tokenizer_config.json", r#"{"chat_template": null}"#)?;
    assert_eq!(found()?.as_deref(), Some("one"));
    let list = r#"[{"name": "rag", "template": "no"}, {"name": "default", "template": "two"}]"#;
    write(
        "tokenizer_config.json",
        &format!(r#"{{"chat_template": {list}}}"#),
    )?;
    assert_eq!(found()?.as_deref(), Some("two"));
    write("tokenizer_config.json", r#"{"chat_template": "three"}"#)?;
    assert_eq!(found()?.as_deref(), Some("three"));
    write("tokenizer_config.json", r#"{"chat_template": 3}"#)?;
    assert!(matches!(found(), Err(Error::Json { .. })));
    write("chat_template.jinja", "four {% if %}")?;
    assert!(matches!(found(), Err(Error::Template { .. })));
    write("chat_template.jinja", "four")?;
    assert_eq!(found()?.as_deref(), Some("four"));
    Ok(())
}

#[test]
fn conversations_with_tools_get_the_template_for_tools() -> Anything {
    let folder = tempfile::tempdir()?;
    let write = |name: &str, content: &str| std::fs::write(folder.path().join(name), content);
    let list = r#"[{"name": "tool_use", "template": "{{ tools | length }}</s>"},
        {"name": "default", "template": "plain"}]"#;
    let config = format!(r#"{{"chat_template": {list}}}"#);
    let tools = [serde_json::json!({"name": "add"})];
    let check = |folder: &Path| {
        let found = ChatTemplate::from_folder(folder)?.expect("there is one");
        let render = |tools| {
            let turns = &two_turns();
            found.render(Conversation { turns, tools }, false, &tokens("", ""))
        };
        assert_eq!((&*render(&[])?, &*render(&tools)?), ("plain", "1</s>"));
        Ok::<_, Error>(found)
    };
    write("tokenizer_config.json", &config)?;
    let saved = tempfile::tempdir()?;
    check(folder.path())?.save(saved.path())?;
    check(saved.path())?;
    write(
        "tokenizer_config.json",
        &config.replace("{{ tools", "{% if"),
    )?;
    let found = ChatTemplate::from_folder(folder.path());
    assert!(matches!(found, Err(Error::Template { .. })), "{found:?}");
    Ok(())
}

#[test]
fn a_message_keeps_its_other_keys_in_order() -> Anything {
    let row =
        r#"{"role":"tool","content":[{"type":"text","text":"x"}],"name":"f","a":{"z":1,"b":null}}"#;
    let message: Message = serde_json::from_str(row)?;
    assert_eq!(message.text().as_deref(), Some("x"));
    assert_eq!(serde_json::to_string(&message)?, row);
    let silent: Message = serde_json::from_str(r#"{"role":"assistant"}"#)?;
    assert_eq!(silent.text(), None);
    Ok(())
}

#[derive(Deserialize)]
struct TurnCase {
    template: String,
    messages: Vec<Message>,
    text: String,
    trained: Vec<Range<usize>>,
}

/// Under templates put together at random: text and tool calls in any order, with and without
/// separators, markers and generation prompts.
#[test]
fn turns_are_found_where_generation_blocks_would_be() -> Anything {
    let file = std::fs::read(fixtures().join("../turns/cases.json"))?;
    let cases: Vec<TurnCase> = serde_json::from_slice(&file)?;
    let (tokens, markers) = (tokens("<s>", "</s>"), ["</s>".to_owned()]);
    let mut wrong = Vec::new();
    for case in &cases {
        let template = ChatTemplate::new("turns", &*case.template)?;
        let turns = (&case.messages).into();
        let found = template.render_trained(turns, 0, TrainOn::Assistant, &tokens, &markers);
        let shown = found.map(|found| {
            assert_eq!(found.text, case.text, "{}", case.template);
            let some = found.trained.into_iter().filter(|range| !range.is_empty());
            some.collect::<Vec<_>>()
        });
        if !matches!(&shown, Ok(shown) if *shown == case.trained) {
            let parts = |ranges: &[Range<usize>]| {
                let all = ranges.iter().map(|range| &case.text[range.clone()]);
                format!("{:?}", all.collect::<Vec<_>>())
            };
            let shown = shown.map(|shown| parts(&shown));
            let expected = parts(&case.trained);
            wrong.push(format!(
                "{}\n{:?}\n{shown:?}\n{expected}",
                case.template, case.text
            ));
        }
    }
    let count = wrong.len();
    wrong.truncate(12);
    assert!(
        count == 0,
        "{count} of {}\n{}",
        cases.len(),
        wrong.join("\n\n")
    );
    Ok(())
}
