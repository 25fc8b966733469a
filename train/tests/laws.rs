//! What holds for every run, whatever the numbers.

#![cfg(not(feature = "wgpu"))] // bit for bit is a law of the CPU

mod harness;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use adapters::{AdaptedLlama, BaseLinear, peft, read_parameters};
use burn::backend::Flex;
use burn::data::dataloader::DataLoader;
use burn::module::{AutodiffModule, Module, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::optim::{GradientsParams, Optimizer};
use burn::tensor::{Tensor, TensorData};
use burn::train::{Interrupter, TrainStep};
use harness::{B, Silent, finish, metrics, recipe, start, tiny_model};
use model::checkpoint::MODEL_FILE;
use model::folder::ModelFolder;
use model::load::normal;
use model::rope::Rope;
use model::segments::Segments;
use serde_json::Value;
use tempfile::{TempDir, tempdir};
use train::Error;
use train::batch::{EvalBatches, MicroBatch, Window, Windows};
use train::card::CARD_FILE;
use train::checkpoint::Checkpoints;
use train::data::{IGNORED, Sample, Samples, epoch_order};
use train::evaluate::{Evaluation, evaluate};
use train::fit::{Event, Outcome, Run, Stopped, fit};
use train::recipe::Recipe;
use train::run_folder::{METRICS_FILE, RECIPE_FILE, RunFolder};
use train::session::{self, Rows};
use train::step::{CausalLm, clip_gradients};

/// A row that begins with `start`; each token follows from the one before it.
fn row(start: u32, length: usize, prompt: usize) -> Sample {
    let next = |id: &u32| Some((id * 7 + 11) % 93 + 3);
    let input_ids: Vec<u32> = std::iter::successors(Some(start), next)
        .take(length)
        .collect();
    let label = |(index, id): (usize, &u32)| if index < prompt { IGNORED } else { *id as i32 };
    Sample {
        task: start % 3,
        labels: input_ids.iter().enumerate().map(label).collect(),
        input_ids,
    }
}

/// Rows of very different lengths, of which very different numbers of tokens are trained.
fn rows() -> Rows {
    let train = [
        (5, 2),
        (31, 3),
        (12, 9),
        (8, 1),
        (27, 20),
        (3, 1),
        (18, 4),
        (9, 8),
        (14, 5),
        (22, 2),
        (6, 3),
    ];
    let eval = [(11, 2), (29, 14), (4, 1), (17, 6), (7, 2)];
    let make = |first: u32, sizes: &[(usize, usize)]| {
        let rows = sizes.iter().zip(first..);
        rows.map(|(&(length, prompt), start)| row(start, length, prompt))
            .collect()
    };
    Rows {
        train: make(3, &train),
        eval: make(40, &eval),
    }
}

fn settings(text: &str) -> Vec<String> {
    text.split_whitespace().map(str::to_owned).collect()
}

/// A run over [`rows`] on the model `gqa`; settings are separated by spaces.
fn start_gqa(text: &str, output: &Path) -> Run<B> {
    start(recipe(&tiny_model("gqa"), &settings(text)), &rows(), output)
}

/// A whole run in a folder of its own.
fn run_gqa(text: &str) -> (TempDir, Outcome) {
    let out = tempdir().unwrap();
    let outcome = finish(start_gqa(text, out.path()), |_, _| {}).unwrap();
    (out, outcome)
}

/// Goes on from the newest checkpoint that can be used, as `--resume` does.
fn resume(run: &Path, rows: &Rows) -> Run<B> {
    let mut recipe = Recipe::read(Some(&run.join(RECIPE_FILE)), &[]).unwrap();
    let trained = session::trained(&mut recipe).unwrap();
    let base = ModelFolder::open(Path::new(&recipe.model.path)).unwrap();
    let newest = Checkpoints::new(run, 0).newest(|_, _| {}).unwrap().unwrap();
    let device = Default::default();
    session::check_recipe(&recipe, &newest).unwrap();
    let folder = RunFolder::open(run).unwrap();
    session::resume(recipe, trained, base, rows.clone(), folder, &newest, device).unwrap()
}

/// All lines of the metrics without what depends on the clock and the machine.
fn steady_metrics(run: &Path) -> Vec<Value> {
    let mut lines = [metrics(run, "train"), metrics(run, "eval")].concat();
    for line in &mut lines {
        for key in ["seconds", "tokens_per_second", "peak_memory_bytes"] {
            line.as_object_mut().unwrap().remove(key);
        }
    }
    lines
}

fn numbers(lines: &[Value], key: &str) -> Vec<f64> {
    lines
        .iter()
        .map(|line| line[key].as_f64().unwrap())
        .collect()
}

fn adapter_bytes(folder: &Path) -> Vec<u8> {
    std::fs::read(folder.join(peft::MODEL_FILE)).unwrap()
}

fn checkpoints(run: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(run.join("checkpoints")).unwrap();
    let mut names: Vec<_> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn load(folder: &Path) -> AdaptedLlama<Flex> {
    let folder = ModelFolder::open(folder).unwrap();
    let checkpoint = folder.checkpoint().unwrap();
    adapters::load(&folder.config, &checkpoint, None, &Default::default()).unwrap()
}

fn lm(model: AdaptedLlama<Flex>) -> CausalLm<Flex> {
    CausalLm {
        model,
        method: None,
        seed: 0,
        recompute: false,
    }
}

fn evaluation(model: AdaptedLlama<Flex>, rows: &Samples, batch: usize) -> Evaluation {
    let batches = EvalBatches::new(rows.clone(), batch);
    let result = evaluate(&lm(model), &batches, &|| false, |_, _| {
        Ok::<_, std::convert::Infallible>(())
    });
    result.unwrap().unwrap()
}

/// Logits `[s, v]` of one row.
fn logits(model: &AdaptedLlama<Flex>, row: &Sample) -> Vec<f32> {
    let device = Default::default();
    let s = row.input_ids.len();
    let ids: Vec<i32> = row.input_ids.iter().map(|id| *id as i32).collect();
    let ids = Tensor::from_data(TensorData::new(ids, [s]), &device);
    let rope = Rope::new(&model.config, Segments::new([s]), &device);
    let hidden = model.forward(ids, &rope, None);
    model.logits(hidden).into_data().to_vec().unwrap()
}

/// The negative log probability of each trained token of a row, from its logits.
fn nll_by_hand(model: &AdaptedLlama<Flex>, row: &Sample) -> Vec<f64> {
    let logits = logits(model, row);
    let v = model.config.vocab_size;
    let trained = row
        .labels
        .iter()
        .enumerate()
        .skip(1)
        .filter(|(_, label)| **label != IGNORED);
    let nll = |(at, label): (usize, &i32)| {
        let logits = &logits[(at - 1) * v..at * v];
        let sum: f64 = logits.iter().map(|x| f64::from(*x).exp()).sum();
        sum.ln() - f64::from(logits[*label as usize])
    };
    trained.map(nll).collect()
}

fn windows(windows: &Windows) -> Vec<Window> {
    DataLoader::<B, Window>::iter(windows).collect()
}

fn gradients(model: &CausalLm<B>, gradients: &GradientsParams) -> HashMap<ParamId, Vec<f32>> {
    struct Read<'a>(&'a GradientsParams, HashMap<ParamId, Vec<f32>>);
    impl ModuleVisitor<B> for Read<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            let gradient = self
                .0
                .get::<Flex, D>(param.id)
                .expect("every parameter has a gradient");
            self.1
                .insert(param.id, gradient.into_data().to_vec().unwrap());
        }
    }
    let mut read = Read(gradients, HashMap::new());
    burn::module::Module::visit(model, &mut read);
    read.1
}

