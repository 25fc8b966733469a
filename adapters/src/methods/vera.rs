//! VeRA: one pair of random matrices for all layers, between which each has two vectors of its own,
//! `y = x Wᵀ + b + λ_b ∘ ((λ_d ∘ drop(x) Aᵀ) Bᵀ)`. A smaller layer uses the upper left of the matrices.
//!
//! Source: <https://arxiv.org/abs/2310.11454>, `peft/tuners/vera/{config,layer,model}.py`.

mod mt19937;

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};
use model::linear::Projection;
use model::load::normal;
use model::ops::matmul;
use model::weight::BaseWeight;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use self::mt19937::Mt19937;
use super::{Computes, LayerMethod, Part, Role, Settings, Values};
use super::{rank_problem, read_peft, share_problem, unless_neutral};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::Layer;
use crate::linear::{Dropout, dropped};

/// The shared matrix on the input's side, `[r, in]` of the widest layer.
const A: &str = "vera_A";
/// The shared matrix on the output's side, `[out, r]` of the widest layer.
const B_: &str = "vera_B";

/// The settings of VeRA.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VeraSettings {
    /// Rows of the shared matrices, `r`.
    pub rank: usize,
    /// Probability with which an input element is dropped while training.
    pub dropout: f64,
    /// What `vera_lambda_d` starts with.
    pub d_initial: f64,
    /// Begin with an update of zero; false: with a random one.
    pub init_weights: bool,
    /// Decides the shared matrices, which are those that PEFT makes of it.
    pub projection_prng_key: u32,
    /// Whether the shared matrices are saved, too, or only the key.
    pub save_projection: bool,
}

impl Default for VeraSettings {
    fn default() -> Self {
        Self {
            rank: 256,
            dropout: 0.0,
            d_initial: 0.1,
            init_weights: true,
            projection_prng_key: 0,
            save_projection: true,
        }
    }
}

impl Settings for VeraSettings {
    const NAME: &'static str = "vera";
    const TITLE: &'static str = "VeRA";
    const PEFT_TYPE: &'static str = "VERA";
    const MUST_BE: &'static [(&'static str, Value)] = &[("fan_in_fan_out", Value::Bool(false))];
    const FREE: &'static [&'static str] = &["dropout", "d_initial", "init_weights"];
    const PEFT_NAMES: &'static [(&'static str, &'static str)] =
        &[("r", "rank"), ("vera_dropout", "dropout")];
    const NOT_IN_PEFT: &'static [&'static str] = &["exclude_modules"];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        read_peft(json, json!({}))
    }

    fn to_peft(&self) -> Map<String, Value> {
        let settings = json!({
            "bias": "none",
            "d_initial": self.d_initial,
            "fan_in_fan_out": false,
            "init_weights": self.init_weights,
            "projection_prng_key": self.projection_prng_key,
            "r": self.rank,
            "save_projection": self.save_projection,
            "vera_dropout": self.dropout,
        });
        settings.as_object().cloned().unwrap_or_default()
    }

    fn unsupported(json: &Map<String, Value>) -> Vec<String> {
        let bias = unless_neutral(json, "bias", &json!("none"));
        let fan = unless_neutral(json, "fan_in_fan_out", &json!(false));
        bias.into_iter().chain(fan).collect()
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let finite = (self.d_initial as f32).is_finite();
        let initial = (!finite).then(|| ("d_initial", "must be a finite number".to_owned()));
        let all = [
            rank_problem("rank", [self.rank]),
            share_problem("dropout", self.dropout),
            initial,
        ];
        all.into_iter().flatten().collect()
    }

    fn is_random(&self) -> bool {
        self.dropout > 0.0
    }
}

