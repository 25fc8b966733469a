//! Adapters in front of rows, written by PEFT (`fixtures/prompts/make.py`): loaded, evaluated and
//! saved again.

#[allow(dead_code, reason = "other tests make adapters of their own")]
mod harness;
#[allow(dead_code, reason = "other tests weigh adapters and compare logits")]
mod logits;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use adapters::methods::mpt::{MptInit, MptSettings};
use adapters::methods::prefix::{InitWeights, PrefixSettings};
use adapters::methods::prompt::{PromptInit, PromptSettings};
use adapters::methods::ptuning::{PTuningSettings, Reparameterization};
use adapters::{AdaptedLlama, AdapterConfig, Method, Selection, Targets, peft};
use burn::tensor::{Tensor, TensorData};
use harness::{B, root};
use logits::{base, base_of, load};
use model::rope::Rope;
use model::segments::Segments;
use model::weight::param_id;
use safetensors::SafeTensors;
use serde_json::Value;

fn fixtures() -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root("tests/fixtures/prompts")).unwrap();
    let mut folders: Vec<_> = entries.map(|entry| entry.unwrap().path()).collect();
    folders.retain(|path| path.is_dir());
    folders.sort();
    assert_eq!(folders.len(), 7);
    folders
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

/// The 32-bit floats of a file.
fn floats(path: &Path) -> Tensors {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = file
        .iter()
        .filter(|(_, tensor)| tensor.dtype() == safetensors::Dtype::F32);
    floats
        .map(|(name, tensor)| {
            let (parts, _) = tensor.data().as_chunks::<4>();
            let values = parts.iter().map(|part| f32::from_le_bytes(*part)).collect();
            (name.to_owned(), (tensor.shape().to_vec(), values))
        })
        .collect()
}

fn integers(path: &Path, name: &str) -> Vec<i64> {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let (parts, _) = file.tensor(name).unwrap().data().as_chunks::<8>();
    parts.iter().map(|part| i64::from_le_bytes(*part)).collect()
}

fn most_off(left: &[f32], right: &[f32]) -> f32 {
    assert_eq!(left.len(), right.len());
    let off = left.iter().zip(right).map(|(l, r)| (l - r).abs());
    off.fold(0.0, f32::max)
}

/// The largest difference between a model's logits and those of a fixture, whose rows are of
/// different tasks.
fn logits_off(model: &AdaptedLlama<B>, folder: &Path) -> f32 {
    let (device, path) = (Default::default(), folder.join("expected.safetensors"));
    let (shape, expected) = floats(&path).remove("logits").unwrap();
    let [b, s] = [shape[0], shape[1]];
    let tasks = integers(&path, "task_ids")
        .into_iter()
        .map(|task| task as usize);
    let segments = Segments::new(vec![s; b]).of_tasks(tasks.collect());
    let rope = Rope::new(&model.config, segments, &device);
    let ids = TensorData::new(integers(&path, "input_ids"), [b * s]);
    let logits = model.logits(model.forward(Tensor::from_data(ids, &device), &rope, None));
    most_off(&logits.into_data().to_vec::<f32>().unwrap(), &expected)
}

fn json(path: PathBuf) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

#[test]
fn logits_equal_those_of_peft() {
    for folder in fixtures() {
        let plain = base_of(&folder);
        let case = folder.display();
        assert!(
            logits_off(&plain, &folder) > 0.01,
            "{case}: the adapter matters"
        );
        let (model, _) = peft::load(plain, &folder, &Default::default()).unwrap();
        let off = logits_off(&model, &folder);
        assert!(off < 2e-5, "{case}: {off}"); // f32 sums in another order
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
        let tensors = |folder: &Path| floats(&folder.join(peft::MODEL_FILE));
        assert!(
            tensors(out.path()) == tensors(&folder),
            "{}",
            folder.display()
        );
        assert_eq!(json(out.path().join(peft::CONFIG_FILE)), theirs);
    }
}

