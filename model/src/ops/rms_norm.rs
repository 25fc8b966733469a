//! Root-mean-square norm: `y = x / √(mean(x²) + eps) · weight`.
//!
//! Source: <https://arxiv.org/abs/1910.07467>; `LlamaRMSNorm` in transformers.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

use super::{primitive, tensor};

/// `x` `[n, d]`, `weight` `[d]` to `[n, d]`.
pub fn rms_norm<B: RmsNormBackend>(
    x: Tensor<B, 2>,
    weight: Tensor<B, 1>,
    eps: f64,
) -> Tensor<B, 2> {
    tensor(B::rms_norm(primitive(x), primitive(weight), eps))
}

/// The operation on a backend's own tensors.
pub trait RmsNormBackend: Backend {
    /// See [`rms_norm`].
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let x: Tensor<Self, 2> = tensor(x);
        let weight: Tensor<Self, 1> = tensor(weight);
        let r = inverse_rms(&x, eps); // [n, 1]
        primitive(x * r * weight.unsqueeze())
    }

    /// Gradients of `x` `[n, d]` and, if asked for, of `weight` `[d]`, from `dy` `[n, d]`.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
        with_weight: bool,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>) {
        let (x, dy): (Tensor<Self, 2>, Tensor<Self, 2>) = (tensor(x), tensor(dy));
        let weight: Tensor<Self, 1> = tensor(weight);
        let r = inverse_rms(&x, eps); // [n, 1]
        let normed = x * r.clone(); // [n, d]
        let d_weight = with_weight.then(|| (dy.clone() * normed.clone()).sum_dim(0).squeeze_dim(0));
        let d_normed = dy * weight.unsqueeze();
        let along = (d_normed.clone() * normed.clone()).mean_dim(1); // [n, 1]
        let dx = (d_normed - normed * along) * r;
        (primitive(dx), d_weight.map(primitive::<Self, 1>))
    }
}

fn inverse_rms<B: Backend>(x: &Tensor<B, 2>, eps: f64) -> Tensor<B, 2> {
    let squares = x.clone() * x.clone();
    squares.mean_dim(1).add_scalar(eps).sqrt().recip()
}

impl RmsNormBackend for Flex {}

#[derive(Debug)]
struct RmsNormBackward;

impl<B: RmsNormBackend> Backward<B, 2> for RmsNormBackward {
    type State = (FloatTensor<B>, FloatTensor<B>, f64);

    fn backward(self, ops: Ops<Self::State, 2>, grads: &mut Gradients, _: &mut Checkpointer) {
        let [x_node, weight_node] = ops.parents;
        let (x, weight, eps) = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        let (dx, dw) = B::rms_norm_backward(x, weight, dy, eps, weight_node.is_some());
        if let Some(node) = x_node {
            grads.register::<B>(node.id, dx);
        }
        if let (Some(node), Some(dw)) = (weight_node, dw) {
            grads.register::<B>(node.id, dw);
        }
    }
}

impl<B: RmsNormBackend, C: CheckpointStrategy> RmsNormBackend for Autodiff<B, C> {
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let nodes = [x.node.clone(), weight.node.clone()];
        let (x, weight) = (x.primitive, weight.primitive);
        match RmsNormBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let y = B::rms_norm(x.clone(), weight.clone(), eps);
                prep.finish((x, weight, eps), y)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::rms_norm(x, weight, eps)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{assert_close, grads_of, random};

    #[test]
    fn gradients_equal_those_of_the_formula() {
        let (x, w) = (random([5, 24], 1), random([1, 24], 2).add_scalar(1.0));
        let fused = grads_of([x.clone(), w.clone()], |[x, w]| {
            rms_norm(x, w.squeeze_dim(0), 1e-5)
        });
        let plain = grads_of([x, w], |[x, w]| {
            let r = (x.clone() * x.clone()).mean_dim(1).add_scalar(1e-5).sqrt();
            x / r * w
        });
        assert_close(fused, plain, 1e-5);
    }
}
