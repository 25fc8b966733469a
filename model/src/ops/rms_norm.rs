//! Root-mean-square norm: `y = x / √(mean(x²) + eps) · weight`.
//!
//! Source: <https://arxiv.org/abs/1910.07467>; `LlamaRMSNorm` in transformers.

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, backend::Backend};

use super::cpu::{self, vectorized};
use super::{again, primitive, tensor};

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
        reference::<Self>(x, weight, eps)
    }

    /// Gradients of `x` `[n, d]` and, if asked for, of `weight` `[d]`, from `dy` `[n, d]`.
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        weight: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f64,
        with_weight: bool,
    ) -> (FloatTensor<Self>, Option<FloatTensor<Self>>) {
        reference_backward::<Self>(x, weight, dy, eps, with_weight)
    }
}

/// [`RmsNormBackend::rms_norm`] in plain tensor operations.
pub fn reference<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    eps: f64,
) -> FloatTensor<B> {
    let x: Tensor<B, 2> = tensor(x);
    let weight: Tensor<B, 1> = tensor(weight);
    let r = inverse_rms(&x, eps); // [n, 1]
    primitive(x * r * weight.unsqueeze())
}

/// [`RmsNormBackend::rms_norm_backward`] in plain tensor operations.
pub fn reference_backward<B: Backend>(
    x: FloatTensor<B>,
    weight: FloatTensor<B>,
    dy: FloatTensor<B>,
    eps: f64,
    with_weight: bool,
) -> (FloatTensor<B>, Option<FloatTensor<B>>) {
    let (x, dy): (Tensor<B, 2>, Tensor<B, 2>) = (tensor(x), tensor(dy));
    let weight: Tensor<B, 1> = tensor(weight);
    let r = inverse_rms(&x, eps); // [n, 1]
    let normed = x * r.clone(); // [n, d]
    let d_weight = with_weight.then(|| (dy.clone() * normed.clone()).sum_dim(0).squeeze_dim(0));
    let d_normed = dy * weight.unsqueeze();
    let along = (d_normed.clone() * normed.clone()).mean_dim(1); // [n, 1]
    let dx = (d_normed - normed * along) * r;
    (primitive(dx), d_weight.map(primitive::<B, 1>))
}

fn inverse_rms<B: Backend>(x: &Tensor<B, 2>, eps: f64) -> Tensor<B, 2> {
    let squares = x.clone() * x.clone();
    squares.mean_dim(1).add_scalar(eps).sqrt().recip()
}

/// Rows of a chunk of the fused version.
const ROWS: usize = 32;

impl RmsNormBackend for Flex {
    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f64) -> FlexTensor {
        if !cpu::all_f32([&x, &weight]) {
            return reference::<Flex>(x, weight, eps);
        }
        let weight = cpu::contiguous(weight);
        let weight = cpu::slice(&weight);
        let [x] = cpu::update([x], [ROWS * weight.len()], |_, [rows]| {
            norm_rows(rows, weight, eps as f32);
        });
        x
    }

    fn rms_norm_backward(
        x: FlexTensor,
        weight: FlexTensor,
        dy: FlexTensor,
        eps: f64,
        with_weight: bool,
    ) -> (FlexTensor, Option<FlexTensor>) {
        if !cpu::all_f32([&x, &weight, &dy]) {
            return reference_backward::<Flex>(x, weight, dy, eps, with_weight);
        }
        let (x, weight) = (cpu::contiguous(x), cpu::contiguous(weight));
        let (x, weight, eps) = (cpu::slice(&x), cpu::slice(&weight), eps as f32);
        let (d, length) = (weight.len(), ROWS * weight.len());
        let x_rows = |i: usize| &x[i * length..x.len().min((i + 1) * length)];
        if !with_weight {
            let [dx] = cpu::update([dy], [length], |i, [dy]| {
                backward_rows(x_rows(i), weight, dy, eps, &mut []);
            });
            return (dx, None);
        }
        let chunks = x.len().div_ceil(length);
        let partial = cpu::from_vec(vec![0.0; chunks * d], [chunks, d]);
        let [dx, partial] = cpu::update([dy, partial], [length, d], |i, [dy, dw]| {
            backward_rows(x_rows(i), weight, dy, eps, dw);
        });
        let mut d_weight = vec![0.0; d];
        for part in cpu::slice(&partial).chunks_exact(d) {
            for (total, x) in d_weight.iter_mut().zip(part) {
                *total += x;
            }
        }
        (dx, Some(cpu::from_vec(d_weight, [d])))
    }
}

