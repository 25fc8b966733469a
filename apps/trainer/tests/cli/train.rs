use std::fs;

use serde_json::json;

use crate::support::{Dir, finish, timeless, token_rows, words};

const TRAIN_KEYS: [&str; 10] = [
    "kind",
    "step",
    "epoch",
    "loss",
    "lr",
    "grad_norm",
    "tokens",
    "tokens_per_second",
    "peak_memory_bytes",
    "seconds",
];
const EVAL_KEYS: [&str; 5] = ["kind", "step", "loss", "perplexity", "tokens"];

#[test]
fn token_rows_become_a_run_folder() {
    let dir = Dir::with_tokens();
    dir.write("eval.jsonl", token_rows(3));
    let line = "train --json --model model --data rows.jsonl --eval-data eval.jsonl --output run \
                --rank 4 --epochs 3 --set train.micro_batch_size=2 --set train.save_every=5 \
                --set data.packing=false \
                --set train.eval_every=4 --set train.learning_rate=1e-2";
    let run = dir.trainer(line).succeeds();
    let json = run.json();
    assert_eq!((&json["run"], &json["steps"]), (&json!("run"), &json!(12)));
    assert_eq!(json["adapter"], "run/adapter");
    assert_eq!(json["interrupted"], json!(false));

    for name in [
        "adapter",
        "best",
        "checkpoints",
        "metrics.jsonl",
        "recipe.toml",
    ] {
        assert!(dir.has(&format!("run/{name}")), "{name}");
    }
    let mut adapter = vec![
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ];
    assert_eq!(dir.names("run/adapter"), adapter);
    assert_eq!(dir.names("run/best"), adapter);
    // keep_checkpoints is 2
    assert_eq!(dir.names("run/checkpoints"), ["step-000010", "step-000012"]);
    let checkpoint = [
        "SHA256SUMS",
        "adapter",
        "optimizer.safetensors",
        "state.json",
    ];
    assert_eq!(dir.names("run/checkpoints/step-000012"), checkpoint);
    adapter.remove(0); // a checkpoint is only for --resume
    assert_eq!(dir.names("run/checkpoints/step-000012/adapter"), adapter);
    let parts = |names: Vec<String>| names.iter().any(|name| name.contains("part"));
    assert!(!parts(dir.names("run")) && !parts(dir.names("run/checkpoints")));

    let lines = dir.lines("run/metrics.jsonl");
    let (train, eval): (Vec<_>, Vec<_>) = lines.iter().partition(|line| line["kind"] == "train");
    assert_eq!((train.len(), eval.len()), (12, 3));
    for (index, line) in train.iter().enumerate() {
        assert!(line.as_object().unwrap().keys().eq(TRAIN_KEYS), "{line}");
        assert_eq!(line["step"], json!(index + 1));
        assert_eq!(line["epoch"], json!((index + 1) as f64 / 4.0));
        for key in &TRAIN_KEYS[3..] {
            assert!(line[key].as_f64().unwrap() >= 0.0, "{key}: {line}");
        }
    }
    // 0.03 of 12 steps is a warm-up of one step, counted from 0
    assert_eq!(
        (train[0]["lr"].as_f64(), train[1]["lr"].as_f64()),
        (Some(0.0), Some(1e-2))
    );
    for (line, step) in eval.iter().zip([4, 8, 12]) {
        assert!(line.as_object().unwrap().keys().eq(EVAL_KEYS), "{line}");
        assert_eq!(
            (&line["step"], &line["tokens"]),
            (&json!(step), &json!(5 + 6 + 7))
        );
    }
    let best = eval
        .iter()
        .map(|line| line["loss"].as_f64().unwrap())
        .fold(f64::MAX, f64::min);
    assert_eq!(json["best"]["loss"], json!(best));

    // what was measured while training is measured again from what was saved
    let line = "eval --json --model model --adapter run/best --data eval.jsonl";
    let loss = dir.trainer(line).succeeds().json()["loss"]
        .as_f64()
        .unwrap();
    assert!((loss - best).abs() < 1e-6 * best, "{loss} {best}"); // saved as f32, exactly
    let base = dir
        .trainer("eval --json --model model --data eval.jsonl")
        .succeeds();
    assert!(base.json()["loss"].as_f64().unwrap() > best);
}

