//! Model folders that lie, are cut off, or describe what cannot be.

use serde_json::{Value, json};

use crate::support::Dir;

/// Everything that loads the model fails alike, and training leaves nothing behind.
#[track_caller]
fn refused(dir: &Dir, parts: &[&str]) {
    dir.trainer("eval --model model --data rows.jsonl")
        .fails(1, parts);
    dir.trainer("generate --model model --prompt-ids 5 --json")
        .fails(1, parts);
    dir.trainer("train --model model --data rows.jsonl --output run")
        .fails(1, parts);
    assert!(!dir.has("run"));
}

fn weights(dir: &Dir) -> Vec<u8> {
    std::fs::read(dir.path("model/model.safetensors")).unwrap()
}

/// The model with another header, whose length is told truly, before the same data.
fn with_header(weights: &[u8], change: impl FnOnce(&mut Value)) -> Vec<u8> {
    let length = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize;
    let mut header: Value = serde_json::from_slice(&weights[8..8 + length]).unwrap();
    change(&mut header);
    let header = header.to_string().into_bytes();
    [
        &(header.len() as u64).to_le_bytes(),
        &header[..],
        &weights[8 + length..],
    ]
    .concat()
}

const NORM: &str = "model.norm.weight"; // 32 numbers

#[test]
fn weights_that_are_cut_off() {
    let dir = Dir::with_tokens();
    let whole = weights(&dir);
    for length in [0, 4, 8, 100, whole.len() / 2, whole.len() - 1] {
        dir.write("model/model.safetensors", &whole[..length]);
        let parts = ["model/model.safetensors", "get the weights again"];
        dir.trainer("eval --model model --data rows.jsonl")
            .fails(1, &parts);
    }
    refused(&dir, &["model/model.safetensors is damaged"]);
}

#[test]
fn a_header_with_a_huge_length() {
    let dir = Dir::with_tokens();
    for length in [u64::MAX, 1 << 62, 1 << 40, 99_000_000] {
        let mut bytes = weights(&dir);
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        dir.write("model/model.safetensors", bytes);
        dir.trainer("eval --model model --data rows.jsonl")
            .fails(1, &["model.safetensors is damaged"]);
    }
    refused(&dir, &["model/model.safetensors is damaged"]);
}

#[test]
fn a_header_with_wrong_offsets_types_or_shapes() {
    let dir = Dir::with_tokens();
    let good = weights(&dir);
    for (key, value) in [
        ("data_offsets", json!([0, 1u64 << 50])),
        ("data_offsets", json!([128, 0])),
        ("data_offsets", json!([u64::MAX, u64::MAX])),
        ("data_offsets", json!([-4, 124])),
        ("dtype", json!("F64")),
        ("dtype", json!("I32")),
        ("dtype", json!("Q7")),
        ("shape", json!([33])),
        ("shape", json!([u64::MAX, 2])),
        ("shape", json!([-32])),
        ("shape", json!("32")),
    ] {
        dir.write(
            "model/model.safetensors",
            with_header(&good, |header| header[NORM][key] = value),
        );
        dir.trainer("eval --model model --data rows.jsonl")
            .fails(1, &["model/model.safetensors"]);
    }
    dir.write(
        "model/model.safetensors",
        with_header(&good, |header| header[NORM]["dtype"] = json!("I32")),
    );
    refused(&dir, &["model/model.safetensors", NORM, "I32"]);
    // the same bytes under another shape
    let reshaped = with_header(&good, |header| header[NORM]["shape"] = json!([8, 4]));
    dir.write("model/model.safetensors", reshaped);
    refused(&dir, &["model.norm.weight is [8, 4], expected [32]"]);
}

#[test]
fn tensors_missing_and_left_over_are_listed_together() {
    let dir = Dir::with_tokens();
    let renamed = with_header(&weights(&dir), |header| {
        let header = header.as_object_mut().unwrap();
        let norm = header.remove(NORM).unwrap();
        header.insert("model.norm.wait".into(), norm);
    });
    dir.write("model/model.safetensors", renamed);
    refused(
        &dir,
        &[
            "model.norm.weight is missing",
            "model.norm.wait is unexpected",
        ],
    );
}

#[test]
fn the_weights_of_another_model() {
    let dir = Dir::with_tokens();
    dir.edit_json("model/config.json", |config| {
        config["intermediate_size"] = json!(64)
    });
    refused(
        &dir,
        &[
            "mlp.up_proj.weight is [56, 32], expected [64, 32]",
            "mlp.down_proj",
        ],
    );
}

