//! The sections of a recipe: what can be set, and to what it is set if nobody does.

use std::path::PathBuf;

use adapters::methods::lora::LoraSettings;
use adapters::{AdapterConfig, Method, Selection};
use model::chat::TrainOn;
use quant::Scheme;
use serde::de::{DeserializeOwned, Error as _};
use serde::{Deserialize, Deserializer, Serialize};
use toml::{Table, Value};

use super::ComputeDtype;
use crate::data::{Format, Settings, Truncate};

/// `[model]`
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ModelSection {
    /// A Hugging Face model folder, or a Hub id `owner/name[@revision]`.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub path: String,
    /// Where the weights come from.
    pub init: ModelInit,
}

/// Where a base model's weights come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ModelInit {
    /// From the folder's safetensors.
    #[default]
    Pretrained,
    /// Random numbers, shaped by the folder's config.json.
    Random,
}

/// `[quantization]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QuantizationSection {
    /// `"none"`, `"nf4"` or `"fp4"`: what the linear layers of the decoder are stored in.
    pub format: String,
    /// Weights that share a scale.
    pub block_size: usize,
    /// Whether the scales are quantized, too.
    pub double_quant: bool,
}

impl QuantizationSection {
    /// How the base is quantised, if it is.
    pub fn scheme(&self) -> Option<Scheme> {
        let format = quant::Format::from_name(&self.format)?;
        Some(Scheme::new(format, self.block_size, self.double_quant))
    }
}

/// `[adapter]`: the keys of its parts are its keys.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AdapterSection {
    /// `"lora"`, or `"full"` for all weights.
    pub method: String,
    /// Which modules are adapted, or trained as a whole.
    #[serde(flatten)]
    pub selection: Selection,
    /// A PEFT adapter folder to continue from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// The method's own settings; those of LoRA if there is no such method.
    #[serde(flatten)]
    pub settings: Method,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Training file, files, folder, pattern, or data set of the Hub (`hf://datasets/owner/name`).
    #[serde(skip_serializing_if = "Paths::is_empty")]
    pub train: Paths,
    /// The same to evaluate on.
    #[serde(skip_serializing_if = "Paths::is_empty")]
    pub eval: Paths,
    /// What a row looks like.
    pub format: Format,
    /// A jinja file, a model or adapter folder with a template, or the name of a built-in one; the
    /// model's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Longest row in tokens.
    pub max_length: usize,
    /// What happens to longer rows.
    pub truncate: Truncate,
    /// Several rows in one sequence of up to `max_length` tokens; none of them sees another.
    pub packing: bool,
    /// Which part of a conversation is trained.
    pub train_on: TrainOn,
    /// Another order each epoch; off: file order, wrapping round, also within packed sequences.
    pub shuffle: bool,
    /// Share of the training rows held back when `eval` is not given.
    pub eval_fraction: f64,
}

/// One path or several.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a path or a list of paths")]
pub enum Paths {
    /// Not given.
    #[default]
    #[serde(skip_deserializing)]
    None,
    /// One.
    One(PathBuf),
    /// Several.
    Many(Vec<PathBuf>),
}

/// `[train]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct TrainSection {
    /// Passes over the training rows.
    pub epochs: f64,
    /// Optimizer steps; wins over `epochs`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_steps: Option<usize>,
    /// Rows at a time; with packing, sequences of rows.
    pub micro_batch_size: usize,
    /// Micro batches for each optimizer step.
    pub gradient_accumulation_steps: usize,
    /// `"adamw"`.
    pub optimizer: String,
    /// Peak learning rate.
    pub learning_rate: f64,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Decay of the moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Course of the learning rate after the warm-up.
    pub lr_schedule: LrSchedule,
    /// Steps of linear warm-up; wins over `warmup_ratio`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warmup_steps: Option<usize>,
    /// Share of the steps that are warm-up.
    pub warmup_ratio: f64,
    /// Largest global gradient norm; 0 = off.
    pub max_grad_norm: f64,
    /// Whether decoder layers are computed again in the backward pass, to save memory.
    pub recompute: Recompute,
    /// What the frozen weights are multiplied in.
    pub compute_dtype: ComputeDtype,
    /// Decides everything random.
    pub seed: u64,
    /// Optimizer steps between evaluations; 0 = each epoch.
    pub eval_every: usize,
    /// Optimizer steps between checkpoints; 0 = each epoch.
    pub save_every: usize,
    /// Optimizer steps between lines.
    pub log_every: usize,
    /// Evaluations without improvement before the run stops; 0 = off.
    pub early_stopping_patience: usize,
    /// How many checkpoints stay.
    pub keep_checkpoints: usize,
}

/// Whether decoder layers are computed again in the backward pass.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recompute {
    /// If the memory there is does not hold what they would keep.
    Auto,
    /// No: every activation that backward needs is kept.
    None,
    /// Yes: only the input of each layer is kept.
    Block,
}

/// Course of the learning rate after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LrSchedule {
    /// Half a cosine, down to 0.
    Cosine,
    /// A straight line, down to 0.
    Linear,
    /// No change.
    Constant,
}

/// `[output]`
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutputSection {
    /// The run folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
    /// Prompts that the model continues before and after training, for the report.
    pub samples: usize,
    /// Whether TensorBoard's event files are written.
    pub tensorboard: bool,
}

impl Default for QuantizationSection {
    fn default() -> Self {
        Self {
            format: "none".into(),
            block_size: Scheme::DEFAULT_BLOCK_SIZE,
            double_quant: false,
        }
    }
}

impl Default for AdapterSection {
    fn default() -> Self {
        Self::of("lora")
    }
}