impl LayerMethod for VeraSettings {
    type Update<B: Backend> = Vera<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let [out, _] = layer.shape;
        let part = |name, count| Part::of_layer(layer, name, name, &[count]);
        vec![part("vera_lambda_b", out), part("vera_lambda_d", self.rank)]
    }

    fn shared_parts(&self, layers: &[Layer]) -> Vec<Part> {
        let widest = |side: usize| layers.iter().map(|layer| layer.shape[side]).max();
        let [out, r#in] = [0, 1].map(|side| widest(side).unwrap_or(0));
        let part = |name: &str, shape: [usize; 2]| Part {
            name: name.into(),
            key: format!("base_model.{name}"),
            shape: shape.into(),
            role: match self.save_projection {
                true => Role::Frozen,
                false => Role::Derived,
            },
        };
        vec![part(A, [self.rank, r#in]), part(B_, [out, self.rank])]
    }

    fn fresh<B: Backend>(&self, layer: &Layer, _: &mut BaseLinear<B>, seed: u64) -> Vec<Vec<f32>> {
        let [out, _] = layer.shape;
        let name = format!("{}.vera_lambda_d", layer.name);
        match self.init_weights {
            true => vec![vec![0.0; out], vec![self.d_initial as f32; self.rank]],
            false => vec![vec![1.0; out], normal(seed, &name, self.rank, 1.0)],
        }
    }

    /// Uniform within `±√(6 / columns)`, from one generator, first `vera_A` and then `vera_B`.
    fn fresh_shared(&self, part: &Part, all: &[Part]) -> Vec<f32> {
        let mut generator = Mt19937::new(self.projection_prng_key);
        let before = all.iter().take_while(|other| other.name != part.name);
        let skipped: usize = before
            .map(|part| part.shape.iter().product::<usize>())
            .sum();
        (0..skipped).for_each(|_| {
            generator.next_u32();
        });
        let std = 2f64.sqrt() / (part.shape[1] as f64).sqrt();
        let bound = 3f64.sqrt() * std;
        let count = part.shape.iter().product();
        (0..count).map(|_| generator.uniform(bound)).collect()
    }

    fn update<B: Backend>(&self, _: &Layer, mut values: Values<'_, B>) -> Vera<B> {
        Vera {
            a: BaseWeight::Frozen(values.shared(A)),
            b: BaseWeight::Frozen(values.shared(B_)),
            lambda_b: values.param("vera_lambda_b"),
            lambda_d: values.param("vera_lambda_d"),
            dropout: self.dropout,
            seed: None,
        }
    }

    /// What the vectors are multiplied with.
    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let [out, _] = layer.shape;
        [self.rank + out, 0]
    }
}

/// The vectors of one layer, and the matrices that all share.
#[derive(Module, Debug)]
pub struct Vera<B: Backend> {
    /// At least `[r, in]`.
    pub a: BaseWeight<B, 2>,
    /// At least `[out, r]`.
    pub b: BaseWeight<B, 2>,
    /// `[out]`.
    pub lambda_b: Param<Tensor<B, 1>>,
    /// `[r]`.
    pub lambda_d: Param<Tensor<B, 1>>,
    /// Share of the input elements that are dropped while training.
    pub dropout: f64,
    /// Set while training: decides which are dropped.
    #[module(skip)]
    pub seed: Option<u64>,
}

impl<B: AdaptedBackend> Computes<B> for Vera<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        let y = base.forward(x.clone());
        let ([_, r#in], [_, out]) = (x.dims(), y.dims());
        let (a, b) = (
            self.a.val().narrow(1, 0, r#in),
            self.b.val().narrow(0, 0, out),
        );
        let probability = Some(self.dropout).filter(|share| *share > 0.0);
        let drops = probability.zip(self.seed);
        let x = dropped(
            x,
            drops.map(|(probability, seed)| Dropout { probability, seed }),
        );
        let narrow = matmul(x, a.transpose()) * self.lambda_d.val().unsqueeze(); // [n, r]
        y + matmul(narrow, b.transpose()) * self.lambda_b.val().unsqueeze()
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let [_, r#in] = weight.dims();
        let a = self.a.val().narrow(1, 0, r#in) * self.lambda_d.val().unsqueeze_dim(1);
        let b = self.b.val().narrow(0, rows.start, rows.len());
        let lambda_b = self.lambda_b.val().narrow(0, rows.start, rows.len());
        weight + matmul(b * lambda_b.unsqueeze_dim(1), a)
    }

    fn draw(&mut self, seed: u64) {
        self.seed = Some(seed);
    }

    fn frozen(&self, part: &str) -> Option<Tensor<B, 2>> {
        match part {
            A => Some(self.a.val()),
            B_ => Some(self.b.val()),
            _ => None,
        }
    }
}
