use std::fs;

use serde_json::{Value, json};

use crate::support::Dir;

/// The data block of a page.
fn data(page: &str) -> Value {
    let (_, rest) = page
        .split_once("<script type=\"application/json\" id=\"data\">")
        .unwrap();
    serde_json::from_str(rest.split_once("</script>").unwrap().0).unwrap()
}

/// The page is whole, has every section, and asks for nothing outside of it.
fn check(page: &str) {
    assert!(page.starts_with("<!doctype html>") && page.trim_end().ends_with("</html>"));
    for id in ["curves", "facts", "memory", "samples", "warnings", "recipe"] {
        assert!(page.contains(&format!("<section id=\"{id}\"")), "{id}");
    }
    let count = |text: &str| page.matches(text).count();
    for name in [
        "section", "table", "div", "figure", "script", "ul", "dl", "pre",
    ] {
        let (open, close) = (format!("<{name}"), format!("</{name}>"));
        let opened = count(&format!("{open}>")) + count(&format!("{open} "));
        assert_eq!(opened, count(&close), "{name}");
    }
    assert_eq!(count("<script"), 2, "the data and what draws it");
    for outside in [
        "src=", "http:", "https:", "@import", "url(http", "<link", "fetch(",
    ] {
        assert_eq!(count(outside), 0, "{outside}");
    }
}

fn without_times(lines: Vec<Value>) -> Vec<Value> {
    let strip = |mut line: Value| {
        for key in ["seconds", "tokens_per_second", "peak_memory_bytes"] {
            line.as_object_mut().unwrap().remove(key);
        }
        line
    };
    lines.into_iter().map(strip).collect()
}

