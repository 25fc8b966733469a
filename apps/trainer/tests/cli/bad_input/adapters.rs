use serde_json::{Value, json};

use crate::support::Dir;

#[track_caller]
fn refused(dir: &Dir, parts: &[&str]) {
    let with = "--model model --adapter run/adapter";
    dir.trainer(&format!("eval {with} --data rows.jsonl"))
        .fails(1, parts);
    dir.trainer(&format!("generate {with} --prompt-ids 5 --json"))
        .fails(1, parts);
    let line =
        "train --model model --data rows.jsonl --output two --set adapter.init_from=run/adapter";
    dir.trainer(line).fails(1, parts);
    assert!(!dir.has("two"));
}

#[test]
fn the_adapter_of_another_model() {
    let dir = Dir::with_adapter();
    std::fs::remove_dir_all(dir.path("model")).unwrap();
    dir.add_model("wide_head", "model"); // other shapes
    refused(
        &dir,
        &[
            "run/adapter/adapter_model.safetensors is not an adapter of this model:\n",
            "q_proj.lora_B.weight is",
            "use the base model",
        ],
    );
    dir.edit_json("model/config.json", |config| {
        config["num_hidden_layers"] = json!(20);
        config["hidden_size"] = json!(64);
    });
    let sizes =
        "it is of a model with 2 layers (this one: 20) and a hidden size of 32 (this one: 64)";
    let plan = "plan --model model --data rows.jsonl --set adapter.init_from=run/adapter";
    let plan = dir.trainer(plan);
    plan.fails(1, &[sizes, "q_proj.lora_A.weight is", " others\nhelp: "]);
    assert!(plan.stderr.lines().count() < 15, "{plan}");
    dir.edit_json("model/config.json", |config| {
        config["num_hidden_layers"] = json!(2);
        config["hidden_size"] = json!(32);
    });
    dir.edit_json("run/adapter/adapter_config.json", |config| {
        config["target_modules"] = json!(["c_attn"]);
    });
    refused(
        &dir,
        &["run/adapter/adapter_config.json", "matches no layer"],
    );
}

/// Its template would read the rows, and what that makes of them is not what is wrong.
#[test]
fn the_adapter_of_another_model_is_told_before_rows_and_prompts() {
    let dir = Dir::with_chat();
    let line = "train -q --model model --data rows.jsonl --output run --max-steps 1";
    dir.trainer(line).succeeds();
    let wordy = "so ".repeat(2000) + &dir.read("model/chat_template.jinja");
    dir.write("run/adapter/chat_template.jinja", wordy);
    dir.edit_json("model/config.json", |config| {
        config["hidden_size"] = json!(32)
    });
    let with = "--model model --adapter run/adapter";
    let init = "--model model --output two --set adapter.init_from=run/adapter";
    for line in [
        &format!("eval {with} --data rows.jsonl"),
        &format!("chat {with}"),
        &format!("train {init} --data rows.jsonl"),
        &format!("plan {init} --data rows.jsonl"),
    ] {
        let told = dir.trainer(line);
        told.fails(
            1,
            &[
                "not an adapter of this model",
                "a hidden size of 16 (this one: 32)",
            ],
        );
        assert!(!told.stderr.contains("warning"), "{told}");
    }
}

#[test]
fn rank_or_targets_that_differ_from_the_tensors() {
    let dir = Dir::with_adapter();
    let file = "run/adapter/adapter_config.json";
    let good = dir.json(file);
    let write = |key: &str, value: Value| {
        let mut config = good.clone();
        config[key] = value;
        dir.write(file, config.to_string());
    };
    write("r", json!(8));
    refused(&dir, &["q_proj.lora_A.weight is [4, 32], expected [8, 32]"]);
    write("target_modules", json!(["q_proj"]));
    refused(
        &dir,
        &[
            "k_proj.lora_A.weight is unexpected",
            "up_proj.lora_B.weight is unexpected",
        ],
    );
    write("target_modules", json!(["q_proj", "lm_head"]));
    refused(&dir, &["lm_head.lora_A.weight is missing"]);
    for rank in [json!(0), json!(1_000_000_000_000u64), json!(u64::MAX)] {
        write("r", rank);
        refused(&dir, &["adapter_config.json", "r must be from 1 to 65536"]);
    }
}

