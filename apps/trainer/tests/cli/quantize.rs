//! 4-bit weights: made while loading, stored in a folder, and refused when they are not in order.

use serde_json::{Value, json};

use crate::support::{Dir, token_rows};

/// With a model in bf16 whose widths blocks of 64 divide, and rows.
fn with_model() -> Dir {
    let dir = Dir::new();
    dir.add_model("by_64", "model");
    dir.write("rows.jsonl", token_rows(8));
    dir
}

fn loss(dir: &Dir, flags: &str) -> Value {
    let run = dir.trainer(&format!("eval --json --data rows.jsonl {flags}"));
    run.succeeds().json()["loss"].clone()
}

#[test]
fn a_quantised_folder_is_the_model_quantised_while_loading() {
    let dir = Dir::with_tokens(); // in f32
    dir.write("model/tokenizer.model", "pieces"); // it goes along as it is
    for flags in ["", " --double-quant", " --block-size 32"] {
        let made = format!("quantize --model model --format nf4 --out small{flags} --json");
        let json = dir.trainer(&made).succeeds().json();
        assert_eq!(json["out"], json!("small"));
        assert_eq!(
            dir.names("small"),
            [
                "config.json",
                "generation_config.json",
                "model.safetensors",
                "tokenizer.model"
            ]
        );
        let config = &dir.json("small/config.json")["quantization_config"];
        assert_eq!(config["load_in_4bit"], json!(true));
        let stored = loss(&dir, "--model small");
        assert_eq!(
            stored,
            loss(&dir, &format!("--model model --quant nf4{flags}"))
        );
        assert_eq!(
            stored,
            loss(&dir, "--model small --quant nf4"),
            "the folder's own blocks"
        );
        assert_ne!(stored, loss(&dir, "--model model"));
        std::fs::remove_dir_all(dir.path("small")).unwrap();
    }
}

#[test]
fn a_folder_of_a_16_bit_model_decodes_to_16_bits() {
    let dir = with_model();
    dir.trainer("quantize --model model --format nf4 --out small")
        .succeeds();
    let stored = loss(&dir, "--model small").as_f64().unwrap();
    let loaded = loss(&dir, "--model model --quant nf4").as_f64().unwrap();
    let off = (stored - loaded).abs() / loaded;
    assert!(0.0 < off && off < 1e-3, "off by {off}"); // bf16 has 8 bits
}

#[test]
fn training_on_either_is_the_same_run() {
    let dir = Dir::with_tokens(); // in f32
    dir.trainer("quantize --model model --format fp4 --out small")
        .succeeds();
    let train = "train --data rows.jsonl --max-steps 3 --set train.learning_rate=1e-2";
    dir.trainer(&format!("{train} --model model --quant fp4 --output a"))
        .succeeds();
    let run = dir
        .trainer(&format!("{train} --model small --output b"))
        .succeeds();
    assert!(
        run.stderr
            .contains("its linear layers as fp4 in blocks of 64"),
        "{run}"
    );
    let losses = |name: &str| -> Vec<Value> {
        let lines = dir.lines(&format!("{name}/metrics.jsonl"));
        lines
            .iter()
            .map(|line| json!([line["loss"], line["grad_norm"]]))
            .collect()
    };
    assert_eq!(losses("a"), losses("b"));
    assert_eq!(losses("a").len(), 3);

    // the adapter knows what it was trained on
    let warns = |flags: &str| {
        let line = format!("eval --data rows.jsonl --adapter a/adapter {flags}");
        dir.trainer(&line).succeeds().stderr.contains(
            "the adapter was trained on a base with quantization fp4 in blocks of 64, and the base \
             in use has quantization",
        )
    };
    assert!(!warns("--model small"));
    assert!(!warns("--model model --quant fp4"));
    assert!(warns("--model model --quant nf4"));
    assert!(warns("--model model"));
    let run = dir.trainer(&format!(
        "{train} --model model --output c --set adapter.init_from=a/adapter"
    ));
    assert!(
        run.succeeds()
            .stderr
            .contains("the adapter was trained on a base with quantization fp4"),
        "so does a run that goes on from it"
    );
}

