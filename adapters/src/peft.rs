//! PEFT's adapter folder: `adapter_config.json` and `adapter_model.safetensors`.
//!
//! Source: `peft/config.py`, `peft/utils/save_and_load.py`, `peft/tuners/lora/config.py`.

use std::path::Path;

use burn::tensor::backend::Backend;
use model::checkpoint::{Checkpoint, NamedTensor, write_file, write_safetensors};
use model::config::LlamaConfig;
use model::linear::Linear;
use model::weight::param_id;
use quant::Scheme;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use crate::attach::{AdaptedLlama, attach};
use crate::base::{BaseLinear, scheme};
use crate::config::{LoraConfig, LoraInit, Pattern, Targets};
use crate::error::{Error, Result};
use crate::lora::AdaptedLinear;
use crate::parameters::{parameters, read_parameters, write_parameters};

/// File name of the settings.
pub const CONFIG_FILE: &str = "adapter_config.json";
/// File name of the tensors.
pub const MODEL_FILE: &str = "adapter_model.safetensors";
/// The version of PEFT whose format this is.
pub const PEFT_VERSION: &str = "0.21.2";
/// What the tensors' file says of the base model that the adapter was trained on; PEFT does not
/// read it.
const BASE_QUANTIZATION: &str = "base_quantization";
/// What PEFT puts before the names of the base model's modules.
const PREFIX: &str = "base_model.model.";

/// Settings that change what the tensors mean and that are not supported: the value each must
/// have. Others that are not read (`revision`, `peft_version`, …) change nothing;
/// `init_lora_weights` has its own check.
const MUST_BE: [(&str, Value); 21] = [
    ("alora_invocation_tokens", Value::Null),
    ("arrow_config", Value::Null),
    ("bias", Value::Null), // "none" is let through, see `unsupported`
    ("corda_config", Value::Null),
    ("eva_config", Value::Null),
    ("fan_in_fan_out", Value::Bool(false)),
    ("kasa_config", Value::Null),
    ("layer_replication", Value::Null),
    ("layers_pattern", Value::Null),
    ("lora_bias", Value::Bool(false)),
    ("lora_ga_config", Value::Null),
    ("megatron_config", Value::Null),
    ("monteclora_config", Value::Null),
    ("target_parameters", Value::Null),
    ("trainable_token_indices", Value::Null),
    ("use_bdlora", Value::Null),
    ("use_dora", Value::Bool(false)),
    ("use_qalora", Value::Bool(false)),
    ("velora_config", Value::Null),
    ("ensure_weight_tying", Value::Bool(false)),
    ("loftq_config", Value::Null),
];

/// The keys of `adapter_config.json` that are read.
#[derive(Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default = "default_rank")]
    r: usize,
    #[serde(default = "default_alpha")]
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    target_modules: Option<Targets>,
    exclude_modules: Option<Targets>,
    layers_to_transform: Option<OneOrMany>,
    #[serde(default)]
    rank_pattern: Pattern<usize>,
    #[serde(default)]
    alpha_pattern: Pattern<f64>,
    #[serde(default)]
    use_rslora: bool,
    modules_to_save: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(usize),
    Many(Vec<usize>),
}

fn default_rank() -> usize {
    8
}

fn default_alpha() -> f64 {
    8.0
}

/// Reads `adapter_config.json` of a folder.
///
/// # Errors
/// [`Error::Config`] lists every setting that is not supported.
pub fn read_config(folder: &Path) -> Result<LoraConfig> {
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
    let problems = unsupported(&object);
    if !problems.is_empty() {
        return Err(Error::Config { path, problems });
    }
    let peft: PeftConfig = serde_json::from_str(&text).map_err(json_error)?;
    let many = |layers| match layers {
        OneOrMany::One(layer) => vec![layer],
        OneOrMany::Many(layers) => layers,
    };
    let config = LoraConfig {
        rank: peft.r,
        alpha: peft.lora_alpha,
        dropout: peft.lora_dropout,
        // PEFT's default for Llamas
        target_modules: peft
            .target_modules
            .unwrap_or_else(|| Targets::Names(vec!["q_proj".into(), "v_proj".into()])),
        exclude_modules: peft.exclude_modules,
        layers_to_transform: peft
            .layers_to_transform
            .map(many)
            .filter(|all| !all.is_empty()),
        rank_pattern: peft.rank_pattern,
        alpha_pattern: peft.alpha_pattern,
        use_rslora: peft.use_rslora,
        modules_to_save: peft.modules_to_save.unwrap_or_default(),
        init: LoraInit::Default,
    };
    let finite = config.alpha.is_finite() && (0.0..1.0).contains(&config.dropout);
    match (peft.peft_type.as_str(), finite) {
        ("LORA", true) => Ok(config),
        ("LORA", false) => Err(Error::Config {
            path,
            problems: vec!["lora_alpha or lora_dropout is out of range".into()],
        }),
        (other, _) => Err(Error::Config {
            path,
            problems: vec![format!(
                "peft_type is {other:?}: only \"LORA\" is supported"
            )],
        }),
    }
}