vectorized! {
    fn norm_rows(rows: &mut [f32], weight: &[f32], eps: f32) {
        for row in rows.chunks_exact_mut(weight.len()) {
            let r = inverse_rms_of(row, eps);
            for (x, w) in row.iter_mut().zip(weight) {
                *x *= r * w;
            }
        }
    }
}

vectorized! {
    /// Turns rows of `dy` into `dx`, and adds to `d_weight` unless that is empty.
    fn backward_rows(x: &[f32], weight: &[f32], dy: &mut [f32], eps: f32, d_weight: &mut [f32]) {
        let d = weight.len();
        for (x, dy) in x.chunks_exact(d).zip(dy.chunks_exact_mut(d)) {
            let r = inverse_rms_of(x, eps);
            for ((dw, x), dy) in d_weight.iter_mut().zip(x).zip(&*dy) {
                *dw += dy * (x * r);
            }
            let along = cpu::sum([x, dy, weight], |[x, dy, w]| x * dy * w) * r / d as f32;
            for ((dy, x), w) in dy.iter_mut().zip(x).zip(weight) {
                *dy = (*dy * w - x * r * along) * r;
            }
        }
    }
}

#[inline(always)]
fn inverse_rms_of(row: &[f32], eps: f32) -> f32 {
    (cpu::dot(row, row) / row.len() as f32 + eps).sqrt().recip()
}

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
    /// Keeps `x`; `y` is computed again for who needs it.
    fn rms_norm(x: FloatTensor<Self>, weight: FloatTensor<Self>, eps: f64) -> FloatTensor<Self> {
        let forward = move |[x, weight]: [FloatTensor<B>; 2]| B::rms_norm(x, weight, eps);
        let operation = again::prepare(RmsNormBackward, [&x, &weight], forward);
        let (x, weight) = (x.primitive, weight.primitive);
        match operation {
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
    use crate::ops::test::{
        assert_close, assert_near, assert_repeats, grads_of, noise, random, values,
    };

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

    #[test]
    fn fused_equals_reference() {
        for (n, d) in [(1, 576), (3, 24), (65, 100), (200, 31)] {
            let case = format!("{n} by {d}");
            let (x, w, dy) = (
                noise([n, d], 3.0, 1),
                noise([d], 1.0, 2),
                noise([n, d], 1.0, 3),
            );
            let y = Flex::rms_norm(x.clone(), w.clone(), 1e-5);
            assert_near(
                &y,
                &reference::<Flex>(x.clone(), w.clone(), 1e-5),
                2e-6,
                &case,
            );
            let run = |f: Backward| f(x.clone(), w.clone(), dy.clone(), 1e-5, true);
            let (dx, dw) = run(Flex::rms_norm_backward);
            let (dx_reference, dw_reference) = run(reference_backward::<Flex>);
            assert_near(&dx, &dx_reference, 2e-6, &case);
            assert_near(&dw.unwrap(), &dw_reference.unwrap(), 5e-6, &case);
            let (alone, none) = Flex::rms_norm_backward(x, w, dy, 1e-5, false);
            assert_eq!(values(&alone), values(&dx));
            assert!(none.is_none());
        }
    }

    type Backward =
        fn(FlexTensor, FlexTensor, FlexTensor, f64, bool) -> (FlexTensor, Option<FlexTensor>);

    #[test]
    fn gradients_repeat_bit_by_bit() {
        let (x, w) = (noise([300, 100], 3.0, 1), noise([100], 1.0, 2));
        assert_repeats(|| {
            let (dx, dw) = Flex::rms_norm_backward(x.clone(), w.clone(), x.clone(), 1e-5, true);
            vec![dx, dw.unwrap()]
        });
    }
}