#[test]
fn conversations_become_an_adapter_that_generates() {
    let dir = Dir::with_chat();
    dir.trainer("train -q --model model --data rows.jsonl --output run --max-steps 3")
        .succeeds();
    assert!(!dir.has("run/best"), "nothing was evaluated");
    let line =
        "generate --json --chat --prompt Hi --max-new-tokens 2 --model model --adapter run/adapter";
    assert!(dir.trainer(line).succeeds().json()["text"].is_string());
    let config = dir.json("run/adapter/adapter_config.json");
    assert_eq!(
        (&config["peft_type"], &config["r"]),
        (&json!("LORA"), &json!(16))
    );
    let base = config["base_model_name_or_path"].as_str().unwrap();
    assert!(
        base.starts_with('/') && base.ends_with("/model"),
        "found from any folder: {base}"
    );
}

#[test]
fn a_template_of_its_own_goes_with_the_adapter() {
    let dir = Dir::with_chat();
    let own = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}\
               {% if add_generation_prompt %}<assistant>{% endif %}";
    dir.write("own.jinja", own);
    let line = "train -q --model model --data rows.jsonl --eval-data rows.jsonl --max-steps 2 \
                --set data.chat_template=own.jinja --output run";
    dir.trainer(line).succeeds();
    for folder in ["adapter", "best", "checkpoints/step-000002/adapter"] {
        assert_eq!(dir.read(&format!("run/{folder}/chat_template.jinja")), own);
    }
    let names = [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(dir.names("run/adapter"), names);

    // it is used wherever the adapter is, unless another one is named
    let eval = "eval --json --model model --adapter run/adapter --data rows.jsonl";
    let loss = |line: &str| {
        dir.trainer(line).succeeds().json()["loss"]
            .as_f64()
            .unwrap()
    };
    let (with_own, with_models) = (
        loss(eval),
        loss(&format!("{eval} --set data.chat_template=model")),
    );
    let last = dir.lines("run/metrics.jsonl").pop().unwrap();
    assert_eq!(json!(with_own), last["loss"]);
    assert_ne!(with_own, with_models);
    let generate = "generate --json --chat --model model --max-new-tokens 9 --prompt Hi";
    let ids = |line: &str| dir.trainer(line).succeeds().json()["token_ids"].clone();
    let with_adapter = ids(&format!("{generate} --adapter run/adapter"));
    let prompt = "generate --json --model model --adapter run/adapter --max-new-tokens 9 --prompt";
    let by_hand = dir.trainer_with(prompt, "<user>Hi<|im_end|><assistant>");
    assert_eq!(with_adapter, by_hand.succeeds().json()["token_ids"]);
    let line = format!("{generate} --adapter run/adapter --chat-template model");
    let with_models = dir.trainer_with(
        prompt,
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    );
    assert_eq!(ids(&line), with_models.succeeds().json()["token_ids"]);

    // and by a run that goes on from it, also when that run is resumed
    fs::remove_file(dir.path("own.jinja")).unwrap();
    let line = "train -q --model model --data rows.jsonl --max-steps 1 --output more \
                --set adapter.init_from=run/adapter";
    dir.trainer(line).succeeds();
    assert_eq!(dir.read("more/adapter/chat_template.jinja"), own);
    dir.trainer("train -q --resume more").succeeds();
    assert_eq!(dir.read("more/adapter/chat_template.jinja"), own);
    let full = "train -q --model model --data rows.jsonl --max-steps 1 --method full \
                --set data.chat_template=run/adapter --output whole";
    dir.trainer(full).succeeds();
    assert_eq!(dir.read("whole/model/chat_template.jinja"), own);
    dir.trainer("train --model model --data rows.jsonl --output no --set data.chat_template=run")
        .fails(2, &["no chat template \"run\" in that folder"]);
}

