//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Source: `peft/config.py`, `peft/utils/save_and_load.py`.

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;

use burn::tensor::{Tensor, backend::Backend};
use model::checkpoint::{Checkpoint, NamedTensor, write_file, write_safetensors};
use model::config::LlamaConfig;
use model::llama::{EMBED_TOKENS, LM_HEAD};
use model::weight::param_id;
use quant::Scheme;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::attach::{AdaptedLlama, Start, put, untie};
use crate::base::{AdaptedBackend, HEAD, scheme};
use crate::config::{AdapterConfig, OneOrMany, Selection, Targets};
use crate::error::{Error, Result};
use crate::methods::{Computes, Method, Part, Role};
use crate::parameters::{read_parameters, write_parameters};

/// File name of the settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File name of the tensors.
pub const MODEL_FILE: &str = "adapter_model.safetensors";
/// The version of PEFT whose format this is.
pub const PEFT_VERSION: &str = "0.21.2";
/// How many elements of a weight are compared at a time.
const ROWS_AT_A_TIME: usize = 1 << 22;
/// What the tensors' file says of the base model that the adapter was trained on; PEFT does not
/// read it.
const BASE_QUANTIZATION: &str = "base_quantization";

/// The keys of `adapter_config.json` that say which modules are meant.
#[derive(Deserialize)]
struct PeftSelection {
    target_modules: Option<Targets>,
    exclude_modules: Option<Targets>,
    layers_to_transform: Option<OneOrMany<usize>>,
    layers_pattern: Option<OneOrMany<String>>,
    modules_to_save: Option<Vec<String>>,
}

/// Reads `adapter_config.json` of a folder.
///
/// # Errors
/// [`Error::Config`] lists every setting that is not supported.
pub fn read_config(folder: &Path) -> Result<AdapterConfig> {
    let path = folder.join(CONFIG_FILE);
    if folder.is_dir() && !path.exists() {
        return Err(model::Error::MissingFile {
            folder: folder.into(),
            file: CONFIG_FILE,
        }
        .into());
    }
    let text = std::fs::read_to_string(&path).map_err(|source| model::Error::Io {
        action: "read",
        path: path.clone(),
        source,
    })?;
    let json_error = |source| model::Error::Json {
        path: path.clone(),
        source,
    };
    let object: Map<String, Value> = serde_json::from_str(&text).map_err(json_error)?;
    let wrong = |problems| Error::Config {
        path: path.clone(),
        problems,
    };
    let peft_type = object.get("peft_type").unwrap_or(&Value::Null);
    let Some(about) = peft_type.as_str().and_then(Method::of_peft_type) else {
        let known: Vec<_> = Method::peft_types().collect();
        let known = known.join(", ");
        return Err(wrong(vec![format!(
            "peft_type is {peft_type}: only these are supported: {known}"
        )]));
    };
    let problems = (about.unsupported)(&object);
    if !problems.is_empty() {
        return Err(wrong(problems));
    }
    let selection: PeftSelection = serde_json::from_str(&text).map_err(json_error)?;
    let config = AdapterConfig {
        selection: selection.read(about.peft_targets),
        method: (about.from_peft)(&text).map_err(|error| wrong(vec![error.to_string()]))?,
    };
    let problems = config.method.problems().into_iter();
    let problems: Vec<_> = problems
        .map(|(key, text)| format!("{} {text}", about.peft_key(key)))
        .collect();
    match problems.is_empty() {
        true => Ok(config),
        false => Err(wrong(problems)),
    }
}

impl PeftSelection {
    fn read(self, default_targets: fn() -> Targets) -> Selection {
        let layers = self.layers_to_transform.map(|all| all.all().to_vec());
        let has_pattern = |all: &OneOrMany<String>| all.all().iter().any(|one| !one.is_empty());
        Selection {
            target_modules: self.target_modules.unwrap_or_else(default_targets),
            exclude_modules: self.exclude_modules,
            layers_to_transform: layers.filter(|all| !all.is_empty()),
            layers_pattern: self.layers_pattern.filter(has_pattern),
            modules_to_save: self.modules_to_save.unwrap_or_default(),
        }
    }
}