/// One optimizer step without the loop around it.
fn step(run: &mut Run<B>, window: Window) {
    let output = run.model.step(window);
    run.model = run.optimizer.step(1e-2, run.model.clone(), output.grads);
}

#[test]
fn one_batch_of_eight_is_eight_batches_of_one() {
    let wide = "data.shuffle=false train.max_steps=3 train.micro_batch_size=8 train.learning_rate=1e-2 \
                train.lr_schedule=constant train.warmup_steps=0";
    let narrow = wide.replace("size=8", "size=1") + " train.gradient_accumulation_steps=8";
    for method in ["adapter.method=lora", "adapter.method=full"] {
        let (wide, narrow) = (format!("{wide} {method}"), format!("{narrow} {method}"));
        let folders = [tempdir().unwrap(), tempdir().unwrap()];
        let [one, eight] = [(&wide, &folders[0]), (&narrow, &folders[1])].map(|(text, folder)| {
            let run = start_gqa(text, folder.path());
            let first = windows(&run.windows).remove(0);
            let output = run.model.step(first);
            let grads = gradients(&run.model, &output.grads);
            finish(run, |_, _| {}).unwrap();
            (output.item.loss, grads)
        });
        assert!((one.0 - eight.0).abs() < 1e-6 * one.0);
        for (id, left) in &one.1 {
            let right = &eight.1[id];
            let largest = left.iter().fold(0f32, |max, x| max.max(x.abs()));
            for (l, r) in left.iter().zip(right) {
                // f32 sums over tokens in another order
                assert!((l - r).abs() <= 1e-5 * largest, "{l} {r} of {largest}");
            }
        }
        let [one, eight] = folders
            .each_ref()
            .map(|folder| metrics(folder.path(), "train"));
        for key in ["loss", "grad_norm", "tokens", "lr"] {
            for (l, r) in numbers(&one, key).iter().zip(numbers(&eight, key)) {
                assert!((l - r).abs() <= 1e-5 * r, "{method} {key}: {l} {r}");
            }
        }
    }
}

#[test]
fn the_base_stays_as_it_is() {
    fn weights(model: &AdaptedLlama<B>) -> HashMap<String, Vec<f32>> {
        let mut model = model.clone();
        let mut all = HashMap::new();
        let mut add =
            |name: &str, values: TensorData| all.insert(name.to_owned(), values.to_vec().unwrap());
        add("embed_tokens", model.embed_tokens.val().into_data());
        add("norm", model.norm.weight.val().into_data());
        for (index, layer) in model.layers.iter().enumerate() {
            add(
                &format!("{index} before"),
                layer.input_layernorm.weight.val().into_data(),
            );
            add(
                &format!("{index} after"),
                layer.post_attention_layernorm.weight.val().into_data(),
            );
        }
        for (name, linear) in model.projections_mut() {
            let BaseLinear::Dense(base) = &linear.base else {
                panic!("the base is not quantised");
            };
            add(&name, base.weight.val().into_data());
        }
        all
    }
    let file = tiny_model("gqa").join(MODEL_FILE);
    let file_before = std::fs::read(&file).unwrap();
    let out = tempdir().unwrap();
    let mut run = start_gqa("train.max_steps=3 adapter.dropout=0.1", out.path());
    let (before, trained_before) = (weights(&run.model.model), read_parameters(&run.model.model));
    for window in windows(&run.windows) {
        step(&mut run, window);
    }
    assert_eq!(weights(&run.model.model), before);
    let trained = read_parameters(&run.model.model);
    assert!(
        trained
            .iter()
            .all(|(id, values)| *values != trained_before[id]),
        "all of it is trained"
    );
    assert_eq!(std::fs::read(&file).unwrap(), file_before);
}

/// Everything that could go wrong when a run goes on: shuffled epochs that end inside a window,
/// dropout, accumulation, warm-up, evaluations and checkpoints at different steps.
const EVENTFUL: &str = "train.epochs=2.6 train.micro_batch_size=2 train.gradient_accumulation_steps=2 \
    train.learning_rate=1e-2 train.weight_decay=0.01 train.eval_every=3 train.save_every=2 \
    train.keep_checkpoints=9";

/// AdaLoRA with ranks that fall and come back.
const ADALORA: &str = "adapter.method=adalora adapter.init_r=4 adapter.target_r=2 adapter.tfinal=2 \
    adapter.deltaT=2 adapter.dropout=0.2";

/// [`EVENTFUL`] with a method, `full` or LoRA in one of its forms; `packed` is LoRA with packing: 6
/// sequences an epoch, where there are 11 rows.
fn eventful(method: &str) -> String {
    match method {
        "packed" => {
            let text = eventful("lora").replace("epochs=2.6", "epochs=5.2");
            format!("{text} data.packing=true data.max_length=31")
        }
        "lora" => format!("{EVENTFUL} adapter.dropout=0.2 adapter.rank=3"),
        "adalora" => format!("{EVENTFUL} {ADALORA}"),
        "loha" | "lokr" => format!(
            "{EVENTFUL} adapter.method={method} adapter.rank=2 adapter.rank_dropout=0.3 adapter.module_dropout=0.5"
        ),
        "vera" => format!("{EVENTFUL} adapter.method=vera adapter.rank=7 adapter.dropout=0.2"),
        "prompt" | "prefix" | "projected" | "mpt" | "ptuning" | "lstm" => {
            format!("{EVENTFUL} {}", in_front(method))
        }
        "dora" => format!("{} adapter.use_dora=true", eventful("lora")),
        "pissa" => format!("{} adapter.init=pissa_niter_2", eventful("lora")),
        "olora" => format!("{EVENTFUL} adapter.init=olora adapter.use_rslora=true"),
        method => format!("{EVENTFUL} adapter.method={method}"),
    }
}

/// The settings of a method that puts virtual tokens in front of rows, of every kind.
fn in_front(method: &str) -> &'static str {
    match method {
        "prompt" => "adapter.method=prompt adapter.num_virtual_tokens=4",
        "prefix" => "adapter.method=prefix adapter.num_virtual_tokens=5",
        "projected" => {
            "adapter.method=prefix adapter.prefix_projection=true adapter.num_virtual_tokens=3 \
             adapter.encoder_hidden_size=7"
        }
        "mpt" => "adapter.method=mpt adapter.num_tasks=3 adapter.num_ranks=2",
        "ptuning" => "adapter.method=ptuning adapter.num_virtual_tokens=2",
        _ => {
            "adapter.method=ptuning adapter.encoder_reparameterization_type=LSTM \
             adapter.num_virtual_tokens=6 adapter.encoder_hidden_size=5"
        }
    }
}