#[test]
fn full_training_saves_a_model_folder() {
    let dir = Dir::new();
    dir.add_chat_config("base");
    dir.write("rows.jsonl", crate::support::chat_rows());
    let line = "train --json --model base --set model.init=random --method full --data rows.jsonl \
                --output run --max-steps 2 --set data.eval_fraction=0.25";
    assert_eq!(dir.trainer(line).succeeds().json()["model"], "run/model");
    let files = [
        "README.md",
        "chat_template.jinja",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(dir.names("run/model"), files);
    assert_eq!(dir.names("run/best"), files);
    dir.trainer("eval --model run/model --data rows.jsonl")
        .succeeds();
}

#[test]
fn recompute_changes_the_memory_and_not_the_run() {
    let dir = Dir::with_tokens();
    let line = "train --model model --data rows.jsonl --max-steps 3 --set adapter.dropout=0.1";
    let mut metrics = Vec::new();
    for recompute in ["none", "block", "auto"] {
        let run = format!("{line} --output {recompute} --set train.recompute={recompute}");
        let run = dir.trainer(&run).succeeds();
        let chosen = "train.recompute = auto: none (without it the run takes about 0.0 GiB of the ";
        let told = run.stderr.contains("train.recompute = auto: ");
        assert_eq!(told, recompute == "auto", "{run}");
        if told && cfg!(target_os = "linux") {
            assert!(run.stderr.contains(chosen), "{run}"); // there is room for a tiny model
        }
        let recipe = dir.read(&format!("{recompute}/recipe.toml"));
        assert!(recipe.contains(&format!("recompute = {recompute:?}")));
        metrics.push(timeless(dir.lines(&format!("{recompute}/metrics.jsonl"))));
    }
    assert_eq!(metrics[0], metrics[1]);
    assert_eq!(metrics[0], metrics[2]);
}

#[test]
fn progress_goes_to_stderr_and_quiet_is_quiet() {
    let dir = Dir::with_tokens();
    let line = "train --model model --data rows.jsonl --max-steps 2 --output";
    let plain = dir.trainer(&format!("{line} one")).succeeds();
    assert_eq!(plain.stdout, "one/adapter\n");
    assert!(plain.stderr.contains("step 1/2  loss "), "{plain}");
    let quiet = dir.trainer(&format!("{line} two -q")).succeeds();
    assert_eq!(
        (quiet.stdout.as_str(), quiet.stderr.as_str()),
        ("two/adapter\n", "")
    );
    let verbose = dir.trainer(&format!("{line} three -v")).succeeds();
    assert!(
        verbose
            .stderr
            .contains("saved three/checkpoints/step-000002"),
        "{verbose}"
    );
}

#[test]
fn a_run_without_a_name_gets_one() {
    let dir = Dir::with_tokens();
    let run = dir
        .trainer("train -q --json --model model --data rows.jsonl --max-steps 1")
        .succeeds();
    let folder = run.json()["run"].as_str().unwrap().to_owned();
    assert!(folder.starts_with("runs/model-20"), "{folder}");
    let mut command = dir.command(&words(
        "train -q --model . --data ../rows.jsonl --max-steps 1",
    ));
    let inside = finish(command.current_dir(dir.path("model"))).succeeds();
    assert!(inside.stdout.starts_with("runs/model-20"), "{inside}");
    assert!(dir.read(&format!("{folder}/recipe.toml")).contains(&folder));
}

#[test]
fn the_defaults_are_printed_without_a_model() {
    let dir = Dir::new();
    let run = dir.trainer("train --print-recipe").succeeds();
    for line in [
        "rank = 16",
        "micro_batch_size = 4",
        "lr_schedule = \"cosine\"",
    ] {
        assert!(run.stdout.contains(line), "{line}: {run}");
    }
}

#[test]
fn the_printed_recipe_is_complete_and_means_the_same() {
    let dir = Dir::new();
    dir.write(
        "base.toml",
        "[data]\ntrain = 'a.jsonl'\n[adapter]\ntarget_modules = ['q_proj', 'v_proj']\n\
        [adapter.rank_pattern]\nq_proj = 2\n[train]\nbetas = [0.8, 0.95]\n",
    );
    let line = "train base.toml --print-recipe --model m --rank 3 --output out \
                --set data.chat_template=chatml";
    let first = dir.trainer(line).succeeds();
    for key in [
        "rank = 3",
        "alpha = 32.0",
        "warmup_ratio = 0.03",
        "packing = true",
        "seed = 42",
    ] {
        assert!(first.stdout.contains(key), "{key}: {first}");
    }
    dir.write("recipe.toml", &first.stdout);
    let second = dir.trainer("train recipe.toml --print-recipe").succeeds();
    assert_eq!(first.stdout, second.stdout);
    let json = dir
        .trainer("train recipe.toml --print-recipe --json")
        .succeeds()
        .json();
    assert_eq!(
        (&json["adapter"]["rank"], &json["model"]["path"]),
        (&json!(3), &json!("m"))
    );
    assert!(!dir.has("out"));
}

#[test]
fn the_recipe_of_a_run_makes_the_run_again() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --output one --max-steps 4";
    dir.trainer(line).succeeds();
    dir.trainer("train -q one/recipe.toml --output two")
        .succeeds();
    let metrics = |run: &str| timeless(dir.lines(&format!("{run}/metrics.jsonl")));
    assert_eq!(metrics("one"), metrics("two"));
    let weights =
        |run: &str| fs::read(dir.path(&format!("{run}/adapter/adapter_model.safetensors")));
    assert_eq!(weights("one").unwrap(), weights("two").unwrap());
}

