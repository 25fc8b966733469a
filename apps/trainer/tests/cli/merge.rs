use serde_json::Value;

use crate::support::Dir;

/// The model `gqa` and an adapter that has been trained on it, as `model` and `run/adapter`.
fn trained(flags: &str) -> Dir {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --output run --rank 4 --max-steps 6 \
                --set train.learning_rate=0.05";
    dir.trainer(&format!("{line} {flags}")).succeeds();
    dir
}

fn drift(json: &Value, key: &str) -> f64 {
    json["drift"][key].as_f64().unwrap()
}

#[test]
fn a_merged_model_says_what_model_and_adapter_say() {
    let dir = trained("");
    let line = "merge --model model --adapter run/adapter --out made/merged --json";
    let json = dir.trainer(line).succeeds().json();
    let keys: Vec<_> = json.as_object().unwrap().keys().collect();
    assert_eq!(
        keys,
        [
            "out",
            "tensors",
            "merged_layers",
            "onto",
            "update_kept",
            "drift"
        ]
    );
    let kept = json["update_kept"].as_f64().unwrap();
    assert!((kept - 1.0).abs() < 1e-6, "{kept}");
    let keys: Vec<_> = json["drift"].as_object().unwrap().keys().collect();
    assert_eq!(keys, ["tokens", "max_abs", "mean_abs", "kl", "same_top"]);
    assert_eq!(json["out"], "made/merged");
    assert_eq!(
        (&json["tensors"], &json["merged_layers"]),
        (&21.into(), &14.into())
    );
    assert_eq!(
        (&json["onto"], &json["drift"]["tokens"]),
        (&"original".into(), &96.into())
    );
    assert!(drift(&json, "max_abs") < 1e-4, "{json}");
    assert_eq!(drift(&json, "same_top"), 1.0);
    assert_eq!(
        dir.names("made/merged"),
        [
            "README.md",
            "config.json",
            "generation_config.json",
            "model.safetensors"
        ]
    );
    let card = dir.read("made/merged/README.md");
    for part in [
        "---\nbase_model: \"model\"\nlibrary_name: transformers\n",
        "merged into the original weights by",
        "| run/adapter | 1 |",
    ] {
        assert!(card.contains(part), "{part}: {card}");
    }
    assert_eq!(dir.names("made"), ["merged"]);

    let loss = |model: &str| {
        let line = format!("eval --json --data rows.jsonl --model {model}");
        dir.trainer(&line).succeeds().json()["loss"]
            .as_f64()
            .unwrap()
    };
    let [plain, adapted, merged] =
        ["model", "model --adapter run/adapter", "made/merged"].map(loss);
    assert!((adapted - merged).abs() < 1e-5, "{adapted} {merged}");
    assert!((plain - merged).abs() > 0.1, "{plain} {merged}");
}

#[test]
fn the_drift_is_told_in_words() {
    let dir = trained("");
    let line = "merge --model model --adapter run/adapter --out merged";
    let run = dir.trainer(line).succeeds();
    for part in [
        "merged\n",
        "merged 14 layers onto the original weights, 21 tensors in all",
        "drift from the trained model (base: not quantised) on 96 tokens",
        "nats",
        "after 100.0 %",
        "100.0 % of the updates are left after rounding",
    ] {
        assert!(run.stdout.contains(part), "{part}: {run}");
    }
    assert!(!run.stderr.contains("warning"), "{run}");
    assert!(run.stderr.contains("merging 21 tensors"), "{run}");
    let run = dir.trainer("merge --model model -q --out copy").succeeds();
    assert!(
        run.stdout.contains("merged 0 layers") && run.stderr.is_empty(),
        "{run}"
    );
    let run = dir.trainer("merge --model model --out again").succeeds();
    assert!(run.stderr.contains("there is no --adapter"), "{run}");
}

#[test]
fn rounding_that_takes_much_of_the_updates_is_warned_of() {
    let dir = trained("--set train.learning_rate=1e-4");
    dir.trainer("merge --model model --dtype bf16 --out small")
        .succeeds();
    let line = "merge --model small --adapter run/adapter --out";
    let lossy = dir.trainer(&format!("{line} lossy")).succeeds();
    assert!(lossy.stderr.contains("with --dtype f32"), "{lossy}");
    let whole = dir.trainer(&format!("{line} whole --dtype f32 --json"));
    let kept = whole.succeeds().json()["update_kept"].as_f64().unwrap();
    assert!((kept - 1.0).abs() < 1e-6, "{kept}");
}

