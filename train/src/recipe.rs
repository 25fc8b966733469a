//! The recipe of a run: a TOML file and what the command line sets over it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use adapters::{LoraConfig, LoraInit, Pattern, Targets};
use model::chat::{ChatTemplate, TrainOn};
use quant::Scheme;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use toml::{Table, Value};

use crate::data::{Format, Settings, Truncate};
use crate::error::{Error, Result};

/// Numbers beyond these are slips, and would be allocated.
const MAX_ROWS_PER_STEP: usize = 1 << 20;
const MAX_STEPS: usize = 1 << 32;

/// The sections of a recipe.
const SECTIONS: [&str; 6] = [
    "model",
    "quantization",
    "adapter",
    "data",
    "train",
    "output",
];

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
    /// A jinja file, a model or adapter folder with a template, or the name of a built-in one; the
    /// model's own if not given.
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
    /// Whether decoder layers are computed again in the backward pass, to save memory.
    pub recompute: Recompute,
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
            recompute: Recompute::Auto,
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
        Self::read_for(file, settings, true)
    }

    /// The same for a recipe that may lack training data: for plans.
    pub fn read_without_data(file: Option<&Path>, settings: &[(String, Value)]) -> Result<Self> {
        Self::read_for(file, settings, false)
    }

    fn read_for(file: Option<&Path>, settings: &[(String, Value)], data: bool) -> Result<Self> {
        let table = match file {
            Some(path) => read_table(path)?,
            None => Table::new(),
        };
        let mut reader = Reader {
            file,
            problems: Vec::new(),
            places: BTreeMap::new(),
            failed: BTreeSet::new(),
        };
        let recipe = reader.read(table, settings);
        for (key, problem) in recipe.problems() {
            reader.add_value_problem(key, &problem);
        }
        if data && recipe.data.train.is_empty() {
            let missing = "data.train is missing: give a file or folder of training rows";
            reader.add_value_problem("data.train", missing);
        }
        match reader.problems.is_empty() {
            true => Ok(recipe),
            false => Err(Error::Recipe {
                problems: reader.problems,
            }),
        }
    }

    /// Makes every path absolute, so that a run goes on from any folder.
    pub fn make_paths_absolute(&mut self) {
        let absolute = |path: &mut PathBuf| {
            if let Ok(full) = std::path::absolute(&*path) {
                *path = full;
            }
        };
        for paths in [&mut self.data.train, &mut self.data.eval] {
            match paths {
                Paths::None => {}
                Paths::One(path) => absolute(path),
                Paths::Many(all) => all.iter_mut().for_each(absolute),
            }
        }
        self.adapter.init_from.iter_mut().for_each(absolute);
        self.output.dir.iter_mut().for_each(absolute);
        if let Some(template) = &mut self.data.chat_template
            && ChatTemplate::builtin(template).is_none()
            && Path::new(template).exists()
            && let Ok(full) = std::path::absolute(&*template)
        {
            *template = full.display().to_string();
        }
        if Path::new(&self.model.path).is_dir()
            && let Ok(full) = std::path::absolute(&self.model.path)
        {
            self.model.path = full.display().to_string();
        }
    }

    /// The complete recipe as TOML.
    pub fn to_toml(&self) -> String {
        toml::to_string(self).expect("a recipe is a plain table")
    }

    /// Values that cannot be, and requests that cannot be honoured: the key, and what is wrong.
    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = self.model_problems();
        problems.extend(self.data_problems());
        problems.extend(self.train_problems());
        problems
    }

    fn model_problems(&self) -> Vec<(&'static str, String)> {
        let (model, adapter) = (&self.model, &self.adapter);
        let mut problems = Vec::new();
        let mut check = |ok: bool, key, text: &str| add(&mut problems, ok, key, text);
        check(
            !model.path.is_empty(),
            "model.path",
            "is missing: give a model folder or a Hub id",
        );
        let random = model.init == ModelInit::Random;
        check(
            !random || adapter.is_full(),
            "model.init",
            "= \"random\" needs adapter.method = \"full\"",
        );
        let (format, scheme) = (&self.quantization.format, self.quantization.scheme());
        let unknown = format!("= {format:?} is unknown: expected \"none\", \"nf4\" or \"fp4\"");
        let known = scheme.is_some() || format == "none";
        check(known, "quantization.format", &unknown);
        let block_size = scheme.is_none_or(|scheme| scheme.is_supported());
        let text = "must be a power of two from 32 to 4096";
        check(block_size, "quantization.block_size", text);
        let text = "cannot be trained as a whole: use adapter.method = \"lora\", or \"none\"";
        let text = format!("= {format:?} {text}");
        let frozen = scheme.is_none() || !adapter.is_full();
        check(frozen, "quantization.format", &text);

        let method = &adapter.method;
        let unsupported = format!("= {method:?} is not supported: expected \"lora\" or \"full\"");
        check(
            adapter.is_full() || method == "lora",
            "adapter.method",
            &unsupported,
        );
        let most = LoraConfig::MAX_RANK;
        let range = format!("must be from 1 to {most}");
        let fits = |rank: usize| (1..=most).contains(&rank);
        check(fits(adapter.rank), "adapter.rank", &range);
        let ranks = adapter.rank_pattern.0.iter().all(|(_, rank)| fits(*rank));
        check(
            ranks,
            "adapter.rank_pattern",
            &format!("has a rank that {range}"),
        );
        check(
            (adapter.alpha as f32).is_finite(),
            "adapter.alpha",
            "must be a finite number",
        );
        let alphas = adapter
            .alpha_pattern
            .0
            .iter()
            .all(|(_, alpha)| (*alpha as f32).is_finite());
        check(
            alphas,
            "adapter.alpha_pattern",
            "has an alpha that must be a finite number",
        );
        check(
            (0.0..1.0).contains(&adapter.dropout),
            "adapter.dropout",
            "must be from 0 to below 1",
        );
        check(
            !adapter.use_dora,
            "adapter.use_dora",
            "= true is not supported",
        );
        let continues = adapter.init_from.is_some();
        let apart = "does not go with adapter.method = \"full\"";
        check(
            !(continues && adapter.is_full()),
            "adapter.init_from",
            apart,
        );
        let fresh = adapter.init != LoraInit::Default;
        check(
            !(continues && fresh),
            "adapter.init",
            "does not go with adapter.init_from",
        );
        problems
    }

    fn data_problems(&self) -> Vec<(&'static str, String)> {
        let data = &self.data;
        let mut problems = Vec::new();
        let mut check = |ok: bool, key, text: &str| add(&mut problems, ok, key, text);
        check(
            data.max_length >= 2,
            "data.max_length",
            "must be at least 2",
        );
        check(!data.packing, "data.packing", "= true is not supported");
        let share = (0.0..1.0).contains(&data.eval_fraction);
        check(share, "data.eval_fraction", "must be from 0 to below 1");
        problems
    }

    fn train_problems(&self) -> Vec<(&'static str, String)> {
        let train = &self.train;
        let mut problems = Vec::new();
        let mut check = |ok: bool, key, text: &str| add(&mut problems, ok, key, text);
        check(
            train.epochs > 0.0 && train.epochs <= 1e6,
            "train.epochs",
            "must be above 0 and at most 1e6",
        );
        let steps = train.max_steps.unwrap_or(1);
        check(steps >= 1, "train.max_steps", "must be at least 1");
        let too_many = format!("must be at most {MAX_STEPS}");
        check(steps <= MAX_STEPS, "train.max_steps", &too_many);
        let (micro, accumulation) = (train.micro_batch_size, train.gradient_accumulation_steps);
        check(micro >= 1, "train.micro_batch_size", "must be at least 1");
        check(
            accumulation >= 1,
            "train.gradient_accumulation_steps",
            "must be at least 1",
        );
        let rows = micro.checked_mul(accumulation);
        let too_many = format!(
            "times train.gradient_accumulation_steps must be at most {MAX_ROWS_PER_STEP} rows"
        );
        let few = rows.is_some_and(|rows| rows <= MAX_ROWS_PER_STEP);
        check(few, "train.micro_batch_size", &too_many);
        let optimizer = &train.optimizer;
        let unsupported = format!("= {optimizer:?} is not supported: only \"adamw\" is");
        check(optimizer == "adamw", "train.optimizer", &unsupported);
        let positive = |x: f64| x >= 0.0 && (x as f32).is_finite(); // computed in f32
        check(
            positive(train.learning_rate),
            "train.learning_rate",
            "must be 0 or above",
        );
        check(
            positive(train.weight_decay),
            "train.weight_decay",
            "must be 0 or above",
        );
        let betas = train.betas.iter().all(|beta| (0.0..1.0).contains(beta));
        check(betas, "train.betas", "must both be from 0 to below 1");
        check(
            train.eps as f32 > 0.0 && (train.eps as f32).is_finite(),
            "train.eps",
            "must be above 0",
        );
        let ratio = (0.0..=1.0).contains(&train.warmup_ratio);
        check(ratio, "train.warmup_ratio", "must be from 0 to 1");
        check(
            positive(train.max_grad_norm),
            "train.max_grad_norm",
            "must be 0 (off) or above",
        );
        let evaluates = !self.data.eval.is_empty() || self.data.eval_fraction > 0.0;
        check(
            evaluates || train.early_stopping_patience == 0,
            "train.early_stopping_patience",
            "needs data.eval or data.eval_fraction",
        );
        check(
            train.log_every >= 1,
            "train.log_every",
            "must be at least 1",
        );
        problems
    }
}

