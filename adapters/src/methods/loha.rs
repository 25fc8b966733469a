//! LoHa: the update is the elementwise product of two low-rank ones, `s (A₁ B₁) ∘ (A₂ B₂)`.
//!
//! An element of it is `Σᵢⱼ A₁[o, i] A₂[o, j] B₁[i, x] B₂[j, x]`: it is a low-rank update itself, of
//! rank `r²`, whose factors are small. So it is computed as LoRA's, unless that costs more than the
//! update as a matrix `[out, in]` does.
//!
//! Source: <https://arxiv.org/abs/2108.06098>, `peft/tuners/loha/{config,layer}.py`.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};
use model::linear::Projection;
use model::ops::matmul;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::lora::{Lora, lora_linear};
use super::lycoris::{Common, Drops};
use super::{Computes, LayerMethod, Part, Settings, Values, fresh_uniform, read_peft};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::{Layer, Pattern};

/// The settings of LoHa.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LohaSettings {
    /// Width of both bottlenecks, `r`.
    pub rank: usize,
    /// Numerator of the scaling `alpha / rank`.
    pub alpha: f64,
    /// Share of the rows of the update that are dropped while training.
    pub rank_dropout: f64,
    /// Probability with which a layer does without its update while training.
    pub module_dropout: f64,
    /// Begin with an update of zero; false: with a random one.
    pub init_weights: bool,
    /// Ranks of single layers: the first key that matches decides.
    pub rank_pattern: Pattern<usize>,
    /// Alphas of single layers: the first key that matches decides.
    pub alpha_pattern: Pattern<f64>,
}

impl Default for LohaSettings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            rank_dropout: 0.0,
            module_dropout: 0.0,
            init_weights: true,
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
        }
    }
}

impl LohaSettings {
    fn common(&self) -> Common<'_> {
        Common {
            rank: self.rank,
            alpha: self.alpha,
            rank_dropout: self.rank_dropout,
            module_dropout: self.module_dropout,
            rank_pattern: &self.rank_pattern,
            alpha_pattern: &self.alpha_pattern,
        }
    }
}

impl Settings for LohaSettings {
    const NAME: &'static str = "loha";
    const TITLE: &'static str = "LoHa";
    const PEFT_TYPE: &'static str = "LOHA";
    const FREE: &'static [&'static str] = &["rank_dropout", "module_dropout", "init_weights"];
    const PEFT_NAMES: &'static [(&'static str, &'static str)] = &[("r", "rank")];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        read_peft(json, json!({"rank": 8, "alpha": 8}))
    }

    fn to_peft(&self) -> Map<String, Value> {
        let others = json!({"init_weights": self.init_weights});
        self.common().to_peft(others)
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        self.common().problems()
    }

    fn patterns(&self) -> Vec<&str> {
        self.common().patterns()
    }

    fn is_random(&self) -> bool {
        self.common().is_random()
    }
}

impl LayerMethod for LohaSettings {
    type Update<B: Backend> = Loha<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let [out, r#in] = layer.shape;
        let (rank, _) = self.common().rank_and_scaling(&layer.name);
        let part = |name, shape: [usize; 2]| Part::of_layer(layer, name, name, &shape);
        vec![
            part("hada_w1_a", [out, rank]),
            part("hada_w1_b", [rank, r#in]),
            part("hada_w2_a", [out, rank]),
            part("hada_w2_b", [rank, r#in]),
        ]
    }

    /// All random but `hada_w2_b`, which is zero: the adapted layer starts as the base layer.
    fn fresh<B: Backend>(&self, layer: &Layer, _: &mut BaseLinear<B>, seed: u64) -> Vec<Vec<f32>> {
        let values = |part: Part| match part.end() {
            "hada_w2_b" if self.init_weights => vec![0.0; part.shape.iter().product()],
            _ => fresh_uniform(&part, part.shape[1], seed),
        };
        self.parts(layer).into_iter().map(values).collect()
    }

    fn update<B: Backend>(&self, layer: &Layer, mut values: Values<'_, B>) -> Loha<B> {
        let (_, scaling) = self.common().rank_and_scaling(&layer.name);
        Loha {
            w1_a: values.param("hada_w1_a"),
            w1_b: values.param("hada_w1_b"),
            w2_a: values.param("hada_w2_a"),
            w2_b: values.param("hada_w2_b"),
            scaling,
            drops: self.common().drops(),
        }
    }

    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let [out, r#in] = layer.shape;
        let (rank, _) = self.common().rank_and_scaling(&layer.name);
        match is_narrow(rank, layer.shape) {
            true => [rank * rank, rank * rank * (out + r#in)],
            false => [0, 3 * out * r#in], // both products, and theirs
        }
    }
}

/// Whether factors of rank `r²` take less than the matrix that they make.
fn is_narrow(rank: usize, [out, r#in]: [usize; 2]) -> bool {
    rank * rank * (out + r#in) <= out * r#in
}

/// The update of one layer.
#[derive(Module, Debug)]
pub struct Loha<B: Backend> {
    /// `[out, r]`.
    pub w1_a: Param<Tensor<B, 2>>,
    /// `[r, in]`.
    pub w1_b: Param<Tensor<B, 2>>,
    /// `[out, r]`.
    pub w2_a: Param<Tensor<B, 2>>,
    /// `[r, in]`.
    pub w2_b: Param<Tensor<B, 2>>,
    /// The factor on the update.
    pub scaling: f64,
    /// What is dropped while training.
    #[module(skip)]
    pub drops: Drops,
}

impl<B: AdaptedBackend> Computes<B> for Loha<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        if self.drops.skips() {
            return base.forward(x);
        }
        let (w1_a, mut w2_a) = (self.w1_a.val(), self.w2_a.val());
        let (w1_b, w2_b) = (self.w1_b.val(), self.w2_b.val());
        let ([out, rank], [_, r#in]) = (w1_a.dims(), w1_b.dims());
        if let Some(rows) = self.drops.rows::<B>(out, true, &x.device()) {
            w2_a = w2_a * rows.transpose();
        }
        if !is_narrow(rank, [out, r#in]) {
            let delta = matmul(w1_a, w1_b) * matmul(w2_a, w2_b); // [out, in]
            let delta = delta.mul_scalar(self.scaling);
            return base.forward(x.clone()) + matmul(x, delta.transpose());
        }
        let a = pairs(w1_b, w2_b); // [r², in]
        let b = pairs(w1_a.transpose(), w2_a.transpose()); // [r², out]
        lora_linear(x, base, &Lora::of(a, b.transpose(), self.scaling))
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let of = |a: &Param<Tensor<B, 2>>, b: &Param<Tensor<B, 2>>| {
            matmul(a.val().narrow(0, rows.start, rows.len()), b.val()) // [rows, in]
        };
        let delta = of(&self.w1_a, &self.w1_b) * of(&self.w2_a, &self.w2_b);
        weight + delta.mul_scalar(self.scaling)
    }

    fn draw(&mut self, seed: u64) {
        self.drops.seed = Some(seed);
    }
}

/// The products of each row of `left` with each of `right`, `[r, n]` both: `[r², n]`.
fn pairs<B: Backend>(left: Tensor<B, 2>, right: Tensor<B, 2>) -> Tensor<B, 2> {
    let [r, n] = left.dims();
    let all: Tensor<B, 3> = left.unsqueeze_dim::<3>(1) * right.unsqueeze_dim::<3>(0); // [r, r, n]
    all.reshape([r * r, n])
}