/// The settings of a fixture as they were before it was saved.
fn unsaved(config: AdapterConfig, theirs: &Value) -> AdapterConfig {
    let method = match config.method {
        Method::Prefix(settings) => Method::Prefix(PrefixSettings {
            prefix_projection: theirs["prefix_projection"].as_bool().unwrap(),
            ..settings
        }),
        Method::PTuning(settings) => {
            let kind = theirs["encoder_reparameterization_type"].clone();
            Method::PTuning(PTuningSettings {
                encoder_reparameterization_type: serde_json::from_value(kind).unwrap(),
                ..settings
            })
        }
        method => method,
    };
    AdapterConfig { method, ..config }
}

/// PEFT saves what its encoders make; ours, of the same tensors, make the same.
#[test]
fn encoders_make_what_those_of_peft_make() {
    let mut encoders = 0;
    for folder in fixtures() {
        let file = folder.join("encoder.safetensors");
        if !file.exists() {
            continue;
        }
        encoders += 1;
        let theirs = json(folder.join(peft::CONFIG_FILE));
        let config = unsaved(peft::read_config(&folder).unwrap(), &theirs);
        let mut model = base_of(&folder);
        adapters::attach(&mut model, &config, 1, &Default::default()).unwrap();
        let encoder = floats(&file);
        let ours = config.parameters(&model.config).unwrap().into_iter();
        let shapes: BTreeMap<_, _> = encoder
            .iter()
            .map(|(k, (shape, _))| (k.clone(), shape.clone()))
            .collect();
        assert_eq!(
            ours.collect::<BTreeMap<_, _>>(),
            shapes,
            "{}",
            folder.display()
        );
        let values = encoder
            .into_iter()
            .map(|(name, (_, values))| (param_id(&name), values));
        let model = adapters::write_parameters(model, values.collect());
        let off = logits_off(&model, &folder);
        assert!(off < 2e-5, "{}: {off}", folder.display());
        let out = tempfile::tempdir().unwrap();
        peft::save(
            &model,
            &config,
            theirs["base_model_name_or_path"].as_str().unwrap(),
            out.path(),
        )
        .unwrap();
        let made =
            |folder: &Path| floats(&folder.join(peft::MODEL_FILE)).remove("prompt_embeddings");
        let ((shape, made), (expected_shape, expected)) =
            (made(out.path()).unwrap(), made(&folder).unwrap());
        assert_eq!(shape, expected_shape);
        assert!(most_off(&made, &expected) < 1e-5, "{}", folder.display());
        assert_eq!(json(out.path().join(peft::CONFIG_FILE)), theirs);
    }
    assert_eq!(encoders, 3);
}

fn in_front(method: impl Into<Method>) -> AdapterConfig {
    AdapterConfig {
        selection: Selection {
            target_modules: Targets::Names(Vec::new()),
            ..Selection::default()
        },
        method: method.into(),
    }
}

fn fresh(method: impl Into<Method>) -> (AdaptedLlama<B>, Vec<f32>) {
    let config = in_front(method);
    let mut model = load(&base("gqa"));
    adapters::attach(&mut model, &config, 1, &Default::default()).unwrap();
    let virtual_tokens = model.virtual_tokens.as_ref().unwrap();
    let values = virtual_tokens.encode(&[0]).into_data().to_vec().unwrap();
    (model, values)
}

#[test]
fn prompts_begin_as_their_settings_say() {
    let prompt = |init, text: Option<&str>| PromptSettings {
        num_virtual_tokens: 5,
        prompt_tuning_init: init,
        prompt_tuning_init_text: text.map(str::to_owned),
        text_ids: if text.is_some() {
            vec![7, 40, 3]
        } else {
            Vec::new()
        },
    };
    let (model, values) = fresh(prompt(PromptInit::Text, Some("three words")));
    let d = model.config.hidden_size;
    let table = model
        .embed_tokens
        .val()
        .into_data()
        .to_vec::<f32>()
        .unwrap();
    let word = |id: usize| &table[id * d..][..d];
    for (at, id) in [7, 40, 3, 7, 40].into_iter().enumerate() {
        assert_eq!(&values[at * d..][..d], word(id), "virtual token {at}");
    }
    let (_, values) = fresh(prompt(PromptInit::SampleVocab, None));
    let is_word = |row: &[f32]| (0..96).any(|id| word(id) == row);
    assert!(values.chunks(d).all(is_word));
    assert_ne!(values[..d], values[d..2 * d]);
    let (_, values) = fresh(prompt(PromptInit::Random, None));
    let square = values.iter().map(|x| x * x).sum::<f32>() / values.len() as f32;
    assert!((0.5..2.0).contains(&square), "{square}");
}