#[test]
fn settings_that_are_not_supported() {
    let dir = Dir::with_adapter();
    let file = "run/adapter/adapter_config.json";
    let good = dir.json(file);
    for (key, value, part) in [
        ("peft_type", json!("OFT"), "peft_type is \"OFT\""),
        ("use_qalora", json!(true), "use_qalora is true"),
        ("lora_bias", json!(true), "lora_bias is true"),
        (
            "target_modules",
            json!("("),
            "\"(\" is not a regular expression",
        ),
        ("target_modules", json!(5), "is not valid"),
        ("r", json!(-4), "r: invalid value"),
        (
            "lora_dropout",
            json!(2),
            "lora_dropout must be from 0 to below 1",
        ),
    ] {
        let mut config = good.clone();
        config[key] = value;
        dir.write(file, config.to_string());
        refused(&dir, &[file, part]);
    }
    dir.write(file, "{");
    refused(&dir, &[file, "is not valid"]);
    std::fs::remove_file(dir.path(file)).unwrap();
    refused(
        &dir,
        &["run/adapter", "adapter_config.json", "PEFT adapter"],
    );
}

#[test]
fn tensors_that_are_damaged_or_not_there() {
    let dir = Dir::with_adapter();
    let file = "run/adapter/adapter_model.safetensors";
    let whole = std::fs::read(dir.path(file)).unwrap();
    for length in [0, 8, 1000, whole.len() - 1] {
        dir.write(file, &whole[..length]);
        refused(&dir, &[file, "get the adapter again"]);
    }
    std::fs::remove_file(dir.path(file)).unwrap();
    refused(
        &dir,
        &[
            file,
            "the adapter folder is incomplete: get that file again",
        ],
    );
}

#[test]
fn an_adapter_that_is_no_folder() {
    let dir = Dir::with_tokens();
    let line = "eval --model model --data rows.jsonl --adapter";
    dir.trainer(&format!("{line} rows.jsonl"))
        .fails(1, &["rows.jsonl is neither"]);
    dir.trainer(&format!("{line} ./gone")).fails(
        1,
        &["there is no folder ./gone", "a PEFT adapter, or its id"],
    );
    dir.trainer(&format!("{line} runs/none")).fails(
        1,
        &[
            "there is no folder runs/none, and as a Hub id",
            "correct the path",
        ],
    );
    dir.trainer(&format!("{line} model"))
        .fails(1, &["model/adapter_config.json"]);
}

#[test]
fn a_run_that_has_no_adapter_yet() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --eval-data rows.jsonl --max-steps 2";
    dir.trainer(&format!("{line} --output run --set train.save_every=1"))
        .succeeds();
    let remove = |name: &str| std::fs::remove_dir_all(dir.path(name)).unwrap();
    remove("run/adapter");
    let fails = |parts: &[&str]| {
        for line in [
            "eval --model model --data rows.jsonl --adapter run",
            "train --model model --data rows.jsonl --output two --set adapter.init_from=run",
        ] {
            dir.trainer(line).fails(1, parts);
        }
    };
    let resume = "go on with: trainer train --resume run";
    fails(&[
        "run is the folder of a run that is unfinished",
        "give run/best, or",
        resume,
    ]);
    remove("run/best");
    fails(&["give run/checkpoints/step-000002/adapter, or", resume]);
    remove("run/checkpoints");
    fails(&["it has no adapter yet", &format!("help: {resume}")]);
}

#[test]
fn an_adapter_in_place_of_a_model_and_a_model_in_place_of_an_adapter() {
    let dir = Dir::with_adapter();
    for name in ["run", "run/adapter"] {
        dir.trainer(&format!("eval --model {name} --data rows.jsonl"))
            .fails(1, &["an adapter and no model", "--adapter run/adapter"]);
    }
    let line = "train --model model --data rows.jsonl --set adapter.init_from";
    dir.trainer(&format!("{line}=gone"))
        .fails(1, &["adapter.init_from", "no folder", "gone"]);
    dir.trainer(&format!("{line}=model"))
        .fails(1, &["a whole model and no adapter"]);
    dir.trainer(&format!("{line}=run"))
        .fails(1, &["the folder of a run", "run/adapter"]);
}
