//! The gated activation of the feed-forward layer: `y = silu(gate) · up`.
//!
//! Source: <https://arxiv.org/abs/2002.05202>; `LlamaMLP` in transformers.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::activation::{sigmoid, silu};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

use super::cpu::{self, CHUNK, exp, vectorized};
use super::{again, primitive, tensor};

/// `gate` and `up` `[n, i]` to `[n, i]`.
pub fn swiglu<B: SwigluBackend>(gate: Tensor<B, 2>, up: Tensor<B, 2>) -> Tensor<B, 2> {
    tensor(B::swiglu(primitive(gate), primitive(up)))
}

/// The operation on a backend's own tensors.
pub trait SwigluBackend: Backend {
    /// See [`swiglu`].
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        reference::<Self>(gate, up)
    }

    /// Gradients of `gate` and `up` from `dy`, all `[n, i]`.
    fn swiglu_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference_backward::<Self>(gate, up, dy)
    }
}

/// [`SwigluBackend::swiglu`] in plain tensor operations.
pub fn reference<B: Backend>(gate: FloatTensor<B>, up: FloatTensor<B>) -> FloatTensor<B> {
    let (gate, up): (Tensor<B, 2>, Tensor<B, 2>) = (tensor(gate), tensor(up));
    primitive(silu(gate) * up)
}

/// [`SwigluBackend::swiglu_backward`] in plain tensor operations.
pub fn reference_backward<B: Backend>(
    gate: FloatTensor<B>,
    up: FloatTensor<B>,
    dy: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (gate, up): (Tensor<B, 2>, Tensor<B, 2>) = (tensor(gate), tensor(up));
    let dy: Tensor<B, 2> = tensor(dy);
    let s = sigmoid(gate.clone());
    let silu = gate * s.clone();
    let d_silu = s.clone() + silu.clone() * (s.neg().add_scalar(1.0));
    (primitive(dy.clone() * up * d_silu), primitive(dy * silu))
}

impl SwigluBackend for Flex {
    fn swiglu(gate: FlexTensor, up: FlexTensor) -> FlexTensor {
        if !cpu::all_f32([&gate, &up]) {
            return reference::<Flex>(gate, up);
        }
        let up = cpu::contiguous(up);
        let up = cpu::slice(&up);
        let [y] = cpu::update([gate], [CHUNK], |i, [gate]| {
            forward_chunk(gate, &up[i * CHUNK..][..gate.len()]);
        });
        y
    }

    fn swiglu_backward(
        gate: FlexTensor,
        up: FlexTensor,
        dy: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        if !cpu::all_f32([&gate, &up, &dy]) {
            return reference_backward::<Flex>(gate, up, dy);
        }
        let up = cpu::contiguous(up);
        let up = cpu::slice(&up);
        let [d_gate, d_up] = cpu::update([gate, dy], [CHUNK; 2], |i, [gate, dy]| {
            backward_chunk(gate, &up[i * CHUNK..][..gate.len()], dy);
        });
        (d_gate, d_up)
    }
}

vectorized! {
    /// Turns `gate` into `y`.
    fn forward_chunk(gate: &mut [f32], up: &[f32]) {
        for (gate, up) in gate.iter_mut().zip(up) {
            *gate = *gate / (1.0 + exp(-*gate)) * up;
        }
    }
}

vectorized! {
    /// Turns `gate` into its gradient and `dy` into that of `up`.
    fn backward_chunk(gate: &mut [f32], up: &[f32], dy: &mut [f32]) {
        for ((gate, up), dy) in gate.iter_mut().zip(up).zip(dy) {
            let s = 1.0 / (1.0 + exp(-*gate));
            let silu = *gate * s;
            *gate = *dy * up * (s + silu * (1.0 - s));
            *dy *= silu;
        }
    }
}

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
    /// Keeps `gate` and `up`; `y` is computed again for who needs it.
    fn swiglu(gate: FloatTensor<Self>, up: FloatTensor<Self>) -> FloatTensor<Self> {
        let forward = |[gate, up]: [FloatTensor<B>; 2]| B::swiglu(gate, up);
        let operation = again::prepare(SwigluBackward, [&gate, &up], forward);
        let (gate, up) = (gate.primitive, up.primitive);
        match operation {
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
    use crate::ops::test::{assert_close, assert_near, grads_of, noise, random, values};
    use burn::tensor::DType;

    #[test]
    fn gradients_equal_those_of_the_formula() {
        let inputs = [random([7, 33], 1).mul_scalar(4.0), random([7, 33], 2)];
        let fused = grads_of(inputs.clone(), |[gate, up]| swiglu(gate, up));
        let plain = grads_of(inputs, |[gate, up]| {
            gate.clone() / gate.neg().exp().add_scalar(1.0) * up
        });
        assert_close(fused, plain, 1e-5);
    }

    #[test]
    fn fused_equals_reference() {
        for (n, i, scale) in [
            (1, 1536, 4.0),
            (3, 7, 1.0),
            (65, 333, 80.0),
            (200, 100, 300.0),
        ] {
            let case = format!("{n} by {i} up to {scale}");
            let inputs = || {
                (
                    noise([n, i], scale, 1),
                    noise([n, i], 1.0, 2),
                    noise([n, i], 1.0, 3),
                )
            };
            let (gate, up, dy) = inputs();
            let y = Flex::swiglu(gate.clone(), up.clone());
            assert_near(
                &y,
                &reference::<Flex>(gate.clone(), up.clone()),
                1e-6,
                &case,
            );
            let (d_gate, d_up) = Flex::swiglu_backward(gate.clone(), up.clone(), dy.clone());
            let expected = reference_backward::<Flex>(gate, up, dy);
            assert_near(&d_gate, &expected.0, 1e-6, &case);
            assert_near(&d_up, &expected.1, 1e-6, &case);
            let (gate, up, dy) = inputs();
            let in_place = Flex::swiglu_backward(gate, up, dy);
            assert_eq!(values(&in_place.0), values(&d_gate));
            assert_eq!(values(&in_place.1), values(&d_up));
        }
    }

    #[test]
    fn other_float_types_take_the_reference() {
        let double = |x| {
            let x: Tensor<Flex, 2> = tensor(x);
            primitive(x.cast(DType::F64))
        };
        let (gate, up) = (noise([3, 5], 4.0, 1), noise([3, 5], 1.0, 2));
        let y = Flex::swiglu(double(gate.clone()), double(up.clone()));
        assert_eq!(y.dtype(), DType::F64);
        let y: Tensor<Flex, 2> = tensor(y);
        let y = primitive(y.cast(DType::F32));
        assert_near(&y, &Flex::swiglu(gate, up), 1e-6, "rounded");
    }
}