fn unsupported(object: &Map<String, Value>) -> Vec<String> {
    let neutral = |key: &str, value: &Value, wanted: &Value| {
        value.is_null()
            || value == wanted
            || (key == "bias" && value == "none")
            || value.as_array().is_some_and(Vec::is_empty)
            || value.as_object().is_some_and(Map::is_empty)
    };
    let set = MUST_BE.iter().filter_map(|(key, wanted)| {
        let value = object
            .get(*key)
            .filter(|value| !neutral(key, value, wanted))?;
        Some(format!("{key} is {value}: this is not supported"))
    });
    let mut problems: Vec<String> = set.collect();
    // the others change the base weights, too, and such an adapter is no use on the original base
    let init = object.get("init_lora_weights").unwrap_or(&Value::Null);
    let plain = init.is_null() || init.is_boolean();
    if !plain
        && !["gaussian", "orthogonal", "eva"]
            .iter()
            .any(|name| init == name)
    {
        problems.push(format!(
            "init_lora_weights is {init}: it belongs to a changed base model, convert the adapter \
             with PEFT's path_initial_model_for_weight_conversion first"
        ));
    }
    problems
}

/// An adapter folder that has been checked against a model and not read yet.
pub(crate) struct Opened {
    /// The settings.
    pub(crate) config: LoraConfig,
    /// Name and shape of every tensor.
    pub(crate) parameters: Vec<(String, Vec<usize>)>,
    /// The tensors, by [`key`].
    pub(crate) file: Checkpoint,
    /// The model that it fits: where embeddings and `lm_head` are one and the adapter changes one of
    /// them, they are apart.
    pub(crate) model: LlamaConfig,
}

