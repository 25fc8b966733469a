//! LoKr: the update is a Kronecker product, `s W₁ ⊗ W₂`, of which `W₂` or both may be low-rank ones.
//!
//! The product is never formed: with a row of `x` as a matrix `X` `[b, d]`, its image is the matrix
//! `W₁ X W₂ᵀ` `[a, c]`.
//!
//! Source: <https://arxiv.org/abs/2212.10650>, `peft/tuners/lokr/{config,layer}.py`.

use std::ops::Range;

use burn::module::{Module, Param};
use burn::tensor::{Tensor, backend::Backend};
use model::linear::Projection;
use model::ops::{MatmulBackend, matmul};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::lycoris::{Common, Drops};
use super::{Computes, LayerMethod, Part, Settings, Values, fresh_uniform, read_peft};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::config::{Layer, Pattern};

/// The settings of LoKr.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LokrSettings {
    /// Width of the bottlenecks, `r`.
    pub rank: usize,
    /// Numerator of the scaling `alpha / rank`.
    pub alpha: f64,
    /// Share of the rows of the update that are dropped while training.
    pub rank_dropout: f64,
    /// Whether the other rows grow for it.
    pub rank_dropout_scale: bool,
    /// Probability with which a layer does without its update while training.
    pub module_dropout: f64,
    /// Whether the left matrix is a low-rank one, too, where that is smaller.
    pub decompose_both: bool,
    /// What the sides of the left matrix come close to; -1: the roots of the layer's.
    pub decompose_factor: i64,
    /// Begin with a left matrix of zeros (true), with a right one of zeros (`"lycoris"`), or with an
    /// update that is not zero (false).
    pub init_weights: LokrInit,
    /// Ranks of single layers: the first key that matches decides.
    pub rank_pattern: Pattern<usize>,
    /// Alphas of single layers: the first key that matches decides.
    pub alpha_pattern: Pattern<f64>,
}

/// How the matrices start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected true, false or \"lycoris\"")]
pub enum LokrInit {
    /// The left matrix is zero, or none is.
    ZeroLeft(bool),
    /// By its name.
    Named(NamedInit),
}

/// A way to start that has a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NamedInit {
    /// The right matrix is zero.
    Lycoris,
}

impl Default for LokrSettings {
    fn default() -> Self {
        Self {
            rank: 16,
            alpha: 32.0,
            rank_dropout: 0.0,
            rank_dropout_scale: false,
            module_dropout: 0.0,
            decompose_both: false,
            decompose_factor: -1,
            init_weights: LokrInit::ZeroLeft(true),
            rank_pattern: Pattern::default(),
            alpha_pattern: Pattern::default(),
        }
    }
}

/// The sides of both matrices of a layer, `[a, b]` and `[c, d]`, and the ranks of those that are
/// low-rank ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Shapes {
    sides: [[usize; 2]; 2],
    ranks: [Option<usize>; 2],
}

impl LokrSettings {
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

