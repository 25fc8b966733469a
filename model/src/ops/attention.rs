//! Causal attention with grouped heads: `softmax(q kᵀ / √h_d) v`, each query head with the KV head
//! of its group.
//!
//! Source: <https://arxiv.org/abs/1706.03762>, <https://arxiv.org/abs/2305.13245>. What forward
//! keeps for backward is FlashAttention-2's: the output and the log-sum-exp of each row
//! (<https://arxiv.org/abs/2307.08691>).

mod cpu;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Tensor, backend::Backend};

use super::cpu::all_f32;
use super::{matmul, primitive, tensor};

/// `q` `[b, s, n_h, h_d]`, `k` and `v` `[b, t, n_kv, h_d]` to `[b, s, n_h, h_d]`.
///
/// The `s` queries are the last of the `t` positions: query `i` sees the keys up to `t - s + i`.
pub fn attention<B: AttentionBackend>(
    q: Tensor<B, 4>,
    k: Tensor<B, 4>,
    v: Tensor<B, 4>,
) -> Tensor<B, 4> {
    tensor(B::causal_attention(primitive(q), primitive(k), primitive(v)).0)
}

/// The operation on a backend's own tensors.
pub trait AttentionBackend: Backend {
    /// The output `[b, s, n_h, h_d]` and the log-sum-exp of the scores `[b, n_h, s]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::<Self>(q, k, v)
    }

    /// Gradients of `q`, `k` and `v` from `d_out` `[b, s, n_h, h_d]` and what forward returned.
    fn causal_attention_backward(
        saved: AttentionState<Self>,
        d_out: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        reference_backward::<Self>(saved, d_out)
    }
}

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub struct AttentionState<B: Backend> {
    /// `[b, s, n_h, h_d]`.
    pub q: FloatTensor<B>,
    /// `[b, t, n_kv, h_d]`.
    pub k: FloatTensor<B>,
    /// `[b, t, n_kv, h_d]`.
    pub v: FloatTensor<B>,
    /// `[b, s, n_h, h_d]`.
    pub out: FloatTensor<B>,
    /// `[b, n_h, s]`.
    pub lse: FloatTensor<B>,
}

/// [`AttentionBackend::causal_attention`] in plain tensor operations.
pub fn reference<B: Backend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (q, k, v): (Tensor<B, 4>, Tensor<B, 4>, Tensor<B, 4>) = (tensor(q), tensor(k), tensor(v));
    let groups = q.dims()[2] / k.dims()[2];
    let scores = scores(q, &k, groups); // [b, n_h, s, t]
    let max = scores.clone().max_dim(3);
    let exp = (scores - max.clone()).exp();
    let sum = exp.clone().sum_dim(3); // [b, n_h, s, 1]
    let out = matmul(exp / sum.clone(), heads_first(v, groups)); // [b, n_h, s, h_d]
    let lse: Tensor<B, 3> = (sum.log() + max).squeeze_dim(3);
    (primitive(out.swap_dims(1, 2)), primitive(lse))
}

/// [`AttentionBackend::causal_attention_backward`] in plain tensor operations.
pub fn reference_backward<B: Backend>(
    saved: AttentionState<B>,
    d_out: FloatTensor<B>,
) -> [FloatTensor<B>; 3] {
    let (q, k, v): (Tensor<B, 4>, Tensor<B, 4>, Tensor<B, 4>) =
        (tensor(saved.q), tensor(saved.k), tensor(saved.v));
    let (out, d_out): (Tensor<B, 4>, Tensor<B, 4>) = (tensor(saved.out), tensor(d_out));
    let lse: Tensor<B, 3> = tensor(saved.lse);
    let [_, _, n_h, h_d] = q.dims();
    let groups = n_h / k.dims()[2];
    let scale = (h_d as f64).powf(-0.5);

    let p = (scores(q.clone(), &k, groups) - lse.unsqueeze_dim(3)).exp(); // [b, n_h, s, t]
    let along = (out * d_out.clone()).sum_dim(3).swap_dims(1, 2); // [b, n_h, s, 1]
    let d_out = d_out.swap_dims(1, 2); // [b, n_h, s, h_d]
    let dv = matmul(p.clone().transpose(), d_out.clone()); // [b, n_h, t, h_d]
    let dp = matmul(d_out, heads_first(v, groups).transpose()); // [b, n_h, s, t]
    let ds = p * (dp - along) * scale;
    let dq = matmul(ds.clone(), heads_first(k, groups)).swap_dims(1, 2);
    let dk = matmul(ds.transpose(), q.swap_dims(1, 2)); // [b, n_h, t, h_d]
    [dq, sum_groups(dk, groups), sum_groups(dv, groups)].map(primitive)
}

