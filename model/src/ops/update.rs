//! The update of a trained tensor: AdamW, and both halves of clipping by the norm of all gradients.
//!
//! Source: <https://arxiv.org/abs/1711.05101>, `torch/optim/adamw.py`,
//! `torch/nn/utils/clip_grad.py`.

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

use super::cpu::{self, CHUNK, vectorized};
use super::{primitive, tensor};

/// The numbers of one step of AdamW.
#[derive(Debug, Clone, Copy)]
pub struct AdamwStep {
    /// What is kept of the two moments.
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    pub eps: f64,
    /// The factor on the weight: 1 − learning rate · weight decay.
    pub decay: f64,
    /// The learning rate ÷ the bias correction of the first moment.
    pub step_size: f64,
    /// The root of the bias correction of the second moment.
    pub root: f64,
}

/// A weight and its two moments, `[n]` each.
#[derive(Debug, Clone)]
pub struct Updated<B: Backend> {
    /// The weight.
    pub weight: Tensor<B, 1>,
    /// The running mean of its gradient.
    pub first: Tensor<B, 1>,
    /// The running mean of its gradient's square.
    pub second: Tensor<B, 1>,
}

/// One step of AdamW from where `old` is, by a gradient `[n]`.
pub fn adamw<B: UpdateBackend>(
    old: Updated<B>,
    gradient: Tensor<B, 1>,
    step: &AdamwStep,
) -> Updated<B> {
    let old = [old.weight, old.first, old.second].map(primitive);
    let [weight, first, second] = B::adamw(old, primitive(gradient), step).map(tensor);
    Updated {
        weight,
        first,
        second,
    }
}

/// `x` `[n]` to the sum of its squares, `[1]`.
pub fn sum_of_squares<B: UpdateBackend>(x: Tensor<B, 1>) -> Tensor<B, 1> {
    tensor(B::sum_of_squares(primitive(x)))
}

/// `x` `[n]` times a number.
pub fn scale<B: UpdateBackend>(x: Tensor<B, 1>, by: f64) -> Tensor<B, 1> {
    tensor(B::scale(primitive(x), by))
}

/// The operations on a backend's own tensors.
pub trait UpdateBackend: Backend {
    /// See [`adamw`]: weight, first and second moment, before and after.
    fn adamw(
        old: [FloatTensor<Self>; 3],
        gradient: FloatTensor<Self>,
        step: &AdamwStep,
    ) -> [FloatTensor<Self>; 3] {
        reference::<Self>(old, gradient, step)
    }

    /// See [`sum_of_squares`].
    fn sum_of_squares(x: FloatTensor<Self>) -> FloatTensor<Self> {
        reference_sum_of_squares::<Self>(x)
    }

    /// See [`scale`].
    fn scale(x: FloatTensor<Self>, by: f64) -> FloatTensor<Self> {
        reference_scale::<Self>(x, by)
    }
}

/// [`UpdateBackend::adamw`] in plain tensor operations.
pub fn reference<B: Backend>(
    old: [FloatTensor<B>; 3],
    gradient: FloatTensor<B>,
    step: &AdamwStep,
) -> [FloatTensor<B>; 3] {
    let [weight, first, second] = old.map(tensor::<B, 1>);
    let gradient: Tensor<B, 1> = tensor(gradient);
    let [beta1, beta2] = step.betas;
    let first = first.mul_scalar(beta1) + gradient.clone().mul_scalar(1.0 - beta1);
    let second = second.mul_scalar(beta2) + (gradient.clone() * gradient).mul_scalar(1.0 - beta2);
    let root = second.clone().sqrt().div_scalar(step.root);
    let change = (first.clone() / root.add_scalar(step.eps)).mul_scalar(step.step_size);
    [weight.mul_scalar(step.decay) - change, first, second].map(primitive)
}

/// [`UpdateBackend::sum_of_squares`] in plain tensor operations.
pub fn reference_sum_of_squares<B: Backend>(x: FloatTensor<B>) -> FloatTensor<B> {
    let x: Tensor<B, 1> = tensor(x);
    primitive((x.clone() * x).sum())
}

/// [`UpdateBackend::scale`] in plain tensor operations.
pub fn reference_scale<B: Backend>(x: FloatTensor<B>, by: f64) -> FloatTensor<B> {
    primitive(tensor::<B, 1>(x).mul_scalar(by))
}

impl UpdateBackend for Flex {
    /// In place: the new weight where the gradient was, since the old one is mostly held by others,
    /// too, and the moments where they were.
    fn adamw(old: [FlexTensor; 3], gradient: FlexTensor, step: &AdamwStep) -> [FlexTensor; 3] {
        let [weight, first, second] = old;
        if !cpu::all_f32([&weight, &first, &second, &gradient]) {
            return reference::<Flex>([weight, first, second], gradient, step);
        }
        let weight = cpu::contiguous(weight);
        let weight = cpu::slice(&weight);
        let step = Step::of(step);
        cpu::update(
            [gradient, first, second],
            [CHUNK; 3],
            |i, [new, first, second]| {
                adamw_chunk(&weight[i * CHUNK..][..new.len()], new, first, second, step);
            },
        )
    }

