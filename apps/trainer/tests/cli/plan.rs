use serde_json::{Value, json};

use crate::support::{Dir, chat_rows};

#[test]
fn a_plan_counts_and_needs_no_weights() {
    let dir = Dir::with_tokens();
    std::fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    let line = "plan --json --model model --data rows.jsonl --rank 4 --output run";
    let run = dir
        .trainer(&format!(
            "{line} --set train.micro_batch_size=3 --set data.packing=false"
        ))
        .succeeds();
    let json = run.json();
    // q, k, v, o are 32×32, 16×32, 16×32, 32×32; gate, up, down have 32 and 56 at their ends
    let per_layer = 4 * (64 + 48 + 48 + 64 + 3 * 88);
    assert_eq!(json["trainable_params"], json!(2 * per_layer));
    let base = 2 * 96 * 32 + 32 + 2 * (2 * 1024 + 2 * 512 + 3 * 32 * 56 + 64);
    assert_eq!(json["all_params"], json!(base + 2 * per_layer));
    let percent = 100.0 * f64::from(2 * per_layer) / f64::from(base + 2 * per_layer);
    assert!((json["trainable_percent"].as_f64().unwrap() - percent).abs() < 1e-9);
    assert_eq!(json["adapter_bytes"], json!(4 * 2 * per_layer));
    assert_eq!((&json["rows"], &json["steps"]), (&json!(8), &json!(3)));
    assert_eq!(
        (&json["sequences"], &json["fill_ratio"]),
        (&json!(8), &Value::Null)
    );
    let tokens: usize = (0..8).map(|row| 5 + row % 5).sum();
    assert_eq!(json["trained_tokens"], json!(tokens));
    assert!(!dir.has("run"));
    let text = dir
        .trainer("plan --model model --data rows.jsonl")
        .succeeds();
    assert!(text.stdout.contains("trainable parameters"), "{text}");
}

#[test]
fn packing_makes_few_full_sequences() {
    let dir = Dir::with_tokens(); // 61 tokens in rows of 6 to 10
    let line = "--model model --data rows.jsonl --set data.max_length=20 \
                --set train.micro_batch_size=3";
    let plan = dir
        .trainer(&format!("plan --json {line}"))
        .succeeds()
        .json();
    assert_eq!((&plan["rows"], &plan["sequences"]), (&json!(8), &json!(4)));
    assert_eq!(plan["fill_ratio"], json!(61.0 / 80.0));
    assert_eq!(plan["steps"], json!(2));
    let text = dir.trainer(&format!("plan {line}")).succeeds();
    assert!(
        text.stdout.contains("packed sequences      4 (76."),
        "{text}"
    );
    let run = dir
        .trainer(&format!("train {line} --output run"))
        .succeeds();
    let told = "an epoch is packed into 4 sequences of up to 20 tokens, 76.";
    assert!(run.stderr.contains(told), "{run}");
    let steps = dir.lines("run/metrics.jsonl");
    assert_eq!(steps.len(), 2);
    assert_eq!(steps[1]["epoch"], json!(1.0));
    // every row is trained once: all of its tokens but the first
    let tokens: u64 = steps
        .iter()
        .map(|step| step["tokens"].as_u64().unwrap())
        .sum();
    assert_eq!(tokens, 61 - 8);
}

#[test]
fn a_recipe_file_is_planned() {
    let dir = Dir::with_tokens();
    let recipe = "[model]\npath = 'model'\n[data]\ntrain = 'rows.jsonl'\n[train]\nmax_steps = 11\n";
    dir.write("recipe.toml", recipe);
    assert_eq!(
        dir.trainer("plan recipe.toml --json").succeeds().json()["steps"],
        json!(11)
    );
    let line = "plan recipe.toml --json --max-steps 5";
    assert_eq!(dir.trainer(line).succeeds().json()["steps"], json!(5));
}

#[test]
fn what_would_keep_a_run_from_starting_is_a_problem() {
    let dir = Dir::with_tokens();
    dir.edit_json("model/config.json", |json| {
        json["vocab_size"] = json!(1 << 24);
        json["hidden_size"] = json!(1 << 20);
    });
    let line = "plan --json --model model --output model --device cpu";
    let plan = dir.trainer(line).succeeds().json();
    let problems: Vec<_> = plan["problems"].as_array().unwrap().iter().collect();
    let has = |part: &str| problems.iter().any(|p| p.as_str().unwrap().contains(part));
    for part in [
        "data.train is missing",
        "GiB of memory",
        "model is not empty",
    ] {
        assert!(has(part), "{part}: {plan}");
    }
}

/// The same words as of the run itself.
#[test]
fn too_few_steps_for_a_method_are_a_problem() {
    let dir = Dir::with_tokens();
    let line = "--model model --data rows.jsonl --method adalora --max-steps 3 \
                --set adapter.tinit=2 --set adapter.tfinal=2";
    let plan = dir.trainer(&format!("plan --json {line}")).succeeds();
    let problems = plan.json()["problems"].to_string();
    let told = "leave none of 3 steps to let the ranks fall";
    assert!(problems.contains(told), "{plan}");
    let run = dir.trainer(&format!("train {line} --output run"));
    run.fails(2, &[told]);
}