/// An adapter folder that has been checked against a model and not read yet.
pub(crate) struct Opened {
    /// The settings.
    pub(crate) config: AdapterConfig,
    /// Every tensor that it is made of.
    pub(crate) parts: Vec<Part>,
    /// Weights of the base model that lie beside it.
    copies: Vec<Part>,
    /// The tensors, by [`Part::key`].
    pub(crate) file: Checkpoint,
    /// The model that it fits: where embeddings and `lm_head` are one and the adapter changes one of
    /// them, they are apart.
    pub(crate) model: LlamaConfig,
}

impl Opened {
    /// Elements of a tensor, row by row.
    pub(crate) fn read(&self, part: &Part) -> Result<Vec<f32>> {
        Ok(self.file.read(&part.key)?)
    }

    /// Compares the weights of the base model that lie beside the adapter with the model's own, of
    /// which `own` reads rows.
    ///
    /// # Errors
    /// [`Error::Tensors`] if some are others, beyond what types round.
    pub(crate) fn check_copies(
        &self,
        own: impl Fn(&Part, Range<usize>) -> Result<Vec<f32>>,
    ) -> Result<()> {
        let mut problems = Vec::new();
        for copy in &self.copies {
            let (rows, width) = (copy.shape[0], copy.shape[1]);
            let step = (ROWS_AT_A_TIME / width).max(1);
            let (mut largest, mut off) = (0f32, 0f32);
            for start in (0..rows).step_by(step) {
                let rows = start..rows.min(start + step);
                let theirs = self.file.read_rows(&copy.key, rows.clone())?;
                for (x, y) in theirs.iter().zip(own(copy, rows)?) {
                    largest = largest.max(y.abs());
                    off = off.max((x - y).abs());
                }
            }
            if off > largest / 100.0 {
                problems.push(format!(
                    "{} is not the model's own: the adapter belongs to one with other embeddings",
                    copy.key
                ));
            }
        }
        let path = self.file.path().into();
        match problems.is_empty() {
            true => Ok(()),
            false => Err(Error::Tensors { path, problems }),
        }
    }

    /// The same of a model that is in memory.
    pub(crate) fn check_copies_of<B: Backend>(&self, model: &AdaptedLlama<B>) -> Result<()> {
        self.check_copies(|copy, rows| Ok(rows_of(model, &copy.name, rows)))
    }

    /// The tensors that replace weights of the model.
    pub(crate) fn whole(&self) -> impl Iterator<Item = &Part> {
        self.parts.iter().filter(|part| part.role == Role::Whole)
    }

    /// How the base was quantised that the adapter was trained on, if the file says so.
    pub(crate) fn base_quantization(&self) -> Option<&str> {
        self.file.metadata(BASE_QUANTIZATION)
    }
}

/// Opens the adapter of a folder and compares it with a model; where that fits only with embeddings
/// and `lm_head` apart, with such a model.
///
/// # Errors
/// Those of [`load`].
pub(crate) fn open(folder: &Path, model: &LlamaConfig) -> Result<Opened> {
    let error = match open_on(folder, model) {
        Err(error) if model.tie_word_embeddings => error,
        opened => return opened,
    };
    let apart = LlamaConfig {
        tie_word_embeddings: false,
        ..model.clone()
    };
    open_on(folder, &apart).map_err(|_| error)
}

fn open_on(folder: &Path, model: &LlamaConfig) -> Result<Opened> {
    let config = read_config(folder)?;
    let in_config = |error| match error {
        Error::Fit { problems } => Error::Config {
            path: folder.join(CONFIG_FILE),
            problems,
        },
        other => other,
    };
    let mut parts = config.parts(model).map_err(in_config)?;
    parts.retain(|part| part.role != Role::Derived);
    let file = Checkpoint::open_file(&folder.join(MODEL_FILE))?;
    let copies = base_copies(&file, &parts, model);
    let wanted = |part: &Part| (part.key.clone(), part.shape.clone());
    let wanted: Vec<_> = parts.iter().chain(&copies).map(wanted).collect();
    let mut problems = file.differences(&wanted, |_| false);
    if !problems.is_empty() {
        problems.splice(0..0, of_another(&config, &file, model));
        let path = file.path().into();
        return Err(Error::Tensors { path, problems });
    }
    Ok(Opened {
        config,
        parts,
        copies,
        file,
        model: model.clone(),
    })
}

