//! The recipe of a run: a TOML file and what the command line sets over it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use adapters::{LoraConfig, LoraInit, Pattern, Targets};
use model::chat::TrainOn;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::data::{Format, Settings, Truncate};
use crate::error::{Error, Result};

/// Most optimizer steps of a run, and most rows of a step: far above every real run, and such that
/// no product of them overflows.
const MAX_STEPS: usize = 1 << 32;
const MAX_STEP_ROWS: usize = 1 << 20;

/// Everything that decides a run.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Recipe {
    /// The base model.
    pub model: ModelSection,
    /// How the base model's weights are stored.
    pub quantization: QuantizationSection,
    /// What is trained.
    pub adapter: AdapterSection,
    /// What it is trained on.
    pub data: DataSection,
    /// How it is trained.
    pub train: TrainSection,
    /// Where the results go.
    pub output: OutputSection,
    /// Keys that the file or the command line gave, as `section.key`.
    #[serde(skip)]
    pub given: BTreeSet<String>,
}

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
    /// `"none"`.
    pub format: String,
    /// Weights that share a scale.
    pub block_size: usize,
    /// Whether the scales are quantized, too.
    pub double_quant: bool,
}

/// `[adapter]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdapterSection {
    /// `"lora"`, or `"full"` for all weights.
    pub method: String,
    /// Width of the LoRA bottleneck.
    pub rank: usize,
    /// Numerator of the LoRA scaling.
    pub alpha: f64,
    /// Dropout before `lora_a`.
    pub dropout: f64,
    /// List of name ends, a regular expression, or `"all-linear"`.
    pub target_modules: Targets,
    /// Modules left out although `target_modules` means them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exclude_modules: Option<Targets>,
    /// Adapt only these decoder layers.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub layers_to_transform: Option<Vec<usize>>,
    /// Modules that are trained and saved as a whole.
    pub modules_to_save: Vec<String>,
    /// Scale by `alpha / √rank`.
    pub use_rslora: bool,
    /// Weight-decomposed LoRA.
    pub use_dora: bool,
    /// How `lora_a` starts.
    pub init: LoraInit,
    /// A PEFT adapter folder to continue from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub init_from: Option<PathBuf>,
    /// Ranks of single modules.
    pub rank_pattern: Pattern<usize>,
    /// Alphas of single modules.
    pub alpha_pattern: Pattern<f64>,
}

/// `[data]`
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DataSection {
    /// Training file, files or folder.
    #[serde(skip_serializing_if = "Paths::is_empty")]
    pub train: Paths,
    /// Evaluation file, files or folder.
    #[serde(skip_serializing_if = "Paths::is_empty")]
    pub eval: Paths,
    /// What a row looks like.
    pub format: Format,
    /// A jinja file, or the name of a built-in template; the model's own if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat_template: Option<String>,
    /// Longest row in tokens.
    pub max_length: usize,
    /// What happens to longer rows.
    pub truncate: Truncate,
    /// Several rows in one sequence.
    pub packing: bool,
    /// Which part of a conversation is trained.
    pub train_on: TrainOn,
    /// Another order each epoch; off: file order, wrapping round.
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
    /// Rows at a time.
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
    /// `"auto"` or `"none"`: whether blocks are computed again in the backward pass.
    pub recompute: String,
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
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OutputSection {
    /// The run folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dir: Option<PathBuf>,
}

impl Default for QuantizationSection {
    fn default() -> Self {
        Self {
            format: "none".into(),
            block_size: 64,
            double_quant: false,
        }
    }
}

impl Default for AdapterSection {
    fn default() -> Self {
        Self {
            method: "lora".into(),
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            target_modules: Targets::AllLinear,
            exclude_modules: None,
            layers_to_transform: None,
            modules_to_save: Vec::new(),
            use_rslora: false,
            use_dora: false,
            init: LoraInit::Default,
            init_from: None,
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
        }
    }
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
            packing: false,
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
            recompute: "auto".into(),
            seed: 42,
            eval_every: 0,
            save_every: 0,
            log_every: 1,
            early_stopping_patience: 0,
            keep_checkpoints: 2,
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
        }
    }
}

impl AdapterSection {
    /// Whether all weights are trained.
    pub fn is_full(&self) -> bool {
        self.method == "full"
    }

    /// The settings of a LoRA adapter.
    pub fn lora(&self) -> LoraConfig {
        LoraConfig {
            rank: self.rank,
            alpha: self.alpha,
            dropout: self.dropout,
            target_modules: self.target_modules.clone(),
            exclude_modules: self.exclude_modules.clone(),
            layers_to_transform: self.layers_to_transform.clone(),
            rank_pattern: self.rank_pattern.clone(),
            alpha_pattern: self.alpha_pattern.clone(),
            use_rslora: self.use_rslora,
            modules_to_save: self.modules_to_save.clone(),
            init: self.init,
        }
    }

