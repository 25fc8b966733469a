//! Merges that cannot be, each of which leaves nothing behind.

use serde_json::json;

use crate::support::Dir;

/// `trainer merge --out merged` with these arguments fails and writes nothing.
#[track_caller]
fn refused(dir: &Dir, line: &str, code: i32, parts: &[&str]) {
    let before = dir.names(".");
    for json in ["", "--json"] {
        dir.trainer(&format!("merge {line} --out merged {json}"))
            .fails(code, parts);
    }
    assert_eq!(dir.names("."), before);
}

#[test]
fn weights_that_are_none() {
    let dir = Dir::with_adapter();
    for weight in ["abc", "NaN", "-inf", "inf", "", "1,5", "0.5x"] {
        let line = format!("--model model --adapter run/adapter={weight}");
        refused(&dir, &line, 2, &["is not a weight", "run/adapter=0.7"]);
    }
    let line = "--model model --adapter run/adapter=1e300";
    refused(&dir, line, 1, &["no finite numbers of its type"]);
}

#[test]
fn adapters_that_are_none() {
    let dir = Dir::with_adapter();
    let line = "--model model --adapter";
    refused(&dir, &format!("{line} ./gone"), 1, &["./gone"]);
    refused(&dir, &format!("{line} ./gone=0.5"), 1, &["./gone"]);
    refused(&dir, &format!("{line} rows.jsonl"), 1, &["rows.jsonl"]);
    refused(
        &dir,
        &format!("{line} run"),
        1,
        &["the folder of a run", "run/adapter"],
    );
    refused(
        &dir,
        &format!("{line} model"),
        1,
        &["a whole model", "--model model"],
    );
    refused(&dir, "--model model --adapter", 2, &["--adapter"]);
    let line = "train -q --model model --data rows.jsonl --output full --method full --max-steps 1";
    dir.trainer(line).succeeds();
    let line = "--model model --adapter full";
    refused(&dir, line, 1, &["a whole model", "--model full/model"]);
    refused(
        &dir,
        &format!("{line}/model"),
        1,
        &["a whole model", "--model full/model"],
    );
}

#[test]
fn adapters_of_other_models() {
    let dir = Dir::with_adapter();
    dir.add_model("wide_head", "other");
    let line = "--model other --adapter run/adapter";
    refused(
        &dir,
        line,
        1,
        &["is not an adapter of this model", "q_proj.lora_B.weight is"],
    );
    dir.edit_json("run/adapter/adapter_config.json", |config| {
        config["r"] = json!(8);
    });
    let line = "--model model --adapter run/adapter";
    refused(
        &dir,
        line,
        1,
        &["lora_A.weight is [4, 32], expected [8, 32]"],
    );
}

#[test]
fn adapters_that_do_not_go_together() {
    let dir = Dir::with_tokens();
    for run in ["one", "two"] {
        let line = format!(
            "train -q --model model --data rows.jsonl --output {run} --max-steps 1 \
             --set adapter.modules_to_save=[\"norm\"]"
        );
        dir.trainer(&line).succeeds();
    }
    let line = "--model model --adapter one/adapter";
    refused(
        &dir,
        &format!("{line} --adapter two/adapter"),
        1,
        &["one/adapter and two/adapter both replace model.norm.weight"],
    );
    refused(&dir, &format!("{line}=0.5"), 1, &["cannot be weighed"]);
    let eval = format!("eval --data rows.jsonl {line}");
    let parts = ["both replace model.norm.weight", "only LoRA adapters"];
    dir.trainer(&format!("{eval} --adapter two/adapter"))
        .fails(1, &parts);
    dir.trainer(&format!("{eval}=x"))
        .fails(2, &["is not a weight"]);
    dir.trainer(&format!("{eval} --combine svd"))
        .fails(2, &["svd", "cat, linear"]);
    dir.trainer("eval --data rows.jsonl --model model --combine cat")
        .fails(2, &["--adapter"]);
}

#[test]
fn adapters_that_are_no_weights() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --output run --max-steps 1";
    dir.trainer(&format!("{line} --method prefix")).succeeds();
    let help = "help: give it to --adapter of eval, generate and chat as it is\n";
    let line = "--model model --adapter run/adapter";
    refused(&dir, line, 1, &["run/adapter is prefix tuning", help]);
}

#[test]
fn bases_that_cannot_be_merged_onto() {
    let dir = Dir::with_adapter();
    let line = "--model model --adapter run/adapter --onto";
    refused(
        &dir,
        &format!("{line} nf4"),
        1,
        &["run/adapter: none", "--onto original"],
    );
    refused(&dir, &format!("{line} fp4"), 2, &["fp4"]);
    dir.trainer("quantize --model model --format nf4 --out stored")
        .succeeds();
    let line = "--model stored --adapter run/adapter --onto original";
    refused(&dir, line, 1, &["stored is in 4 bits", "original model"]);
}

#[test]
fn folders_that_cannot_be_made() {
    let dir = Dir::with_adapter();
    dir.write("used/notes.txt", "mine");
    let before = [dir.names("."), dir.names("model")];
    let fails = |out: &str, code, parts: &[&str]| {
        let line = format!("merge --model model --adapter run/adapter --out {out}");
        dir.trainer(&line).fails(code, parts);
    };
    fails("used", 1, &["used is not empty", "--out"]);
    fails("model", 1, &["model is not empty"]);
    fails("model/merged", 2, &["lies in the folder of the model"]);
    fails("model/a/b", 2, &["lies in the folder of the model"]);
    fails(
        "run/../model/merged",
        2,
        &["lies in the folder of the model"],
    );
    fails("rows.jsonl", 1, &["rows.jsonl"]);
    fails("rows.jsonl/merged", 1, &["rows.jsonl/merged"]);
    assert_eq!([dir.names("."), dir.names("model")], before);
    assert_eq!(dir.names("used"), ["notes.txt"]);
    std::fs::create_dir(dir.path("empty")).unwrap();
    dir.trainer("merge --model model --adapter run/adapter --out empty")
        .succeeds();
    let line = "quantize --model model --format nf4 --out used";
    dir.trainer(line).fails(1, &["used is not empty", "--out"]);
}

#[test]
fn models_that_are_damaged() {
    let dir = Dir::with_adapter();
    let line = "--model model --adapter run/adapter";
    let weights = std::fs::read(dir.path("model/model.safetensors")).unwrap();
    dir.write("model/model.safetensors", &weights[..weights.len() / 2]);
    refused(&dir, line, 1, &["model.safetensors is damaged"]);
    dir.write("model/model.safetensors", weights);
    dir.edit_json("model/config.json", |config| {
        config["num_hidden_layers"] = json!(3)
    });
    refused(
        &dir,
        line,
        1,
        &["model.layers.2.self_attn.q_proj.weight is missing"],
    );
    refused(&dir, "--model gone --adapter run/adapter", 1, &["gone"]);
}
