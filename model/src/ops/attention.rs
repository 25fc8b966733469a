//! Causal attention with grouped heads, inside of each row: `softmax(q kᵀ / √h_d) v`, each query
//! head with the KV head of its group.
//!
//! Shapes: `n` queries, `m` keys of all rows; `s` queries and `t` keys of one row.
//!
//! Source: <https://arxiv.org/abs/1706.03762>, <https://arxiv.org/abs/2305.13245>. What forward
//! keeps for backward is FlashAttention-2's: the output and the log-sum-exp of each query
//! (<https://arxiv.org/abs/2307.08691>).

mod cpu;
#[cfg(feature = "gpu")]
mod gpu;

use std::ops::Range;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Tensor, backend::Backend};

use super::cpu::all_f32;
use super::{MatmulBackend, matmul, primitive, tensor};
use crate::segments::{Segment, Segments};

/// `q` `[n, n_h, h_d]`, `k` and `v` `[m, n_kv, h_d]` to `[n, n_h, h_d]`.
///
/// The `s` queries of a row are the last of its `t` positions: query `i` sees the row's keys up to
/// `t - s + i`, and none of another row.
pub fn attention<B: AttentionBackend>(
    q: Tensor<B, 3>,
    k: Tensor<B, 3>,
    v: Tensor<B, 3>,
    segments: &Segments,
) -> Tensor<B, 3> {
    tensor(B::causal_attention(primitive(q), primitive(k), primitive(v), segments).0)
}

/// Writes `new` `[b, s, n_kv, h_d]` over the positions from `at` on of `all` `[b, c, n_kv, h_d]`,
/// in place where nobody else holds that.
pub fn write_positions<B: AttentionBackend>(
    all: Tensor<B, 4>,
    new: Tensor<B, 4>,
    at: usize,
) -> Tensor<B, 4> {
    tensor(B::write_positions(primitive(all), primitive(new), at))
}

/// The operation on a backend's own tensors.
pub trait AttentionBackend: MatmulBackend {
    /// See [`write_positions`].
    fn write_positions(
        all: FloatTensor<Self>,
        new: FloatTensor<Self>,
        at: usize,
    ) -> FloatTensor<Self> {
        reference_write::<Self>(all, new, at)
    }

    /// The output `[n, n_h, h_d]` and the log-sum-exp of the scores `[n, n_h]`.
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: &Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        reference::<Self>(q, k, v, segments)
    }

    /// Gradients of `q`, `k` and `v` from `d_out` `[n, n_h, h_d]` and what forward returned.
    fn causal_attention_backward(
        saved: AttentionState<Self>,
        d_out: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        reference_backward::<Self>(saved, d_out)
    }
}

/// [`AttentionBackend::write_positions`] in plain tensor operations.
fn reference_write<B: Backend>(
    all: FloatTensor<B>,
    new: FloatTensor<B>,
    at: usize,
) -> FloatTensor<B> {
    let (all, new): (Tensor<B, 4>, Tensor<B, 4>) = (tensor(all), tensor(new));
    let [b, s, n_kv, h_d] = new.dims();
    primitive(all.slice_assign([0..b, at..at + s, 0..n_kv, 0..h_d], new))
}

/// What backward needs of forward.
#[derive(Debug, Clone)]
pub struct AttentionState<B: Backend> {
    /// `[n, n_h, h_d]`.
    pub q: FloatTensor<B>,
    /// `[m, n_kv, h_d]`.
    pub k: FloatTensor<B>,
    /// `[m, n_kv, h_d]`.
    pub v: FloatTensor<B>,
    /// `[n, n_h, h_d]`.
    pub out: FloatTensor<B>,
    /// `[n, n_h]`.
    pub lse: FloatTensor<B>,
    /// The rows.
    pub segments: Segments,
}

/// Queries of a row whose scores exist together in plain tensor operations, as on graphics cards.
pub const QUERIES: usize = 512;