#[test]
fn shards_and_index() {
    let dir = Dir::with_tokens();
    std::fs::remove_dir_all(dir.path("model")).unwrap();
    dir.add_model("sharded_bf16", "model");
    dir.trainer("eval --model model --data rows.jsonl")
        .succeeds();
    let index = dir.read("model/model.safetensors.index.json");
    for (text, part) in [
        ("{", "is not valid"),
        ("[]", "no weight_map"),
        (r#"{"weight_map": {"a": 3}}"#, "a file name is not a string"),
        (
            r#"{"weight_map": {"a": "../x.safetensors"}}"#,
            "outside of the folder",
        ),
    ] {
        dir.write("model/model.safetensors.index.json", text);
        refused(&dir, &["model/model.safetensors.index.json", part]);
    }
    dir.write("model/model.safetensors.index.json", index);
    let shard = "model/model-00003-of-00005.safetensors";
    std::fs::remove_file(dir.path(shard)).unwrap();
    refused(
        &dir,
        &[shard, "cannot open", "incomplete: get that file again"],
    );
}

#[test]
fn folders_that_lack_something() {
    let dir = Dir::with_tokens();
    std::fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    refused(&dir, &["model has no model.safetensors"]);
    dir.write("model/pytorch_model.bin", "PK");
    refused(&dir, &["only pytorch_model.bin", "safetensors weights"]);
    dir.write(
        "model/model.safetensors",
        "version https://git-lfs.github.com/spec/v1\n",
    );
    refused(&dir, &["model/model.safetensors", "git lfs pull"]);
    std::fs::remove_file(dir.path("model/config.json")).unwrap();
    refused(&dir, &["model has no config.json"]);
    std::fs::remove_dir_all(dir.path("model")).unwrap();
    refused(&dir, &["model"]);
    dir.write("model", "a file");
    refused(&dir, &["model is neither a folder nor a Hub id"]);
}

#[test]
fn configs_that_cannot_be() {
    let dir = Dir::with_tokens();
    let good = dir.json("model/config.json");
    for (key, value, parts) in [
        (
            "num_attention_heads",
            json!(0),
            &["num_attention_heads is 0"][..],
        ),
        (
            "num_attention_heads",
            json!(-4),
            &["num_attention_heads is -4"],
        ),
        (
            "num_key_value_heads",
            json!(0),
            &["num_key_value_heads is 0"],
        ),
        (
            "num_key_value_heads",
            json!(3),
            &["num_attention_heads (4)", "num_key_value_heads (3)"],
        ),
        ("hidden_size", json!(0), &["hidden_size is 0"]),
        (
            "hidden_size",
            json!(u64::MAX),
            &["hidden_size is 18446744073709551615"],
        ),
        ("hidden_size", json!("32"), &["hidden_size is \"32\""]),
        ("hidden_size", json!(1e30), &["hidden_size is 1e+30"]),
        ("head_dim", json!(7), &["head_dim (7) is odd"]),
        (
            "num_hidden_layers",
            json!(1_000_000_000_000u64),
            &["num_hidden_layers is 1000000000000"],
        ),
        (
            "num_hidden_layers",
            json!(2.5),
            &["num_hidden_layers is 2.5"],
        ),
        ("vocab_size", Value::Null, &["vocab_size is missing"]),
        (
            "vocab_size",
            json!(1u64 << 40),
            &["vocab_size is 1099511627776"],
        ),
        ("rms_norm_eps", json!(-1), &["rms_norm_eps is -1"]),
        (
            "tie_word_embeddings",
            json!("no"),
            &["tie_word_embeddings is \"no\""],
        ),
        (
            "rope_parameters",
            json!({"rope_type": "spiral"}),
            &["rope_type is \"spiral\"", "yarn"],
        ),
        (
            "rope_parameters",
            json!({"rope_type": "linear"}),
            &["rope_parameters.factor is missing"],
        ),
        ("rope_parameters", json!([]), &["rope_parameters is []"]),
        (
            "architectures",
            json!(["GPT2LMHeadModel"]),
            &["GPT2LMHeadModel", "LlamaForCausalLM"],
        ),
        ("hidden_act", json!("gelu"), &["hidden_act is \"gelu\""]),
        ("eos_token_id", json!(96), &["eos_token_id is 96"]),
    ] {
        let mut config = good.clone();
        config[key] = value;
        dir.write("model/config.json", config.to_string());
        let line = "train --model model --data rows.jsonl --output run";
        dir.trainer(line)
            .fails(1, &[&["model/config.json"], parts].concat());
        dir.trainer("plan --model model --data rows.jsonl")
            .fails(1, parts);
    }
    for (text, part) in [
        ("{", "is not valid"),
        ("[]", "expected a JSON object"),
        ("\u{feff}", "not valid"),
    ] {
        dir.write("model/config.json", text);
        refused(&dir, &["model/config.json", part]);
    }
    assert!(!dir.has("run"));
}

#[test]
fn several_problems_of_a_config_are_told_at_once() {
    let dir = Dir::with_tokens();
    dir.edit_json("model/config.json", |config| {
        config["hidden_size"] = json!(-1);
        config["vocab_size"] = json!("many");
        config["rope_parameters"] = json!({"rope_type": "spiral"});
    });
    refused(
        &dir,
        &["hidden_size is -1", "vocab_size is \"many\"", "spiral"],
    );
}

/// Each number is possible by itself, and together they are more than any machine has.
#[test]
fn a_model_that_cannot_fit_is_refused_before_it_is_made() {
    let dir = Dir::with_tokens();
    dir.edit_json("model/config.json", |config| {
        config["hidden_size"] = json!(1 << 20);
        config["vocab_size"] = json!(1 << 24);
        config["num_hidden_layers"] = json!(4096);
        config["intermediate_size"] = json!(1 << 22);
    });
    let line = "--model model --data rows.jsonl --output run --method full --set model.init=random";
    dir.trainer(&format!("train {line}"))
        .fails(1, &["GiB of memory", "smaller model"]);
    assert!(!dir.has("run"));
    // counting costs nothing
    let plan = dir.trainer(&format!("plan --json {line}")).succeeds();
    assert!(plan.json()["all_params"].as_u64() > Some(1 << 55), "{plan}");
    dir.edit_json("model/config.json", |config| {
        config["num_attention_heads"] = json!(1 << 16);
        config["head_dim"] = json!(1 << 16);
        config["num_key_value_heads"] = json!(1);
    });
    dir.trainer(&format!("train {line}"))
        .fails(1, &["num_attention_heads (65536) × head_dim"]);
}

#[test]
fn a_tokenizer_or_template_that_does_not_load() {
    let dir = Dir::with_chat();
    let line = "generate --model model --prompt Hi --chat";
    dir.write("model/chat_template.jinja", "{% for");
    dir.trainer(line).fails(1, &["model/chat_template.jinja"]);
    dir.write("model/chat_template.jinja", "{{ raise_exception('no') }}");
    dir.trainer(line).fails(1, &["chat_template.jinja", "no"]);
    dir.trainer("eval --model model --data rows.jsonl")
        .fails(1, &["rows.jsonl:1", "chat_template.jinja"]);
    std::fs::remove_file(dir.path("model/chat_template.jinja")).unwrap();
    dir.trainer(line).succeeds(); // the plain alpaca form, as in training
    dir.trainer(&format!("{line} --chat-template nothing"))
        .fails(2, &["\"nothing\"", "chatml"]);
    dir.write("model/tokenizer_config.json", "{");
    dir.trainer(line).fails(1, &["model/tokenizer_config.json"]);
    dir.write("model/tokenizer_config.json", "{}");
    dir.write("model/tokenizer.json", "{}");
    dir.trainer(line).fails(
        1,
        &[
            "model/tokenizer.json is not a tokenizer",
            "get tokenizer.json again",
        ],
    );
}

#[test]
fn weights_that_are_no_numbers_give_no_result() {
    let dir = Dir::with_tokens();
    let mut bytes = weights(&dir);
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let at = 8 + length + header[NORM]["data_offsets"][0].as_u64().unwrap() as usize;
    bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
    dir.write("model/model.safetensors", bytes);
    let check = "check the weights";
    dir.trainer("eval --model model --data rows.jsonl --per-token out.jsonl")
        .fails(1, &["not a finite number", check]);
    assert!(!dir.has("out.jsonl"));
    dir.trainer("generate --model model --prompt-ids 5 --json")
        .fails(1, &["not a number", check]);
    dir.trainer("train --model model --data rows.jsonl --output run")
        .fails(1, &["step 1 is not a finite number"]);
    assert!(!dir.has("run/adapter"));
}