    fn sum_of_squares(x: FlexTensor) -> FlexTensor {
        if !cpu::all_f32([&x]) {
            return reference_sum_of_squares::<Flex>(x);
        }
        let x = cpu::contiguous(x);
        let x = cpu::slice(&x);
        let sums = cpu::from_vec(
            vec![0.0; x.len().div_ceil(CHUNK)],
            [x.len().div_ceil(CHUNK)],
        );
        let [sums] = cpu::update([sums], [1], |i, [sum]| {
            sum[0] = squares(&x[i * CHUNK..x.len().min((i + 1) * CHUNK)]);
        });
        let total: f64 = cpu::slice(&sums).iter().copied().map(f64::from).sum();
        cpu::from_vec(vec![total as f32], [1])
    }

    /// In place where nobody else holds `x`.
    fn scale(x: FlexTensor, by: f64) -> FlexTensor {
        if !cpu::all_f32([&x]) {
            return reference_scale::<Flex>(x, by);
        }
        let [x] = cpu::update([x], [CHUNK], |_, [x]| scale_chunk(x, by as f32));
        x
    }
}

/// [`AdamwStep`] as the kernel computes with it.
#[derive(Clone, Copy)]
struct Step {
    keep: [f32; 2],
    take: [f32; 2],
    eps: f32,
    decay: f32,
    step_size: f32,
    root: f32,
}

impl Step {
    fn of(step: &AdamwStep) -> Self {
        Self {
            keep: step.betas.map(|beta| beta as f32),
            take: step.betas.map(|beta| (1.0 - beta) as f32),
            eps: step.eps as f32,
            decay: step.decay as f32,
            step_size: step.step_size as f32,
            root: step.root as f32,
        }
    }
}

vectorized! {
    /// Turns the gradient in `new` into the new weight.
    fn adamw_chunk(old: &[f32], new: &mut [f32], first: &mut [f32], second: &mut [f32], step: Step) {
        for (((new, old), first), second) in new.iter_mut().zip(old).zip(first).zip(second) {
            *first = *first * step.keep[0] + *new * step.take[0];
            *second = *second * step.keep[1] + *new * *new * step.take[1];
            let root = second.sqrt() / step.root;
            *new = old * step.decay - *first / (root + step.eps) * step.step_size;
        }
    }
}

vectorized! {
    fn squares(x: &[f32]) -> f32 {
        cpu::dot(x, x)
    }
}

vectorized! {
    fn scale_chunk(x: &mut [f32], by: f32) {
        x.iter_mut().for_each(|x| *x *= by);
    }
}

/// Nothing differentiates an update.
impl<B: Backend, C: CheckpointStrategy> UpdateBackend for Autodiff<B, C> {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{assert_near, assert_repeats, noise, values};

    const STEP: AdamwStep = AdamwStep {
        betas: [0.9, 0.95],
        eps: 1e-8,
        decay: 1.0 - 3e-3,
        step_size: 2e-2,
        root: 0.3,
    };

    /// Weight, moments and gradient.
    fn inputs(n: usize) -> ([FlexTensor; 3], FlexTensor) {
        let second = Flex::scale(noise([n], 1.0, 3), 1e-3);
        let second = tensor::<Flex, 1>(second).powf_scalar(2.0);
        let old = [noise([n], 1.0, 1), noise([n], 0.1, 2), primitive(second)];
        (old, noise([n], 1.0, 4))
    }

    #[test]
    fn fused_equals_reference() {
        for n in [1, 7, 32, 2 * CHUNK + 100] {
            let (old, gradient) = inputs(n);
            let expected = reference::<Flex>(old.clone(), gradient.clone(), &STEP);
            let found = Flex::adamw(old, gradient.clone(), &STEP);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_near(found, expected, 2e-7, &format!("{n}, tensor {i}"));
            }
            let expected = reference_sum_of_squares::<Flex>(gradient.clone());
            let found = Flex::sum_of_squares(gradient.clone());
            assert_near(&found, &expected, 1e-6, &format!("squares of {n}"));
            let expected = reference_scale::<Flex>(gradient.clone(), 0.3);
            assert_eq!(values(&Flex::scale(gradient, 0.3)), values(&expected));
        }
    }

    #[test]
    fn a_step_takes_no_memory() {
        let ([weight, first, second], gradient) = inputs(3 * CHUNK);
        let address = |x: &FlexTensor| x.bytes().as_ptr();
        let before = [&gradient, &first, &second].map(address);
        let kept = (weight.clone(), values(&weight));
        let after = Flex::adamw([weight, first, second], gradient, &STEP);
        assert_eq!(after.each_ref().map(address), before);
        assert_eq!(values(&kept.0), kept.1);
        let [weight, ..] = after;
        let place = address(&weight);
        assert_eq!(address(&Flex::scale(weight, 0.5)), place);
    }

    #[test]
    fn steps_repeat_bit_by_bit() {
        assert_repeats(|| {
            let (old, gradient) = inputs(5 * CHUNK + 3);
            let squares = Flex::sum_of_squares(gradient.clone());
            let [weight, first, second] = Flex::adamw(old, gradient, &STEP);
            vec![weight, first, second, squares]
        });
    }

    #[test]
    fn numbers_that_are_not_finite_stay_so() {
        let x = |values: [f32; 2]| cpu::from_vec(values.to_vec(), [2]);
        let sum = |x| values(&Flex::sum_of_squares(x))[0];
        assert!(sum(x([1.0, f32::NAN])).is_nan());
        assert_eq!(sum(x([1e30, 1.0])), f32::INFINITY);
        assert_eq!(sum(x([3.0, 4.0])), 25.0);
    }
}
