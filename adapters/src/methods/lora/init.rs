//! How LoRA starts. Those that take something out of the base weight, PiSSA and OLoRA, leave it
//! where it is and take it out of the output, which is the same: `W - s B₀ A₀ + s B A`. What they
//! train is saved as LoRA of twice the rank, `[B, -B₀] [A; A₀]`, for the weight as it is.
//!
//! Source: `peft/tuners/lora/layer.py`, and `subtract_mutated_init` of `model.py` there;
//! <https://arxiv.org/abs/2404.02948> (PiSSA), <https://arxiv.org/abs/2406.01775> (OLoRA).

use burn::tensor::{Tensor, backend::Backend};
use model::load::{normal, uniform};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::decompose::{extend, first_columns, leading};
use crate::config::Layer;

/// How `lora_a` and `lora_b` start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum LoraInit {
    /// `lora_a` uniform within `±1/√in` (PyTorch's `kaiming_uniform_(a=√5)`), `lora_b` zero.
    Default,
    /// `lora_a` normal with deviation `1/rank`, `lora_b` zero.
    Gaussian,
    /// Both random, in directions that have nothing in common: their product is zero.
    Orthogonal,
    /// The largest singular values of the weight with their vectors; with a number, by that many
    /// passes over it.
    Pissa(Option<usize>),
    /// The weight's first columns made orthonormal, and what they make of it.
    Olora,
}

/// What stands before the number of passes.
const PASSES: &str = "pissa_niter_";

impl TryFrom<String> for LoraInit {
    type Error = String;

    fn try_from(name: String) -> Result<Self, String> {
        match name.as_str() {
            "default" => return Ok(Self::Default),
            "gaussian" => return Ok(Self::Gaussian),
            "orthogonal" => return Ok(Self::Orthogonal),
            "pissa" => return Ok(Self::Pissa(None)),
            "olora" => return Ok(Self::Olora),
            _ => {}
        }
        let passes = name.strip_prefix(PASSES).and_then(|n| n.parse().ok());
        let known = "`default`, `gaussian`, `orthogonal`, `olora`, `pissa` or `pissa_niter_N`";
        match passes {
            Some(passes) => Ok(Self::Pissa(Some(passes))),
            None => Err(format!("unknown variant `{name}`, expected {known}")),
        }
    }
}

impl From<LoraInit> for String {
    fn from(init: LoraInit) -> Self {
        match init {
            LoraInit::Default => "default".into(),
            LoraInit::Gaussian => "gaussian".into(),
            LoraInit::Orthogonal => "orthogonal".into(),
            LoraInit::Pissa(None) => "pissa".into(),
            LoraInit::Pissa(Some(passes)) => format!("{PASSES}{passes}"),
            LoraInit::Olora => "olora".into(),
        }
    }
}

impl LoraInit {
    /// Whether the start is taken out of the base weight.
    pub fn is_taken_out(self) -> bool {
        matches!(self, Self::Pissa(_) | Self::Olora)
    }

    /// PEFT's `init_lora_weights`.
    pub(super) fn to_peft(self) -> Value {
        match self {
            Self::Default => json!(true),
            other => json!(String::from(other)),
        }
    }

    /// `lora_a` `[rank, in]` and `lora_b` `[out, rank]` of a layer with this weight `[out, in]`.
    pub(super) fn factors<B: Backend>(
        self,
        layer: &str,
        weight: impl FnOnce() -> Tensor<B, 2>,
        [out, r#in]: [usize; 2],
        (rank, scaling): (usize, f64),
        seed: u64,
    ) -> [Vec<f32>; 2] {
        let name = format!("{layer}.lora_a");
        let count = rank * r#in;
        match self {
            Self::Default => {
                let a = uniform(seed, &name, count, 1.0 / (r#in as f32).sqrt());
                [a, vec![0.0; out * rank]]
            }
            Self::Gaussian => {
                let a = normal(seed, &name, count, 1.0 / rank as f64);
                [a, vec![0.0; out * rank]]
            }
            Self::Orthogonal => orthogonal(layer, [out, r#in], rank, seed),
            Self::Pissa(passes) => {
                let found = leading(&weight(), rank, passes);
                let root = |value: &f64| (value / scaling).sqrt();
                let roots: Vec<f64> = found.values.iter().map(root).collect();
                put(&found.right, &found.left, &roots, [out, r#in], rank)
            }
            Self::Olora => {
                let (columns, products) = first_columns(&weight(), rank);
                let ones = vec![1.0; columns.len()];
                put(&products, &columns, &ones, [out, r#in], rank)
            }
        }
    }
}

/// `lora_a` `[rank, vocab]` and `lora_b` `[d, rank]` of embeddings, however the linear layers start:
/// zero, and normal.
pub(super) fn of_embeddings(layer: &Layer, rank: usize, seed: u64) -> [Vec<f32>; 2] {
    let [out, r#in] = layer.shape;
    let b = normal(seed, &format!("{}.lora_b", layer.name), out * rank, 1.0);
    [vec![0.0; rank * r#in], b]
}

/// Vectors `[k, in]` and `[k, out]`, scaled, as `lora_a` `[rank, in]` and `lora_b` `[out, rank]`;
/// what of the rank is left is zero.
fn put(
    right: &[Vec<f64>],
    left: &[Vec<f64>],
    scales: &[f64],
    [out, r#in]: [usize; 2],
    rank: usize,
) -> [Vec<f32>; 2] {
    let (mut a, mut b) = (vec![0.0; rank * r#in], vec![0.0; out * rank]);
    for (k, scale) in scales.iter().enumerate() {
        for (to, x) in a[k * r#in..].iter_mut().zip(&right[k]) {
            *to = (x * scale) as f32;
        }
        for (row, x) in left[k].iter().enumerate() {
            b[row * rank + k] = (x * scale) as f32;
        }
    }
    [a, b]
}

/// Random factors, of which one uses the odd and one the even rows of an orthonormal matrix.
fn orthogonal(layer: &str, [out, r#in]: [usize; 2], rank: usize, seed: u64) -> [Vec<f32>; 2] {
    let random = |part: &str, count: usize| normal(seed, &format!("{layer}.{part}"), count, 1.0);
    let square = random("lora_q", rank * rank);
    let square = square
        .chunks(rank)
        .map(|row| row.iter().map(|x| f64::from(*x)).collect());
    let mut rows = Vec::new();
    extend(&mut rows, square.collect(), rank);
    let mix = |part: &str, width: usize, first: usize| {
        let values = random(part, width * rank / 2);
        let mut mixed = vec![0.0; rank * width]; // [rank, width]
        for (row, values) in rows.iter().skip(first).step_by(2).zip(values.chunks(width)) {
            for (mixed, factor) in mixed.chunks_mut(width).zip(row) {
                let pairs = mixed.iter_mut().zip(values);
                pairs.for_each(|(to, x)| *to += *factor as f32 * x / 10.0);
            }
        }
        mixed
    };
    let transposed = mix("lora_b", out, 1);
    let mut b = vec![0.0; out * rank];
    for (k, row) in transposed.chunks(out).enumerate() {
        row.iter()
            .enumerate()
            .for_each(|(i, x)| b[i * rank + k] = *x);
    }
    [mix("lora_a", r#in, 0), b]
}