/// [`AttentionBackend::causal_attention`] in plain tensor operations, so many queries of a row at a
/// time.
pub fn reference<B: MatmulBackend>(
    q: FloatTensor<B>,
    k: FloatTensor<B>,
    v: FloatTensor<B>,
    segments: &Segments,
) -> (FloatTensor<B>, FloatTensor<B>) {
    let (q, k, v): (Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 3>) = (tensor(q), tensor(k), tensor(v));
    let [_, n_kv, _] = k.dims();
    let (mut outs, mut lses) = (Vec::new(), Vec::new());
    for piece in segments.iter().flat_map(|row| row.pieces(QUERIES)) {
        let q = by_kv_head(pick(&q, &piece.queries), n_kv); // [n_kv, groups · s, h_d]
        let k = pick(&k, &piece.keys).swap_dims(0, 1); // [n_kv, t, h_d]
        let v = pick(&v, &piece.keys).swap_dims(0, 1); // [n_kv, t, h_d]
        let scores = scores(q, k, &piece); // [n_kv, groups · s, t]
        let max = scores.clone().max_dim(2);
        let exp = (scores - max.clone()).exp();
        let sum = exp.clone().sum_dim(2); // [n_kv, groups · s, 1]
        outs.push(by_query(matmul(exp / sum.clone(), v), piece.queries.len()));
        lses.push(by_query(sum.log() + max, piece.queries.len())); // [s, n_h, 1]
    }
    let lse: Tensor<B, 2> = Tensor::cat(lses, 0).squeeze_dim(2);
    (primitive(Tensor::cat(outs, 0)), primitive(lse))
}

/// [`AttentionBackend::causal_attention_backward`] in plain tensor operations.
pub fn reference_backward<B: MatmulBackend>(
    saved: AttentionState<B>,
    d_out: FloatTensor<B>,
) -> [FloatTensor<B>; 3] {
    let (q, k, v): (Tensor<B, 3>, Tensor<B, 3>, Tensor<B, 3>) =
        (tensor(saved.q), tensor(saved.k), tensor(saved.v));
    let (out, d_out): (Tensor<B, 3>, Tensor<B, 3>) = (tensor(saved.out), tensor(d_out));
    let lse: Tensor<B, 3> = tensor::<B, 2>(saved.lse).unsqueeze_dim(2); // [n, n_h, 1]
    let along = (out * d_out.clone()).sum_dim(2); // [n, n_h, 1]
    let [_, n_kv, h_d] = k.dims();
    let scale = (h_d as f64).powf(-0.5);

    let (mut dqs, mut dks, mut dvs) = (Vec::new(), Vec::new(), Vec::new());
    for row in saved.segments.iter() {
        let all_keys = row.keys.clone();
        let mut dk = Tensor::zeros([n_kv, all_keys.len(), h_d], &k.device());
        let mut dv = dk.clone();
        for piece in row.pieces(QUERIES) {
            let of_queries = |x: &Tensor<B, 3>| by_kv_head(pick(x, &piece.queries), n_kv);
            let (q, d_out) = (of_queries(&q), of_queries(&d_out)); // [n_kv, groups · s, h_d]
            let k = pick(&k, &piece.keys).swap_dims(0, 1); // [n_kv, t, h_d]
            let v = pick(&v, &piece.keys).swap_dims(0, 1); // [n_kv, t, h_d]
            let p = (scores(q.clone(), k.clone(), &piece) - of_queries(&lse)).exp();
            let dp = matmul(d_out.clone(), v.transpose()); // [n_kv, groups · s, t]
            let ds = p.clone() * (dp - of_queries(&along)) * scale;
            dqs.push(by_query(matmul(ds.clone(), k), piece.queries.len()));
            // the products sum over the group, too: its gradients belong to one KV head
            dk = add(dk, matmul(ds.transpose(), q)); // [n_kv, t, h_d]
            dv = add(dv, matmul(p.transpose(), d_out)); // [n_kv, t, h_d]
        }
        dks.push(dk.swap_dims(0, 1));
        dvs.push(dv.swap_dims(0, 1));
    }
    [dqs, dks, dvs].map(|parts| primitive(Tensor::cat(parts, 0)))
}