#[test]
fn a_run_ends_with_a_report_facts_and_a_card() {
    let dir = Dir::with_chat();
    dir.write("model/tokenizer.model", "pieces");
    let line = "train --model model --data rows.jsonl --eval-data rows.jsonl --max-steps 12 \
                --set train.eval_every=4 --output run";
    let run = dir.trainer(line).succeeds();
    assert!(run.stderr.contains("report: run/report.html"), "{run}");
    let said = run.stderr;
    let page = dir.read("run/report.html");
    check(&page);
    let run = &data(&page)["runs"][0];
    let steps: Vec<usize> = (1..=12).collect();
    for curve in ["loss", "smooth", "lr", "grad_norm", "speed", "memory"] {
        assert_eq!(run[curve]["x"], json!(steps), "{curve}");
        assert_eq!(run[curve]["y"].as_array().unwrap().len(), 12, "{curve}");
    }
    assert_eq!(run["eval"]["x"], json!([4, 8, 12]));
    for part in [
        "LoRA, rank 16, alpha 32",
        "q_proj × 1",
        "finished",
        "12 of 12",
        "rows.jsonl",
    ] {
        assert!(page.contains(part), "{part}");
    }
    let svg = dir.read("run/loss.svg");
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("<polyline"));

    let facts = dir.json("run/run.json");
    let peak = facts["sessions"][0]["peak_memory_bytes"].as_f64().unwrap();
    let told = format!("peak memory  {:.2} GiB", peak / f64::from(1 << 30));
    assert!(said.contains(&told), "{told}: {said}");
    let shown = format!(
        "<b>{:.1} MiB</b><span>peak memory",
        peak / f64::from(1 << 20)
    );
    assert!(page.contains(&shown), "{shown}");
    assert_eq!(facts["data"]["train"]["rows"], json!(4));
    assert_eq!(facts["data"]["eval"]["rows"], json!(4));
    assert_eq!(facts["sessions"][0]["end"], json!("finished"));
    assert!(facts["predicted_peak_bytes"].as_u64().unwrap() > 0);
    assert_eq!(facts["device"]["id"], json!("cpu"));
    let samples = facts["samples"].as_array().unwrap();
    assert_eq!(samples.len(), 2);
    assert_eq!(
        samples[0]["prompt"],
        json!("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    );
    assert_eq!(samples[0]["expected"], json!("Hello."));
    for when in ["before", "after"] {
        assert!(samples[0][when]["text"].is_string(), "{facts:#}");
    }

    for folder in ["run/adapter", "run/best"] {
        for file in [
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "tokenizer.model",
        ] {
            assert_eq!(
                fs::read(dir.path(&format!("{folder}/{file}"))).unwrap(),
                fs::read(dir.path(&format!("model/{file}"))).unwrap()
            );
        }
        let card = dir.read(&format!("{folder}/README.md"));
        assert!(card.starts_with("---\nbase_model: "), "{card}");
        for part in [
            "library_name: peft\n",
            "pipeline_tag: text-generation\n",
            "base_model:adapter:",
            "| 4 | ",
            "```toml\n[model]",
            "- PEFT ",
        ] {
            assert!(card.contains(part), "{part}: {card}");
        }
    }
    let config = dir.json("run/adapter/adapter_config.json");
    assert!(config["peft_version"].is_string());
    let targets = config["target_modules"].as_array().unwrap();
    assert!(
        targets.is_sorted_by_key(|name| name.as_str()),
        "{targets:?}"
    );
}

#[test]
fn samples_change_nothing_of_the_training() {
    let dir = Dir::with_chat();
    let line = "train -q --model model --data rows.jsonl --max-steps 4 --set adapter.dropout=0.1 \
                --set output.samples=";
    let weights = |run: &str| {
        dir.trainer(&format!(
            "{line}{} --output {run}",
            run.trim_start_matches('n')
        ))
        .succeeds();
        let metrics = without_times(dir.lines(&format!("{run}/metrics.jsonl")));
        let file = format!("{run}/adapter/adapter_model.safetensors");
        (metrics, fs::read(dir.path(&file)).unwrap())
    };
    assert!(weights("n0") == weights("n3"));
    assert_eq!(dir.json("n0/run.json")["samples"], json!([]));
    assert_eq!(
        dir.json("n3/run.json")["samples"].as_array().unwrap().len(),
        3
    );
    check(&dir.read("n0/report.html"));
}

#[test]
fn what_users_and_models_say_stays_text() {
    let dir = Dir::with_chat();
    let evil = "</script><script>alert(1)</script><b>&\"'";
    let turns = json!([
        {"role": "user", "content": evil}, {"role": "assistant", "content": evil}
    ]);
    dir.write("<b>.jsonl", json!({ "messages": turns }).to_string());
    let args = [
        "train",
        "-q",
        "--model",
        "model",
        "--data",
        "<b>.jsonl",
        "--output",
        "<i>&run",
        "--max-steps",
        "1",
    ];
    dir.run(&args).succeeds();
    let page = dir.read("<i>&run/report.html");
    check(&page);
    assert!(!page.contains("<b>&") && !page.contains("alert(1)</script>"));
    assert!(page.contains("&lt;/script&gt;&lt;script&gt;alert(1)"));
    assert_eq!(data(&page)["runs"][0]["name"], json!("<i>&run"));
    assert!(dir.read("<i>&run/loss.svg").contains("&lt;i&gt;&amp;run"));
    check(&page); // one step: a curve of one point
}

#[cfg(unix)]
#[test]
fn a_run_that_was_cut_short_says_so_and_goes_on_in_the_same_report() {
    let dir = Dir::with_chat();
    let line = "train --model model --data rows.jsonl --max-steps 2000 --set output.tensorboard=true \
                --set train.save_every=1000000 --output run";
    let mut child = dir.piped(&crate::support::words(line)).spawn().unwrap();
    let run = crate::support::interrupt(&mut child, "step 3/");
    assert_eq!(run.code, Some(130), "{run}");
    let page = dir.read("run/report.html");
    check(&page);
    assert!(page.contains("interrupted after step "));
    let facts = dir.json("run/run.json");
    let before = facts["samples"][0]["before"].clone();
    assert!(before["text"].is_string() && facts["samples"][0]["after"].is_null());
    let events = |dir: &Dir| dir.names("run/tensorboard").len();
    assert_eq!(events(&dir), 1);

    let step = dir.lines("run/metrics.jsonl").len();
    let recipe = dir.read("run/recipe.toml");
    let fewer = recipe.replace("max_steps = 2000", &format!("max_steps = {}", step + 2));
    dir.write("run/recipe.toml", fewer);
    dir.trainer("train -q --resume run").succeeds();
    let facts = dir.json("run/run.json");
    assert_eq!(facts["samples"][0]["before"], before);
    assert!(facts["samples"][0]["after"]["text"].is_string());
    let ends: Vec<_> = facts["sessions"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| &s["end"])
        .collect();
    assert_eq!(ends, ["interrupted", "finished"]);
    let page = dir.read("run/report.html");
    assert_eq!(data(&page)["runs"][0]["marks"], json!([[step, "resumed"]]));
    assert_eq!(events(&dir), 2);
}

#[test]
fn a_run_that_failed_has_a_report_too() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --output run --max-steps 30 \
                --set train.learning_rate=1e30";
    assert_eq!(dir.trainer(line).code, Some(1));
    let page = dir.read("run/report.html");
    check(&page);
    assert!(page.contains("class=\"state failed\""), "{page}");
    assert!(page.contains("is not a finite number"));
}

