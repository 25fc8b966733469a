//! The gated activation of the feed-forward layer: `y = silu(gate) · up`.
//!
//! Source: <https://arxiv.org/abs/2002.05202>; `LlamaMLP` in transformers.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

use super::{primitive, tensor};

/// `gate` and `up` `[n, i]` to `[n, i]`.
pub fn swiglu<B: SwigluBackend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    tensor(B::swiglu(primitive(gate), primitive(up)))
}

/// The operation on a backend's own tensors.
pub trait SwigluBackend: Backend {
    /// See [`swiglu`].
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let (gate, up): (Tensor<Self, 2>, Tensor<Self, 2>) = (tensor(gate), tensor(up));
        primitive(silu(gate) * up)
    }

    /// Gradients of `gate` and `up` from `dy`, all `[n, i]`.
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let (gate, up): (Tensor<Self, 2>, Tensor<Self, 2>) = (tensor(gate), tensor(up));
        let dy: Tensor<Self, 2> = tensor(dy);
        let s = sigmoid(gate.clone());
        let silu = gate * s.clone();
        let d_silu = s.clone() + silu.clone() * (s.neg().add_scalar(1.0));
        (primitive(dy.clone() * up * d_silu), primitive(dy * silu))
    }
}

impl SwigluBackend for Flex {}

#[derive(Debug)]
struct SwigluBackward;

impl<B: SwigluBackend> Backward<B, 2> for SwigluBackward {
    type State = (FloatTensor<B>, FloatTensor<B>);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (gate, up) = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let (d_gate, d_up) = B::swiglu_backward(gate, up, dy);
        for (node, gradient) in ops.parents.into_iter().zip([d_gate, d_up]) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: SwigluBackend, C: CheckpointStrategy> SwigluBackend for Autodiff<B, C> {
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let nodes = [gate.node.clone(), up.node.clone()];
        let (gate, up) = (gate.primitive, up.primitive);
        match SwigluBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::swiglu(gate.clone(), up.clone());
                prep.finish((gate, up), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::swiglu(gate, up)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{assert_close, grads_of, random};

    #[test]
    fn gradients_equal_those_of_the_formula() {
        let inputs = [random([7, 33], 1).mul_scalar(4.0), random([7, 33], 2)];
        let fused = grads_of(inputs.clone(), |[gate, up]| swiglu(gate, up));
        let plain = grads_of(inputs, |[gate, up]| {
            gate.clone() / gate.neg().exp().add_scalar(1.0) * up
        });
        assert_close(fused, plain, 1e-5);
    }
}