/// What tells that tensors are those of a model of other sizes.
fn of_another(config: &AdapterConfig, file: &Checkpoint, model: &LlamaConfig) -> Option<String> {
    let mut differ = Vec::new();
    let index = |(name, _): (&str, _)| {
        let (_, behind) = name.split_once(".layers.")?;
        behind.split('.').next()?.parse::<usize>().ok()
    };
    let layers = file.tensors().filter_map(index).max().map(|last| last + 1);
    let layers = layers.filter(|_| config.selection.names_no_layer());
    let ours = model.num_hidden_layers;
    if let Some(theirs) = layers.filter(|theirs| *theirs != ours) {
        differ.push(format!("{theirs} layers (this one: {ours})"));
    }
    let inputs =
        ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"].map(|p| p.to_owned() + ".lora_A");
    let reads_hidden = |name: &str| inputs.iter().any(|input| name.contains(input));
    let mut of_hidden = file.tensors().filter(|(name, _)| reads_hidden(name));
    let hidden = of_hidden.find_map(|(_, shape)| shape.get(1).copied());
    let ours = model.hidden_size;
    if let Some(theirs) = hidden.filter(|theirs| *theirs != ours) {
        differ.push(format!("a hidden size of {theirs} (this one: {ours})"));
    }
    (!differ.is_empty()).then(|| format!("it is of a model with {}", differ.join(" and ")))
}

/// Puts the adapter of a folder on a model; its `modules_to_save` replace the model's own weights.
/// Embeddings that are the output layer, too, come apart where it changes one of the two.
///
/// # Errors
/// [`Error::Tensors`] lists every tensor that is missing, unexpected or of another shape;
/// [`Error::Config`] if the settings do not fit the model.
pub fn load<B: AdaptedBackend>(
    mut model: AdaptedLlama<B>,
    folder: &Path,
    device: &B::Device,
) -> Result<(AdaptedLlama<B>, AdapterConfig)> {
    let adapter = open(folder, &model.config)?;
    adapter.check_copies_of(&model)?;
    if model.config.tie_word_embeddings && !adapter.model.tie_word_embeddings {
        untie(&mut model);
    }
    let start = Start::Read(&|part| adapter.read(part));
    put(&mut model, &adapter.config, &start, device)?;
    let read = |part: &Part| Ok((param_id(&part.name), adapter.read(part)?));
    let values = adapter.whole().map(read).collect::<Result<_>>()?;
    Ok((write_parameters(model, values), adapter.config))
}

/// Writes an adapter folder that `peft.PeftModel.from_pretrained` loads; `base_model` is the name
/// that the adapter gives its base, a folder or `owner/name[@revision]`.
///
/// # Errors
/// Files that cannot be written; each is complete or absent.
pub fn save<B: AdaptedBackend>(
    model: &AdaptedLlama<B>,
    config: &AdapterConfig,
    base_model: &str,
    folder: &Path,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|source| model::Error::Io {
        action: "create",
        path: folder.into(),
        source,
    })?;
    let (config, mut values) = saved(model, config)?;
    let tensor = |part: Part| NamedTensor {
        values: values
            .remove(&part.name)
            .expect("every tensor of the adapter is on the model"),
        name: part.key,
        shape: part.shape,
    };
    let parts = config.parts(&model.config)?.into_iter();
    let saved = parts.filter(|part| part.role != Role::Derived);
    let tensors: Vec<_> = saved.map(tensor).collect();
    let metadata = [(BASE_QUANTIZATION, quantization(model))];
    write_safetensors(&folder.join(MODEL_FILE), &tensors, &metadata)?;
    let json = serde_json::to_string_pretty(&config_json(&config, &model.config, base_model));
    let json = json.expect("a JSON value can be written");
    write_file(&folder.join(CONFIG_FILE), json.as_bytes())?;
    Ok(())
}

