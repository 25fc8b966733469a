//! Cross entropy of each token, in nats: `log Σ exp(logits) − logits[target]`.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex};
use burn::tensor::activation::log_softmax;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{Int, Tensor, backend::Backend};

use super::{primitive, tensor};

/// `logits` `[n, v]` and `targets` `[n]` to the negative log probability `[n]` of each target.
pub fn cross_entropy<B: CrossEntropyBackend>(
    logits: Tensor<B, 2>,
    targets: Tensor<B, 1, Int>,
) -> Tensor<B, 1> {
    tensor(B::cross_entropy(
        primitive(logits),
        targets.into_primitive(),
    ))
}

/// The operation on a backend's own tensors.
pub trait CrossEntropyBackend: Backend {
    /// See [`cross_entropy`].
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        let targets = Tensor::<Self, 1, Int>::from_primitive(targets);
        let log_p = log_softmax(tensor::<Self, 2>(logits), 1);
        let nll: Tensor<Self, 1> = log_p.gather(1, targets.unsqueeze_dim(1)).squeeze_dim(1);
        primitive(nll.neg())
    }

    /// The same and its gradient by the logits, `softmax(logits) − onehot(target)`, `[n, v]`: both
    /// come from one pass, so that the logits need not be kept beside their gradient.
    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let targets = Tensor::<Self, 1, Int>::from_primitive(targets).unsqueeze_dim::<2>(1);
        let log_p = log_softmax(tensor::<Self, 2>(logits), 1);
        let nll: Tensor<Self, 1> = log_p.clone().gather(1, targets.clone()).squeeze_dim(1);
        let minus_one = nll.ones_like().neg().unsqueeze_dim(1);
        let gradient =
            log_p
                .exp()
                .scatter(1, targets, minus_one, burn::tensor::IndexingUpdateOp::Add);
        (primitive(nll.neg()), primitive(gradient))
    }
}

impl CrossEntropyBackend for Flex {}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: CrossEntropyBackend> Backward<B, 1> for CrossEntropyBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_nll: Tensor<B, 1> = tensor(grads.consume::<B>(&ops.node));
        if let [Some(node)] = ops.parents {
            let gradient: Tensor<B, 2> = tensor(ops.state);
            grads.register::<B>(node.id, primitive(gradient * d_nll.unsqueeze_dim(1)));
        }
    }
}

impl<B: CrossEntropyBackend, C: CheckpointStrategy> CrossEntropyBackend for Autodiff<B, C> {
    fn cross_entropy(logits: FloatTensor<Self>, targets: IntTensor<Self>) -> FloatTensor<Self> {
        match CrossEntropyBackward
            .prepare::<C>([logits.node.clone()])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => {
                let (nll, gradient) = B::cross_entropy_with_gradient(logits.primitive, targets);
                prep.finish(gradient, nll)
            }
            OpsKind::UnTracked(prep) => prep.finish(B::cross_entropy(logits.primitive, targets)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{Train, assert_close, grads_of, random};

    #[test]
    fn gradients_equal_those_of_the_formula() {
        let logits = random([6, 50], 1).mul_scalar(8.0);
        let targets = [3, 0, 49, 7, 7, 21];
        let device = logits.device();
        let fused = grads_of([logits.clone()], |[x]| {
            cross_entropy(x, Tensor::from_ints(targets, &device)).unsqueeze_dim(1)
        });
        let plain = grads_of([logits], |[x]| {
            let rows = (0..6).map(|i| x.clone().slice([i..i + 1, 0..50]));
            let nll = rows.zip(targets).map(|(row, target)| -> Tensor<Train, 2> {
                let target = target as usize;
                row.clone().exp().sum_dim(1).log() - row.slice([0..1, target..target + 1])
            });
            Tensor::cat(nll.collect(), 0)
        });
        assert_close(fused, plain, 1e-5);
    }
}