#[test]
fn weights_of_adapters_are_heeded() {
    let dir = trained("");
    let loss = |out: &str, adapters: &str| {
        let line = format!("merge --model model {adapters} --out {out}");
        dir.trainer(&line).succeeds();
        let line = format!("eval --json --data rows.jsonl --model {out}");
        dir.trainer(&line).succeeds().json()["loss"]
            .as_f64()
            .unwrap()
    };
    let whole = loss("a", "--adapter run/adapter");
    let parts = "--adapter run/adapter=0.25 --adapter run/adapter=0.75";
    assert!((loss("b", parts) - whole).abs() < 1e-5);
    let half = loss("c", "--adapter run/adapter=0.5");
    assert!((half - whole).abs() > 0.01, "{half} {whole}");
    let taken_back = "--adapter run/adapter=0.5 --adapter run/adapter=-0.5";
    assert!((loss("f", taken_back) - loss("g", "")).abs() < 1e-5);
    // a folder may be named like one with a weight
    std::fs::rename(dir.path("run/adapter"), dir.path("run=2")).unwrap();
    assert_eq!(loss("d", "--adapter run=2"), whole);
    assert_eq!(loss("e", "--adapter run=2=1"), whole);
}

#[test]
fn the_base_that_was_trained_on_is_merged_onto_and_measured_against() {
    let dir = trained("--quant nf4");
    let merge = |line: &str| {
        let line = format!("merge --json --adapter run/adapter {line}");
        dir.trainer(&line).succeeds().json()
    };
    let original = merge("--model model --out original");
    let nf4 = merge("--model model --out nf4 --onto nf4");
    assert_eq!(original["onto"], "original");
    assert_eq!(nf4["onto"], "nf4 in blocks of 64");
    assert!(drift(&original, "max_abs") > 0.01, "{original}");
    assert!(drift(&nf4, "max_abs") < 1e-4, "{nf4}");

    dir.trainer("quantize --model model --format nf4 --out stored")
        .succeeds();
    let stored = merge("--model stored --out from_stored");
    assert_eq!(stored["onto"], "nf4 in blocks of 64");
    let bytes = |out: &str| std::fs::read(dir.path(out).join("model.safetensors")).unwrap();
    assert_eq!(bytes("from_stored"), bytes("nf4"));
    assert!(
        dir.json("from_stored/config.json")
            .get("quantization_config")
            .is_none()
    );
    assert!(
        dir.json("stored/config.json")
            .get("quantization_config")
            .is_some()
    );

    let line = "quantize --model model --format nf4 --double-quant --out other";
    dir.trainer(line).succeeds();
    let run = dir.trainer("merge --model other --adapter run/adapter --out from_other");
    let warning = "warning: run/adapter was trained on a base with quantization nf4 in blocks of 64, \
                   and the base in use has quantization nf4 in blocks of 64 with double";
    assert!(run.succeeds().stderr.contains(warning));
}

#[test]
fn tokenizer_and_the_adapters_own_template_come_along() {
    let dir = Dir::with_chat();
    let line = "train -q --model model --data rows.jsonl --output run --rank 2 --max-steps 1 \
                --set data.chat_template=llama3";
    dir.trainer(line).succeeds();
    dir.trainer("merge --model model --adapter run/adapter --out merged")
        .succeeds();
    let template = |folder: &str| dir.read(&format!("{folder}/chat_template.jinja"));
    assert_eq!(template("merged"), template("run/adapter"));
    assert_ne!(template("merged"), template("model"));
    for file in ["tokenizer.json", "tokenizer_config.json"] {
        assert_eq!(
            dir.read(&format!("merged/{file}")),
            dir.read(&format!("model/{file}"))
        );
    }
    dir.trainer("generate --model merged --chat --prompt Hi --max-new-tokens 2")
        .succeeds();
}

#[cfg(unix)]
#[test]
fn an_interrupted_merge_leaves_nothing() {
    use crate::support::{interrupt, words};
    let dir = Dir::new();
    dir.add_model("gqa", "config_only");
    dir.edit_json("config_only/config.json", |config| {
        for (key, value) in [("hidden_size", 512), ("intermediate_size", 2048)] {
            config[key] = value.into(); // long enough to be stopped in the middle
        }
        config["num_hidden_layers"] = 8.into();
    });
    dir.write("rows.jsonl", crate::support::token_rows(1));
    let line = "train -q --model config_only --data rows.jsonl --method full --max-steps 1 \
                --set model.init=random --output run";
    dir.trainer(line).succeeds();
    let line = "merge --model run/model --out merged --onto nf4 --json";
    let mut child = dir.piped(&words(line)).spawn().unwrap();
    let run = interrupt(&mut child, "merging");
    assert_eq!(run.code, Some(130), "{run}");
    assert_eq!(run.json(), serde_json::json!({"interrupted": true}));
    assert_eq!(dir.names("."), ["config_only", "rows.jsonl", "run"]);
}