/// Scaled scores `[b, n_h, s, t]`, minus infinity above the diagonal.
fn scores<B: Backend>(q: Tensor<B, 4>, k: &Tensor<B, 4>, groups: usize) -> Tensor<B, 4> {
    let ([_, s, _, h_d], [_, t, _, _]) = (q.dims(), k.dims());
    let q = q.swap_dims(1, 2).mul_scalar((h_d as f64).powf(-0.5));
    let scores = matmul(q, heads_first(k.clone(), groups).transpose());
    if s == 1 {
        return scores; // the last position sees every key
    }
    let device = scores.device();
    let query = Tensor::<B, 1, Int>::arange((t - s) as i64..t as i64, &device);
    let key = Tensor::<B, 1, Int>::arange(0..t as i64, &device);
    let later = key.unsqueeze_dim::<2>(0).greater(query.unsqueeze_dim(1)); // [s, t]
    scores.mask_fill(later.unsqueeze(), f64::NEG_INFINITY)
}

/// `[b, t, n_kv, h_d]` to `[b, n_h, t, h_d]`: each KV head once for every query head of its group.
fn heads_first<B: Backend>(x: Tensor<B, 4>, groups: usize) -> Tensor<B, 4> {
    let [b, t, n_kv, h_d] = x.dims();
    let x = x.swap_dims(1, 2).unsqueeze_dim::<5>(2); // [b, n_kv, 1, t, h_d]
    x.expand([b, n_kv, groups, t, h_d])
        .reshape([b, n_kv * groups, t, h_d])
}

/// `[b, n_h, t, h_d]` to `[b, t, n_kv, h_d]`: the gradients of a group belong to one KV head.
fn sum_groups<B: Backend>(x: Tensor<B, 4>, groups: usize) -> Tensor<B, 4> {
    let [b, n_h, t, h_d] = x.dims();
    let x = x.reshape([b, n_h / groups, groups, t, h_d]).sum_dim(2);
    x.squeeze_dim::<4>(2).swap_dims(1, 2)
}

impl AttentionBackend for Flex {
    fn causal_attention(q: FlexTensor, k: FlexTensor, v: FlexTensor) -> (FlexTensor, FlexTensor) {
        if !all_f32([&q, &k, &v]) {
            return reference::<Flex>(q, k, v);
        }
        cpu::forward(q, k, v)
    }

    fn causal_attention_backward(
        saved: AttentionState<Flex>,
        d_out: FlexTensor,
    ) -> [FlexTensor; 3] {
        if !all_f32([&saved.q, &saved.k, &saved.v, &d_out]) {
            return reference_backward::<Flex>(saved, d_out);
        }
        cpu::backward(saved, d_out)
    }
}

#[derive(Debug)]
struct AttentionBackward;

impl<B: AttentionBackend> Backward<B, 3> for AttentionBackward {
    type State = AttentionState<B>;

    fn backward(self, ops: Ops<Self::State, 3>, grads: &mut Gradients, _: &mut Checkpointer) {
        let d_out = grads.consume::<B>(&ops.node);
        let gradients = B::causal_attention_backward(ops.state, d_out);
        for (node, gradient) in ops.parents.into_iter().zip(gradients) {
            if let Some(node) = node {
                grads.register::<B>(node.id, gradient);
            }
        }
    }
}