#[test]
fn a_resumed_run_is_the_uninterrupted_one() {
    for (method, result) in [
        ("lora", "adapter"),
        ("packed", "adapter"),
        ("dora", "adapter"),
        ("pissa", "adapter"),
        ("full", "model"),
        ("adalora", "adapter"),
        ("loha", "adapter"),
        ("lokr", "adapter"),
        ("ia3", "adapter"),
        ("vera", "adapter"),
        ("prompt", "adapter"),
        ("projected", "adapter"),
        ("mpt", "adapter"),
        ("lstm", "adapter"),
    ] {
        let text = eventful(method);
        let (whole, outcome) = run_gqa(&text);
        assert_eq!((outcome.steps, outcome.stopped), (8, None));

        // interrupted after step 3 by its evaluation, and after step 5 by the checkpoint of step 4
        let out = tempdir().unwrap();
        let part = finish(start_gqa(&text, out.path()), |event, interrupter| {
            if matches!(event, Event::Evaluated { step: 3, .. }) {
                interrupter.stop(Some("test"));
            }
        });
        let part = part.unwrap();
        assert_eq!((part.steps, part.stopped), (3, Some(Stopped::Interrupted)));
        assert!(!out.path().join(result).exists());
        let metrics_file = out.path().join(METRICS_FILE);
        let mut text = std::fs::read_to_string(&metrics_file).unwrap();
        text.push_str("{\"kind\":\"train\",\"st"); // as a power cut would leave it
        std::fs::write(&metrics_file, text).unwrap();
        let part = finish(resume(out.path(), &rows()), |event, interrupter| {
            if matches!(event, Event::Saved { checkpoint } if checkpoint.ends_with("step-000004")) {
                interrupter.stop(Some("test"));
            }
        });
        assert_eq!(part.unwrap().steps, 5);
        assert_eq!(checkpoints(out.path()).last().unwrap(), "step-000005");
        let rest = finish(resume(out.path(), &rows()), |_, _| {}).unwrap();

        assert_eq!(rest, outcome, "{method}");
        assert_eq!(steady_metrics(out.path()), steady_metrics(whole.path()));
        for folder in [result, "best", "checkpoints/step-000008"] {
            let bytes = |run: &TempDir| files(&run.path().join(folder));
            assert!(bytes(&out) == bytes(&whole), "{method}: {folder} differs");
        }
        let past = resume(out.path(), &rows()).folder.lines().unwrap();
        assert_eq!(past.len(), steady_metrics(out.path()).len());
        // a finished run that is resumed has nothing left to do
        let again = finish(resume(out.path(), &rows()), |_, _| {
            panic!("no step is left")
        })
        .unwrap();
        assert_eq!((again.steps, again.loss), (8, None));
        assert_eq!(steady_metrics(out.path()), steady_metrics(whole.path()));
    }
}

#[test]
fn a_resumed_run_that_parts_tied_weights_is_the_uninterrupted_one() {
    let adapter = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../adapters/tests/fixtures/merge/tied_head/adapter");
    let begin = |output: &Path| {
        let text = format!("{EVENTFUL} adapter.init_from={}", adapter.display());
        let recipe = recipe(&tiny_model("tied_llama3"), &settings(&text));
        start(recipe, &rows(), output)
    };
    let (whole, out) = (tempdir().unwrap(), tempdir().unwrap());
    let outcome = finish(begin(whole.path()), |_, _| {}).unwrap();
    let part = finish(begin(out.path()), |event, interrupter| {
        if matches!(event, Event::Evaluated { step: 3, .. }) {
            interrupter.stop(Some("test"));
        }
    });
    assert_eq!(part.unwrap().steps, 3);
    let rest = finish(resume(out.path(), &rows()), |_, _| {}).unwrap();
    assert_eq!(rest, outcome);
    assert_eq!(steady_metrics(out.path()), steady_metrics(whole.path()));
    let bytes = |run: &TempDir| adapter_bytes(&run.path().join("adapter"));
    assert!(bytes(&out) == bytes(&whole));
}

/// Interrupts a run in its `number`-th evaluation, counted from 1, after a batch or a few: the
/// renderer hears of a batch before the one after the next begins.
fn cut_evaluation(run: Run<B>, number: usize) -> Outcome {
    let interrupter = Interrupter::new();
    let (handle, mut evaluations) = (interrupter.clone(), 0);
    let renderer = Silent(Box::new(move |batch| {
        evaluations += usize::from(batch == 1);
        if evaluations == number {
            handle.stop(Some("test"));
        }
    }));
    fit(run, renderer, interrupter, Arc::new(|_| {})).unwrap()
}

#[test]
fn an_evaluation_that_was_cut_short_is_made_again() {
    let text = eventful("lora").replace("batch_size=2", "batch_size=1");
    let text = text.replace("steps=2", "steps=4"); // five batches an evaluation
    let (whole, _) = run_gqa(&text);
    let out = tempdir().unwrap();
    let evaluated = || numbers(&metrics(out.path(), "eval"), "step");

    let part = cut_evaluation(start_gqa(&text, out.path()), 1);
    assert_eq!((part.steps, part.stopped), (3, Some(Stopped::Interrupted)));
    assert_eq!((evaluated(), part.best), (vec![], None));
    assert!(!out.path().join("best").exists());
    assert_eq!(checkpoints(out.path()), ["step-000002", "step-000003"]);
    // and cut again where it goes on, which is before anything else
    let part = cut_evaluation(resume(out.path(), &rows()), 1);
    assert_eq!((part.steps, part.stopped), (3, Some(Stopped::Interrupted)));
    assert!(evaluated().is_empty());
    // made, but the checkpoints that know of it are lost
    let part = finish(resume(out.path(), &rows()), |event, interrupter| {
        if matches!(event, Event::Saved { checkpoint } if checkpoint.ends_with("step-000004")) {
            interrupter.stop(Some("test"));
        }
    });
    assert_eq!((part.unwrap().steps, evaluated()), (5, vec![3.0]));
    for step in 4..=5 {
        let checkpoint = format!("checkpoints/step-{step:06}");
        std::fs::remove_dir_all(out.path().join(checkpoint)).unwrap();
    }
    // the last one comes after the last step, where a checkpoint is due, too
    let part = cut_evaluation(resume(out.path(), &rows()), 3);
    assert_eq!((part.steps, part.stopped), (8, Some(Stopped::Interrupted)));
    assert_eq!(evaluated(), [3.0, 6.0]);
    assert!(!out.path().join("adapter").exists());
    let rest = finish(resume(out.path(), &rows()), |_, _| {}).unwrap();
    assert_eq!((rest.steps, rest.stopped), (8, None));

    assert_eq!(evaluated(), [3.0, 6.0, 8.0]);
    assert_eq!(steady_metrics(out.path()), steady_metrics(whole.path()));
    for folder in ["adapter", "best", "checkpoints/step-000008"] {
        let bytes = |run: &TempDir| files(&run.path().join(folder));
        assert!(bytes(&out) == bytes(&whole), "{folder} differs");
    }
}

/// Every file below a folder.
fn files(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(folder).unwrap();
        match path.is_dir() {
            true => all.extend(
                files(&path)
                    .into_iter()
                    .map(|(rest, bytes)| (name.join(rest), bytes)),
            ),
            false => all.push((name.into(), std::fs::read(&path).unwrap())),
        }
    }
    all.sort();
    all
}

