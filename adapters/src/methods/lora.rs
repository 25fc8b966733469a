//! LoRA: `y = x Wᵀ + b + s · drop(x) Aᵀ Bᵀ`.
//!
//! Source: <https://arxiv.org/abs/2106.09685>, `peft/tuners/lora/{config,layer}.py`.

mod linear;

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};
use model::load::normal;
use model::ops::{MatmulBackend, matmul};
use model::weight::param_id;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Computes, LayerMethod, Part, Settings, Values};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::{Layer, MAX_RANK, Pattern, number};
use crate::linear::{Dropout, dropped};
pub use linear::{LoraBackend, lora_linear, reference};

/// The settings of LoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraSettings {
    /// Width of the bottleneck, `r`.
    pub rank: usize,
    /// Numerator of the scaling.
    pub alpha: f64,
    /// Probability with which an input element of `lora_a` is dropped while training.
    pub dropout: f64,
    /// Scale by `alpha / √rank` instead of `alpha / rank` (<https://arxiv.org/abs/2312.03732>).
    pub use_rslora: bool,
    /// Weight-decomposed LoRA.
    pub use_dora: bool,
    /// How `lora_a` starts; `lora_b` starts as zeros.
    pub init: LoraInit,
    /// Ranks of single layers: the first key that matches decides.
    pub rank_pattern: Pattern<usize>,
    /// Alphas of single layers: the first key that matches decides.
    pub alpha_pattern: Pattern<f64>,
}

/// How `lora_a` is initialised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LoraInit {
    /// Uniform within `±1/√in` (PyTorch's `kaiming_uniform_(a=√5)`).
    Default,
    /// Normal with deviation `1/rank`.
    Gaussian,
}

impl Default for LoraSettings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            dropout: 0.0,
            use_rslora: false,
            use_dora: false,
            init: LoraInit::Default,
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
        }
    }
}

/// The keys of `adapter_config.json` that are read.
#[derive(Deserialize)]
#[serde(default)]
struct PeftLora {
    r: usize,
    lora_alpha: f64,
    lora_dropout: f64,
    use_rslora: bool,
    rank_pattern: Pattern<usize>,
    alpha_pattern: Pattern<f64>,
}

impl Default for PeftLora {
    fn default() -> Self {
        Self {
            r: 8,
            lora_alpha: 8.0,
            lora_dropout: 0.0,
            use_rslora: false,
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
        }
    }
}

