//! The matrix product.

use burn::tensor::{Tensor, backend::Backend};

/// `a` `[.., m, k]` times `b` `[.., k, n]`: `[.., m, n]`.
///
/// Burn's fusion makes one kernel of a product and the element-wise operations that follow it. If
/// `m` or `n` is 1, autotune may give that kernel a routine that reads `b` in the wrong order and
/// returns wrong numbers: <https://github.com/tracel-ai/cubek/pull/262>,
/// <https://github.com/tracel-ai/burn/issues/5122>. Such a product has a kernel of its own here,
/// which is right; so have the products of its gradients.
pub fn matmul<B: Backend, const D: usize>(a: Tensor<B, D>, b: Tensor<B, D>) -> Tensor<B, D> {
    apart(apart(a).matmul(apart(b)))
}

/// Takes a row or column through a flat shape: fusion ends at a reshape to fewer dimensions. The
/// operands go through it for the sake of their gradients, which pass it right after the products
/// that they come from.
fn apart<B: Backend, const D: usize>(x: Tensor<B, D>) -> Tensor<B, D> {
    let shape = x.shape();
    match shape[D - 2..].contains(&1) {
        true => x.reshape([shape.num_elements()]).reshape(shape),
        false => x,
    }
}