#[test]
fn layers_that_are_computed_again_change_nothing() {
    let cases = [
        ("gqa", "lora", ""),
        ("gqa", "lora", "quantization.format=nf4"),
        ("gqa", "dora", "quantization.format=nf4"),
        ("gqa", "pissa", "quantization.format=nf4"),
        ("gqa", "olora", ""),
        ("gqa", "lora", "adapter.layers_to_transform=[1]"),
        ("gqa", "lora", "adapter.layers_to_transform=[0]"),
        (
            "gqa",
            "lora",
            "adapter.modules_to_save=[embed_tokens,lm_head]",
        ),
        (
            "gqa",
            "lora",
            "adapter.modules_to_save=[norm,post_attention_layernorm]",
        ),
        ("gqa", "lora", "adapter.target_modules=[lm_head]"), // nothing below the output layer
        ("gqa", "dora", "adapter.target_modules=[embed_tokens]"), // nothing above the embeddings
        (
            "tied_llama3",
            "lora",
            "adapter.target_modules=[embed_tokens,lm_head,o_proj] quantization.format=nf4",
        ),
        ("gqa", "adalora", ""),
        ("gqa", "loha", "adapter.module_dropout=0"),
        (
            "gqa",
            "lokr",
            "adapter.module_dropout=0 adapter.layers_to_transform=[1]",
        ),
        ("mha_bias_linear", "ia3", "quantization.format=nf4"),
        ("gqa", "vera", ""),
        ("gqa", "full", ""),
        ("tied_llama3", "full", ""),
        ("mha_bias_linear", "full", ""),
        ("gqa", "prompt", "quantization.format=nf4"),
        ("gqa", "prefix", "quantization.format=nf4"),
        ("tied_llama3", "projected", ""),
        ("gqa", "mpt", ""),
        ("mha_bias_linear", "lstm", ""),
    ];
    for (model, method, text) in cases {
        let run = |recompute: &str| {
            let text = format!("{} {text} train.recompute={recompute}", eventful(method));
            let out = tempdir().unwrap();
            let recipe = recipe(&tiny_model(model), &settings(&text));
            let run = start(recipe, &rows(), out.path());
            let first = run.model.step(windows(&run.windows).remove(0));
            let first = (first.item.loss, gradients(&run.model, &first.grads));
            finish(run, |_, _| {}).unwrap();
            (first, out)
        };
        let ((plain, plain_run), (again, again_run)) = (run("none"), run("block"));
        assert!(plain == again, "{model} {method} {text}: gradients");
        let metrics = |run: &TempDir| steady_metrics(run.path());
        assert_eq!(
            metrics(&again_run),
            metrics(&plain_run),
            "{model} {method} {text}"
        );
        let result = if method == "full" { "model" } else { "adapter" };
        let trained = |run: &TempDir| {
            let mut all = files(&run.path().join(result));
            all.retain(|(name, _)| name != Path::new(CARD_FILE)); // it has the recipe
            all
        };
        assert!(
            trained(&again_run) == trained(&plain_run),
            "{model} {method} {text}"
        );
    }
}

/// A step in which no layer has an update changes nothing, and the run goes on.
#[test]
fn an_update_that_is_always_dropped_is_not_trained() {
    for recompute in ["none", "block"] {
        let text = format!(
            "adapter.method=loha adapter.module_dropout=0.999999 train.max_steps=2 adapter.rank=2 \
             adapter.target_modules=[model.layers.1.mlp.up_proj] train.recompute={recompute}"
        );
        let out = tempdir().unwrap();
        let run = start_gqa(&text, out.path());
        let before = adapters::read_parameters(&run.model.model);
        let outcome = finish(run, |_, _| {}).unwrap();
        assert_eq!(outcome.steps, 2, "{recompute}");
        let file = model::checkpoint::Checkpoint::open_file(
            &out.path().join("adapter/adapter_model.safetensors"),
        );
        let name = "model.layers.1.mlp.up_proj.hada_w1_a";
        let after = file
            .unwrap()
            .read(&format!("base_model.model.{name}"))
            .unwrap();
        assert_eq!(after, before[&model::weight::param_id(name)]);
    }
}

#[test]
fn the_seed_decides_the_run() {
    let text = eventful("lora");
    let (first, _) = run_gqa(&text);
    let (again, _) = run_gqa(&text);
    let (other, _) = run_gqa(&format!("{text} train.seed=43"));
    let run = |run: &TempDir| {
        (
            steady_metrics(run.path()),
            adapter_bytes(&run.path().join("adapter")),
        )
    };
    assert_eq!(run(&first), run(&again));
    let [first, other] = [&first, &other].map(|run| numbers(&metrics(run.path(), "train"), "loss"));
    assert!(first.iter().zip(&other).all(|(l, r)| l != r));
}

#[test]
fn dropout_acts_while_training_and_not_while_evaluating() {
    let text = "train.max_steps=2 train.learning_rate=0 train.eval_every=1";
    let (plain, _) = run_gqa(text);
    let out = tempdir().unwrap();
    let mut run = start_gqa(&format!("{text} adapter.dropout=0.5"), out.path());
    let (train, eval) = (windows(&run.windows), rows().eval);
    // with lora_b = 0 there is nothing to drop
    step(&mut run, train[0].clone());
    let loss = |run: &Run<B>| run.model.step(train[1].clone()).item.loss;
    let with = loss(&run);
    assert_eq!(with, loss(&run), "a function of seed and step");
    // each step and each micro batch drops others
    let mean = |step: usize, rows: &[&Sample]| {
        let window = Window {
            micro_batches: rows.iter().map(|row| MicroBatch::new([*row])).collect(),
            step,
            epoch: 0.0,
            loss_scale: 1.0,
        };
        run.model.step(window).item.loss
    };
    let row = &eval.get(0);
    let first = mean(1, &[row]);
    assert_eq!(first, mean(1, &[row]));
    assert_ne!(first, mean(2, &[row]));
    assert_ne!(first, mean(1, &[row, row]));
    let valid = |run: &Run<B>| evaluation(run.model.valid().model, &eval, 2).loss;
    let eval_with = valid(&run);
    run.model.method = None;
    assert_ne!(with, loss(&run));
    assert_eq!(eval_with, valid(&run));
    let evals = numbers(&metrics(plain.path(), "eval"), "loss");
    assert_eq!(evals[0], evals[1], "a learning rate of 0 changes nothing");
}

#[test]
fn full_fine_tuning_saves_a_model_that_loads_again() {
    let text =
        "adapter.method=full train.max_steps=30 train.learning_rate=1e-2 train.eval_every=30";
    for base in ["gqa", "tied_llama3"] {
        let out = tempdir().unwrap();
        let recipe = recipe(&tiny_model(base), &settings(text));
        let mut run = start(recipe.clone(), &rows(), out.path());
        let (train, before) = (
            windows(&run.windows),
            logits(&load(&tiny_model(base)), &rows().train.get(1)),
        );
        step(&mut run, train[0].clone());
        let valid = run.model.valid().model;
        let saved = run.trained.save(&valid, &run.base, "", out.path()).unwrap();
        let ours = logits(&valid, &rows().train.get(1));
        assert_eq!(logits(&load(&saved), &rows().train.get(1)), ours, "{base}");
        assert_ne!(ours, before);

        let out = tempdir().unwrap();
        finish(start(recipe, &rows(), out.path()), |_, _| {}).unwrap();
        let losses = numbers(&metrics(out.path(), "train"), "loss");
        assert!(losses[29] < 0.2 * losses[0], "{base}: {losses:?}");
        let folder = out.path().join("model");
        let config = |folder: &Path| -> serde_json::Value {
            serde_json::from_slice(&std::fs::read(folder.join("config.json")).unwrap()).unwrap()
        };
        let mut expected = config(&tiny_model(base));
        expected["dtype"] = "float32".into(); // what it is saved as, whatever it was
        assert_eq!(config(&folder), expected);
        let eval = numbers(&metrics(out.path(), "eval"), "loss")[0];
        assert_eq!(
            evaluation(load(&folder), &rows().eval, 4).loss,
            eval,
            "{base}"
        );
    }
}

#[test]
fn pre_training_needs_only_a_configuration() {
    let base = tempdir().unwrap();
    std::fs::copy(
        tiny_model("gqa").join("config.json"),
        base.path().join("config.json"),
    )
    .unwrap();
    let text = "model.init=random adapter.method=full train.max_steps=40 train.learning_rate=1e-2";
    let train = |seed: u64| {
        let out = tempdir().unwrap();
        let settings = settings(&format!("{text} train.seed={seed}"));
        finish(
            start(recipe(base.path(), &settings), &rows(), out.path()),
            |_, _| {},
        )
        .unwrap();
        let losses = numbers(&metrics(out.path(), "train"), "loss");
        assert!(
            (losses[0] - 96f64.ln()).abs() < 0.3,
            "nothing is known at first: {}",
            losses[0]
        );
        assert!(losses[39] < 0.3 * losses[0], "{losses:?}");
        losses
    };
    let losses = train(1);
    assert_eq!(losses, train(1));
    assert_ne!(losses[0], train(2)[0]);
}