#[test]
fn a_resumed_run_quantises_as_before() {
    let dir = with_model();
    let train = "train --data rows.jsonl --model model --quant nf4 --set train.save_every=2";
    dir.trainer(&format!("{train} --max-steps 4 --output whole"))
        .succeeds();
    dir.trainer(&format!("{train} --max-steps 4 --output half"))
        .succeeds();
    std::fs::remove_dir_all(dir.path("half/checkpoints/step-000004")).unwrap();
    dir.trainer("train --resume half").succeeds();
    let numbers = |name: &str| -> Vec<Value> {
        let lines = dir.lines(&format!("{name}/metrics.jsonl"));
        lines
            .iter()
            .map(|line| json!([line["step"], line["loss"]]))
            .collect()
    };
    assert_eq!(numbers("whole"), numbers("half"));
    let adapter = |name: &str| {
        std::fs::read(dir.path(name).join("adapter/adapter_model.safetensors")).unwrap()
    };
    assert!(adapter("whole") == adapter("half"));
}

#[test]
fn generation_heeds_the_quantization() {
    let dir = with_model();
    dir.trainer("quantize --model model --format nf4 --out small")
        .succeeds();
    let ids = |flags: &str| {
        let line = format!("generate --json --prompt-ids 5,9,33,7 --max-new-tokens 20 {flags}");
        dir.trainer(&line).succeeds().json()["token_ids"].clone()
    };
    assert_eq!(ids("--model small"), ids("--model model --quant nf4"));
    assert_ne!(ids("--model small"), ids("--model model"));
}

#[test]
fn what_cannot_be_quantised_is_refused() {
    let dir = with_model();
    let quantize = "quantize --model model --format nf4 --out small";
    dir.trainer(&format!("{quantize} --block-size 48"))
        .fails(2, &["--block-size 48", "power of two"]);
    dir.trainer("quantize --model model --format int8 --out small")
        .fails(2, &["int8", "nf4"]);
    dir.trainer("eval --model model --data rows.jsonl --double-quant")
        .fails(2, &["--quant"]);
    dir.trainer(quantize).succeeds();
    dir.trainer(quantize).fails(1, &["small is not empty"]);
    dir.trainer("eval --model small --data rows.jsonl --quant nf4 --block-size 128")
        .fails(2, &["small is stored in 4 bits", "leave --block-size"]);
    dir.trainer("eval --model model --data rows.jsonl --quant none")
        .fails(2, &["nf4"]);
    dir.trainer("quantize --model small --format nf4 --out again")
        .fails(1, &["small is quantised already", "original model"]);
    assert!(!dir.has("again"));
    dir.trainer("train --model model --quant nf4 --method full --data rows.jsonl --output run")
        .fails(
            2,
            &["quantization.format = \"nf4\" cannot be trained as a whole"],
        );
    dir.trainer("train --model small --method full --data rows.jsonl --output run")
        .fails(2, &["is in 4 bits and cannot be trained as a whole"]);
    assert!(!dir.has("run"));
    // what begins anew is dense, whatever the folder held
    dir.trainer("train --model small --method full --data rows.jsonl --max-steps 1 --set model.init=random --output new")
        .succeeds();
    dir.trainer("eval --model new/model --data rows.jsonl")
        .succeeds();
}

#[test]
fn a_damaged_4_bit_folder_is_refused() {
    let dir = with_model();
    dir.trainer("quantize --model model --format nf4 --out small")
        .succeeds();
    let config = dir.read("small/config.json");
    let eval = "eval --model small --data rows.jsonl";
    dir.edit_json("small/config.json", |config| {
        config["quantization_config"] = json!({"quant_method": "awq", "bits": 4});
    });
    dir.trainer(eval).fails(
        1,
        &["quantization_config.quant_method is \"awq\"", "--quant nf4"],
    );
    dir.edit_json("small/config.json", |config| {
        config["quantization_config"] =
            json!({"quant_method": "bitsandbytes", "load_in_8bit": true});
    });
    dir.trainer(eval)
        .fails(1, &["quantization_config.load_in_8bit is true"]);
    dir.write("small/config.json", config);
    dir.trainer(eval).succeeds();
    // another shape than the parts were made for
    dir.edit_json("small/config.json", |config| {
        config["intermediate_size"] = json!(256)
    });
    let run = dir.trainer(eval);
    run.fails(1, &["quant_state.bitsandbytes__nf4", "expected [256, 64]"]);
}

#[test]
fn a_plan_counts_quantised_weights_by_their_original_size() {
    let dir = with_model();
    dir.trainer("quantize --model model --format nf4 --out small")
        .succeeds();
    let plan = |flags: &str| {
        let json = dir
            .trainer(&format!("plan --json --data rows.jsonl {flags}"))
            .succeeds()
            .json();
        [json["all_params"].clone(), json["trainable_params"].clone()]
    };
    let dense = plan("--model model");
    assert_eq!(dense, plan("--model model --quant nf4"));
    assert_eq!(dense, plan("--model small"));
}