#[test]
fn a_finished_run_resumes_to_the_same_end() {
    let dir = Dir::with_tokens();
    dir.trainer("train -q --model model --data rows.jsonl --output run --max-steps 3")
        .succeeds();
    let before = dir.read("run/metrics.jsonl");
    let json = dir
        .trainer("train -q --resume run --json")
        .succeeds()
        .json();
    assert_eq!(json["steps"], json!(3));
    assert_eq!(dir.read("run/metrics.jsonl"), before);
}

#[test]
fn a_damaged_checkpoint_is_passed_over() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --output run --max-steps 6 --set train.save_every=2";
    dir.trainer(line).succeeds();
    let metrics = timeless(dir.lines("run/metrics.jsonl"));
    let weights = "run/checkpoints/step-000006/adapter/adapter_model.safetensors";
    let mut bytes = fs::read(dir.path(weights)).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    dir.write(weights, bytes);
    let run = dir.trainer("train --resume run").succeeds();
    assert!(run.stderr.contains("step-000006 is skipped"), "{run}");
    assert!(run.stderr.contains("checksum"), "{run}");
    assert_eq!(timeless(dir.lines("run/metrics.jsonl")), metrics);
    for step in ["step-000004", "step-000006"] {
        dir.write(&format!("run/checkpoints/{step}/state.json"), "{");
    }
    dir.trainer("train --resume run")
        .fails(1, &["run has no complete checkpoint"]);
}

#[test]
fn training_goes_on_from_an_adapter() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --rank 4 --output one --max-steps 3";
    dir.trainer(line).succeeds();
    let line = "train -q --model model --data rows.jsonl --output two --max-steps 1 \
                --set adapter.init_from=one/adapter --set train.learning_rate=0";
    dir.trainer(line).succeeds();
    let weights =
        |run: &str| fs::read(dir.path(&format!("{run}/adapter/adapter_model.safetensors")));
    assert_eq!(weights("one").unwrap(), weights("two").unwrap());
    let line = "train -q --model model --data rows.jsonl --output three --rank 8 \
                --set adapter.init_from=one/adapter";
    dir.trainer(line)
        .fails(2, &["adapter.rank differs", "one/adapter"]);
    assert!(!dir.has("three"));
}

#[test]
fn an_adapter_with_the_models_own_template_is_not_needed_again() {
    let dir = Dir::with_chat();
    let line = "train -q --model model --data rows.jsonl --max-steps 1 --output";
    dir.trainer(&format!("{line} one")).succeeds();
    dir.trainer(&format!("{line} two --set adapter.init_from=one/adapter"))
        .succeeds();
    assert!(!dir.read("two/recipe.toml").contains("chat_template"));
    fs::remove_dir_all(dir.path("one")).unwrap();
    dir.trainer("train -q --resume two").succeeds();
}
