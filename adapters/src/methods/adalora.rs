//! AdaLoRA: `y = x Wᵀ + b + s · drop(x) (A ∘ E)ᵀ Bᵀ` in the form of a singular value decomposition,
//! `E` the values. While it is trained, those that matter least go, see the file `budget`.
//!
//! Source: <https://arxiv.org/abs/2303.10512>, `peft/tuners/adalora/{config,layer,model}.py`.

mod budget;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use burn::module::{Module, Param};
use burn::optim::GradientsParams;
use burn::tensor::{Tensor, backend::Backend};
use model::linear::Projection;
use model::load::normal;
use model::ops::matmul;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::budget::Budget;
use super::lora::{Lora, LoraSettings, lora_linear};
use super::{AfterStep, Computes, LayerMethod, Part, Settings, Values};
use super::{alpha_problem, rank_problem, read_peft, share_problem, unless_neutral};
use crate::base::{AdaptedBackend, BaseLinear, TrainBackend};
use crate::config::{Layer, number};

/// Deviation of the vectors in the beginning.
const DEVIATION: f64 = 0.02;

/// The settings of AdaLoRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdaloraSettings {
    /// Rank of every layer in the beginning.
    pub init_r: usize,
    /// Mean rank of the layers in the end.
    pub target_r: usize,
    /// Numerator of the scaling `alpha / init_r`.
    pub alpha: f64,
    /// Probability with which an input element is dropped while training.
    pub dropout: f64,
    /// Steps before the ranks begin to fall.
    pub tinit: usize,
    /// Steps after they have fallen.
    pub tfinal: usize,
    /// They fall every so many steps.
    #[serde(rename = "deltaT")]
    pub delta_t: usize,
    /// How much of the importance is that of earlier steps.
    pub beta1: f64,
    /// How much of its uncertainty is.
    pub beta2: f64,
    /// Weight of the term of the loss that holds the vectors orthogonal.
    pub orth_reg_weight: f64,
    /// Steps of the schedule; those of the run if not given.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_step: Option<usize>,
    /// Which ranks an adapter that was trained has left, by layer; no key of a recipe.
    #[serde(skip)]
    pub rank_pattern: Option<BTreeMap<String, Vec<bool>>>,
}

impl Default for AdaloraSettings {
    fn default() -> Self {
        Self {
            init_r: 12,
            target_r: 8,
            alpha: 32.0,
            dropout: 0.0,
            tinit: 0,
            tfinal: 0,
            delta_t: 1,
            beta1: 0.85,
            beta2: 0.85,
            orth_reg_weight: 0.5,
            total_step: None,
            rank_pattern: None,
        }
    }
}

/// The key of `adapter_config.json` that a recipe has not.
#[derive(Deserialize)]
struct PeftPattern {
    rank_pattern: Option<BTreeMap<String, Vec<bool>>>,
}