#[test]
fn the_memory_is_predicted_by_part() {
    let dir = Dir::with_tokens();
    let plan = |flags: &str| {
        let line = format!("plan --json --device cpu --model model {flags}");
        dir.trainer(&line).succeeds().json()
    };
    let total = |plan: &Value| plan["predicted_peak_bytes"].as_u64().unwrap();
    let with_rows = plan("--data rows.jsonl --max-steps 9");
    let parts = with_rows["breakdown"].as_object().unwrap();
    let sum: u64 = parts.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(sum, total(&with_rows));
    for part in [
        "weights",
        "adapter",
        "optimizer",
        "activations",
        "workspace",
    ] {
        assert!(parts[part].as_u64() > Some(0), "{part}: {with_rows}");
    }
    let adapter = with_rows["adapter_bytes"].as_u64().unwrap();
    assert_eq!(parts["adapter"], json!(2 * adapter)); // and the last good one
    assert_eq!(with_rows["problems"], json!([]));
    // config.json alone: full micro batches, larger than those of the short rows
    std::fs::remove_file(dir.path("model/model.safetensors")).unwrap();
    let without = plan("");
    assert!(total(&without) > total(&with_rows), "{without}");
    let problems = without["problems"].to_string();
    assert!(
        problems.contains("micro batches of 4 × 1024 tokens"),
        "{without}"
    );
    assert!(
        problems.contains("model has no model.safetensors"),
        "{without}"
    );
    let again = plan("--set train.recompute=block");
    assert!(total(&again) < total(&without), "{again}");
}

#[test]
fn a_run_tells_its_peak_beside_the_prediction() {
    let dir = Dir::with_tokens();
    let line =
        "train --json --device cpu --model model --data rows.jsonl --max-steps 1 --output run";
    let run = dir.trainer(line).succeeds();
    let memory = run.json()["memory"].clone();
    assert!(
        memory["predicted_bytes"].as_u64() > Some(1 << 20),
        "{memory}"
    );
    assert!(memory["predicted"]["weights"].is_u64(), "{memory}");
    if cfg!(target_os = "linux") {
        let off = memory["predicted_bytes"].as_f64().unwrap()
            / memory["measured_bytes"].as_f64().unwrap();
        assert!((0.5..2.0).contains(&off), "{memory}"); // it is almost all program
        assert!(run.stderr.contains("peak memory  0.0"), "{run}");
        assert!(run.stderr.contains("(predicted 0.0"), "{run}");
    }
}

/// Every problem of the weights is told from their headers, and none is read.
#[test]
fn the_headers_of_the_weights_are_checked() {
    let dir = Dir::with_tokens();
    let problems = |flags: &str| {
        let line = format!("plan --json --model model --data rows.jsonl --max-steps 9 {flags}");
        dir.trainer(&line).succeeds().json()["problems"].to_string()
    };
    assert_eq!(problems(""), "[]");
    dir.edit_json("model/config.json", |config| {
        config["intermediate_size"] = json!(57)
    });
    let found = problems("");
    for part in [
        "layers.0.mlp.up_proj.weight",
        "layers.1.mlp.down_proj.weight",
        "expected [32, 57]",
    ] {
        assert!(found.contains(part), "{part}: {found}");
    }
    assert_eq!(problems("--method full --set model.init=random"), "[]");
    let bytes = std::fs::read(dir.path("model/model.safetensors")).unwrap();
    dir.write("model/model.safetensors", &bytes[..bytes.len() - 1]);
    assert!(
        problems("").contains("model/model.safetensors"),
        "{}",
        problems("")
    );
}

#[test]
fn a_plan_shows_rows_with_what_is_trained() {
    let dir = Dir::with_chat();
    let line = "plan --model model --data rows.jsonl";
    let plan = dir.trainer(&format!("{line} --json")).succeeds().json();
    let sample = &plan["samples"][0];
    assert_eq!(sample["place"], json!("rows.jsonl:1"));
    let text: Vec<char> = sample["text"].as_str().unwrap().chars().collect();
    let trained: Vec<String> = sample["trained"]
        .as_array()
        .unwrap()
        .iter()
        .map(|range| {
            let [start, end] = [0, 1].map(|i| range[i].as_u64().unwrap() as usize);
            text[start..end].iter().collect()
        })
        .collect();
    assert_eq!(trained, ["Hello.<|im_end|>"]);
    assert_eq!(plan["samples"].as_array().unwrap().len(), 3);
    assert!(plan["trained_tokens_per_row"]["median"].is_u64(), "{plan}");
    let run = dir.trainer(line).succeeds();
    assert!(run.stdout.contains("‹Hello.<|im_end|>›"), "{run}");
    assert!(run.stdout.contains("<|im_start|>user"), "{run}");
    // the first row is shown before a run, too, and more with -v
    let train = |flags: &str| {
        let line = format!("train {flags} --model model --data rows.jsonl --max-steps 1");
        dir.trainer(&line).succeeds().stderr
    };
    let plain = train("--output one");
    assert!(
        plain.contains("‹Hello.<|im_end|>›") && !plain.contains("‹4<|im_end|>›"),
        "{plain}"
    );
    assert!(train("-v --output two").contains("‹4<|im_end|>›"));
    assert!(!train("-q --output three").contains("Hello"));
}