fn add(problems: &mut Vec<(&'static str, String)>, ok: bool, key: &'static str, text: &str) {
    if !ok {
        problems.push((key, format!("{key} {text}")));
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

/// What `--set section.key=value` means: TOML, or a string if it is not; strings in a list need no
/// quotes either.
pub fn parse_setting(text: &str) -> Option<(String, Value)> {
    let (key, value) = text.split_once('=')?;
    let (key, value) = (key.trim(), value.trim());
    let (section, name) = key.split_once('.')?;
    if section.is_empty() || name.is_empty() {
        return None;
    }
    let list = value
        .strip_prefix('[')
        .and_then(|rest| rest.strip_suffix(']'));
    let value = match (parse_value(value), list) {
        (Some(value), _) => value,
        (None, Some(list)) => {
            let one = |item: &str| parse_value(item).unwrap_or_else(|| item.trim().into());
            Value::Array(list.split(',').map(one).collect())
        }
        (None, None) => value.into(),
    };
    Some((key.to_owned(), value))
}

fn parse_value(text: &str) -> Option<Value> {
    let mut table = format!("x = {text}").parse::<Table>().ok()?;
    match table.remove("x") {
        // no key of a recipe is a date, but a folder may be called after one
        Some(Value::Datetime(date)) => Some(date.to_string().into()),
        value => value.filter(|_| table.is_empty()),
    }
}

/// Reads key by key, so that one bad key does not hide the next.
struct Reader<'a> {
    file: Option<&'a Path>,
    problems: Vec<String>,
    /// Where each key was given.
    places: BTreeMap<String, Place>,
    /// Keys whose value could not be taken over.
    failed: BTreeSet<String>,
}

/// Where a key was given.
#[derive(Clone, Copy)]
enum Place {
    File,
    CommandLine,
}

impl Reader<'_> {
    fn read(&mut self, table: Table, settings: &[(String, Value)]) -> Recipe {
        let mut recipe = Recipe::default();
        for (section, value) in table {
            match value {
                _ if !SECTIONS.contains(&section.as_str()) => {
                    self.add(Place::File, &unknown_section(&section));
                }
                Value::Table(table) => {
                    for (key, value) in table {
                        self.set(&mut recipe, Place::File, &section, &key, value);
                    }
                }
                _ => self.add(Place::File, &format!("{section} must be a section")),
            }
        }
        for (key, value) in settings {
            let (section, name) = key.split_once('.').unwrap_or((key, ""));
            self.set(
                &mut recipe,
                Place::CommandLine,
                section,
                name,
                value.clone(),
            );
        }
        recipe.given = self.places.keys().cloned().collect();
        recipe
    }

    fn set(&mut self, recipe: &mut Recipe, place: Place, section: &str, key: &str, value: Value) {
        let at = format!("{section}.{key}");
        let outcome = match section {
            "model" => set(&mut recipe.model, key, value),
            "quantization" => set(&mut recipe.quantization, key, value),
            "adapter" => set(&mut recipe.adapter, key, value),
            "data" => set(&mut recipe.data, key, value),
            "train" => set(&mut recipe.train, key, value),
            "output" => set(&mut recipe.output, key, value),
            _ => Err(unknown_section(section)),
        };
        match outcome {
            Ok(()) => {
                self.places.insert(at, place);
            }
            Err(problem) => {
                self.add(place, &format!("{at}: {problem}"));
                self.failed.insert(at);
            }
        }
    }

    /// What is wrong with a value; nothing new about a key that could not be read at all.
    fn add_value_problem(&mut self, key: &str, problem: &str) {
        if self.failed.contains(key) {
            return;
        }
        match (self.places.get(key), self.file) {
            (Some(place), _) => self.add(*place, problem),
            (None, Some(_)) => self.add(Place::File, problem),
            (None, None) => self.problems.push(problem.to_owned()),
        }
    }

    fn add(&mut self, place: Place, problem: &str) {
        let place = match (place, self.file) {
            (Place::File, Some(path)) => path.display().to_string(),
            _ => "the command line".into(),
        };
        self.problems.push(format!("{place}: {problem}"));
    }
}

fn unknown_section(name: &str) -> String {
    format!(
        "there is no section {name}: expected {}",
        SECTIONS.join(", ")
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A recipe file, read with `--set` arguments over it.
    fn read(file: &str, set: &[&str]) -> Result<Recipe> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("my.toml");
        std::fs::write(&path, file).unwrap();
        let settings: Vec<_> = set
            .iter()
            .map(|text| parse_setting(text).unwrap())
            .collect();
        Recipe::read(Some(&path), &settings)
    }

    /// The problems of a recipe, without the folder of its file.
    fn problems(file: &str, set: &[&str]) -> Vec<String> {
        match read(file, set).unwrap_err() {
            Error::Recipe { problems } => {
                let name = |text: String| match text.find("my.toml") {
                    Some(at) => text[at..].to_owned(),
                    None => text,
                };
                problems.into_iter().map(name).collect()
            }
            other => panic!("{other}"),
        }
    }

    const GOOD: &str = "model.path = 'm'\ndata.train = 'rows.jsonl'\n";

    fn problem(set: &str) -> String {
        let all = problems(GOOD, &[set]);
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        let recipe = read(GOOD, &[]).unwrap();
        let expected: Table = r#"
            [model]
            path = "m"
            init = "pretrained"
            [quantization]
            format = "none"
            block_size = 64
            double_quant = false
            [adapter]
            method = "lora"
            rank = 16
            alpha = 32.0
            dropout = 0.0
            target_modules = "all-linear"
            modules_to_save = []
            use_rslora = false
            use_dora = false
            init = "default"
            rank_pattern = {}
            alpha_pattern = {}
            [data]
            train = "rows.jsonl"
            format = "auto"
            max_length = 1024
            truncate = "drop"
            packing = false # until it is supported
            train_on = "assistant"
            shuffle = true
            eval_fraction = 0.0
            [train]
            epochs = 1.0
            micro_batch_size = 4
            gradient_accumulation_steps = 1
            optimizer = "adamw"
            learning_rate = 2e-4
            weight_decay = 0.0
            betas = [0.9, 0.999]
            eps = 1e-8
            lr_schedule = "cosine"
            warmup_ratio = 0.03
            max_grad_norm = 1.0
            recompute = "auto"
            seed = 42
            eval_every = 0
            save_every = 0
            log_every = 1
            early_stopping_patience = 0
            keep_checkpoints = 2
            [output]
        "#
        .parse()
        .unwrap();
        assert_eq!(recipe.to_toml().parse::<Table>().unwrap(), expected);
        assert!(recipe.given.iter().eq(["data.train", "model.path"]));
    }

    #[test]
    fn every_problem_is_told_at_once_with_its_place_and_key() {
        let file = "
            trian.epochs = 2
            [model]
            path = 3
            [adapter]
            rank = 0
            ranks = 8
            [train]
            epochs = 'two'
            max_steps = -1
            [empty]
        ";
        let all = problems(
            file,
            &[
                "train.eps=0",
                "data.packing=yes",
                "output.name=x",
                "foo.bar=1",
            ],
        );
        let expected = [
            "my.toml: there is no section trian: expected model, quantization, adapter, data, train, output",
            "my.toml: model.path: invalid type: integer `3`, expected a string",
            "my.toml: adapter.ranks: unknown field `ranks`, expected one of `method`, `rank`",
            "my.toml: train.epochs: invalid type: string \"two\", expected a number",
            "my.toml: train.max_steps: invalid value: integer `-1`, expected a whole number",
            "my.toml: there is no section empty",
            "the command line: data.packing: invalid type: string \"yes\", expected a boolean",
            "the command line: output.name: unknown field `name`, expected `dir`",
            "the command line: foo.bar: there is no section foo",
            "my.toml: adapter.rank must be from 1 to 65536",
            "the command line: train.eps must be above 0",
            "my.toml: data.train is missing: give a file or folder of training rows",
        ];
        assert_eq!(all.len(), expected.len(), "{all:#?}");
        for (text, start) in all.iter().zip(expected) {
            assert!(
                text.starts_with(start),
                "{text:?} does not start with {start:?}"
            );
        }
    }

    #[test]
    fn without_a_file_no_place_is_invented() {
        let error = Recipe::read(None, &[]).unwrap_err().to_string();
        let expected = "the recipe cannot be used:\n  \
            model.path is missing: give a model folder or a Hub id\n  \
            data.train is missing: give a file or folder of training rows";
        assert_eq!(error, expected);
    }

    #[test]
    fn what_is_no_toml_names_the_file_and_the_line() {
        let error = read("[model]\npath = \n", &[]).unwrap_err();
        assert!(
            error.to_string().ends_with("my.toml is not a recipe"),
            "{error}"
        );
        let cause = std::error::Error::source(&error).unwrap().to_string();
        assert!(cause.contains("line 2"), "{cause}");
        assert_eq!(
            problems("model = 'm'\n[data]\ntrain = 'x'", &[])[0],
            "my.toml: model must be a section"
        );
        let missing = Recipe::read(Some(Path::new("no/such.toml")), &[]).unwrap_err();
        assert_eq!(missing.to_string(), "cannot read the recipe no/such.toml");
    }

    #[test]
    fn requests_that_cannot_be_honoured_are_errors() {
        let cases = [
            ("data.packing=true", "data.packing = true is not supported"),
            (
                "quantization.format=int4",
                "quantization.format = \"int4\" is unknown: expected \"none\", \"nf4\" or \"fp4\"",
            ),
            (
                "train.recompute=layer",
                "train.recompute: unknown variant `layer`, expected one of `auto`, `none`, `block`",
            ),
            (
                "adapter.use_dora=true",
                "adapter.use_dora = true is not supported",
            ),
            (
                "adapter.method=ia3",
                "adapter.method = \"ia3\" is not supported: expected \"lora\" or \"full\"",
            ),
            (
                "adapter.init=pissa",
                "adapter.init: unknown variant `pissa`, expected `default` or `gaussian`",
            ),
            (
                "train.optimizer=lion",
                "train.optimizer = \"lion\" is not supported",
            ),
            (
                "data.format=parquet",
                "data.format: unknown variant `parquet`",
            ),
            (
                "model.init=random",
                "model.init = \"random\" needs adapter.method = \"full\"",
            ),
        ];
        for (set, expected) in cases {
            let text = problem(set);
            assert!(
                text.starts_with(&format!("the command line: {expected}")),
                "{text}"
            );
        }
        let both = problems(GOOD, &["adapter.method=full", "adapter.init_from=there"]);
        assert_eq!(
            both,
            ["the command line: adapter.init_from does not go with adapter.method = \"full\""]
        );
    }

    #[test]
    fn impossible_and_absurd_values_are_errors() {
        let cases = [
            "adapter.rank=65537",
            "adapter.rank_pattern={q_proj = 0}",
            "adapter.alpha=inf",
            "adapter.alpha_pattern={q_proj = nan}",
            "adapter.dropout=1.0",
            "adapter.dropout=-0.1",
            "data.max_length=1",
            "data.eval_fraction=1",
            "train.epochs=0",
            "train.epochs=nan",
            "train.max_steps=0",
            "train.max_steps=9000000000000000000",
            "train.micro_batch_size=0",
            "train.gradient_accumulation_steps=0",
            "train.micro_batch_size=9000000000000000000",
            "train.learning_rate=-1",
            "train.learning_rate=inf",
            "train.weight_decay=-1",
            "train.betas=[0.9, 1.0]",
            "train.betas=[0.9]",
            "train.eps=0",
            "train.warmup_ratio=1.5",
            "train.max_grad_norm=-1",
            "train.log_every=0",
            "train.seed=-1",
            "train.warmup_steps=1.5",
        ];
        for set in cases {
            let key = set.split_once('=').unwrap().0;
            let text = problem(set);
            assert!(
                text.starts_with(&format!("the command line: {key}")),
                "{set}: {text}"
            );
        }
        let sizes = [
            "train.micro_batch_size=4294967296",
            "train.gradient_accumulation_steps=4294967296",
        ];
        let text = &problems(GOOD, &sizes)[0]; // the product is 2^64
        assert!(text.contains("must be at most 1048576 rows"), "{text}");
    }

    #[test]
    fn a_setting_is_toml_or_a_string() {
        let value = |text: &str| parse_setting(&format!("data.train={text}")).unwrap().1;
        let texts = |all: &[&str]| Value::Array(all.iter().map(|text| (*text).into()).collect());
        assert_eq!(value("1e-4"), Value::Float(1e-4));
        assert_eq!(value("5"), Value::Integer(5));
        assert_eq!(value("true"), Value::Boolean(true));
        assert_eq!(value("\"5\""), "5".into());
        assert_eq!(value("a/b c.jsonl"), "a/b c.jsonl".into());
        assert_eq!(value("Qwen/Qwen-7B@main"), "Qwen/Qwen-7B@main".into());
        assert_eq!(value("a=b"), "a=b".into());
        assert_eq!(value("2026-01-01"), "2026-01-01".into());
        assert_eq!(value(""), "".into());
        assert_eq!(value("1\ny = 2"), "1\ny = 2".into());
        assert_eq!(
            value("[\"q_proj\", 'v_proj']"),
            texts(&["q_proj", "v_proj"])
        );
        assert_eq!(value("[q_proj, \"v_proj\"]"), texts(&["q_proj", "v_proj"]));
        assert_eq!(value("[1, 2]"), Value::Array(vec![1.into(), 2.into()]));
        assert_eq!(value(r".*\.[qv]_proj"), r".*\.[qv]_proj".into());
        assert!(matches!(value("{q_proj = 8}"), Value::Table(_)));
        assert_eq!(
            parse_setting(" train.seed = 7 "),
            Some(("train.seed".into(), 7.into()))
        );
        for bad in ["train.seed", "seed=7", ".seed=7", "train.=7", "=7", ""] {
            assert_eq!(parse_setting(bad), None, "{bad}");
        }
    }

    #[test]
    fn the_command_line_wins_over_the_file() {
        let recipe = read(
            &format!("{GOOD}train.seed = 1\ntrain.epochs = 3"),
            &["train.seed=2"],
        )
        .unwrap();
        assert_eq!((recipe.train.seed, recipe.train.epochs), (2, 3.0));
        let given = ["data.train", "model.path", "train.epochs", "train.seed"];
        assert!(recipe.given.iter().eq(given));
        let text = problems(&format!("{GOOD}train.eps = 1.0"), &["train.eps=-1"]);
        assert_eq!(text, ["the command line: train.eps must be above 0"]);
    }

    #[test]
    fn a_recipe_written_and_read_is_the_same() {
        let all = [
            "adapter.target_modules=[q_proj, v_proj]",
            "adapter.exclude_modules=.*o_proj",
            "adapter.layers_to_transform=[0, 2]",
            "adapter.rank_pattern={q_proj = 8, 'layers.1' = 4}",
            "adapter.alpha_pattern={v_proj = 2.5}",
            "adapter.modules_to_save=[lm_head]",
            "adapter.init_from=some/adapter",
            "adapter.alpha=3",
            "data.train=[a.jsonl, b.jsonl]",
            "data.eval=c.json",
            "data.chat_template=chatml",
            "data.truncate=right",
            "data.train_on=last",
            "data.format=messages",
            "train.max_steps=7",
            "train.warmup_steps=2",
            "train.lr_schedule=linear",
            "train.betas=[0.8, 0.95]",
            "train.learning_rate=3e-5",
            "train.recompute=block",
            "output.dir=runs/\u{e9} \"x\"",
        ];
        for settings in [&all[..], &[]] {
            let recipe = read(GOOD, settings).unwrap();
            let again = read(&recipe.to_toml(), &[]).unwrap();
            assert!(again.given.is_superset(&recipe.given));
            assert_eq!(
                Recipe {
                    given: recipe.given.clone(),
                    ..again
                },
                recipe
            );
        }
    }
}