impl Settings for AdaloraSettings {
    const NAME: &'static str = "adalora";
    const TITLE: &'static str = "AdaLoRA";
    const PEFT_TYPE: &'static str = "ADALORA";
    const FREE: &'static [&'static str] = &[
        "dropout",
        "target_r",
        "tinit",
        "tfinal",
        "deltaT",
        "beta1",
        "beta2",
        "orth_reg_weight",
        "total_step",
    ];
    const PEFT_NAMES: &'static [(&'static str, &'static str)] =
        &[("lora_alpha", "alpha"), ("lora_dropout", "dropout")];
    /// Importance and uncertainty.
    const REMEMBERS: usize = 2;

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        let mut settings: Self = read_peft(json, json!({"alpha": 8}))?;
        let pattern = serde_json::from_str::<PeftPattern>(json)?.rank_pattern;
        let by_layer = |(key, kept): (String, Vec<bool>)| {
            let key = key.strip_suffix(".default").unwrap_or(&key);
            (key.strip_suffix(".lora_E").unwrap_or(key).to_owned(), kept)
        };
        settings.rank_pattern = pattern
            .filter(|pattern| !pattern.is_empty())
            .map(|pattern| pattern.into_iter().map(by_layer).collect());
        Ok(settings)
    }

    fn to_peft(&self) -> Map<String, Value> {
        let keys = self.rank_pattern.as_ref().map(|pattern| {
            let key =
                |(layer, kept): (&String, &Vec<bool>)| (format!("{layer}.lora_E"), json!(kept));
            pattern.iter().map(key).collect::<Map<_, _>>()
        });
        let settings = json!({
            "alpha_pattern": {},
            "beta1": self.beta1,
            "beta2": self.beta2,
            "bias": "none",
            "deltaT": self.delta_t,
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "init_r": self.init_r,
            "lora_alpha": number(self.alpha),
            "lora_dropout": self.dropout,
            "orth_reg_weight": self.orth_reg_weight,
            "r": 8, // PEFT's default, which it does not use
            "rank_pattern": keys,
            "target_r": self.target_r,
            "tfinal": self.tfinal,
            "tinit": self.tinit,
            // PEFT loads none without, nor one that leaves no step to let ranks fall
            "total_step": self.total_step.unwrap_or(self.tinit + self.tfinal + 1),
            "use_dora": false,
            "use_rslora": false,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn unsupported(json: &Map<String, Value>) -> Vec<String> {
        let mut problems = LoraSettings::unsupported(json);
        problems.extend(unless_neutral(json, "use_dora", &json!(false)));
        problems.extend(unless_neutral(json, "bias", &json!("none")));
        problems
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let within = |key, share: f64| {
            (!(share > 0.0 && share < 1.0)).then(|| (key, "must be between 0 and 1".to_owned()))
        };
        let unless = |ok: bool, key, text: &str| (!ok).then(|| (key, text.to_owned()));
        let weight = self.orth_reg_weight;
        let all = [
            rank_problem("init_r", [self.init_r]),
            rank_problem("target_r", [self.target_r]),
            unless(
                self.target_r <= self.init_r,
                "target_r",
                "must not be above init_r",
            ),
            alpha_problem("alpha", [self.alpha]),
            unless(self.alpha > 0.0, "alpha", "must be above 0"),
            share_problem("dropout", self.dropout),
            unless(self.delta_t > 0, "deltaT", "must be above 0"),
            within("beta1", self.beta1),
            within("beta2", self.beta2),
            unless(
                weight >= 0.0 && weight.is_finite(),
                "orth_reg_weight",
                "must be 0 or above",
            ),
        ];
        all.into_iter().flatten().collect()
    }

    fn is_random(&self) -> bool {
        self.dropout > 0.0
    }

    fn is_converted(&self) -> bool {
        true
    }
}

impl AdaloraSettings {
    /// The rank of a layer.
    fn rank(&self, layer: &str) -> usize {
        let pattern = self.rank_pattern.as_ref();
        let kept = pattern.and_then(|pattern| pattern.get(layer));
        kept.map_or(self.init_r, |kept| count(kept))
    }
}

fn count(kept: &[bool]) -> usize {
    kept.iter().filter(|kept| **kept).count()
}

impl LayerMethod for AdaloraSettings {
    type Update<B: Backend> = Adalora<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let ([out, r#in], rank) = (layer.shape, self.rank(&layer.name));
        vec![
            Part::of_layer(layer, "lora_a", "lora_A", &[rank, r#in]),
            Part::of_layer(layer, "lora_b", "lora_B", &[out, rank]),
            Part::of_layer(layer, "lora_e", "lora_E", &[rank, 1]),
        ]
    }

    /// The vectors random, the values zero: the adapted layer starts as the base layer.
    fn fresh<B: Backend>(&self, layer: &Layer, _: &mut BaseLinear<B>, seed: u64) -> Vec<Vec<f32>> {
        let values = |part: Part| {
            let count = part.shape.iter().product();
            match part.end() {
                "lora_e" => vec![0.0; count],
                _ => normal(seed, &part.name, count, DEVIATION),
            }
        };
        self.parts(layer).into_iter().map(values).collect()
    }

    fn update<B: Backend>(&self, layer: &Layer, mut values: Values<'_, B>) -> Adalora<B> {
        let has_any = self.rank(&layer.name) > 0;
        let factors = has_any.then(|| Factors {
            a: values.param("lora_a"),
            b: values.param("lora_b"),
            e: values.param("lora_e"),
        });
        Adalora {
            factors,
            scaling: self.alpha / (self.init_r as f64 + 1e-5), // as PEFT has it
            dropout: self.dropout,
            seed: None,
        }
    }

    /// Between the two factors, and `A ∘ E`.
    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let ([_, r#in], rank) = (layer.shape, self.rank(&layer.name));
        [rank, rank * r#in]
    }

    /// Without the ranks whose value is zero.
    fn convert(&self, layers: &[Layer], values: &mut HashMap<String, Vec<f32>>) -> Option<Self> {
        if self.rank_pattern.is_some() {
            return None;
        }
        let kept = |layer: &Layer| {
            let e = values.get(&format!("{}.lora_e", layer.name))?;
            Some((layer.name.clone(), e.iter().map(|e| *e != 0.0).collect()))
        };
        let pattern: BTreeMap<String, Vec<bool>> = layers.iter().filter_map(kept).collect();
        let all: Vec<_> = pattern.values().flatten().copied().collect();
        if all.iter().all(|kept| *kept) || !all.contains(&true) {
            return None; // nothing is to go, or nothing has been trained
        }
        for (layer, kept) in &pattern {
            slice(layer, kept, values);
        }
        Some(Self {
            rank_pattern: Some(pattern),
            ..self.clone()
        })
    }

    /// `orth_reg_weight` times the mean of `‖A Aᵀ - 1‖` and `‖Bᵀ B - 1‖` over all layers.
    fn regularise<B: TrainBackend>(
        &self,
        update: &Adalora<B>,
        layers: usize,
        gradients: &mut GradientsParams,
    ) {
        let weight = self.orth_reg_weight / (2 * layers) as f64;
        if let Some(Factors { a, b, .. }) = update.factors.as_ref().filter(|_| weight > 0.0) {
            let of_a = orthogonality_gradient(a.val().inner(), weight);
            let of_b = orthogonality_gradient(b.val().inner().transpose(), weight).transpose();
            for (param, gradient) in [(a, of_a), (b, of_b)] {
                let sum = match gradients.remove::<B::InnerBackend, 2>(param.id) {
                    Some(before) => before + gradient,
                    None => gradient,
                };
                gradients.register::<B::InnerBackend, 2>(param.id, sum);
            }
        }
    }

    fn of_run(&mut self, steps: usize) -> Option<(&'static str, String)> {
        let total = *self.total_step.get_or_insert(steps);
        (self.tinit + self.tfinal >= total).then(|| {
            let text = format!(
                "and adapter.tinit ({} and {}) leave none of {total} steps to let the ranks fall",
                self.tfinal, self.tinit
            );
            ("tfinal", text)
        })
    }

    fn after_step<B: Backend>(
        &self,
        layers: &[Layer],
        steps: usize,
    ) -> Option<Box<dyn AfterStep<B>>> {
        Some(Box::new(Budget::new(self, layers, steps)))
    }
}

/// Takes the ranks that are not kept out of the tensors of a layer.
fn slice(layer: &str, kept: &[bool], values: &mut HashMap<String, Vec<f32>>) {
    let mut change = |end: &str, is_kept: &dyn Fn(usize, usize) -> bool| {
        if let Some(all) = values.get_mut(&format!("{layer}.{end}")) {
            let width = all.len() / kept.len();
            let mut index = 0..;
            all.retain(|_| index.next().is_some_and(|index| is_kept(index, width)));
        }
    };
    change("lora_a", &|index, r#in| kept[index / r#in]);
    change("lora_b", &|index, _| kept[index % kept.len()]);
    change("lora_e", &|index, _| kept[index]);
}

/// The gradient of `weight · ‖P Pᵀ - 1‖` by `P` `[r, n]`.
fn orthogonality_gradient<B: AdaptedBackend>(p: Tensor<B, 2>, weight: f64) -> Tensor<B, 2> {
    let [rank, _] = p.dims();
    let off = matmul(p.clone(), p.clone().transpose()) - Tensor::eye(rank, &p.device()); // [r, r]
    let norm = off.clone().powi_scalar(2).sum().sqrt();
    let norm = norm.clamp_min(f32::MIN_POSITIVE).unsqueeze();
    matmul(off, p).mul_scalar(2.0 * weight) / norm
}

/// The update of one layer.
#[derive(Module, Debug)]
pub struct Adalora<B: Backend> {
    /// What it is made of; nothing if no rank is left.
    pub factors: Option<Factors<B>>,
    /// The factor on the update.
    pub scaling: f64,
    /// Share of the input elements that are dropped while training.
    pub dropout: f64,
    /// Set while training: decides which are dropped.
    #[module(skip)]
    pub seed: Option<u64>,
}

/// Vectors and values.
#[derive(Module, Debug)]
pub struct Factors<B: Backend> {
    /// Right vectors, `[r, in]`.
    pub a: Param<Tensor<B, 2>>,
    /// Left vectors, `[out, r]`.
    pub b: Param<Tensor<B, 2>>,
    /// Values, `[r, 1]`.
    pub e: Param<Tensor<B, 2>>,
}

impl<B: AdaptedBackend> Computes<B> for Adalora<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        let Some(Factors { a, b, e }) = &self.factors else {
            return base.forward(x);
        };
        let lora = Lora {
            dropout: self.dropout,
            seed: self.seed,
            ..Lora::of(a.val() * e.val(), b.val(), self.scaling)
        };
        lora_linear(x, base, &lora)
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let Some(Factors { a, b, e }) = &self.factors else {
            return weight;
        };
        let b = b.val().narrow(0, rows.start, rows.len());
        weight + matmul(b, a.val() * e.val()).mul_scalar(self.scaling)
    }

    fn draw(&mut self, seed: u64) {
        self.seed = Some(seed);
    }
}