/// Scaled scores `[n_kv, groups · s, t]`, minus infinity where a query does not see the key.
fn scores<B: MatmulBackend>(q: Tensor<B, 3>, k: Tensor<B, 3>, piece: &Segment) -> Tensor<B, 3> {
    let ([n_kv, rows, h_d], [_, t, _]) = (q.dims(), k.dims());
    let s = piece.queries.len();
    let scores = matmul(q.mul_scalar((h_d as f64).powf(-0.5)), k.transpose());
    if s == 1 {
        return scores; // the last position sees every key
    }
    let device = scores.device();
    let positions = piece.positions();
    let query = Tensor::<B, 1, Int>::arange(positions.start as i64..t as i64, &device);
    let key = Tensor::<B, 1, Int>::arange(0..t as i64, &device);
    let later = key.unsqueeze_dim::<2>(0).greater(query.unsqueeze_dim(1)); // [s, t]
    let scores = scores.reshape([n_kv, rows / s, s, t]);
    let scores = scores.mask_fill(later.unsqueeze::<4>(), f64::NEG_INFINITY);
    scores.reshape([n_kv, rows, t])
}

/// Some of the positions.
fn pick<B: Backend>(x: &Tensor<B, 3>, positions: &Range<usize>) -> Tensor<B, 3> {
    x.clone().narrow(0, positions.start, positions.len())
}

/// `[s, n_h, w]` to `[n_kv, groups · s, w]`: the query heads of a KV head together.
fn by_kv_head<B: Backend>(x: Tensor<B, 3>, n_kv: usize) -> Tensor<B, 3> {
    let [s, n_h, w] = x.dims();
    let x = x.reshape([s, n_kv, n_h / n_kv, w]).permute([1, 2, 0, 3]);
    x.reshape([n_kv, n_h / n_kv * s, w])
}

/// `[n_kv, groups · s, w]` to `[s, n_h, w]`.
fn by_query<B: Backend>(x: Tensor<B, 3>, s: usize) -> Tensor<B, 3> {
    let [n_kv, rows, w] = x.dims();
    let x = x.reshape([n_kv, rows / s, s, w]).permute([2, 0, 1, 3]);
    x.reshape([s, n_kv * rows / s, w])
}

/// Adds the gradients `[n_kv, t, h_d]` of a row's first keys to those of all of its keys.
fn add<B: Backend>(all: Tensor<B, 3>, first: Tensor<B, 3>) -> Tensor<B, 3> {
    let [n_kv, t, h_d] = first.dims();
    let here = [0..n_kv, 0..t, 0..h_d];
    let sum = all.clone().slice(here.clone()) + first;
    all.slice_assign(here, sum)
}

impl AttentionBackend for Flex {
    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        segments: &Segments,
    ) -> (FlexTensor, FlexTensor) {
        if !all_f32([&q, &k, &v]) {
            return reference::<Flex>(q, k, v, segments);
        }
        cpu::forward(q, k, v, segments)
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

    /// Burn's own assignment to a slice copies the whole tensor.
    fn write_positions(all: FlexTensor, new: FlexTensor, at: usize) -> FlexTensor {
        if !all_f32([&all, &new]) {
            return reference_write::<Flex>(all, new, at);
        }
        cpu::write_positions(all, new, at)
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
        segments: &Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        let nodes = [q.node.clone(), k.node.clone(), v.node.clone()];
        let (q, k, v) = (q.primitive, k.primitive, v.primitive);
        let (out, lse) = B::causal_attention(q.clone(), k.clone(), v.clone(), segments);
        let state = AttentionState {
            q,
            k,
            v,
            out: out.clone(),
            lse: lse.clone(),
            segments: segments.clone(),
        };
        let out = match AttentionBackward
            .prepare::<C>(nodes)
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish(state, out),
            OpsKind::UnTracked(prep) => prep.finish(out),
        };
        (out, primitive(Tensor::<Self, 2>::from_inner(tensor(lse))))
    }
}