/// Key by key, since a method decides which keys there are.
impl<'de> Deserialize<'de> for AdapterSection {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let mut table = Table::deserialize(deserializer)?;
        let method = match table.remove("method") {
            Some(method) => String::deserialize(method).map_err(within)?,
            None => "lora".into(),
        };
        let mut section = Self::of(&method);
        if let Some(folder) = table.remove("init_from") {
            section.init_from = Some(PathBuf::deserialize(folder).map_err(within)?);
        }
        let known = adapters::methods::keys_of::<Selection>();
        let is_selection = |(key, _): &(String, Value)| known.contains(key);
        let (selection, settings): (Vec<_>, Vec<_>) = table.into_iter().partition(is_selection);
        let has_targets = selection.iter().any(|(key, _)| key == "target_modules");
        section.selection = over(&section.selection, selection).map_err(within)?;
        if !has_targets {
            section.selection.target_modules = section.settings.default_targets();
        }
        let settings = Value::Table(Table::from_iter(settings));
        section.settings =
            Method::deserialize(section.settings.name(), settings).map_err(within)?;
        Ok(section)
    }
}

/// Values with some set to others.
fn over<T: Serialize + DeserializeOwned>(
    values: &T,
    others: Vec<(String, Value)>,
) -> Result<T, toml::de::Error> {
    let mut all = Table::try_from(values).map_err(toml::de::Error::custom)?;
    all.extend(others);
    all.try_into()
}

/// The same without a place, which it has none of inside of a section.
fn within<E: serde::de::Error>(error: toml::de::Error) -> E {
    E::custom(error.message())
}

impl Default for DataSection {
    fn default() -> Self {
        Self {
            train: Paths::None,
            eval: Paths::None,
            format: Format::Auto,
            chat_template: None,
            max_length: 1024,
            truncate: Truncate::Drop,
            packing: true,
            train_on: TrainOn::Assistant,
            shuffle: true,
            eval_fraction: 0.0,
        }
    }
}

impl Default for TrainSection {
    fn default() -> Self {
        Self {
            epochs: 1.0,
            max_steps: None,
            micro_batch_size: 4,
            gradient_accumulation_steps: 1,
            optimizer: "adamw".into(),
            learning_rate: 2e-4,
            weight_decay: 0.0,
            betas: [0.9, 0.999],
            eps: 1e-8,
            lr_schedule: LrSchedule::Cosine,
            warmup_steps: None,
            warmup_ratio: 0.03,
            max_grad_norm: 1.0,
            recompute: Recompute::Auto,
            compute_dtype: ComputeDtype::Auto,
            seed: 42,
            eval_every: 0,
            save_every: 0,
            log_every: 1,
            early_stopping_patience: 0,
            keep_checkpoints: 2,
        }
    }
}

impl Default for OutputSection {
    fn default() -> Self {
        Self {
            dir: None,
            samples: 2,
            tensorboard: false,
        }
    }
}

impl Paths {
    /// All of them.
    pub fn list(&self) -> Vec<PathBuf> {
        match self {
            Self::None => Vec::new(),
            Self::One(path) => vec![path.clone()],
            Self::Many(paths) => paths.clone(),
        }
    }

    /// Whether nothing was given.
    pub fn is_empty(&self) -> bool {
        self.list().is_empty()
    }
}

impl DataSection {
    /// How rows become samples.
    pub fn settings(&self) -> Settings {
        Settings {
            format: self.format,
            max_length: self.max_length,
            truncate: self.truncate,
            tasks: None,
            skip_untrained: false,
        }
    }
}

impl AdapterSection {
    /// Whether all weights are trained.
    pub fn is_full(&self) -> bool {
        self.method == "full"
    }

    /// The section of a recipe that gives nothing but the method.
    pub fn of(method: &str) -> Self {
        let settings = Method::named(method).unwrap_or_else(|| LoraSettings::default().into());
        Self {
            method: method.into(),
            selection: Selection {
                target_modules: settings.default_targets(),
                ..Selection::default()
            },
            init_from: None,
            settings,
        }
    }

    /// The keys that this method has.
    pub fn keys(&self) -> Vec<String> {
        let mut keys = vec!["method".to_owned()];
        keys.extend(adapters::methods::keys_of::<Selection>());
        keys.push("init_from".into());
        keys.extend(self.settings.keys());
        keys
    }

    /// The settings of the adapter.
    pub fn config(&self) -> AdapterConfig {
        AdapterConfig {
            selection: match self.settings.changes_layers() {
                true => self.selection.clone(),
                false => Self::of(&self.method).selection, // it has none
            },
            method: self.settings.clone(),
        }
    }

    /// How many tasks the adapter tells apart, if it does.
    pub fn tasks(&self) -> Option<usize> {
        let tasks = self.settings.tasks();
        tasks.filter(|_| !self.is_full())
    }

    /// Takes over the settings of an adapter that training continues from, but those that `given`
    /// names and that may change.
    pub fn continue_from(&mut self, theirs: &AdapterConfig, given: impl Fn(&str) -> bool) {
        self.selection = theirs.selection.clone();
        let free = self.settings.free_keys();
        let ours = Table::try_from(&self.settings).unwrap_or_default();
        let kept = ours.into_iter();
        let kept = kept.filter(|(key, _)| free.contains(&key.as_str()) && given(key));
        let mut all = Table::try_from(&theirs.method).unwrap_or_default();
        all.extend(kept);
        self.method = theirs.method.name().into();
        self.settings = Method::deserialize(&self.method, Value::Table(all))
            .unwrap_or_else(|_| theirs.method.clone());
    }
}