#[test]
fn several_runs_are_drawn_together() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --max-steps 3 --output";
    dir.trainer(&format!("{line} one")).succeeds();
    let other = format!("{line} two --rank 4 --set train.weight_decay=0.1");
    dir.trainer(&other).succeeds();
    let own = dir.read("one/report.html");
    let json = dir.trainer("report --json one two").succeeds().json();
    assert_eq!(json["report"], json!("report.html"), "beside the runs");
    assert_eq!(json["runs"][1]["steps"], json!(3));
    assert_eq!(dir.read("one/report.html"), own, "each keeps its own");
    let page = dir.read("report.html");
    check(&page);
    let names: Vec<_> = data(&page)["runs"]
        .as_array()
        .unwrap()
        .iter()
        .map(|run| run["name"].clone())
        .collect();
    assert_eq!(names, ["one", "two"]);
    let row = |key: &str| {
        let at = page.find(&format!("<th scope=\"row\">{key}</th>")).unwrap();
        page[..at].rsplit_once("<tr ").unwrap().1.to_owned()
    };
    assert_eq!(row("adapter.rank"), "class=\"own differs\">");
    assert_eq!(row("adapter.alpha"), "class=\"\">");
    assert_eq!(row("train.weight_decay"), "class=\"own differs\">");

    // a run that is still writing, under names that are alike
    let mut torn = dir.read("two/metrics.jsonl");
    torn.push_str("{\"kind\":\"train\",\"st");
    dir.write("more/one/metrics.jsonl", torn);
    let run = dir
        .trainer("report one more/one --out both.html")
        .succeeds();
    assert_eq!(run.stdout, "both.html\n2 runs drawn together\n");
    assert!(run.stderr.contains("more/one: the last line"), "{run}");
    let page = dir.read("both.html");
    check(&page);
    assert_eq!(data(&page)["runs"][1]["name"], json!("more/one"));
    assert!(dir.has("both-loss.svg"));
    dir.write("one/report.html", "old");
    dir.trainer("report one").succeeds();
    check(&dir.read("one/report.html"));
    let twice = dir.trainer("report one ./one").succeeds();
    assert_eq!(twice.stdout, "one/report.html\n");
    assert!(twice.stderr.contains("./one is given twice"), "{twice}");
    // not in the place of a run's own page, wherever the runs lie
    dir.write("one/inside/metrics.jsonl", dir.read("two/metrics.jsonl"));
    dir.trainer("report one/inside two")
        .fails(2, &["that of the run one", "--out both.html"]);
    let mut command = dir.command(&["report", ".", "../one"]);
    let run = crate::support::finish(command.current_dir(dir.path("two"))).succeeds();
    assert!(run.stdout.contains("report.html"), "{run}");
    assert!(!dir.read("two/report.html").contains("<h1>2 runs"));
}

