//! Adapters written by PEFT (`fixtures/make.py`): loaded, evaluated and saved again.

mod harness;
#[allow(dead_code, reason = "other tests weigh adapters and compare logits")]
mod logits;

use std::path::{Path, PathBuf};

use adapters::methods::lora::{LoraInit, LoraSettings};
use adapters::{AdaptedLlama, AdapterConfig, Pattern, Targets, peft};
use burn::tensor::{Tensor, TensorData};
use harness::{B, lora, rank_4, root};
use logits::{base, base_of, fixture, load};
use model::checkpoint::{Checkpoint, NamedTensor, write_safetensors};
use model::config::LlamaConfig;
use model::load::normal;
use model::rope::Rope;
use model::segments::Segments;
use quant::{Format, Scheme};
use safetensors::SafeTensors;
use serde_json::Value;

fn fixtures() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(fixture(""))
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let folders: Vec<_> = entries
        .filter(|path| path.join("base.txt").is_file())
        .collect();
    assert!(folders.len() >= 8);
    folders
}

/// The largest difference between a model's logits and those of a fixture.
fn max_off(model: &AdaptedLlama<B>, folder: &Path) -> f32 {
    let device = Default::default();
    let bytes = std::fs::read(folder.join("expected.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (ids, logits) = (
        file.tensor("input_ids").unwrap(),
        file.tensor("logits").unwrap(),
    );
    let [b, s] = [ids.shape()[0], ids.shape()[1]];
    let (id_bytes, _) = ids.data().as_chunks::<8>();
    let ids: Vec<i64> = id_bytes.iter().map(|b| i64::from_le_bytes(*b)).collect();
    let (value_bytes, _) = logits.data().as_chunks::<4>();
    let values: Vec<f32> = value_bytes.iter().map(|b| f32::from_le_bytes(*b)).collect();
    let expected =
        Tensor::<B, 2>::from_data(TensorData::new(values, [b * s, logits.shape()[2]]), &device);
    let rope = Rope::new(&model.config, Segments::new(vec![s; b]), &device);
    let ids = Tensor::from_data(TensorData::new(ids, [b * s]), &device);
    let logits = model.logits(model.forward(ids, &rope, None));
    (logits - expected).abs().max().into_scalar()
}

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn logits_equal_those_of_peft() {
    for folder in fixtures() {
        let plain = base_of(&folder);
        assert!(
            max_off(&plain, &folder) > 0.01,
            "{}: the adapter matters",
            folder.display()
        );
        let (model, _) = peft::load(plain, &folder, &Default::default()).unwrap();
        let off = max_off(&model, &folder);
        // f32 sums in another order
        assert!(off < 2e-5, "{}: {off}", folder.display());
    }
}

/// An adapter of one of the two says nothing of the other, which stays as it was.
#[test]
fn tied_weights_that_an_adapter_changes_come_apart() {
    for case in ["tied_head", "tied_save"] {
        let folder = PathBuf::from("tests/fixtures/merge").join(case);
        let tied = load(&base("tied_llama3"));
        assert!(
            max_off(&tied, &folder) > 0.01,
            "{case}: the adapter matters"
        );
        let adapter = folder.join("adapter");
        let (model, _) = peft::load(tied, &adapter, &Default::default()).unwrap();
        let off = max_off(&model, &folder);
        assert!(off < 2e-5, "{case}: {off}");
    }
}

#[test]
fn what_was_loaded_is_saved_again() {
    for folder in fixtures() {
        let (model, config) = peft::load(base_of(&folder), &folder, &Default::default()).unwrap();
        let out = tempfile::tempdir().unwrap();
        let theirs = json(folder.join(peft::CONFIG_FILE));
        let name = theirs["base_model_name_or_path"].as_str().unwrap();
        peft::save(&model, &config, name, out.path()).unwrap();
        let read = |folder: &Path| std::fs::read(folder.join(peft::MODEL_FILE)).unwrap();
        let (left, right) = (read(&folder), read(out.path()));
        let left = SafeTensors::deserialize(&left).unwrap();
        let right = SafeTensors::deserialize(&right).unwrap();
        // PEFT adds a copy of the base's lm_head when that is adapted
        let theirs_only = |key: &str| key.ends_with("base_layer.weight");
        assert_eq!(
            left.iter().filter(|(key, _)| !theirs_only(key)).count(),
            right.len()
        );
        for (key, tensor) in left.iter().filter(|(key, _)| !theirs_only(key)) {
            let ours = right.tensor(key).unwrap();
            assert_eq!(
                (tensor.shape(), tensor.data()),
                (ours.shape(), ours.data()),
                "{key}"
            );
        }
        let ours = json(out.path().join(peft::CONFIG_FILE));
        for (key, value) in ours.as_object().unwrap() {
            let sorted = |value: &Value| match value.as_array() {
                Some(list) => {
                    let mut list: Vec<String> = list.iter().map(Value::to_string).collect();
                    list.sort(); // PEFT writes sets, in any order
                    list
                }
                None => vec![value.to_string()],
            };
            let theirs = &theirs[key.as_str()];
            let equal = sorted(value) == sorted(theirs)
                || value.as_f64().is_some_and(|x| theirs.as_f64() == Some(x));
            assert!(
                equal,
                "{}: {key} is {value}, not {theirs}",
                folder.display()
            );
        }
    }
}

#[test]
fn fresh_adapters_leave_the_logits_unchanged() {
    let mut config = lora(Targets::AllLinear);
    config.selection.modules_to_save = vec!["lm_head".into()];
    let folder = root("../model/tests/fixtures/models/gqa");
    let mut model = load(&base("gqa"));
    adapters::attach(&mut model, &config, 1, &Default::default()).unwrap();
    assert!(max_off(&model, &folder) < 2e-5);
    let values = adapters::read_parameters(&model);
    let parameters = config.parameters(&model.config).unwrap();
    assert_eq!(values.len(), parameters.len());
    for (name, shape) in parameters
        .iter()
        .filter(|(name, _)| name.ends_with("lora_a"))
    {
        let values = &values[&model::weight::param_id(name)];
        let bound = 1.0 / (shape[1] as f32).sqrt();
        let largest = values.iter().fold(0f32, |m, v| m.max(v.abs()));
        assert!(
            largest <= bound && largest > 0.8 * bound,
            "{name}: {largest} of {bound}"
        );
    }
}

#[test]
fn embeddings_start_with_zeros_and_a_normal_factor() {
    let config = lora(Targets::Names(vec!["embed_tokens".into()]));
    let mut model = load(&base("gqa"));
    adapters::attach(&mut model, &config, 1, &Default::default()).unwrap();
    let values = adapters::read_parameters(&model);
    let of = |end: &str| &values[&model::weight::param_id(&format!("model.embed_tokens.{end}"))];
    assert!(of("lora_a").len() == 4 * 96 && of("lora_a").iter().all(|x| *x == 0.0));
    let squares: f32 = of("lora_b").iter().map(|x| x * x).sum();
    let variance = squares / of("lora_b").len() as f32;
    assert!((0.6..1.5).contains(&variance), "{variance}");
}

/// The logits of a model for a few tokens, one after the other.
fn some_logits(model: &AdaptedLlama<B>) -> Vec<f32> {
    let device = Default::default();
    let ids: Vec<i64> = (3..40).collect();
    let rope = Rope::new(&model.config, Segments::new([ids.len()]), &device);
    let ids = Tensor::from_data(TensorData::new(ids, [37]), &device);
    let logits = model.logits(model.forward(ids, &rope, None));
    logits.into_data().to_vec().unwrap()
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    let differences = a.iter().zip(b).map(|(a, b)| (a - b).abs());
    differences.fold(0.0, f32::max)
}

/// Whatever LoRA starts with, the model is the base model at first, and what is saved fits that.
#[test]
fn every_start_is_no_change_and_is_saved_for_the_base_as_it_is() {
    let device = Default::default();
    let folder = root("../model/tests/fixtures/models/by_64");
    let config = LlamaConfig::from_file(&folder.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open_folder(&folder).unwrap();
    let nf4 = Scheme::new(Format::Nf4, 64, false);
    let inits = [
        LoraInit::Default,
        LoraInit::Gaussian,
        LoraInit::Orthogonal,
        LoraInit::Olora,
        LoraInit::Pissa(None),
        LoraInit::Pissa(Some(2)),
    ];
    for (scheme, init) in [None, Some(nf4)]
        .into_iter()
        .flat_map(|s| inits.map(|i| (s, i)))
    {
        let load = || adapters::load(&config, &checkpoint, scheme, &device).unwrap();
        let settings = LoraSettings {
            init,
            use_rslora: init == LoraInit::Olora,
            rank_pattern: Pattern(vec![("up_proj".into(), 6)]),
            alpha_pattern: Pattern(vec![("v_proj".into(), 3.0)]),
            ..rank_4()
        };
        let targets = ["embed_tokens", "up_proj", "v_proj", "o_proj"].map(str::to_owned);
        let adapter = AdapterConfig {
            method: settings.into(),
            ..lora(Targets::Names(targets.into()))
        };
        let mut model = load();
        adapters::attach(&mut model, &adapter, 1, &device).unwrap();
        let base = some_logits(&load());
        let off = largest_difference(&some_logits(&model), &base);
        assert!(off < 1e-4, "{scheme:?} {init:?}: {off}");
        let moved = |(id, values): (_, Vec<f32>)| {
            let noise = normal(2, "noise", values.len(), 0.1);
            let moved = values.iter().zip(noise).map(|(x, y)| x + y);
            (id, moved.collect())
        };
        let values = adapters::read_parameters(&model).into_iter().map(moved);
        let model = adapters::write_parameters(model, values.collect());
        let trained = some_logits(&model);
        assert!(largest_difference(&trained, &base) > 0.05);
        let out = tempfile::tempdir().unwrap();
        peft::save(&model, &adapter, "base", out.path()).unwrap();
        let (loaded, read) = peft::load(load(), out.path(), &device).unwrap();
        let off = largest_difference(&some_logits(&loaded), &trained);
        assert!(off < 1e-4, "{scheme:?} {init:?}: {off}");
        let shape = |config: &AdapterConfig| config.parts(&model.config).unwrap()[0].shape.clone();
        assert_eq!(shape(&read)[0], if init.is_taken_out() { 8 } else { 4 });
    }
}

/// Weights of the base model beside the adapter, as `save_embedding_layers` of PEFT leaves them.
#[test]
fn embeddings_beside_an_adapter_are_to_be_the_models_own() {
    let copy = tempfile::tempdir().unwrap();
    let config = copy.path().join(peft::CONFIG_FILE);
    std::fs::copy(fixture("qv").join(peft::CONFIG_FILE), config).unwrap();
    let adapter = Checkpoint::open_file(&fixture("qv").join(peft::MODEL_FILE)).unwrap();
    let own = Checkpoint::open_folder(&base("gqa")).unwrap();
    let write = |factor: f32| {
        let theirs = |name: &str| NamedTensor {
            name: format!("base_model.model.{name}"),
            shape: own.shape(name).unwrap().to_vec(),
            values: own.read(name).unwrap().iter().map(|x| factor * x).collect(),
        };
        let mut all: Vec<_> = adapter
            .tensors()
            .map(|(name, shape)| NamedTensor {
                name: name.to_owned(),
                shape: shape.to_vec(),
                values: adapter.read(name).unwrap(),
            })
            .collect();
        all.extend(["model.embed_tokens.weight", "lm_head.weight"].map(theirs));
        write_safetensors(&copy.path().join(peft::MODEL_FILE), &all, &[]).unwrap();
    };
    write(1.0);
    let (model, _) = peft::load(load(&base("gqa")), copy.path(), &Default::default()).unwrap();
    assert!(max_off(&model, &fixture("qv")) < 2e-5);
    write(1.1);
    let text = error(copy.path(), "gqa");
    for key in [
        "model.embed_tokens.weight is not the model's own",
        "lm_head.weight is not",
    ] {
        assert!(text.contains(key), "{text}");
    }
    assert!(error(copy.path(), "wide_head").contains("expected"));
}

fn error(adapter: &Path, base_name: &str) -> String {
    let loaded = peft::load(load(&base(base_name)), adapter, &Default::default());
    loaded.map(|_| ()).unwrap_err().to_string()
}

#[test]
fn an_adapter_of_another_model_lists_every_tensor() {
    let text = error(&fixture("qv"), "wide_head");
    assert!(
        text.contains("layers.0.self_attn.q_proj.lora_B.weight is [32, 4], expected [96, 4]"),
        "{text}"
    );
    assert!(
        text.contains("layers.1.self_attn.v_proj.lora_B.weight"),
        "{text}"
    );
}

#[test]
fn missing_and_unexpected_keys_and_unknown_settings_are_errors() {
    let copy = tempfile::tempdir().unwrap();
    let tensors = copy.path().join(peft::MODEL_FILE);
    let config = copy.path().join(peft::CONFIG_FILE);
    std::fs::copy(fixture("qv").join(peft::MODEL_FILE), &tensors).unwrap();
    let set = |key: &str, value: Value| {
        let mut json = json(fixture("qv").join(peft::CONFIG_FILE));
        json[key] = value;
        std::fs::write(&config, json.to_string()).unwrap();
        error(copy.path(), "gqa")
    };
    let text = set("target_modules", serde_json::json!(["q_proj", "o_proj"]));
    assert!(text.contains("o_proj.lora_A.weight is missing"), "{text}");
    assert!(
        text.contains("v_proj.lora_A.weight is unexpected"),
        "{text}"
    );
    assert!(set("r", 5.into()).contains("is [4, 32], expected [5, 32]"));
    assert!(set("use_dora", true.into()).contains("lora_magnitude_vector is missing"));
    assert!(set("init_lora_weights", "pissa_niter_4".into()).contains("pissa_niter_4"));
    assert!(set("bias", "some".into()).contains("bias: unknown variant `some`"));
    assert!(set("lora_bias", true.into()).contains("lora_bias is true"));
    assert!(set("peft_type", "OFT".into()).contains("OFT"));
    let text = set("r", "four".into());
    assert!(
        text.contains("adapter_config.json") && text.contains("r: invalid type"),
        "{text}"
    );
    assert!(set("r", 0.into()).contains("adapter_config.json: r must be from 1"));
    assert!(set("lora_dropout", 1.5.into()).contains(": lora_dropout must be from 0"));
    std::fs::remove_file(&tensors).unwrap();
    assert!(set("r", 4.into()).contains("adapter_model.safetensors"));
}
