//! The sections of a recipe: what can be set, and to what it is set if nobody does.

use std::path::PathBuf;

use adapters::{LoraConfig, LoraInit, Pattern, Targets};
use model::chat::TrainOn;
use quant::Scheme;
use serde::{Deserialize, Serialize};

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
            skip_untrained: false,
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