    /// Takes over the settings of an adapter that training continues from.
    pub fn set_lora(&mut self, lora: &LoraConfig) {
        let lora = lora.clone();
        self.rank = lora.rank;
        self.alpha = lora.alpha;
        self.dropout = lora.dropout;
        self.target_modules = lora.target_modules;
        self.exclude_modules = lora.exclude_modules;
        self.layers_to_transform = lora.layers_to_transform;
        self.rank_pattern = lora.rank_pattern;
        self.alpha_pattern = lora.alpha_pattern;
        self.use_rslora = lora.use_rslora;
        self.modules_to_save = lora.modules_to_save;
    }
}

impl Recipe {
    /// Reads a recipe file (if there is one) and applies `section.key = value` settings over it.
    ///
    /// # Errors
    /// [`Error::Recipe`] with every unknown key, wrong type and impossible value at once.
    pub fn read(file: Option<&Path>, settings: &[(String, Value)]) -> Result<Self> {
        let table = match file {
            Some(path) => read_table(path)?,
            None => Table::new(),
        };
        let place = file.map_or("the recipe".into(), |path| path.display().to_string());
        let mut reader = Reader {
            place,
            problems: Vec::new(),
            given: BTreeSet::new(),
        };
        let recipe = reader.read(table, settings);
        reader.problems.extend(recipe.problems());
        match reader.problems.is_empty() {
            true => Ok(recipe),
            false => Err(Error::Recipe {
                problems: reader.problems,
            }),
        }
    }

    /// The complete recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is a plain table")
    }

    /// Values that cannot be, and requests that cannot be honoured.
    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, text: &str| {
            if !ok {
                problems.push(text.to_owned());
            }
        };
        let (model, adapter, data, train) = (&self.model, &self.adapter, &self.data, &self.train);
        check(
            !model.path.is_empty(),
            "model.path is missing: give a model folder or a Hub id",
        );
        let random = model.init == ModelInit::Random;
        check(
            !random || adapter.is_full(),
            "model.init = \"random\" needs adapter.method = \"full\"",
        );
        let format = &self.quantization.format;
        check(
            format == "none",
            &format!("quantization.format = {format:?} is not supported: only \"none\" is"),
        );

        let method = &adapter.method;
        let known = adapter.is_full() || method == "lora";
        check(
            known,
            &format!("adapter.method = {method:?} is not supported: expected \"lora\" or \"full\""),
        );
        let most = LoraConfig::MAX_RANK;
        let ranks = adapter.rank_pattern.0.iter().map(|(_, rank)| *rank);
        check(
            (1..=most).contains(&adapter.rank),
            &format!("adapter.rank must be from 1 to {most}"),
        );
        check(
            ranks.into_iter().all(|rank| (1..=most).contains(&rank)),
            &format!("adapter.rank_pattern must hold ranks from 1 to {most}"),
        );
        check(
            (adapter.alpha as f32).is_finite(),
            "adapter.alpha must be a finite number",
        );
        check(
            (0.0..1.0).contains(&adapter.dropout),
            "adapter.dropout must be from 0 to below 1",
        );
        check(
            !adapter.use_dora,
            "adapter.use_dora = true is not supported",
        );
        let continues = adapter.init_from.is_some();
        check(
            !(continues && adapter.is_full()),
            "adapter.init_from does not go with adapter.method = \"full\"",
        );

        check(
            !data.train.is_empty(),
            "data.train is missing: give a file or folder of training rows",
        );
        check(data.max_length >= 2, "data.max_length must be at least 2");
        check(!data.packing, "data.packing = true is not supported");
        check(
            (0.0..1.0).contains(&data.eval_fraction),
            "data.eval_fraction must be from 0 to below 1",
        );

        check(
            train.epochs > 0.0 && train.epochs <= 1e6,
            "train.epochs must be above 0 and at most 1e6",
        );
        let steps = train.max_steps.unwrap_or(1);
        check(
            (1..=MAX_STEPS).contains(&steps),
            &format!("train.max_steps must be from 1 to {MAX_STEPS}"),
        );
        let (micro, accumulation) = (train.micro_batch_size, train.gradient_accumulation_steps);
        check(micro >= 1, "train.micro_batch_size must be at least 1");
        check(
            accumulation >= 1,
            "train.gradient_accumulation_steps must be at least 1",
        );
        check(
            micro.saturating_mul(accumulation) <= MAX_STEP_ROWS,
            &format!(
                "train.micro_batch_size × train.gradient_accumulation_steps must be at most {MAX_STEP_ROWS}"
            ),
        );
        let optimizer = &train.optimizer;
        check(
            optimizer == "adamw",
            &format!("train.optimizer = {optimizer:?} is not supported: only \"adamw\" is"),
        );
        let positive = |x: f64| x >= 0.0 && (x as f32).is_finite(); // computed in f32
        check(
            positive(train.learning_rate),
            "train.learning_rate must be 0 or above",
        );
        check(
            positive(train.weight_decay),
            "train.weight_decay must be 0 or above",
        );
        let betas = train.betas.iter().all(|beta| (0.0..1.0).contains(beta));
        check(betas, "train.betas must both be from 0 to below 1");
        check(
            train.eps as f32 > 0.0 && (train.eps as f32).is_finite(),
            "train.eps must be above 0",
        );
        check(
            (0.0..=1.0).contains(&train.warmup_ratio),
            "train.warmup_ratio must be from 0 to 1",
        );
        check(
            positive(train.max_grad_norm),
            "train.max_grad_norm must be 0 (off) or above",
        );
        check(train.log_every >= 1, "train.log_every must be at least 1");
        let recompute = &train.recompute;
        check(
            recompute == "auto" || recompute == "none",
            &format!(
                "train.recompute = {recompute:?} is not supported: expected \"auto\" or \"none\""
            ),
        );
        problems
    }
}