#[test]
fn evaluation_is_the_mean_over_tokens_row_by_row() {
    let model = load(&tiny_model("gqa"));
    let rows = rows().train;
    let by_hand: Vec<Vec<f64>> = rows.iter().map(|row| nll_by_hand(&model, &row)).collect();
    let tokens: usize = by_hand.iter().map(Vec::len).sum();
    let loss = by_hand.iter().flatten().sum::<f64>() / tokens as f64;
    let mut expected = by_hand.iter();
    let hear = |batch: &MicroBatch, nll: &[f32]| {
        for row in batch.by_row(nll) {
            let expected = expected.next().unwrap();
            assert_eq!(row.len(), expected.len());
            let pairs = expected.iter().zip(row);
            let off = pairs.map(|(expected, nll)| (expected - f64::from(*nll)).abs());
            assert!(off.fold(0.0, f64::max) < 2e-6); // one f32 rounding of values up to 10
        }
        Ok::<_, std::convert::Infallible>(())
    };
    let (lm, batches) = (lm(model), EvalBatches::new(rows.clone(), 3));
    let result = evaluate(&lm, &batches, &|| false, hear).unwrap().unwrap();
    assert!(
        (result.loss - loss).abs() < 1e-6 * loss,
        "{} {loss}",
        result.loss
    );
    assert_eq!((result.tokens, result.rows), (tokens, rows.len()));
    assert_eq!(result.perplexity, result.loss.exp());
    assert_eq!(expected.next(), None);

    // asked before each of the four batches
    for answered in 0..4 {
        let asked = AtomicUsize::new(0);
        let mut heard = 0;
        let cut = || asked.fetch_add(1, Ordering::Relaxed) == answered;
        let result = evaluate(&lm, &batches, &cut, |_, _| {
            heard += 1;
            Ok::<_, std::convert::Infallible>(())
        });
        assert_eq!((result.unwrap(), heard), (None, answered));
    }
}

#[test]
fn rows_beside_a_row_change_nothing() {
    let lm = lm(load(&tiny_model("gqa")));
    let rows = rows().train;
    let together = lm.token_nll(&MicroBatch::new(&rows.iter().collect::<Vec<_>>()));
    let alone: Vec<f32> = rows
        .iter()
        .flat_map(|row| lm.token_nll(&MicroBatch::new([&row])))
        .collect();
    assert_eq!(together.len(), alone.len());
    for (l, r) in together.iter().zip(&alone) {
        assert!((l - r).abs() < 1e-6 * r.max(1.0), "{l} {r}");
    }
}

#[test]
fn packing_changes_neither_loss_nor_gradients() {
    for (model, settings_) in [
        ("gqa", ""),
        ("gqa", "train.recompute=block"),
        ("gqa", "adapter.method=full"),
        ("tied_llama3", ""),
        ("gqa", in_front("prompt")),
        ("gqa", in_front("prefix")),
        ("tied_llama3", in_front("mpt")),
    ] {
        let text = format!("data.packing=true data.max_length=31 {settings_}");
        let out = tempdir().unwrap();
        let recipe = recipe(&tiny_model(model), &settings(&text));
        let mut run = start(recipe, &rows(), out.path());
        let mut all = windows(&run.windows);
        step(&mut run, all.remove(0)); // so that lora_b is not zero
        let rows: Vec<Sample> = rows().train.iter().collect();
        let output = |micro_batches: Vec<MicroBatch>| {
            let window = Window {
                micro_batches,
                step: 0,
                epoch: 0.0,
                loss_scale: 1.0,
            };
            let output = run.model.step(window);
            (output.item.loss, gradients(&run.model, &output.grads))
        };
        let (loss, grads) = output(rows.iter().map(|row| MicroBatch::new([row])).collect());
        for order in 0..6 {
            let order = epoch_order(rows.len(), 1, order, order > 0);
            let row = |&row: &usize| &rows[row];
            for at_a_time in [11, 4] {
                let batches = order.chunks(at_a_time);
                let batches = batches.map(|batch| MicroBatch::new(batch.iter().map(row)));
                let (packed_loss, packed_grads) = output(batches.collect());
                assert!(
                    (packed_loss - loss).abs() < 1e-6 * loss,
                    "{packed_loss} {loss}"
                );
                for (id, packed) in packed_grads {
                    let largest = grads[&id].iter().fold(0f32, |max, x| max.max(x.abs()));
                    for (packed, alone) in packed.iter().zip(&grads[&id]) {
                        let off = (packed - alone).abs();
                        assert!(off <= 1e-5 * largest, "{model}: {off} of {largest}");
                    }
                }
            }
        }
    }
}

/// Every method that stands in front of rows learns, over a dense base and over one in 4 bits, and
/// what it saves has the loss that it had.
#[test]
fn virtual_tokens_learn_and_are_saved_as_they_are() {
    for (method, format) in [
        ("prompt", "none"),
        ("prefix", "nf4"),
        ("projected", "none"),
        ("mpt", "nf4"),
        ("ptuning", "none"),
        ("lstm", "none"),
    ] {
        let text = format!(
            "{} train.max_steps=60 train.learning_rate=0.02 train.micro_batch_size=11 \
             data.packing=true data.shuffle=false quantization.format={format}",
            in_front(method)
        );
        let (out, _) = run_gqa(&text);
        let losses = numbers(&metrics(out.path(), "train"), "loss");
        let (first, last) = (losses[0], losses[59]);
        assert!(last < 0.95 * first, "{method}: {first} to {last}");

        let folder = ModelFolder::open(&tiny_model("gqa")).unwrap();
        let checkpoint = folder.checkpoint().unwrap();
        let scheme = Recipe::read(Some(&out.path().join(RECIPE_FILE)), &[]).unwrap();
        let scheme = scheme.quantization.scheme();
        let device = Default::default();
        let model = adapters::load(&folder.config, &checkpoint, scheme, &device).unwrap();
        let (model, _) = peft::load(model, &out.path().join("adapter"), &device).unwrap();
        let loss = evaluation(model, &rows().eval, 5).loss;
        let told = *numbers(&metrics(out.path(), "eval"), "loss")
            .last()
            .unwrap();
        assert!(
            (loss - told).abs() < 1e-6 * told,
            "{method}: {loss} for {told}"
        );
    }
}

/// Training goes on from embeddings that an encoder made, without it.
#[test]
fn what_an_encoder_made_is_trained_on_without_it() {
    for method in ["projected", "lstm"] {
        let (first, _) = run_gqa(&eventful(method));
        let adapter = first.path().join("adapter");
        let method = if method == "lstm" {
            "ptuning"
        } else {
            "prefix"
        };
        let from = format!(
            "adapter.method={method} adapter.init_from={}",
            adapter.display()
        );
        let (second, _) = run_gqa(&format!("{EVENTFUL} {from}"));
        let begun = numbers(&metrics(second.path(), "train"), "loss")[0];
        let fresh = numbers(&metrics(first.path(), "train"), "loss")[0];
        assert!(begun < fresh, "{method}: {begun} {fresh}");
        let text = std::fs::read_to_string(second.path().join(RECIPE_FILE)).unwrap();
        let off = [
            "prefix_projection = false",
            "encoder_reparameterization_type = \"NONE\"",
        ];
        assert!(off.iter().any(|line| text.contains(line)), "{text}");
    }
}