    fn shapes(&self, layer: &Layer) -> Shapes {
        let (rank, _) = self.common().rank_and_scaling(&layer.name);
        let [out, r#in] = layer.shape;
        let [[a, c], [b, d]] = [out, r#in].map(|side| factors(side, self.decompose_factor));
        let is_low = |sides: [usize; 2]| 2 * rank < sides[0].max(sides[1]);
        Shapes {
            sides: [[a, b], [c, d]],
            ranks: [
                Some(rank).filter(|_| self.decompose_both && is_low([a, b])),
                Some(rank).filter(|_| is_low([c, d])),
            ],
        }
    }
}

/// Two factors of a number, the smaller one first: `wanted` and what is left, if it divides the
/// number; else the two next to its root whose smaller one is at most `wanted`.
fn factors(number: usize, wanted: i64) -> [usize; 2] {
    let wanted = usize::try_from(wanted).ok();
    if let Some(wanted) = wanted.filter(|wanted| number.is_multiple_of(*wanted)) {
        return [wanted, number / wanted];
    }
    let most = wanted.unwrap_or(number);
    let mut all = (1..=number.isqrt()).rev();
    let small = all.find(|small| number.is_multiple_of(*small) && *small <= most);
    let small = small.unwrap_or(1);
    [small, number / small]
}

impl Settings for LokrSettings {
    const NAME: &'static str = "lokr";
    const TITLE: &'static str = "LoKr";
    const PEFT_TYPE: &'static str = "LOKR";
    const FREE: &'static [&'static str] = &[
        "rank_dropout",
        "rank_dropout_scale",
        "module_dropout",
        "init_weights",
    ];
    const PEFT_NAMES: &'static [(&'static str, &'static str)] = &[("r", "rank")];

    fn from_peft(json: &str) -> serde_json::Result<Self> {
        read_peft(json, json!({"rank": 8, "alpha": 8}))
    }

    fn to_peft(&self) -> Map<String, Value> {
        self.common().to_peft(json!({
            "decompose_both": self.decompose_both,
            "decompose_factor": self.decompose_factor,
            "init_weights": self.init_weights,
            "rank_dropout_scale": self.rank_dropout_scale,
        }))
    }

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = self.common().problems();
        if self.decompose_factor < 1 && self.decompose_factor != -1 {
            problems.push(("decompose_factor", "must be -1 or above 0".into()));
        }
        problems
    }

    fn patterns(&self) -> Vec<&str> {
        self.common().patterns()
    }

    fn is_random(&self) -> bool {
        self.common().is_random()
    }
}

impl LayerMethod for LokrSettings {
    type Update<B: Backend> = Lokr<B>;

    fn parts(&self, layer: &Layer) -> Vec<Part> {
        let Shapes { sides, ranks } = self.shapes(layer);
        let part = |name: String, shape: [usize; 2]| Part::of_layer(layer, &name, &name, &shape);
        let of = |(index, ([rows, columns], rank)): (usize, ([usize; 2], Option<usize>))| {
            let name = format!("lokr_w{}", index + 1);
            match rank {
                None => vec![part(name, [rows, columns])],
                Some(rank) => vec![
                    part(format!("{name}_a"), [rows, rank]),
                    part(format!("{name}_b"), [rank, columns]),
                ],
            }
        };
        let both = sides.into_iter().zip(ranks).enumerate();
        both.flat_map(of).collect()
    }

    fn fresh<B: Backend>(&self, layer: &Layer, _: &mut BaseLinear<B>, seed: u64) -> Vec<Vec<f32>> {
        let zero: &[&str] = match self.init_weights {
            LokrInit::ZeroLeft(true) => &["lokr_w1", "lokr_w1_a"],
            LokrInit::ZeroLeft(false) => &[],
            LokrInit::Named(NamedInit::Lycoris) => &["lokr_w2", "lokr_w2_b"],
        };
        let values = |part: Part| match zero.contains(&part.end()) {
            true => vec![0.0; part.shape.iter().product()],
            false => fresh_uniform(&part, part.shape[1], seed),
        };
        self.parts(layer).into_iter().map(values).collect()
    }

    fn update<B: Backend>(&self, layer: &Layer, mut values: Values<'_, B>) -> Lokr<B> {
        let (_, scaling) = self.common().rank_and_scaling(&layer.name);
        let mut factor = |name: &str, is_low: bool| match is_low {
            false => Factor {
                left: values.param(name),
                right: None,
            },
            true => Factor {
                left: values.param(&format!("{name}_a")),
                right: Some(values.param(&format!("{name}_b"))),
            },
        };
        let [first, second] = self.shapes(layer).ranks.map(|rank| rank.is_some());
        Lokr {
            w1: factor("lokr_w1", first),
            w2: factor("lokr_w2", second),
            scaling,
            grows: self.rank_dropout_scale,
            drops: self.common().drops(),
        }
    }

    fn kept(&self, layer: &Layer) -> [usize; 2] {
        let Shapes { sides, ranks } = self.shapes(layer);
        let [[_, b], [c, _]] = sides;
        let [first, second] = ranks.map(|rank| rank.unwrap_or(0));
        [b * c + b * second + c * first, 0] // what comes out of `W₂`, and between low-rank factors
    }
}

