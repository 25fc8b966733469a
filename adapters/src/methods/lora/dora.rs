//! DoRA: the rows of the adapted weight keep their directions and have trained lengths,
//! `y = m / ‖W + s B A‖ ⊙ (x Wᵀ + s drop(x) Aᵀ Bᵀ) + b`, where no gradient reaches the lengths that
//! are divided by.
//!
//! Shapes: `n` tokens, `[out, in]` the layer, `r` rank.
//!
//! Source: <https://arxiv.org/abs/2402.09353>, `peft/tuners/lora/{dora,variants}.py`.

use burn::tensor::{Tensor, backend::Backend};
use model::linear::Projection;
use model::ops::matmul;

use super::{Lora, lora_linear};
use crate::base::{AdaptedBackend, BaseLinear};
use crate::linear::dropped;

/// `x` `[n, in]` through a layer whose rows have the lengths `magnitude` `[out]`.
pub(super) fn forward<B: AdaptedBackend>(
    lora: &Lora<B>,
    magnitude: Tensor<B, 1>,
    x: Tensor<B, 2>,
    base: &BaseLinear<B>,
) -> Tensor<B, 2> {
    let plain = base.without_bias();
    let scale = (magnitude / lengths(lora, &plain)).unsqueeze::<2>(); // [1, out]
    let Some(drops) = lora.drops() else {
        let y = lora_linear(x, &plain, lora) * scale;
        return with_bias(y, base);
    };
    // What is dropped is missing from the change of the base layer's output, too, and not from that.
    let narrow = dropped(x.clone(), Some(drops));
    let change = plain.forward(narrow.clone()) * scale.clone().sub_scalar(1.0);
    base.forward(x) + change + lora.addition_to(narrow) * scale
}

/// The lengths of the rows of `W + s B A`, `[out]`: by the squares of both parts and their product,
/// so that a matrix of the weight's size is never made.
pub(super) fn lengths<B: AdaptedBackend>(lora: &Lora<B>, plain: &BaseLinear<B>) -> Tensor<B, 1> {
    let (a, b) = (lora.lora_a.val().detach(), lora.lora_b.val().detach());
    let own = match &lora.base_squares {
        Some(squares) => squares.val(),
        None => plain.row_squares(),
    };
    let across = plain.forward(a.clone()).transpose(); // W Aᵀ: [out, r]
    let gram = matmul(a.clone(), a.transpose()); // [r, r]
    let both = across.mul_scalar(2.0) + matmul(b.clone(), gram).mul_scalar(lora.scaling);
    let added = (both * b).sum_dim(1).mul_scalar(lora.scaling); // [out, 1]
    (own + added.squeeze_dim(1)).clamp_min(0.0).sqrt()
}

fn with_bias<B: AdaptedBackend>(y: Tensor<B, 2>, base: &BaseLinear<B>) -> Tensor<B, 2> {
    match base.bias() {
        Some(bias) => y + bias.unsqueeze(),
        None => y,
    }
}

/// Rows `[rows, in]` scaled to lengths `[rows]`.
pub(super) fn with_lengths<B: Backend>(
    rows: Tensor<B, 2>,
    magnitude: Tensor<B, 1>,
) -> Tensor<B, 2> {
    rows.clone() * (magnitude / row_lengths(rows)).unsqueeze_dim(1)
}

/// The lengths of rows `[rows, in]`.
pub(super) fn row_lengths<B: Backend>(rows: Tensor<B, 2>) -> Tensor<B, 1> {
    rows.powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1).sqrt()
}