#[test]
fn a_packed_epoch_has_every_row_once() {
    let out = tempdir().unwrap();
    let text = "data.packing=true data.max_length=31 train.epochs=3 train.micro_batch_size=2";
    let run = start_gqa(text, out.path());
    assert_eq!(
        (run.windows.num_sequences(), run.windows.num_steps()),
        (6, 9)
    );
    let tokens: usize = rows().train.iter().map(|row| row.input_ids.len()).sum();
    assert_eq!(run.windows.fill_ratio(), Some(tokens as f64 / (6.0 * 31.0)));
    for epoch in windows(&run.windows).chunks(3) {
        let batches = || epoch.iter().flat_map(|window| &window.micro_batches);
        let lengths = batches().flat_map(|batch| batch.segments().iter());
        let mut lengths: Vec<_> = lengths.map(|row| row.queries.len()).collect();
        lengths.sort_unstable();
        assert_eq!(lengths, [3, 5, 6, 8, 9, 12, 14, 18, 22, 27, 31]);
        assert_eq!(epoch[2].epoch.fract(), 0.0);
    }
    finish(run, |_, _| {}).unwrap();
    assert_eq!(checkpoints(out.path()), ["step-000006", "step-000009"]);
    let lines = metrics(out.path(), "train");
    let epochs = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0].map(|step| step / 3.0);
    assert_eq!(numbers(&lines, "epoch"), epochs);
    for line in &lines {
        // all tokens, and nothing else
        let all = line["tokens_per_second"].as_f64().unwrap() * line["seconds"].as_f64().unwrap();
        assert!(
            (all - all.round()).abs() < 1e-6 && all.round() <= 62.0,
            "{line}"
        );
    }
    assert_eq!(
        numbers(&metrics(out.path(), "eval"), "step"),
        [3.0, 6.0, 9.0]
    );
}

#[test]
fn only_trained_tokens_make_the_loss() {
    let mut long = row(50, 20, 4);
    long.labels[12..].fill(IGNORED);
    let mut other = long.clone();
    for id in &mut other.input_ids[12..] {
        *id = 95 - *id % 90; // nothing looks at what follows the last trained token
    }
    let out = tempdir().unwrap();
    let mut run = start_gqa("train.max_steps=1", out.path());
    let first = windows(&run.windows).remove(0);
    step(&mut run, first); // so that lora_b is not zero
    let output = |row: &Sample| {
        let window = Window {
            micro_batches: vec![MicroBatch::new([row])],
            step: 0,
            epoch: 0.0,
            loss_scale: 1.0,
        };
        let output = run.model.step(window);
        (
            output.item.loss,
            gradients(&run.model, &output.grads),
            output.item.trained_tokens,
        )
    };
    let (loss, grads, tokens) = output(&long);
    assert_eq!(tokens, 8);
    assert_eq!((loss, grads.clone(), tokens), output(&other));
    // while each label does count
    let mut fewer = long.clone();
    fewer.labels[11] = IGNORED;
    let (fewer_loss, fewer_grads, _) = output(&fewer);
    assert!(fewer_loss != loss && fewer_grads != grads);
    let model = run.model.valid().model;
    let by_hand = nll_by_hand(&model, &long).iter().sum::<f64>() / 8.0;
    assert!((loss - by_hand).abs() < 1e-6 * loss, "{loss} {by_hand}");
}

/// Overfits quickly: the evaluation loss rises soon.
const OVERFIT: &str = "train.max_steps=20 train.learning_rate=3e-2 train.lr_schedule=constant \
    train.warmup_steps=0 train.eval_every=1";

#[test]
fn the_best_adapter_is_that_of_the_lowest_evaluation_loss() {
    let (out, outcome) = run_gqa(&format!(
        "{OVERFIT} train.save_every=1 train.keep_checkpoints=3"
    ));
    let evals = metrics(out.path(), "eval");
    let losses = numbers(&evals, "loss");
    let lowest = losses.iter().copied().fold(f64::INFINITY, f64::min);
    let best = outcome.best.unwrap();
    assert_eq!(best.loss, lowest);
    assert_eq!(evals[best.step - 1]["loss"], lowest);
    assert!(
        (2..15).contains(&best.step),
        "the case is chosen so: {losses:?}"
    );
    let loss_of = |folder: &str| {
        let base = load(&tiny_model("gqa"));
        let (model, _) = peft::load(base, &out.path().join(folder), &Default::default()).unwrap();
        evaluation(model, &rows().eval, 4).loss
    };
    assert_eq!(loss_of("best"), lowest);
    assert_eq!(loss_of("adapter"), losses[19]);
    // the newest three checkpoints, and always the best
    let best = format!("step-{:06}", best.step);
    assert_eq!(
        checkpoints(out.path()),
        [&best, "step-000018", "step-000019", "step-000020"]
    );
    assert_eq!(loss_of(&format!("checkpoints/{best}/adapter")), lowest);
}

#[test]
fn a_run_stops_early_when_patience_ends() {
    let (out, outcome) = run_gqa(&format!("{OVERFIT} train.early_stopping_patience=2"));
    let best = outcome.best.unwrap();
    assert_eq!(outcome.stopped, Some(Stopped::Early));
    let losses = numbers(&metrics(out.path(), "eval"), "loss");
    assert_eq!(losses.len(), outcome.steps);
    assert_eq!(best.step + 2, outcome.steps);
    assert!(losses[best.step..].iter().all(|loss| *loss >= best.loss));
    let adapter = adapter_bytes(&out.path().join("adapter"));
    // going on from there is stopping there
    let again = finish(resume(out.path(), &rows()), |_, _| {
        panic!("no step is left")
    })
    .unwrap();
    assert_eq!(
        (again.steps, again.stopped),
        (outcome.steps, Some(Stopped::Early))
    );
    assert_eq!(adapter_bytes(&out.path().join("adapter")), adapter);
}

#[test]
fn the_newest_checkpoints_stay() {
    let (out, _) = run_gqa("train.max_steps=5 train.save_every=1");
    assert_eq!(checkpoints(out.path()), ["step-000004", "step-000005"]);
    let (out, _) = run_gqa("train.max_steps=5 train.save_every=2 train.keep_checkpoints=9");
    assert_eq!(
        checkpoints(out.path()),
        ["step-000002", "step-000004", "step-000005"]
    );
    // 11 rows, 4 a step: each epoch ends in its third, sixth and ninth step
    let (out, _) = run_gqa("train.max_steps=9 train.keep_checkpoints=9");
    assert_eq!(
        checkpoints(out.path()),
        ["step-000003", "step-000006", "step-000009"]
    );
    assert_eq!(
        numbers(&metrics(out.path(), "eval"), "step"),
        [3.0, 6.0, 9.0]
    );
}

