//! `trainer` without a command, as a user runs it.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

fn trainer(folder: &Path, args: &[&str]) -> Value {
    let mut trainer = Command::new(env!("CARGO_BIN_EXE_trainer"));
    trainer
        .current_dir(folder)
        .args(["--device", "cpu", "--json"]);
    let output = trainer.args(args).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn the_demo_teaches_what_the_model_could_not_do() {
    let folder = tempfile::tempdir().unwrap();
    let demo = trainer(folder.path(), &["--no-tui"]);
    let number = |key: &str| demo[key].as_u64().unwrap_or_else(|| panic!("{demo}"));
    let (before, after, prompts) = (number("before"), number("after"), number("prompts"));
    assert_eq!(prompts, 100);
    assert!(before * 10 < prompts * 2, "{demo}");
    assert!(after * 10 > prompts * 9, "{demo}");

    let path = |key: &str| demo[key].as_str().unwrap().to_owned();
    let (model, adapter, run) = (path("model"), path("adapter"), path("run"));
    for file in ["adapter_config.json", "adapter_model.safetensors"] {
        assert!(folder.path().join(&adapter).join(file).is_file(), "{file}");
    }
    assert!(folder.path().join(&run).join("metrics.jsonl").is_file());

    // What the demo says to do next.
    let example = &demo["examples"][0];
    let prompt = example["prompt"].as_str().unwrap();
    let ask = [
        "generate",
        "--model",
        &model,
        "--adapter",
        &adapter,
        "--chat",
        "--prompt",
        prompt,
    ];
    assert_eq!(trainer(folder.path(), &ask)["text"], example["after"]);
}

#[test]
fn no_word_of_the_evaluation_is_trained() {
    let rows = |name: &str| -> Vec<String> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("demo")
            .join(name);
        let text = std::fs::read_to_string(path).unwrap();
        let prompt =
            |line: &str| serde_json::from_str::<Value>(line).unwrap()["prompt"].to_string();
        text.lines().map(prompt).collect()
    };
    let train = rows("train.jsonl");
    assert_eq!(train.len(), 1000);
    for prompt in rows("eval.jsonl") {
        assert!(!train.contains(&prompt), "{prompt}");
    }
}
