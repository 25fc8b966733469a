//! Cross entropy of each token, in nats: `log Σ exp(logits) − logits[target]`.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::activation::log_softmax;
use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{IndexingUpdateOp, Int, Tensor, backend::Backend};

use super::cpu::{self, exp, vectorized};
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
        reference::<Self>(logits, targets)
    }

    /// The same and its gradient by the logits, `softmax(logits) − onehot(target)`, `[n, v]`: both
    /// come from one pass, so that the logits need not be kept beside their gradient.
    fn cross_entropy_with_gradient(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference_with_gradient::<Self>(logits, targets)
    }

    /// The rows of `gradient` `[n, v]`, each times its element of `d_nll` `[n]`.
    fn cross_entropy_backward(
        gradient: FloatTensor<Self>,
        d_nll: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        reference_backward::<Self>(gradient, d_nll)
    }
}

/// [`CrossEntropyBackend::cross_entropy`] in plain tensor operations.
pub fn reference<B: Backend>(logits: FloatTensor<B>, targets: IntTensor<B>) -> FloatTensor<B> {
    let targets = Tensor::<B, 1, Int>::from_primitive(targets);
    let log_p = log_softmax(tensor::<B, 2>(logits), 1);
    let nll: Tensor<B, 1> = log_p.gather(1, targets.unsqueeze_dim(1)).squeeze_dim(1);
    primitive(nll.neg())
}

/// [`CrossEntropyBackend::cross_entropy_with_gradient`] in plain tensor operations.
pub fn reference_with_gradient<B: Backend>(
    logits: FloatTensor<B>,
    targets: IntTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let targets = Tensor::<B, 1, Int>::from_primitive(targets).unsqueeze_dim::<2>(1);
    let log_p = log_softmax(tensor::<B, 2>(logits), 1);
    let nll: Tensor<B, 1> = log_p.clone().gather(1, targets.clone()).squeeze_dim(1);
    let minus_one = nll.ones_like().neg().unsqueeze_dim(1);
    let gradient = log_p
        .exp()
        .scatter(1, targets, minus_one, IndexingUpdateOp::Add);
    (primitive(nll.neg()), primitive(gradient))
}

/// [`CrossEntropyBackend::cross_entropy_backward`] in plain tensor operations.
pub fn reference_backward<B: Backend>(
    gradient: FloatTensor<B>,
    d_nll: FloatTensor<B>,
) -> FloatTensor<B> {
    let (gradient, d_nll): (Tensor<B, 2>, Tensor<B, 1>) = (tensor(gradient), tensor(d_nll));
    primitive(gradient * d_nll.unsqueeze_dim(1))
}

impl CrossEntropyBackend for Flex {
    fn cross_entropy(logits: FlexTensor, targets: FlexTensor) -> FlexTensor {
        if !cpu::all_f32([&logits]) {
            return reference::<Flex>(logits, targets);
        }
        let [n, v] = cpu::dims(&logits);
        let logits = cpu::contiguous(logits);
        let (logits, targets) = (cpu::slice(&logits), indices(targets));
        let nll = cpu::from_vec(vec![0.0; n], [n]);
        let [nll] = cpu::update([nll], [1], |i, [nll]| {
            nll[0] = row_loss(&logits[i * v..][..v], targets[i]);
        });
        nll
    }

    fn cross_entropy_with_gradient(
        logits: FlexTensor,
        targets: FlexTensor,
    ) -> (FlexTensor, FlexTensor) {
        if !cpu::all_f32([&logits]) {
            return reference_with_gradient::<Flex>(logits, targets);
        }
        let [n, v] = cpu::dims(&logits);
        let targets = indices(targets);
        let nll = cpu::from_vec(vec![0.0; n], [n]);
        let [nll, gradient] = cpu::update([nll, logits], [1, v], |i, [nll, row]| {
            nll[0] = row_loss_and_gradient(row, targets[i]);
        });
        (nll, gradient)
    }

