//! Rotary positions on half-split pairs: element `j` of a head turns with element `j + h_d/2`.
//!
//! Source: <https://arxiv.org/abs/2104.09864>; `apply_rotary_pos_emb` in transformers. (Burn's own
//! `RotaryEncoding` turns neighbouring elements, which is another layout.)

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

use super::cpu::{self, vectorized};
use super::{primitive, tensor};

/// `x` `[n, heads, h_d]`, `cos` and `sin` `[n, h_d/2]` to `[n, heads, h_d]`.
pub fn rotary<B: RotaryBackend>(
    x: Tensor<B, 3>,
    cos: Tensor<B, 2>,
    sin: Tensor<B, 2>,
) -> Tensor<B, 3> {
    tensor(B::rotary(
        primitive(x),
        primitive(cos),
        primitive(sin),
        false,
    ))
}

/// The operation on a backend's own tensors.
pub trait RotaryBackend: Backend {
    /// See [`rotary`]; `inverse` turns back, which is the gradient of turning forth.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        reference::<Self>(x, cos, sin, inverse)
    }
}

/// [`RotaryBackend::rotary`] in plain tensor operations.
pub fn reference<B: Backend>(
    x: FloatTensor<B>,
    cos: FloatTensor<B>,
    sin: FloatTensor<B>,
    inverse: bool,
) -> FloatTensor<B> {
    let x: Tensor<B, 3> = tensor(x);
    let (cos, sin): (Tensor<B, 2>, Tensor<B, 2>) = (tensor(cos), tensor(sin));
    let [_, _, h_d] = x.dims();
    let cos = cos.unsqueeze_dim::<3>(1); // [n, 1, h_d/2]
    let sin = sin.unsqueeze_dim::<3>(1);
    let sin = if inverse { sin.neg() } else { sin };
    let first = x.clone().narrow(2, 0, h_d / 2); // [n, heads, h_d/2]
    let second = x.narrow(2, h_d / 2, h_d / 2);
    let turned = vec![
        first.clone() * cos.clone() - second.clone() * sin.clone(),
        second * cos + first * sin,
    ];
    primitive(Tensor::cat(turned, 2))
}

impl RotaryBackend for Flex {
    fn rotary(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, inverse: bool) -> FlexTensor {
        if !cpu::all_f32([&x, &cos, &sin]) {
            return reference::<Flex>(x, cos, sin, inverse);
        }
        let [_, heads, h_d] = cpu::dims(&x);
        let (cos, sin) = (cpu::contiguous(cos), cpu::contiguous(sin));
        let (cos, sin) = (cpu::slice(&cos), cpu::slice(&sin));
        let tokens = (cpu::CHUNK / (heads * h_d)).max(1); // of a chunk
        let [x] = cpu::update([x], [tokens * heads * h_d], |i, [x]| {
            let start = i * tokens * (h_d / 2);
            turn(x, heads, &cos[start..], &sin[start..], h_d / 2, inverse);
        });
        x
    }
}

vectorized! {
    /// Turns whole tokens `[heads, 2 · half]`; `cos` and `sin` begin with those of the first one.
    fn turn(x: &mut [f32], heads: usize, cos: &[f32], sin: &[f32], half: usize, inverse: bool) {
        let sign = if inverse { -1.0 } else { 1.0 };
        let angles = cos.chunks_exact(half).zip(sin.chunks_exact(half));
        for (token, (cos, sin)) in x.chunks_exact_mut(heads * 2 * half).zip(angles) {
            for head in token.chunks_exact_mut(2 * half) {
                let (first, second) = head.split_at_mut(half);
                for (((a, b), c), s) in first.iter_mut().zip(second).zip(cos).zip(sin) {
                    let s = sign * s;
                    (*a, *b) = (*a * c - *b * s, *b * c + *a * s);
                }
            }
        }
    }
}

#[derive(Debug)]
struct RotaryBackward;

impl<B: RotaryBackend> Backward<B, 1> for RotaryBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, bool);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (cos, sin, inverse) = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, B::rotary(dy, cos, sin, !inverse));
        }
    }
}

impl<B: RotaryBackend, C: CheckpointStrategy> RotaryBackend for Autodiff<B, C> {
    /// Keeps `cos` and `sin` alone, tables that all layers share and that are never tracked.
    fn rotary(
        x: FloatTensor<Self>,
        cos: FloatTensor<Self>,
        sin: FloatTensor<Self>,
        inverse: bool,
    ) -> FloatTensor<Self> {
        let (cos, sin) = (cos.primitive, sin.primitive);
        match RotaryBackward
            .prepare::<C>([x.node.clone()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::rotary(x.primitive, cos.clone(), sin.clone(), inverse);
                prep.finish((cos, sin, inverse), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rotary(x.primitive, cos, sin, inverse)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{Inner, Train, assert_close, assert_near, grads_of, noise, random};

    fn tables() -> (Tensor<Inner, 2>, Tensor<Inner, 2>) {
        let angles = random([6, 4], 3).mul_scalar(9.0);
        (angles.clone().cos(), angles.sin())
    }

    #[test]
    fn gradients_equal_those_of_the_formula() {
        let (cos, sin) = tables();
        let x = random([6, 3 * 8], 1);
        let fused = grads_of([x.clone()], |[x]| {
            let (cos, sin) = (
                Tensor::from_inner(cos.clone()),
                Tensor::from_inner(sin.clone()),
            );
            rotary(x.reshape([6, 3, 8]), cos, sin).reshape([6, 24])
        });
        let plain = grads_of([x], |[x]| {
            let x = x.reshape([6, 3, 8]);
            let half = |t: &Tensor<Inner, 2>| -> Tensor<Train, 3> {
                Tensor::from_inner(Tensor::cat(vec![t.clone(), t.clone()], 1).unsqueeze_dim(1))
            };
            let turned = Tensor::cat(
                vec![x.clone().narrow(2, 4, 4).neg(), x.clone().narrow(2, 0, 4)],
                2,
            );
            (x * half(&cos) + turned * half(&sin)).reshape([6, 24])
        });
        assert_close(fused, plain, 1e-6);
    }

    #[test]
    fn turning_back_undoes_turning() {
        let (cos, sin) = tables();
        let x = random([6, 24], 1).reshape([6, 3, 8]);
        let turned = primitive(rotary(x.clone(), cos.clone(), sin.clone()));
        let back: Tensor<Inner, 3> =
            tensor(Inner::rotary(turned, primitive(cos), primitive(sin), true));
        assert_close(vec![back.reshape([6, 24])], vec![x.reshape([6, 24])], 1e-6);
    }

    #[test]
    fn fused_equals_reference() {
        for (n, heads, h_d) in [(1, 9, 64), (3, 1, 24), (65, 3, 80), (200, 2, 6)] {
            let case = format!("{n}, {heads}, {h_d}");
            let x = noise([n, heads, h_d], 2.0, 1);
            let (cos, sin) = (noise([n, h_d / 2], 1.0, 2), noise([n, h_d / 2], 1.0, 3));
            for inverse in [false, true] {
                let y = Flex::rotary(x.clone(), cos.clone(), sin.clone(), inverse);
                let y_reference = reference::<Flex>(x.clone(), cos.clone(), sin.clone(), inverse);
                assert_near(&y, &y_reference, 1e-6, &case);
            }
        }
    }
}