/// Each is one sentence that says what to do.
#[test]
fn labels_are_checked_before_the_first_step() {
    let dir = Dir::with_chat();
    dir.write("eval.jsonl", chat_rows().lines().nth(1).unwrap());
    let rows = chat_rows();
    dir.write(
        "twice.jsonl",
        format!("{rows}{}", rows.lines().next().unwrap()),
    );
    dir.edit_json("model/tokenizer_config.json", |config| {
        config["bos_token"] = json!("<|im_start|>");
    });
    let bos = json!({"text": "<|im_start|><|im_start|>a"});
    dir.write("bos.jsonl", bos.to_string());
    let tools = json!([{"name": "add"}]);
    let tools = json!({"question": "1 + 1?", "answer": "2", "tools": tools});
    dir.write("tools.jsonl", tools.to_string());
    let long = rows
        .lines()
        .next()
        .unwrap()
        .replace("Hello.", &"Hello. ".repeat(9));
    dir.write("long.jsonl", long);
    let marker = "{% for m in messages %}<|turn|>{{ m.content }}<|im_end|>\n{% endfor %}";
    dir.write("marker.jinja", marker);
    dir.write(
        "endless.jinja",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    );
    for (flags, parts) in [
        (
            "--data twice.jsonl",
            &["1 rows repeat another one (twice.jsonl:5 is twice.jsonl:1)"][..],
        ),
        (
            "--data rows.jsonl --eval-data eval.jsonl",
            &["1 of 1 evaluation rows are trained on, too (eval.jsonl:1 is rows.jsonl:2)"],
        ),
        (
            "--data twice.jsonl --set data.eval_fraction=0.8",
            &["are trained on, too"],
        ),
        (
            "--data bos.jsonl",
            &["1 rows begin with two BOS tokens (bos.jsonl:1)"],
        ),
        (
            "--data tools.jsonl",
            &["does not show the tools or tool calls of 1 rows (tools.jsonl:1)"],
        ),
        (
            "--data rows.jsonl --set data.chat_template=marker.jinja",
            &["the text has <|turn|>, which this tokenizer does not know as one token"],
        ),
        (
            "--data rows.jsonl --set data.chat_template=endless.jinja",
            &[
                "4 rows do not end in a trained end marker",
                "rows.jsonl:3 and 1 more",
            ],
        ),
        (
            "--data long.jsonl --set data.max_length=18 --set data.truncate=right",
            &[
                "the trained text of 1 rows is",
                "cut off at data.max_length (long.jsonl:1)",
            ],
        ),
    ] {
        let line = format!("plan --json --model model {flags}");
        let run = dir.trainer(&line).succeeds();
        let problems = run.json()["problems"].to_string();
        for part in parts {
            assert!(problems.contains(part), "{part}: {run}");
            assert!(run.stderr.contains(part), "{part}: {run}");
        }
    }
    let eos = dir.json("model/config.json")["eos_token_id"].clone();
    dir.write(
        "model/generation_config.json",
        json!({"eos_token_id": 5}).to_string(),
    );
    let run = dir
        .trainer("plan --model model --data rows.jsonl")
        .succeeds();
    assert!(
        run.stdout
            .contains("no eos token of generation_config.json"),
        "{eos}: {run}"
    );
    std::fs::remove_file(dir.path("model/generation_config.json")).unwrap();
    std::fs::remove_file(dir.path("model/chat_template.jinja")).unwrap();
    let run = dir
        .trainer("plan --model model --data rows.jsonl")
        .succeeds();
    assert!(
        run.stdout.contains("the model has no chat template"),
        "{run}"
    );
    // rows without a trained token are named
    let untrained = json!({"input_ids": [5, 6], "labels": [-100, -100]}).to_string() + "\n";
    dir.write("none.jsonl", untrained.repeat(5));
    dir.trainer("train --model model --data none.jsonl --output run")
        .fails(
            1,
            &[
                "5 of the rows have no trained token",
                "none.jsonl:3 and 2 more",
            ],
        );
}

#[test]
fn rows_beyond_the_context_of_the_model_are_told() {
    let dir = Dir::with_tokens();
    let ids: Vec<usize> = (0..300).map(|i| 3 + i % 90).collect();
    let rows = serde_json::json!({"input_ids": ids}).to_string();
    dir.write("long.jsonl", rows);
    let plan = dir
        .trainer("plan --json --model model --data long.jsonl")
        .succeeds();
    let problems = plan.json()["problems"].to_string();
    let expected = "1 rows are longer than the 128 tokens that the model was made for";
    assert!(problems.contains(expected), "{problems}");
    let fits = dir
        .trainer("plan --json --model model --data rows.jsonl")
        .succeeds();
    assert!(!fits.stdout.contains("was made for"), "{fits}");
}