fn read_table(path: &Path) -> Result<Table> {
    let text = std::fs::read_to_string(path).map_err(|source| Error::NoRecipe {
        path: path.into(),
        source,
    })?;
    text.parse().map_err(|source| Error::Toml {
        path: path.into(),
        source,
    })
}

/// What `--set section.key=value` means: TOML, or a string if it is not.
pub fn parse_setting(text: &str) -> Option<(String, Value)> {
    let (key, value) = text.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let (section, name) = key.split_once('.')?;
    if section.is_empty() || name.is_empty() {
        return None;
    }
    let parsed = format!("x = {value}").parse::<Table>().ok();
    let parsed = parsed
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("x"));
    Some((
        key.to_owned(),
        parsed.unwrap_or_else(|| Value::String(value.to_owned())),
    ))
}

/// Reads key by key, so that one bad key does not hide the next.
struct Reader {
    place: String,
    problems: Vec<String>,
    given: BTreeSet<String>,
}

impl Reader {
    fn read(&mut self, table: Table, settings: &[(String, Value)]) -> Recipe {
        let mut keys: Vec<(String, String, Value, String)> = Vec::new();
        for (section, value) in table {
            match value {
                Value::Table(table) => keys.extend(
                    table
                        .into_iter()
                        .map(|(key, value)| (section.clone(), key, value, self.place.clone())),
                ),
                _ => self
                    .problems
                    .push(format!("{}: {section} must be a section", self.place)),
            }
        }
        for (key, value) in settings {
            let (section, name) = key.split_once('.').unwrap_or((key, ""));
            let place = "the command line".to_owned();
            keys.push((section.to_owned(), name.to_owned(), value.clone(), place));
        }
        let mut recipe = Recipe::default();
        for (section, key, value, place) in keys {
            let at = format!("{section}.{key}");
            let outcome = match section.as_str() {
                "model" => set(&mut recipe.model, &key, value),
                "quantization" => set(&mut recipe.quantization, &key, value),
                "adapter" => set(&mut recipe.adapter, &key, value),
                "data" => set(&mut recipe.data, &key, value),
                "train" => set(&mut recipe.train, &key, value),
                "output" => set(&mut recipe.output, &key, value),
                _ => Err(format!(
                    "unknown section {section}: expected model, quantization, adapter, data, train or output"
                )),
            };
            match outcome {
                Ok(()) => {
                    self.given.insert(at);
                }
                Err(problem) => self.problems.push(format!("{place}: {at}: {problem}")),
            }
        }
        recipe.given = self.given.clone();
        recipe
    }
}

/// Sets one key of a section; the section stays as it is when the key or the type is wrong.
fn set<T: Serialize + DeserializeOwned>(
    section: &mut T,
    key: &str,
    value: Value,
) -> std::result::Result<(), String> {
    let current = Value::try_from(&*section).map_err(|e| e.to_string())?;
    let mut table = current.as_table().cloned().unwrap_or_default();
    table.insert(key.to_owned(), value);
    *section = Value::Table(table)
        .try_into()
        .map_err(|e: toml::de::Error| {
            let message = e.message().trim().lines().collect::<Vec<_>>().join(", ");
            in_words(&message)
        })?;
    Ok(())
}

/// serde names Rust's types.
fn in_words(message: &str) -> String {
    let words = [
        ("expected usize", "expected a whole number, 0 or above"),
        ("expected u64", "expected a whole number, 0 or above"),
        ("expected f64", "expected a number"),
    ];
    words
        .iter()
        .fold(message.to_owned(), |text, (name, words)| {
            text.replace(name, words)
        })
}