impl<B: AttentionBackend, C: CheckpointStrategy> AttentionBackend for Autodiff<B, C> {
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
        let (q, k, v) = (q.primitive, k.primitive, v.primitive);
        let (out, lse) = B::causal_attention(q.clone(), k.clone(), v.clone());
        let state = AttentionState {
            q,
            k,
            v,
            out: out.clone(),
            lse: lse.clone(),
        };
        let out = match AttentionBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(state, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        (out, primitive(Tensor::<Self, 3>::from_inner(tensor(lse))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::test::{
        Train, assert_close, assert_near, assert_repeats, grads_of, noise, random,
    };

    /// Softmax attention, one query at a time.
    fn by_the_book(
        q: Tensor<Train, 4>,
        k: Tensor<Train, 4>,
        v: Tensor<Train, 4>,
    ) -> Tensor<Train, 4> {
        let ([b, s, n_h, h_d], [_, t, n_kv, _]) = (q.dims(), k.dims());
        let mut rows = Vec::new();
        for (i, j, h) in
            (0..b).flat_map(|i| (0..s).flat_map(move |j| (0..n_h).map(move |h| (i, j, h))))
        {
            let (g, seen) = (h / (n_h / n_kv), t - s + j + 1);
            let query = q
                .clone()
                .slice([i..i + 1, j..j + 1, h..h + 1, 0..h_d])
                .reshape([1, h_d]);
            let pick = |x: &Tensor<Train, 4>| {
                x.clone()
                    .slice([i..i + 1, 0..seen, g..g + 1, 0..h_d])
                    .reshape([seen, h_d])
            };
            let scores = matmul(query, pick(&k).transpose()).div_scalar((h_d as f64).sqrt());
            let weights = burn::tensor::activation::softmax(scores, 1);
            rows.push(matmul(weights, pick(&v)));
        }
        Tensor::cat(rows, 0).reshape([b, s, n_h, h_d])
    }

    fn check(b: usize, s: usize, t: usize, n_h: usize, n_kv: usize, h_d: usize) {
        let inputs = [
            random([b * s, n_h * h_d], 1).mul_scalar(3.0),
            random([b * t, n_kv * h_d], 2),
            random([b * t, n_kv * h_d], 3),
        ];
        let run =
            |op: fn(Tensor<Train, 4>, Tensor<Train, 4>, Tensor<Train, 4>) -> Tensor<Train, 4>| {
                grads_of(inputs.clone(), |[q, k, v]| {
                    let kv = |x: Tensor<Train, 2>| x.reshape([b, t, n_kv, h_d]);
                    op(q.reshape([b, s, n_h, h_d]), kv(k), kv(v)).reshape([b * s, n_h * h_d])
                })
            };
        assert_close(run(attention), run(by_the_book), 2e-5);
    }

    #[test]
    fn output_and_gradients_equal_attention_by_the_book() {
        check(2, 5, 5, 4, 2, 8);
        check(1, 3, 7, 3, 1, 6);
        check(1, 1, 9, 2, 2, 4);
    }

    /// Forward and backward of the fused version and the reference.
    fn compare(b: usize, s: usize, t: usize, heads: [usize; 2], h_d: usize, scale: f64) {
        let case = format!("b {b}, s {s}, t {t}, heads {heads:?}, h_d {h_d}, up to {scale}");
        let [n_h, n_kv] = heads;
        let q = noise([b, s, n_h, h_d], scale, 1);
        let (k, v) = (
            noise([b, t, n_kv, h_d], 2.0, 2),
            noise([b, t, n_kv, h_d], 1.0, 3),
        );
        let d_out = noise([b, s, n_h, h_d], 1.0, 4);
        let expected = reference::<Flex>(q.clone(), k.clone(), v.clone());
        let (out, lse) = Flex::causal_attention(q.clone(), k.clone(), v.clone());
        assert_near(&out, &expected.0, 5e-6, &format!("out of {case}"));
        assert_near(&lse, &expected.1, 5e-6, &format!("lse of {case}"));
        let saved = AttentionState { q, k, v, out, lse };
        let expected = reference_backward::<Flex>(saved.clone(), d_out.clone());
        let gradients = Flex::causal_attention_backward(saved, d_out);
        for ((gradient, expected), name) in gradients.iter().zip(&expected).zip(["dq", "dk", "dv"])
        {
            // A query that sees one key has no gradient, and neither has that key by it.
            let zero = t == 1 && name != "dv";
            if !zero {
                assert_near(gradient, expected, 2e-5, &format!("{name} of {case}"));
            }
        }
    }

    #[test]
    fn fused_equals_reference() {
        compare(2, 65, 65, [3, 1], 64, 3.0);
        compare(1, 200, 200, [3, 3], 24, 3.0);
        compare(2, 3, 200, [6, 2], 80, 3.0);
        compare(1, 65, 200, [4, 2], 64, 3.0);
        compare(2, 1, 300, [9, 3], 64, 3.0);
        compare(1, 1, 2, [2, 2], 24, 3.0);
        compare(3, 5, 5, [8, 1], 6, 3.0);
        compare(1, 4, 64, [100, 1], 8, 3.0); // a group larger than a tile
    }

    #[test]
    fn fused_equals_reference_for_large_scores() {
        compare(1, 130, 130, [3, 1], 64, 80.0);
        compare(1, 1, 130, [3, 1], 64, 80.0);
    }

    #[test]
    fn fused_equals_reference_when_keys_are_shared_out() {
        compare(1, 1100, 1100, [2, 1], 16, 3.0);
        compare(1, 70, 1100, [2, 1], 16, 3.0);
        compare(1, 1600, 1603, [1, 1], 8, 3.0);
    }

    #[test]
    fn keys_and_values_can_be_parts_of_longer_buffers() {
        let q = noise([2, 7, 6, 8], 3.0, 1);
        let buffers = [noise([2, 50, 2, 8], 1.0, 2), noise([2, 50, 2, 8], 1.0, 3)];
        let [k, v] = buffers.map(|x| {
            let layout = x.layout().narrow(1, 2, 40);
            x.with_layout(layout)
        });
        let expected = reference::<Flex>(q.clone(), k.clone(), v.clone()).0;
        let out = Flex::causal_attention(q, k, v).0;
        assert_near(&out, &expected, 5e-6, "part");
    }

    #[test]
    fn results_repeat_bit_by_bit() {
        let q = noise([1, 1100, 3, 16], 3.0, 1);
        let (k, v) = (
            noise([1, 1100, 1, 16], 1.0, 2),
            noise([1, 1100, 1, 16], 1.0, 3),
        );
        assert_repeats(|| {
            let (q, k, v) = (q.clone(), k.clone(), v.clone());
            let (out, lse) = Flex::causal_attention(q.clone(), k.clone(), v.clone());
            let d_out = q.clone();
            let (out_, lse_) = (out.clone(), lse.clone());
            let gradients =
                Flex::causal_attention_backward(AttentionState { q, k, v, out, lse }, d_out);
            [out_, lse_].into_iter().chain(gradients).collect()
        });
    }
}