impl Settings for LoraSettings {
    const NAME: &'static str = "lora";
    const TITLE: &'static str = "LoRA";
    const PEFT_TYPE: &'static str = "LORA";
    const MUST_BE: &'static [(&'static str, Value)] = &[
        ("alora_invocation_tokens", Value::Null),
        ("arrow_config", Value::Null),
        ("bias", Value::Null), // "none" is let through, see `unsupported`
        ("corda_config", Value::Null),
        ("eva_config", Value::Null),
        ("fan_in_fan_out", Value::Bool(false)),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
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
    const FREE: &'static [&'static str] = &["dropout", "init"];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let peft: PeftLora = serde_json::from_str(json)?;
        Ok(Self {
            rank: peft.r,
            alpha: peft.lora_alpha,
            dropout: peft.lora_dropout,
            use_rslora: peft.use_rslora,
            use_dora: false,
            init: LoraInit::Default,
            rank_pattern: peft.rank_pattern,
            alpha_pattern: peft.alpha_pattern,
        })
    }

    fn to_peft(&self) -> Map<String, Value> {
        let alphas = self.alpha_pattern.0.iter();
        let alphas: Map<_, _> = alphas
            .map(|(name, alpha)| (name.clone(), number(*alpha)))
            .collect();
        let init = match self.init {
            LoraInit::Default => json!(true),
            LoraInit::Gaussian => json!("gaussian"),
        };
        let settings = json!({
            "alpha_pattern": alphas,
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": init,
            "lora_alpha": number(self.alpha),
            "lora_dropout": self.dropout,
            "r": self.rank,
            "rank_pattern": self.rank_pattern,
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn unsupported(json: &Map<String, Value>) -> Vec<String> {
        let set = Self::MUST_BE.iter().filter_map(|(key, wanted)| {
            super::unless_neutral(json, key, wanted).filter(|_| json[*key] != "none")
        });
        let mut problems: Vec<String> = set.collect();
        // the others change the base weights, too, and such an adapter is no use on the original base
        let init = json.get("init_lora_weights").unwrap_or(&Value::Null);
        let plain = init.is_null() || init.is_boolean();
        let harmless = ["gaussian", "orthogonal", "eva"];
        if !plain && !harmless.iter().any(|name| init == name) {
            problems.push(format!(
                "init_lora_weights is {init}: it belongs to a changed base model, convert the \
                 adapter with PEFT's path_initial_model_for_weight_conversion first"
            ));
        }
        problems
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        let mut unless = |ok: bool, key, text: String| {
            if !ok {
                problems.push((key, text));
            }
        };
        let fits = |rank: usize| (1..=MAX_RANK).contains(&rank);
        let range = format!("must be from 1 to {MAX_RANK}");
        unless(fits(self.rank), "rank", range.clone());
        let mut ranks = self.rank_pattern.0.iter().map(|(_, rank)| *rank);
        unless(
            ranks.all(fits),
            "rank_pattern",
            format!("has a rank that {range}"),
        );
        let fits = |alpha: f64| (alpha as f32).is_finite() && alpha as f32 != 0.0; // computed in f32
        let finite = "must be a finite number other than 0";
        unless(fits(self.alpha), "alpha", finite.into());
        let mut alphas = self.alpha_pattern.0.iter().map(|(_, alpha)| *alpha);
        unless(
            alphas.all(fits),
            "alpha_pattern",
            format!("has an alpha that {finite}"),
        );
        let share = (0.0..1.0).contains(&self.dropout);
        unless(share, "dropout", "must be from 0 to below 1".into());
        unless(!self.use_dora, "use_dora", "= true is not supported".into());
        problems
    }

    fn patterns(&self) -> Vec<&str> {
        let keys = self.rank_pattern.keys().chain(self.alpha_pattern.keys());
        keys.collect()
    }

    fn is_random(&self) -> bool {
        self.dropout > 0.0
    }
}

impl LoraSettings {
    /// The rank of a layer, and the factor on `x Aᵀ Bᵀ`.
    pub fn rank_and_scaling(&self, layer: &str) -> (usize, f64) {
        let rank = self.rank_pattern.find(layer).unwrap_or(self.rank);
        let alpha = self.alpha_pattern.find(layer).unwrap_or(self.alpha);
        let divisor = match self.use_rslora {
            true => (rank as f64).sqrt(),
            false => rank as f64,
        };
        (rank, alpha / divisor)
    }

    fn fresh_a(&self, name: &str, rank: usize, r#in: usize, seed: u64) -> Vec<f32> {
        let count = rank * r#in;
        match self.init {
            LoraInit::Gaussian => normal(seed, name, count, 1.0 / rank as f64),
            LoraInit::Default => {
                let mut rng = ChaCha8Rng::seed_from_u64(seed ^ param_id(name).val());
                let bound = 1.0 / (r#in as f32).sqrt();
                let values = (0..count).map(|_| rng.random_range(-bound..bound));
                values.collect()
            }
        }
    }
}

impl LayerMethod for LoraSettings {
    type Update<B: Backend> = Lora<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let [out, r#in] = layer.shape;
        let (rank, _) = self.rank_and_scaling(&layer.name);
        vec![
            Part::of_layer(layer, "lora_a", "lora_A.weight", &[rank, r#in]),
            Part::of_layer(layer, "lora_b", "lora_B.weight", &[out, rank]),
        ]
    }

    /// `lora_a` random, `lora_b` zero: the adapted layer starts as the base layer.
    fn fresh<B: Backend>(&self, layer: &Layer, _: &mut BaseLinear<B>, seed: u64) -> Vec<Vec<f32>> {
        let [out, r#in] = layer.shape;
        let (rank, _) = self.rank_and_scaling(&layer.name);
        let name = format!("{}.lora_a", layer.name);
        vec![self.fresh_a(&name, rank, r#in, seed), vec![0.0; out * rank]]
    }

    fn update<B: Backend>(&self, layer: &Layer, mut values: Values<'_, B>) -> Lora<B> {
        let (_, scaling) = self.rank_and_scaling(&layer.name);
        Lora {
            lora_a: values.param("lora_a"),
            lora_b: values.param("lora_b"),
            scaling,
            dropout: self.dropout,
            seed: None,
        }
    }

    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let (rank, _) = self.rank_and_scaling(&layer.name);
        [rank, 0] // between `lora_a` and `lora_b`
    }
}

/// The low-rank update of one layer.
#[derive(Module, Debug)]
pub struct Lora<B: Backend> {
    /// `[r, in]`.
    pub lora_a: Param<Tensor<B, 2>>,
    /// `[out, r]`.
    pub lora_b: Param<Tensor<B, 2>>,
    /// The factor on the update.
    pub scaling: f64,
    /// Share of the input elements that are dropped while training.
    pub dropout: f64,
    /// Set while training: decides which are dropped.
    #[module(skip)]
    pub seed: Option<u64>,
}

impl<B: AdaptedBackend> Computes<B> for Lora<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        lora_linear(x, base, self)
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let b = self.lora_b.val().narrow(0, rows.start, rows.len()); // [rows, r]
        weight + matmul(b, self.lora_a.val()).mul_scalar(self.scaling)
    }

    fn draw(&mut self, seed: u64) {
        self.seed = Some(seed);
    }
}

impl<B: Backend> Lora<B> {
    /// What is dropped, if anything is.
    fn drops(&self) -> Option<Dropout> {
        let probability = Some(self.dropout).filter(|share| *share > 0.0)?;
        let seed = self.seed?;
        Some(Dropout { probability, seed })
    }
}

impl<B: MatmulBackend> Lora<B> {
    /// `x` `[n, in]` to the update `[n, out]`, in plain tensor operations.
    pub fn addition(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = dropped(x, self.drops());
        let narrow = matmul(x, self.lora_a.val().transpose()); // [n, r]
        let narrow = narrow.mul_scalar(self.scaling);
        matmul(narrow, self.lora_b.val().transpose()) // [n, out]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_pattern_that_matches_decides() {
        let settings = LoraSettings {
            rank: 4,
            alpha: 8.0,
            rank_pattern: Pattern(vec![
                ("layers.1.mlp.up_proj".into(), 2),
                ("up_proj".into(), 6),
            ]),
            alpha_pattern: Pattern(vec![("up_proj".into(), 12.0)]),
            ..LoraSettings::default()
        };
        let of = |name| settings.rank_and_scaling(name);
        assert_eq!(of("model.layers.1.mlp.up_proj"), (2, 6.0));
        assert_eq!(of("model.layers.0.mlp.up_proj"), (6, 2.0));
        assert_eq!(of("model.layers.0.mlp.gate_proj"), (4, 2.0));
    }
}