/// Writes all tensors of an adapter as they are on the model, by our names: where [`save`] converts
/// them, this is what training goes on with.
///
/// # Errors
/// A file that cannot be written; it is complete or absent.
pub fn save_exactly<B: AdaptedBackend>(
    model: &AdaptedLlama<B>,
    config: &AdapterConfig,
    file: &Path,
) -> Result<()> {
    let mut values = values(model, config)?;
    let tensor = |part: Part| NamedTensor {
        values: values.remove(&part.name).expect("it is one of the parts"),
        name: part.name,
        shape: part.shape,
    };
    let tensors: Vec<_> = config
        .parts(&model.config)?
        .into_iter()
        .map(tensor)
        .collect();
    Ok(write_safetensors(file, &tensors, &[])?)
}

/// Puts an adapter on a model that [`save_exactly`] wrote.
///
/// # Errors
/// Those of [`load`].
pub fn load_exactly<B: AdaptedBackend>(
    mut model: AdaptedLlama<B>,
    config: &AdapterConfig,
    file: &Path,
    device: &B::Device,
) -> Result<AdaptedLlama<B>> {
    let file = Checkpoint::open_file(file)?;
    let parts = config.parts(&model.config)?;
    let wanted = |part: &Part| (part.name.clone(), part.shape.clone());
    file.check(&parts.iter().map(wanted).collect::<Vec<_>>(), |_| false)?;
    let read = |part: &Part| Ok(file.read(&part.name)?);
    put(&mut model, config, &Start::Read(&read), device)?;
    let whole = parts.iter().filter(|part| part.role == Role::Whole);
    let whole = whole.map(|part| Ok((param_id(&part.name), read(part)?)));
    Ok(write_parameters(model, whole.collect::<Result<_>>()?))
}

/// The values of all tensors of an adapter, by name.
fn values<B: AdaptedBackend>(
    model: &AdaptedLlama<B>,
    config: &AdapterConfig,
) -> Result<HashMap<String, Vec<f32>>> {
    let mut by_id = read_parameters(model);
    let value = |part: Part| {
        let values = match part.role {
            _ if part.shape.contains(&0) => Some(Vec::new()),
            Role::Frozen => frozen(model, &part),
            _ => by_id.remove(&param_id(&part.name)),
        };
        (
            part.name,
            values.expect("every tensor of the adapter is on the model"),
        )
    };
    let parts = config.parts(&model.config)?.into_iter();
    let held = parts.filter(|part| part.role != Role::Derived);
    Ok(held.map(value).collect())
}

/// What is saved of a model: the settings, and the values of all tensors by name.
fn saved<B: AdaptedBackend>(
    model: &AdaptedLlama<B>,
    config: &AdapterConfig,
) -> Result<(AdapterConfig, HashMap<String, Vec<f32>>)> {
    let mut values = values(model, config)?;
    let mut config = config.clone();
    if config.method.is_converted() {
        let layers = config.layers(&model.config)?;
        let converted = config.method.convert(&layers, model, &mut values);
        config.method = converted.unwrap_or(config.method);
    }
    Ok((config, values))
}

/// The values of a tensor that is not trained: of the first layer that has it.
fn frozen<B: AdaptedBackend>(model: &AdaptedLlama<B>, part: &Part) -> Option<Vec<f32>> {
    let mut updates = model
        .projections()
        .filter(|(name, _)| part.module().is_none_or(|module| module == name))
        .filter_map(|(_, linear)| linear.update.as_ref()?.frozen(part.end()));
    let data = updates.next()?.into_data().convert::<f32>();
    data.into_vec().ok()
}