/// What PEFT's `MultitaskPromptEmbedding` takes of the file of another adapter.
#[test]
fn a_task_begins_with_those_of_another_adapter() {
    let source = root("tests/fixtures/prompts/mpt");
    let theirs = floats(&source.join(peft::MODEL_FILE));
    let (cols, _) = &theirs["prefix_task_cols"];
    let (tasks, p, r) = (cols[0], cols[1], cols[2]);
    assert!(tasks > 1);
    let of = |init, task, num_tasks| MptSettings {
        num_virtual_tokens: p,
        num_tasks,
        num_ranks: r,
        prompt_tuning_init: init,
        prompt_tuning_init_state_dict_path: Some(source.clone()),
        prompt_tuning_init_task: task,
        ..MptSettings::default()
    };
    let attached = |settings: MptSettings| {
        let config = in_front(settings);
        let mut model = load(&base("gqa"));
        adapters::attach(&mut model, &config, 1, &Default::default())?;
        let values = adapters::read_parameters(&model);
        let names = ["prompt_embeddings", "prefix_task_cols", "prefix_task_rows"];
        Ok::<_, adapters::Error>(names.map(|name| values[&param_id(name)].clone()))
    };
    let blocks = |name: &str| -> Vec<&[f32]> {
        let values = &theirs[name].1;
        values.chunks(values.len() / tasks).collect()
    };
    let exact = attached(of(MptInit::ExactSourceTask, 1, 1)).unwrap();
    let average = attached(of(MptInit::AverageSourceTasks, 0, 1)).unwrap();
    let shared = attached(of(MptInit::OnlySourceShared, 0, 3)).unwrap();
    for all in [&exact, &average, &shared] {
        assert_eq!(all[0], theirs["prompt_embeddings"].1);
    }
    for (at, name) in ["prefix_task_cols", "prefix_task_rows"]
        .into_iter()
        .enumerate()
    {
        assert_eq!(exact[at + 1], blocks(name)[1]);
        for (i, x) in average[at + 1].iter().enumerate() {
            let sum: f32 = blocks(name).iter().map(|block| block[i]).sum();
            assert!((x - sum / tasks as f32).abs() < 1e-6);
        }
        assert_eq!(shared[at + 1].len(), 3 * blocks(name)[0].len());
        assert!(shared[at + 1].iter().all(|x| x.abs() < 0.2)); // as without another adapter
    }
    let refused = |settings| attached(settings).unwrap_err().to_string();
    let text = refused(of(MptInit::ExactSourceTask, tasks, 1));
    assert!(text.contains(&format!("no task {tasks}")), "{text}");
    let mut narrow = of(MptInit::AverageSourceTasks, 0, 1);
    narrow.num_ranks += 1;
    assert!(refused(narrow).contains("prefix_task_cols is ["));
    let text = refused(of(MptInit::AverageSourceTasks, 0, 2));
    assert!(text.contains("num_tasks must be 1"), "{text}");
    let mut none = of(MptInit::OnlySourceShared, 0, 1);
    none.prompt_tuning_init_state_dict_path = None;
    assert!(refused(none).contains("prompt_tuning_init_state_dict_path goes with"));
}

#[test]
fn a_prefix_can_begin_with_zeros() {
    for prefix_projection in [false, true] {
        let (_, values) = fresh(PrefixSettings {
            init_weights: Some(InitWeights::Zero),
            prefix_projection,
            ..PrefixSettings::default()
        });
        assert!(values.iter().all(|x| *x == 0.0));
    }
    let (_, values) = fresh(PTuningSettings {
        encoder_reparameterization_type: Reparameterization::Lstm,
        ..PTuningSettings::default()
    });
    assert!(values.iter().any(|x| *x != 0.0));
}
