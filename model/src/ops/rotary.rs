//! Rotary positions on half-split pairs: element `j` of a head turns with element `j + h_d/2`.
//!
//! Source: <https://arxiv.org/abs/2104.09864>; `apply_rotary_pos_emb` in transformers. (Burn's own
//! `RotaryEncoding` turns neighbouring elements, which is another layout.)

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

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
        let x: Tensor<Self, 3> = tensor(x);
        let (cos, sin): (Tensor<Self, 2>, Tensor<Self, 2>) = (tensor(cos), tensor(sin));
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
}

impl RotaryBackend for Flex {}

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
    /// `cos` and `sin` are tables and never tracked.
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
    use crate::ops::test::{Inner, Train, assert_close, grads_of, random};

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
}