impl Opened {
    /// Elements of a parameter, row by row.
    pub(crate) fn read(&self, name: &str) -> Result<Vec<f32>> {
        Ok(self.file.read(&key(name))?)
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
    let parameters = parameters(&config, model).map_err(in_config)?;
    let file = Checkpoint::open_file(&folder.join(MODEL_FILE))?;
    let wanted: Vec<_> = parameters
        .iter()
        .map(|(name, shape)| (key(name), shape.clone()))
        .collect();
    file.check(&wanted, is_base_copy)
        .map_err(|error| match error {
            model::Error::Tensors { path, problems } => Error::Tensors { path, problems },
            other => Error::File(other),
        })?;
    Ok(Opened {
        config,
        parameters,
        file,
        model: model.clone(),
    })
}

/// Puts the adapter of a folder on a model; its `modules_to_save` replace the model's own weights.
/// Embeddings that are the output layer, too, come apart where it changes one of the two.
///
/// # Errors
/// [`Error::Tensors`] lists every tensor that is missing, unexpected or of another shape;
/// [`Error::Config`] if the settings do not fit the model.
pub fn load<B: Backend>(
    mut model: AdaptedLlama<B>,
    folder: &Path,
    device: &B::Device,
) -> Result<(AdaptedLlama<B>, LoraConfig)> {
    let adapter = open(folder, &model.config)?;
    if model.config.tie_word_embeddings && !adapter.model.tie_word_embeddings {
        untie(&mut model);
    }
    attach(&mut model, &adapter.config, 0, device)?;
    let read = |(name, _): &(String, _)| Ok((param_id(name), adapter.read(name)?));
    let values = adapter.parameters.iter().map(read).collect::<Result<_>>()?;
    Ok((write_parameters(model, values), adapter.config))
}

/// Gives a model an output layer of its own, whose weights are still those of the embeddings.
fn untie<B: Backend>(model: &mut AdaptedLlama<B>) {
    let base = BaseLinear::Dense(Linear {
        weight: model.embed_tokens.clone(),
        bias: None,
    });
    model.lm_head = Some(AdaptedLinear { base, lora: None });
    model.config.tie_word_embeddings = false;
}

/// Writes an adapter folder that `peft.PeftModel.from_pretrained` loads; `base_model` is the name
/// that the adapter gives its base, a folder or `owner/name[@revision]`.
///
/// # Errors
/// Files that cannot be written; each is complete or absent.
pub fn save<B: Backend>(
    model: &AdaptedLlama<B>,
    config: &LoraConfig,
    base_model: &str,
    folder: &Path,
) -> Result<()> {
    std::fs::create_dir_all(folder).map_err(|source| model::Error::Io {
        action: "create",
        path: folder.into(),
        source,
    })?;
    let mut values = read_parameters(model);
    let tensors = parameters(config, &model.config)?
        .into_iter()
        .map(|(name, shape)| NamedTensor {
            values: values
                .remove(&param_id(&name))
                .expect("every parameter is on the model"),
            name: key(&name),
            shape,
        });
    let metadata = [(BASE_QUANTIZATION, quantization(model))];
    let tensors: Vec<_> = tensors.collect();
    write_safetensors(&folder.join(MODEL_FILE), &tensors, &metadata)?;
    let json = serde_json::to_string_pretty(&config_json(config, base_model));
    let json = json.expect("a JSON value can be written");
    write_file(&folder.join(CONFIG_FILE), json.as_bytes())?;
    Ok(())
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

/// PEFT adds the base weights of an adapted `lm_head`, unchanged; the model has them already.
fn is_base_copy(key: &str) -> bool {
    key == "base_model.model.lm_head.base_layer.weight"
}

/// Key of a parameter in PEFT's file.
pub(crate) fn key(name: &str) -> String {
    let (module, part) = name
        .rsplit_once('.')
        .expect("parameters are named module.part");
    let part = match part {
        "lora_a" => "lora_A.weight",
        "lora_b" => "lora_B.weight",
        whole => whole, // of modules_to_save
    };
    format!("{PREFIX}{module}.{part}")
}

/// The settings in PEFT's spelling, keys sorted. Keys that came late to PEFT and hold their
/// default are left out: older versions refuse keys that they do not know.
fn config_json(config: &LoraConfig, base_model: &str) -> Value {
    let (base_model, revision) = match base_model.split_once('@') {
        Some((id, revision)) if !Path::new(base_model).exists() => (id, Some(revision)),
        _ => (base_model, None),
    };
    let names = |targets: &Targets| json!(targets.sorted()); // sets in PEFT
    let number = |x: f64| match x.fract() == 0.0 && x.abs() < 1e15 {
        true => json!(x as i64),
        false => json!(x),
    };
    let alphas = config.alpha_pattern.0.iter();
    let alphas: Map<_, _> = alphas
        .map(|(name, alpha)| (name.clone(), number(*alpha)))
        .collect();
    let init = match config.init {
        LoraInit::Default => json!(true),
        LoraInit::Gaussian => json!("gaussian"),
    };
    let mut json = json!({
        "alpha_pattern": alphas,
        "auto_mapping": null,
        "base_model_name_or_path": base_model,
        "bias": "none",
        "exclude_modules": config.exclude_modules.as_ref().map(names),
        "fan_in_fan_out": false,
        "inference_mode": true,
        "init_lora_weights": init,
        "layers_pattern": null,
        "layers_to_transform": config.layers_to_transform,
        "lora_alpha": number(config.alpha),
        "lora_dropout": config.dropout,
        "modules_to_save": Some(&config.modules_to_save).filter(|all| !all.is_empty()),
        "peft_type": "LORA",
        "peft_version": PEFT_VERSION,
        "r": config.rank,
        "rank_pattern": config.rank_pattern,
        "revision": revision,
        "target_modules": names(&config.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": false,
        "use_rslora": config.use_rslora,
    });
    if config.exclude_modules.is_none()
        && let Some(object) = json.as_object_mut()
    {
        object.shift_remove("exclude_modules"); // came with PEFT 0.14
    }
    json
}