    fn cross_entropy_backward(gradient: FlexTensor, d_nll: FlexTensor) -> FlexTensor {
        if !cpu::all_f32([&gradient, &d_nll]) {
            return reference_backward::<Flex>(gradient, d_nll);
        }
        let [_, v] = cpu::dims(&gradient);
        let d_nll = cpu::contiguous(d_nll);
        let d_nll = cpu::slice(&d_nll);
        let [d_logits] = cpu::update([gradient], [v], |i, [row]| scale(row, d_nll[i]));
        d_logits
    }
}

/// Integer tensors come in several widths.
fn indices(targets: FlexTensor) -> Vec<usize> {
    targets
        .into_data()
        .iter::<i64>()
        .map(|x| x as usize)
        .collect()
}

vectorized! {
    fn row_loss(row: &[f32], target: usize) -> f32 {
        let max = cpu::max(row);
        let sum = cpu::sum([row], |[x]| exp(x - max));
        sum.ln() + max - row[target]
    }
}

vectorized! {
    /// Turns logits into the gradient of the loss that it returns.
    fn row_loss_and_gradient(row: &mut [f32], target: usize) -> f32 {
        let (max, of_target) = (cpu::max(row), row[target]);
        let sum = cpu::replace_and_sum(row, |x| exp(x - max));
        let share = 1.0 / sum;
        row.iter_mut().for_each(|x| *x *= share);
        row[target] -= 1.0;
        sum.ln() + max - of_target
    }
}

vectorized! {
    fn scale(row: &mut [f32], by: f32) {
        row.iter_mut().for_each(|x| *x *= by);
    }
}

#[derive(Debug)]
struct CrossEntropyBackward;

impl<B: CrossEntropyBackend> Backward<B, 1> for CrossEntropyBackward {
    type State = FloatTensor<B>;

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_nll = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, B::cross_entropy_backward(ops.state, d_nll));
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
    use crate::ops::test::{Train, assert_close, assert_near, grads_of, noise, random, values};

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

    fn targets(n: usize, v: usize) -> FlexTensor {
        let targets: Vec<i32> = (0..n).map(|i| (i * 37 % v) as i32).collect();
        Tensor::<Flex, 1, Int>::from_ints(targets.as_slice(), &Default::default()).into_primitive()
    }

    #[test]
    fn fused_equals_reference() {
        for (n, v, scale) in [
            (1, 49152, 8.0),
            (3, 7, 80.0),
            (65, 1000, 80.0),
            (200, 33, 0.1),
        ] {
            let case = format!("{n} by {v} up to {scale}");
            let (logits, targets) = (noise([n, v], scale, 1), targets(n, v));
            let expected = reference_with_gradient::<Flex>(logits.clone(), targets.clone());
            let nll = Flex::cross_entropy(logits.clone(), targets.clone());
            assert_near(&nll, &expected.0, 2e-6, &case);
            let (nll, gradient) =
                Flex::cross_entropy_with_gradient(logits.clone(), targets.clone());
            assert_near(&nll, &expected.0, 2e-6, &case);
            assert_near(&gradient, &expected.1, 1e-5, &case);
            let d_nll = noise([n], 1.0, 2);
            let expected = reference_backward::<Flex>(gradient.clone(), d_nll.clone());
            let d_logits = Flex::cross_entropy_backward(gradient, d_nll);
            assert_eq!(values(&d_logits), values(&expected));
        }
    }

    #[test]
    fn the_gradient_takes_the_place_of_logits_nobody_else_holds() {
        let logits = noise([5, 100], 4.0, 1);
        let address = |x: &FlexTensor| x.bytes().as_ptr();
        let (before, kept) = (address(&logits), values(&logits));
        let shared = logits.clone();
        let (_, gradient) = Flex::cross_entropy_with_gradient(logits, targets(5, 100));
        assert_ne!(address(&gradient), before);
        assert_eq!(values(&shared), kept);
        let (_, in_place) = Flex::cross_entropy_with_gradient(shared, targets(5, 100));
        assert_eq!(address(&in_place), before);
        assert_eq!(values(&in_place), values(&gradient));
        let d_logits = Flex::cross_entropy_backward(in_place, noise([5], 1.0, 2));
        assert_eq!(address(&d_logits), before);
    }
}