/// The update of one layer. Shapes: `out = a c`, `in = b d`.
#[derive(Module, Debug)]
pub struct Lokr<B: Backend> {
    /// `[a, b]`.
    pub w1: Factor<B>,
    /// `[c, d]`.
    pub w2: Factor<B>,
    /// The factor on the update.
    pub scaling: f64,
    /// Whether the rows that are not dropped grow for it.
    pub grows: bool,
    /// What is dropped while training.
    #[module(skip)]
    pub drops: Drops,
}

/// One of the two matrices, `[rows, columns]`.
#[derive(Module, Debug)]
pub struct Factor<B: Backend> {
    /// All of it, or `[rows, r]`.
    pub left: Param<Tensor<B, 2>>,
    /// `[r, columns]`.
    pub right: Option<Param<Tensor<B, 2>>>,
}

impl<B: MatmulBackend> Factor<B> {
    /// The matrix.
    fn whole(&self) -> Tensor<B, 2> {
        match &self.right {
            None => self.left.val(),
            Some(right) => matmul(self.left.val(), right.val()),
        }
    }

    /// `x` `[n, columns]` to `[n, rows]`.
    fn apply(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let x = match &self.right {
            None => x,
            Some(right) => matmul(x, right.val().transpose()), // [n, r]
        };
        matmul(x, self.left.val().transpose())
    }

    fn dims(&self) -> [usize; 2] {
        let [rows, columns] = self.left.dims();
        let right = self.right.as_ref().map(|right| right.dims()[1]);
        [rows, right.unwrap_or(columns)]
    }
}

impl<B: AdaptedBackend> Computes<B> for Lokr<B> {
    fn forward(&self, x: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
        let y = base.forward(x.clone());
        if self.drops.skips() {
            return y;
        }
        let ([a, b], [c, d]) = (self.w1.dims(), self.w2.dims());
        let ([n, _], device) = (x.dims(), x.device());
        let x = self
            .w2
            .apply(x.reshape([n * b, d]))
            .mul_scalar(self.scaling); // [n b, c]
        let x = x.reshape([n, b, c]).swap_dims(1, 2).reshape([n * c, b]);
        let x = self.w1.apply(x); // [n c, a]
        let update = x.reshape([n, c, a]).swap_dims(1, 2).reshape([n, a * c]);
        y + match self.drops.rows(a * c, self.grows, &device) {
            Some(rows) => update * rows,
            None => update,
        }
    }

    fn merge(&self, rows: Range<usize>, weight: Tensor<B, 2>) -> Tensor<B, 2> {
        let ([_, b], [c, d]) = (self.w1.dims(), self.w2.dims());
        let (first, last) = (rows.start / c, rows.end.div_ceil(c)); // rows of W₁ that reach into them
        let w1 = self.w1.whole().narrow(0, first, last - first);
        let w1: Tensor<B, 4> = w1.reshape([last - first, 1, b, 1]);
        let w2: Tensor<B, 4> = self.w2.whole().reshape([1, c, 1, d]);
        let all = (w1 * w2).reshape([(last - first) * c, b * d]);
        let delta = all.narrow(0, rows.start - first * c, rows.len());
        weight + delta.mul_scalar(self.scaling)
    }

    fn draw(&mut self, seed: u64) {
        self.drops.seed = Some(seed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Those of PEFT's `factorization`.
    #[test]
    fn factors_are_those_of_peft() {
        let cases = [
            (256, -1, [16, 16]),
            (128, -1, [8, 16]),
            (127, -1, [1, 127]),
            (128, 4, [4, 32]),
            (360, 7, [6, 60]),
            (64, 48, [8, 8]),
            (64, 32, [32, 2]),
            (12, 12, [12, 1]),
            (1, -1, [1, 1]),
            (576, 1, [1, 576]),
        ];
        for (number, wanted, expected) in cases {
            assert_eq!(factors(number, wanted), expected, "{number}, {wanted}");
        }
    }
}