#[test]
fn a_damaged_checkpoint_is_skipped_for_the_one_before() {
    let text = "train.max_steps=4 train.save_every=2 train.keep_checkpoints=1 train.eval_every=1";
    let two = text.replace("checkpoints=1", "checkpoints=2");
    let (whole, _) = run_gqa(text);
    let (out, _) = run_gqa(&two);
    let at = |step: usize| out.path().join(format!("checkpoints/step-{step:06}"));
    let newest = || {
        let mut skipped = Vec::new();
        let all = Checkpoints::new(out.path(), 2);
        let newest = all.newest(|path, error| skipped.push((path.to_owned(), error.to_string())));
        (newest.unwrap(), skipped)
    };
    assert_eq!(newest(), (Some(at(4)), vec![]));
    let names: Vec<PathBuf> = files(&at(4)).into_iter().map(|(name, _)| name).collect();
    assert_eq!(names.len(), 5, "{names:?}");
    for name in &names {
        let file = at(4).join(name);
        let bytes = std::fs::read(&file).unwrap();
        for position in [0, bytes.len() / 3, bytes.len() / 2, bytes.len() - 1] {
            let mut damaged = bytes.clone();
            damaged[position] ^= 1;
            std::fs::write(&file, damaged).unwrap();
            let (found, skipped) = newest();
            assert_eq!(found, Some(at(2)), "{} at {position}", name.display());
            assert!(skipped.len() == 1 && skipped[0].0 == at(4), "{skipped:?}");
        }
        for kept in [0, bytes.len() / 2] {
            std::fs::write(&file, &bytes[..kept]).unwrap();
            assert_eq!(newest().0, Some(at(2)), "{} cut to {kept}", name.display());
        }
        std::fs::remove_file(&file).unwrap();
        assert_eq!(newest().0, Some(at(2)), "{} removed", name.display());
        std::fs::write(&file, &bytes).unwrap();
    }
    assert_eq!(newest().0, Some(at(4)));

    // going on from the older one, the damaged one does not count among those that stay
    std::fs::write(at(4).join("SHA256SUMS"), "").unwrap();
    let path = out.path().join(RECIPE_FILE);
    let recipe = std::fs::read_to_string(&path).unwrap();
    std::fs::write(
        &path,
        recipe.replace("keep_checkpoints = 2", "keep_checkpoints = 1"),
    )
    .unwrap();
    let part = finish(resume(out.path(), &rows()), |event, interrupter| {
        if matches!(event, Event::Evaluated { step: 3, .. }) {
            interrupter.stop(Some("test"));
        }
    });
    assert_eq!(part.unwrap().steps, 3);
    assert_eq!(checkpoints(out.path()), ["step-000003"]);
    finish(resume(out.path(), &rows()), |_, _| {}).unwrap();
    assert_eq!(steady_metrics(out.path()), steady_metrics(whole.path()));
    std::fs::remove_dir_all(out.path().join("checkpoints")).unwrap();
    assert_eq!(newest(), (None, vec![]));
}

#[test]
fn what_a_crash_left_half_written_does_no_harm() {
    let text = "train.max_steps=4 train.save_every=2 train.eval_every=2 train.learning_rate=1e-2";
    let (whole, _) = run_gqa(text);
    let out = tempdir().unwrap();
    let run = start_gqa(text, out.path());
    for folder in [
        "checkpoints/.step-000002.part/adapter",
        ".best.part/adapter",
        "best",
    ] {
        let folder = out.path().join(folder);
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(folder.join("junk"), "half").unwrap();
    }
    finish(run, |_, _| {}).unwrap();
    assert_eq!(checkpoints(out.path()), ["step-000002", "step-000004"]);
    assert!(!out.path().join(".best.part").exists());
    for folder in ["best", "adapter", "checkpoints"] {
        let files = |run: &TempDir| files(&run.path().join(folder));
        assert!(files(&out) == files(&whole), "{folder}");
    }
    // nor is a half-written checkpoint taken for the newest
    let part = out.path().join("checkpoints/.step-000009.part");
    std::fs::rename(out.path().join("checkpoints/step-000004"), part).unwrap();
    let newest = Checkpoints::new(out.path(), 2)
        .newest(|_, _| {})
        .unwrap()
        .unwrap();
    assert!(newest.ends_with("step-000002"));
}

/// The last update gives weights that are no numbers, or that give none: what was good before it is
/// saved, and what it left is not.
#[test]
fn weights_that_are_no_numbers_are_never_saved() {
    for (text, told, good) in [
        ("train.save_every=9", "the weight model.layers.0.", None),
        ("train.save_every=1", "the weight model.layers.0.", Some(1)),
        ("train.eval_every=1", "the evaluation loss after", None),
        (
            "train.eval_every=1 train.save_every=1",
            "the evaluation loss after",
            Some(1),
        ),
    ] {
        let text = format!(
            "train.max_steps=5 train.learning_rate=1e38 train.warmup_steps=1 train.max_grad_norm=0 {text}"
        );
        let out = tempdir().unwrap();
        let error = finish(start_gqa(&text, out.path()), |_, _| {}).unwrap_err();
        let good = match good {
            Some(step) => {
                let path = out.path().join(format!("checkpoints/step-{step:06}"));
                format!("the last good checkpoint is {}", path.display())
            }
            None => "there is no checkpoint from before".to_owned(),
        };
        let adapter = out.path().join("adapter");
        let saved = format!("the last good weights are saved in {}", adapter.display());
        let end = format!(" step 2 is not a finite number; {saved}, {good}");
        let error = error.to_string();
        assert!(error.starts_with(told) && error.ends_with(&end), "{error}");
        // a warm-up of one step leaves the weights as they began, which is what is good here
        let (first, _) = run_gqa("train.max_steps=1 train.warmup_steps=1");
        let bytes = |run: &Path| adapter_bytes(&run.join("adapter"));
        assert_eq!(bytes(out.path()), bytes(first.path()));
        let text = std::fs::read_to_string(out.path().join(METRICS_FILE)).unwrap();
        assert!(!text.contains("null"), "{text}");
    }
}

/// The same where no copy of the weights is kept.
#[test]
fn a_model_that_is_no_numbers_is_never_saved() {
    let text = "train.learning_rate=1e30 train.weight_decay=1e30 train.warmup_steps=0 \
                train.lr_schedule=constant train.save_every=1 train.max_steps=1 adapter.method=full";
    let none = Rows {
        eval: Samples::default(),
        ..rows()
    };
    let out = tempdir().unwrap();
    let run = start(
        recipe(&tiny_model("gqa"), &settings(text)),
        &none,
        out.path(),
    );
    let error = finish(run, |_, _| {}).unwrap_err().to_string();
    let expected = "the weight model.embed_tokens.weight after step 1 is not a finite number; no \
                    weights are saved, there is no checkpoint from before";
    assert_eq!(error, expected);
    assert_eq!(metrics(out.path(), "train").len(), 1);
    for folder in ["model", "best", "checkpoints"] {
        assert!(!out.path().join(folder).exists(), "{folder}");
    }
}

#[test]
fn one_run_at_a_time_trains_in_a_folder() {
    let out = tempdir().unwrap();
    let run = start_gqa("train.max_steps=2 train.save_every=1", out.path());
    let second = || RunFolder::open(out.path()).map(|_| ());
    assert!(matches!(second(), Err(Error::InUse { .. })));
    finish(run, |_, _| {}).unwrap();
    second().unwrap();
    second().unwrap(); // it was let go of
}

/// A crash between the two renames that put a folder in the place of another.
#[test]
fn what_was_set_aside_is_put_back() {
    let text = "train.max_steps=2 train.save_every=1 train.eval_every=1";
    let (out, _) = run_gqa(text);
    let at = |name: &str| out.path().join(name);
    let before = files(out.path());
    for (there, aside) in [
        ("best", ".best.old"),
        ("checkpoints/step-000002", "checkpoints/.step-000002.old"),
    ] {
        std::fs::rename(at(there), at(aside)).unwrap();
        std::fs::create_dir_all(at(aside).with_extension("part")).unwrap();
    }
    std::fs::create_dir(at(".adapter.old")).unwrap(); // its successor is there
    std::fs::write(at(".mine.old"), "mine").unwrap();
    std::fs::write(at(".part-x1"), "half a").unwrap();
    drop(RunFolder::open(out.path()).unwrap());
    std::fs::remove_file(at(".mine.old")).unwrap();
    assert!(files(out.path()) == before);
    let names = std::fs::read_dir(out.path()).unwrap();
    let hidden = names.filter(|name| {
        let name = name.as_ref().unwrap().file_name();
        name.to_string_lossy().starts_with('.')
    });
    assert_eq!(hidden.count(), 1, "the lock");
}