#[test]
fn what_is_no_run_is_said() {
    let dir = Dir::with_adapter();
    let fails = |line: &str, part: &str| dir.trainer(line).fails(1, &[part]);
    fails("report nowhere", "nowhere does not exist");
    fails("report model", "model is not the folder of a run");
    fails(
        "report run run/adapter --json",
        "run/adapter is not the folder of a run",
    );
    dir.write("empty/metrics.jsonl", "");
    fails("report empty", "empty has no metrics");
    dir.write("bare/recipe.toml", "");
    fails("report bare", "bare has no metrics");
    dir.write("bad/metrics.jsonl", "no\nmetrics\n");
    fails("report bad", "bad/metrics.jsonl is one of metrics: line 1");
    dir.trainer("report").fails(2, &["RUN"]);
    let nowhere = dir.trainer("report run --out nowhere/x.html");
    nowhere.fails(1, &["cannot write nowhere/x.html", "cause: No such file"]);
    assert!(!nowhere.stderr.contains(".part-"), "{nowhere}");
    dir.write(
        "odd/metrics.jsonl",
        "what\n{\"kind\":\"train\",\"step\":1,\"loss\":2.5}\n",
    );
    let run = dir.trainer("report odd").succeeds();
    assert!(
        run.stderr
            .contains("1 line of metrics.jsonl cannot be read"),
        "{run}"
    );
    check(&dir.read("odd/report.html"));
}

#[test]
fn full_training_has_a_card_of_its_own() {
    let dir = Dir::with_tokens();
    let line = "train -q --model model --data rows.jsonl --method full --max-steps 1 --output run";
    dir.trainer(line).succeeds();
    let card = dir.read("run/model/README.md");
    assert!(card.contains("library_name: transformers\n"), "{card}");
    assert!(dir.read("run/report.html").contains("all weights"));
}

#[test]
fn a_hundred_thousand_steps_fit_on_a_page() {
    let dir = Dir::new();
    let line = |step: usize| {
        let loss = if step == 70_001 {
            9.5
        } else {
            1.0 + (step % 97) as f64 * 1e-3
        };
        json!({
            "kind": "train", "step": step, "epoch": step as f64 / 1e5, "loss": loss, "lr": 1e-4,
            "grad_norm": loss, "tokens": 100, "tokens_per_second": 123.456789,
            "peak_memory_bytes": 1_234_567_890u64, "seconds": 0.5, "spike": step == 70_001,
        })
        .to_string()
            + "\n"
    };
    dir.write(
        "run/metrics.jsonl",
        (1..=100_000).map(line).collect::<String>(),
    );
    dir.trainer("report run").succeeds();
    let page = dir.read("run/report.html");
    check(&page);
    assert!(page.len() < 2_000_000, "{}", page.len());
    let run = &data(&page)["runs"][0];
    let loss = run["loss"]["y"].as_array().unwrap();
    assert!(loss.contains(&json!(9.5)), "the spike stays");
    assert_eq!(run["marks"], json!([[70_001, "spike"]]));
}

#[test]
fn a_model_in_4_bits_is_asked_too() {
    let dir = Dir::new();
    dir.add_demo_model("model");
    let rows = json!({"prompt": "pig latin: zebra", "completion": "ebrazay"}).to_string();
    dir.write("rows.jsonl", rows);
    let line = "train -q --model model --quant nf4 --data rows.jsonl --max-steps 2 --output run";
    dir.trainer(line).succeeds();
    let sample = &dir.json("run/run.json")["samples"][0];
    assert_eq!(sample["expected"], json!("ebrazay"));
    // what a model says of a task that it does not know
    assert_eq!(sample["before"]["text"], json!("unknown task"));
    assert!(dir.read("run/report.html").contains("nf4, blocks of 64"));
}