/// How the base of an adapter was quantised when it was trained, if its file says so and it differs
/// from how `model` is: the two in words, first the adapter's.
///
/// # Errors
/// If the adapter's tensors cannot be opened.
pub fn other_base<B: Backend>(
    model: &AdaptedLlama<B>,
    folder: &Path,
) -> Result<Option<[String; 2]>> {
    let file = Checkpoint::open_file(&folder.join(MODEL_FILE))?;
    let (theirs, ours) = (file.metadata(BASE_QUANTIZATION), quantization(model));
    let differs = theirs.filter(|theirs| *theirs != ours);
    Ok(differs.map(|theirs| [theirs.to_owned(), ours]))
}

/// How a model is quantised, in words.
fn quantization<B: Backend>(model: &AdaptedLlama<B>) -> String {
    in_words(scheme(model))
}

/// What an adapter's file says of a base that is quantised by `scheme`.
pub fn in_words(scheme: Option<Scheme>) -> String {
    scheme.map_or("none".into(), |scheme| scheme.to_string())
}

/// PEFT adds the base weights of adapted embeddings and of an adapted `lm_head`, and with
/// `save_embedding_layers` of both, adapted or not.
fn base_copies(file: &Checkpoint, parts: &[Part], model: &LlamaConfig) -> Vec<Part> {
    let shape = || vec![model.vocab_size, model.hidden_size];
    let of =
        |module| ["weight", "base_layer.weight"].map(|end| Part::base_copy(module, end, shape()));
    let known = |copy: &Part| parts.iter().any(|part| part.key == copy.key);
    let copies = [EMBED_TOKENS, LM_HEAD].into_iter().flat_map(of);
    copies
        .filter(|copy| file.shape(&copy.key).is_some() && !known(copy))
        .collect()
}

/// Some rows of the embeddings or of the output layer of a model.
fn rows_of<B: Backend>(model: &AdaptedLlama<B>, name: &str, rows: Range<usize>) -> Vec<f32> {
    let head = model.lm_head.as_ref().filter(|_| name == HEAD);
    let device = model.norm.weight.val().device();
    let rows = Tensor::arange(rows.start as i64..rows.end as i64, &device);
    let values = match head {
        Some(head) => head.base.select(rows),
        None => model.embed_tokens.select(rows),
    };
    values.into_data().into_vec().expect("they are f32")
}

/// The settings in PEFT's spelling, keys sorted. Keys that came late to PEFT and hold their
/// default are left out: older versions refuse keys that they do not know.
fn config_json(config: &AdapterConfig, model: &LlamaConfig, base_model: &str) -> Value {
    let (base_model, revision) = match base_model.split_once('@') {
        Some((id, revision)) if !Path::new(base_model).exists() => (id, Some(revision)),
        _ => (base_model, None),
    };
    let names = |targets: &Targets| json!(targets.sorted()); // sets in PEFT
    let selection = &config.selection;
    let mut all = config.method.to_peft();
    all.extend(config.method.peft_of_model(model, selection, base_model));
    let mut set = |key: &str, value: Value| all.insert(key.to_owned(), value);
    set("auto_mapping", Value::Null);
    set("base_model_name_or_path", json!(base_model));
    set("inference_mode", json!(true));
    set(
        "modules_to_save",
        json!(Some(&selection.modules_to_save).filter(|all| !all.is_empty())),
    );
    set("peft_type", json!(config.method.peft_type()));
    set("peft_version", json!(PEFT_VERSION));
    set("revision", json!(revision));
    set("task_type", json!("CAUSAL_LM"));
    if config.method.changes_layers() {
        let layers = ("layers_to_transform", json!(selection.layers_to_transform));
        for (key, value) in [("layers_pattern", json!(selection.layers_pattern)), layers] {
            if !config.method.not_in_peft().contains(&key) {
                set(key, value);
            }
        }
        set("target_modules", names(&selection.target_modules));
        if let Some(exclude) = &selection.exclude_modules {
            set("exclude_modules", names(exclude)); // came with PEFT 0.14
        }
    }
    all.sort_keys();
    Value::Object(all)
}