#[test]
fn a_run_needs_an_empty_folder() {
    let out = tempdir().unwrap();
    std::fs::write(out.path().join("notes.txt"), "mine").unwrap();
    let mut recipe = recipe(&tiny_model("gqa"), &[]);
    let trained = session::trained(&mut recipe).unwrap();
    let base = ModelFolder::open(&tiny_model("gqa")).unwrap();
    let device = Default::default();
    let started = session::start::<B>(recipe, trained, base, rows(), out.path(), device);
    assert!(matches!(
        started.map(|_| ()),
        Err(Error::OutputNotEmpty { .. })
    ));
    assert_eq!(files(out.path()).len(), 1);
}

#[test]
fn clipping_scales_all_gradients_together() {
    let out = tempdir().unwrap();
    let run = start_gqa("train.max_steps=1 adapter.method=full", out.path());
    let output = run.model.step(windows(&run.windows).remove(0));
    let mut grads = output.grads;
    let before = gradients(&run.model, &grads);
    let square = |x: &f32| f64::from(*x).powi(2);
    let by_hand = before.values().flatten().map(square).sum::<f64>().sqrt();
    for (limit, factor) in [(0.0, 1.0), (2.0 * by_hand, 1.0), (0.5 * by_hand, 0.5)] {
        let norm = clip_gradients(&mut grads, &run.model, limit);
        assert!((norm - by_hand).abs() < 1e-5 * by_hand, "{norm} {by_hand}");
        for (id, after) in gradients(&run.model, &grads) {
            for (a, b) in after.iter().zip(&before[&id]) {
                let wanted = factor * f64::from(*b);
                assert!((f64::from(*a) - wanted).abs() <= 1e-5 * wanted.abs());
            }
        }
    }
}

#[test]
fn runs_report_what_they_do() {
    let (saved, evaluated) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (saved.clone(), evaluated.clone());
    let out = tempdir().unwrap();
    let run = start_gqa(
        "train.max_steps=6 train.save_every=2 train.eval_every=3",
        out.path(),
    );
    let outcome = finish(run, move |event, _| {
        let count = match event {
            Event::Saved { .. } => &counts.0,
            Event::Evaluated { .. } => &counts.1,
            other => panic!("{other:?}"),
        };
        count.fetch_add(1, Ordering::Relaxed);
    });
    let lines = metrics(out.path(), "train");
    assert_eq!(outcome.unwrap().loss, lines[5]["loss"].as_f64());
    assert_eq!(
        (
            saved.load(Ordering::Relaxed),
            evaluated.load(Ordering::Relaxed)
        ),
        (3, 2)
    );
    assert_eq!(numbers(&lines, "step"), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    assert_eq!(lines[5]["epoch"].as_f64(), Some(24.0 / 11.0));
    for key in [
        "seconds",
        "tokens_per_second",
        "peak_memory_bytes",
        "grad_norm",
    ] {
        assert!(
            numbers(&lines, key).iter().all(|value| *value > 0.0),
            "{key}"
        );
    }
}

/// Visits what is trained, tensor by tensor, and moves one along a direction.
struct Move<'a> {
    direction: &'a dyn Fn(usize, usize) -> Option<Vec<f32>>,
    step: f32,
    index: usize,
}

impl ModuleMapper<B> for Move<'_> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        if !param.is_require_grad() {
            return param;
        }
        let (shape, at) = (param.shape(), self.index);
        self.index += 1;
        let Some(direction) = (self.direction)(at, shape.num_elements()) else {
            return param;
        };
        let direction = Tensor::from_data(TensorData::new(direction, shape), &param.device());
        let moved = param.val() + direction * self.step;
        Param::initialized(param.id, moved.detach().require_grad())
    }
}

/// The gradients of all that is trained, in the order of [`Move`].
fn trained_gradients(model: &CausalLm<B>, gradients: &GradientsParams) -> Vec<Vec<f32>> {
    struct Read<'a>(&'a GradientsParams, Vec<Vec<f32>>);
    impl ModuleVisitor<B> for Read<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            if param.is_require_grad() {
                let gradient = self.0.get::<Flex, D>(param.id).expect("it is trained");
                self.1.push(gradient.into_data().to_vec().unwrap());
            }
        }
    }
    let mut read = Read(gradients, Vec::new());
    model.visit(&mut read);
    read.1
}

/// Along the gradient of every tensor of every method, the loss rises as the gradient is long. Not of
/// DoRA, whose gradients take the norm of the weights for a constant, as PEFT's do: its curves are
/// PEFT's.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    const STEP: f32 = 2e-3;
    for method in [
        "method=lora",
        "method=lora adapter.target_modules=[embed_tokens,q_proj,lm_head]",
        "method=adalora adapter.orth_reg_weight=1e-9",
        "method=loha adapter.rank=3",
        "method=lokr adapter.rank=3",
        "method=lokr adapter.rank=3 adapter.decompose_both=true",
        "method=ia3",
        "method=vera adapter.rank=7",
        "method=prefix adapter.num_virtual_tokens=3",
        "method=prefix adapter.num_virtual_tokens=3 adapter.prefix_projection=true",
        "method=prompt adapter.num_virtual_tokens=3",
        "method=mpt adapter.num_tasks=3 adapter.num_ranks=2",
        "method=ptuning adapter.num_virtual_tokens=3",
        "method=ptuning adapter.num_virtual_tokens=3 adapter.encoder_reparameterization_type=LSTM",
        "method=full",
    ] {
        let folder = tempdir().unwrap();
        let text = format!("data.shuffle=false train.micro_batch_size=6 adapter.{method}");
        let run = start_gqa(&text, folder.path());
        let window = windows(&run.windows).remove(0);
        let moved =
            |model: &CausalLm<B>, direction: &dyn Fn(usize, usize) -> Option<Vec<f32>>, step| {
                model.clone().map(&mut Move {
                    direction,
                    step,
                    index: 0,
                })
            };
        // away from where some tensors are zero and others have no gradient
        let noise = |at: usize, count| Some(normal(3, &at.to_string(), count, 0.1));
        let model = moved(&run.model, &noise, 1.0);
        let all = trained_gradients(&model, &model.step(window.clone()).grads);
        assert!(!all.is_empty());
        for (index, gradient) in all.iter().enumerate() {
            let squares: f64 = gradient.iter().map(|x| f64::from(*x).powi(2)).sum();
            let length = squares.sqrt();
            assert!(length > 1e-6, "{method}: tensor {index} has no gradient");
            let unit = |at, _| {
                let unit = || {
                    gradient
                        .iter()
                        .map(|x| (f64::from(*x) / length) as f32)
                        .collect()
                };
                (at == index).then(unit)
            };
            let loss = |step| moved(&model, &unit, step).step(window.clone()).item.loss;
            let slope = (loss(STEP) - loss(-STEP)) / f64::from(2.0 * STEP);
            // a loss of 5 in f32 ends in 5e-7
            let off = (slope - length).abs() / (length + 0.02);
            assert!(off < 0.02, "{method}: tensor {index}: {slope} for {length}");
        }
    }
}