#[cfg(test)]
mod tests {
    use rand::{RngExt, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::ops::test::{
        Train, assert_close, assert_near, assert_repeats, grads_of, noise, random,
    };

    /// Softmax attention, one query at a time.
    fn by_the_book(
        q: Tensor<Train, 3>,
        k: Tensor<Train, 3>,
        v: Tensor<Train, 3>,
        segments: &Segments,
    ) -> Tensor<Train, 3> {
        let ([n, n_h, h_d], [_, n_kv, _]) = (q.dims(), k.dims());
        let mut rows = Vec::new();
        let queries = |row: &Segment| (0..row.queries.len()).collect::<Vec<_>>();
        for (row, j, h) in segments
            .iter()
            .flat_map(|row| queries(&row).into_iter().map(move |j| (row.clone(), j)))
            .flat_map(|(row, j)| (0..n_h).map(move |h| (row.clone(), j, h)))
        {
            let (g, start, seen) = (h / (n_h / n_kv), row.keys.start, row.seen_by(j));
            let j = row.queries.start + j;
            let query = q
                .clone()
                .slice([j..j + 1, h..h + 1, 0..h_d])
                .reshape([1, h_d]);
            let pick = |x: &Tensor<Train, 3>| {
                x.clone()
                    .slice([start..start + seen, g..g + 1, 0..h_d])
                    .reshape([seen, h_d])
            };
            let scores = matmul(query, pick(&k).transpose()).div_scalar((h_d as f64).sqrt());
            let weights = burn::tensor::activation::softmax(scores, 1);
            rows.push(matmul(weights, pick(&v)));
        }
        Tensor::cat(rows, 0).reshape([n, n_h, h_d])
    }

    /// Queries and keys of all rows.
    fn sizes(segments: &Segments) -> [usize; 2] {
        let last = segments.iter().last().expect("there are rows");
        [last.queries.end, last.keys.end]
    }

    fn check(segments: Segments, n_h: usize, n_kv: usize, h_d: usize) {
        let [n, m] = sizes(&segments);
        let inputs = [
            random([n, n_h * h_d], 1).mul_scalar(3.0),
            random([m, n_kv * h_d], 2),
            random([m, n_kv * h_d], 3),
        ];
        type Op =
            fn(Tensor<Train, 3>, Tensor<Train, 3>, Tensor<Train, 3>, &Segments) -> Tensor<Train, 3>;
        let run = |op: Op| {
            grads_of(inputs.clone(), |[q, k, v]| {
                let kv = |x: Tensor<Train, 2>| x.reshape([m, n_kv, h_d]);
                op(q.reshape([n, n_h, h_d]), kv(k), kv(v), &segments).reshape([n, n_h * h_d])
            })
        };
        assert_close(run(attention), run(by_the_book), 2e-5);
    }

    #[test]
    fn output_and_gradients_equal_attention_by_the_book() {
        check(Segments::new([5, 5]), 4, 2, 8);
        check(Segments::new([3]).after(4), 3, 1, 6);
        check(Segments::new([1]).after(8), 2, 2, 4);
    }

    /// Rows of many lengths in many orders, some of them tiles long.
    #[test]
    fn a_row_sees_itself_alone_whatever_lies_beside_it() {
        let mut rng = ChaCha8Rng::seed_from_u64(7);
        for case in 0..24 {
            let rows = rng.random_range(1..6);
            let length = |rng: &mut ChaCha8Rng| match rng.random_range(0..4) {
                0 => rng.random_range(1..3),
                1 => rng.random_range(60..70),
                _ => rng.random_range(3..20),
            };
            let mut lengths: Vec<usize> = (0..rows).map(|_| length(&mut rng)).collect();
            lengths[0] += 1; // a row of one token alone has no gradient by its query
            let seen = [0, 0, 5][case % 3];
            let [n_h, n_kv] = [[6, 2], [3, 3], [4, 1]][case / 3 % 3];
            check(Segments::new(lengths).after(seen), n_h, n_kv, 4);
        }
    }

    fn saved(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        segments: &Segments,
    ) -> AttentionState<Flex> {
        let (out, lse) = Flex::causal_attention(q.clone(), k.clone(), v.clone(), segments);
        let segments = segments.clone();
        AttentionState {
            q,
            k,
            v,
            out,
            lse,
            segments,
        }
    }

    /// Forward and backward of the fused version and the reference.
    fn compare(segments: Segments, heads: [usize; 2], h_d: usize, scale: f64) {
        let case = format!("{segments:?}, heads {heads:?}, h_d {h_d}, up to {scale}");
        let ([n, m], [n_h, n_kv]) = (sizes(&segments), heads);
        let q = noise([n, n_h, h_d], scale, 1);
        let (k, v) = (noise([m, n_kv, h_d], 2.0, 2), noise([m, n_kv, h_d], 1.0, 3));
        let d_out = noise([n, n_h, h_d], 1.0, 4);
        let expected = reference::<Flex>(q.clone(), k.clone(), v.clone(), &segments);
        let saved = saved(q, k, v, &segments);
        assert_near(&saved.out, &expected.0, 5e-6, &format!("out of {case}"));
        assert_near(&saved.lse, &expected.1, 5e-6, &format!("lse of {case}"));
        let expected = reference_backward::<Flex>(saved.clone(), d_out.clone());
        let gradients = Flex::causal_attention_backward(saved, d_out);
        for ((gradient, expected), name) in gradients.iter().zip(&expected).zip(["dq", "dk", "dv"])
        {
            // the exponential magnifies the rounding of large scores
            let tolerance = 2e-5 * (scale / 20.0).max(1.0) as f32;
            assert_near(gradient, expected, tolerance, &format!("{name} of {case}"));
        }
    }

    #[test]
    fn fused_equals_reference() {
        compare(Segments::new([65, 65]), [3, 1], 64, 3.0);
        compare(Segments::new([200]), [3, 3], 24, 3.0);
        compare(Segments::new([3, 3]).after(197), [6, 2], 80, 3.0);
        compare(Segments::new([65]).after(135), [4, 2], 64, 3.0);
        compare(Segments::new([1, 1]).after(299), [9, 3], 64, 3.0);
        compare(Segments::new([1]).after(299), [9, 3], 64, 3.0);
        compare(Segments::new([1]).after(1), [2, 2], 24, 3.0);
        compare(Segments::new([1]).after(1299), [6, 2], 40, 3.0);
        compare(Segments::new([5, 5, 5]), [8, 1], 6, 3.0);
        compare(Segments::new([4]).after(60), [100, 1], 8, 3.0); // a group larger than a tile
        compare(Segments::new([1, 300, 2, 64, 96, 97, 33]), [3, 1], 16, 3.0);
    }

    #[test]
    fn fused_equals_reference_for_large_scores() {
        compare(Segments::new([130]), [3, 1], 64, 80.0);
        compare(Segments::new([1]).after(129), [3, 1], 64, 80.0);
    }

    #[test]
    fn fused_equals_reference_when_keys_are_shared_out() {
        compare(Segments::new([1100]), [2, 1], 16, 3.0);
        compare(Segments::new([70]).after(1030), [2, 1], 16, 3.0);
        compare(Segments::new([1600]).after(3), [1, 1], 8, 3.0);
        compare(Segments::new([20, 1100, 1, 700]), [2, 1], 8, 3.0);
    }

    #[test]
    fn keys_and_values_can_be_parts_of_longer_buffers() {
        let segments = Segments::new([7]).after(33);
        let q = noise([7, 6, 8], 3.0, 1);
        let buffers = [noise([50, 2, 8], 1.0, 2), noise([50, 2, 8], 1.0, 3)];
        let [k, v] = buffers.map(|x| {
            let layout = x.layout().narrow(0, 2, 40);
            x.with_layout(layout)
        });
        let expected = reference::<Flex>(q.clone(), k.clone(), v.clone(), &segments).0;
        let out = Flex::causal_attention(q, k, v, &segments).0;
        assert_near(&out, &expected, 5e-6, "part");
    }

    #[test]
    fn results_repeat_bit_by_bit() {
        let q = noise([1100, 3, 16], 3.0, 1);
        let (k, v) = (noise([1100, 1, 16], 1.0, 2), noise([1100, 1, 16], 1.0, 3));
        for segments in [Segments::new([1100]), Segments::new([90, 1000, 10])] {
            assert_repeats(|| {
                let saved = saved(q.clone(), k.clone(), v.clone(), &segments);
                let (out, lse) = (saved.out.clone(), saved.lse.clone());
                let gradients = Flex::causal_attention_backward(saved, q.clone());
                [out, lse].into_iter().chain(gradients).collect()
            });
        }
    }
}
