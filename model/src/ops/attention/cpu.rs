//! Attention on Flex in FlashAttention-2's tiles: no `[s, t]` matrix, and no tile above the
//! diagonal.
//!
//! The rows of a tile are the `groups` query heads of each of its queries, next to each other as
//! in memory: each tile of keys and values serves its whole group, and the products themselves sum
//! the gradients over the group.

mod backward;
mod matrix;

use std::ops::Range;

use burn::backend::flex::FlexTensor;

use crate::ops::cpu::{self, exp, vectorized};
use matrix::{
    Heads, Matrix, Old, gather, inner_contiguous, multiply, scalar_products, scale, weighted_sums,
};

pub(super) use backward::backward;

/// Rows and keys of a tile: whole numbers of the blocks that `gemm` computes in registers, and
/// what a tile's products read stays in the second-level cache.
const ROWS: usize = 96;
const KEYS: usize = 64;

/// Up to this many rows, as when generating, scalar products beat `gemm`, which repacks the keys.
const FEW_ROWS: usize = 4;

/// See [`super::AttentionBackend::causal_attention`].
pub(super) fn forward(q: FlexTensor, k: FlexTensor, v: FlexTensor) -> (FlexTensor, FlexTensor) {
    let sizes = Sizes::of(&q, &k);
    let Sizes { b, s, n_h, h_d, .. } = sizes;
    let (q, k, v) = (cpu::contiguous(q), inner_contiguous(k), inner_contiguous(v));
    let (q, k, v) = (cpu::slice(&q), Heads::of(&k), Heads::of(&v));

    let mut out = vec![0.0; b * s * n_h * h_d];
    let mut lse = vec![0.0; b * s * n_h]; // [b, s, n_h]
    // Tiles of queries are shared out with all their heads, a lone query by KV heads.
    let (queries, kv_heads) = match s {
        1 => (1, 1),
        _ => (sizes.queries_of_tile(), sizes.n_kv),
    };
    let heads = kv_heads * sizes.groups;
    let mut tasks = Vec::new();
    let batches = out.chunks_mut(s * n_h * h_d).zip(lse.chunks_mut(s * n_h));
    for (batch, (out, lse)) in batches.enumerate() {
        let pieces = lse.chunks_mut(queries * heads);
        for (i, (out, lse)) in out
            .chunks_mut(queries * heads * h_d)
            .zip(pieces)
            .enumerate()
        {
            let (query, kv_head) = if s == 1 { (0, i) } else { (i * queries, 0) };
            tasks.push(ForwardTask {
                batch,
                queries: query..s.min(query + queries),
                kv_heads: kv_head..kv_head + kv_heads,
                out,
                lse,
            });
        }
    }
    cpu::for_each(tasks, |_, task| task.run(sizes, q, k, v));
    let lse = cpu::from_vec(lse, [b, s, n_h]).transpose(1, 2); // [b, n_h, s]
    (cpu::from_vec(out, [b, s, n_h, h_d]), lse)
}

struct ForwardTask<'a> {
    batch: usize,
    queries: Range<usize>,
    kv_heads: Range<usize>,
    /// `[queries, kv_heads · groups, h_d]`.
    out: &'a mut [f32],
    /// `[queries, kv_heads · groups]`.
    lse: &'a mut [f32],
}

impl ForwardTask<'_> {
    fn run(self, sizes: Sizes, q: &[f32], k: Heads, v: Heads) {
        let Sizes { groups, h_d, .. } = sizes;
        let rows = self.queries.len() * groups;
        let seen = sizes.seen_by(self.queries.start);
        let all_seen = sizes.seen_by(self.queries.end - 1);
        let mut q_rows = vec![0.0; rows * h_d];
        let mut scores = vec![0.0; rows * KEYS];
        let mut tile = Tile::new(rows, h_d);
        for kv_head in self.kv_heads.clone() {
            let at = sizes.places(self.batch, kv_head, self.queries.clone());
            gather(&mut q_rows, q, at, groups, h_d);
            scale(&mut q_rows, sizes.scale());
            tile.clear();
            for start in (0..all_seen).step_by(KEYS) {
                let keys = start..all_seen.min(start + KEYS);
                let (k, v) = (
                    k.matrix(self.batch, kv_head, &keys),
                    v.matrix(self.batch, kv_head, &keys),
                );
                let scores = &mut scores[..rows * keys.len()];
                let diagonal = Diagonal::new(seen, start, keys.len(), groups);
                if rows <= FEW_ROWS {
                    scalar_products(scores, &q_rows, k.data, k.row_stride, h_d);
                    weigh(&mut tile, scores, diagonal);
                    weighted_sums(&mut tile.out, scores, v.data, v.row_stride, h_d);
                } else {
                    multiply(
                        scores,
                        Matrix::rows(&q_rows, h_d),
                        k.transposed(),
                        Old::Forget,
                    );
                    weigh(&mut tile, scores, diagonal);
                    multiply(
                        &mut tile.out,
                        Matrix::rows(scores, keys.len()),
                        v,
                        Old::Keep,
                    );
                }
            }
            let heads = self.kv_heads.len() * groups;
            let first = (kv_head - self.kv_heads.start) * groups;
            for row in 0..rows {
                let to = row / groups * heads + first + row % groups;
                self.lse[to] = tile.max[row] + tile.sum[row].ln();
                let from = &tile.out[row * h_d..][..h_d];
                for (to, from) in self.out[to * h_d..][..h_d].iter_mut().zip(from) {
                    *to = from / tile.sum[row];
                }
            }
        }
    }
}

/// The softmax of a tile's rows as far as their keys have come.
struct Tile {
    /// The largest score of each row.
    max: Vec<f32>,
    /// `Σ exp(score − max)` of each row.
    sum: Vec<f32>,
    /// `Σ exp(score − max) v`, `[rows, h_d]`.
    out: Vec<f32>,
}

impl Tile {
    fn new(rows: usize, h_d: usize) -> Self {
        Self {
            max: vec![0.0; rows],
            sum: vec![0.0; rows],
            out: vec![0.0; rows * h_d],
        }
    }

    fn clear(&mut self) {
        self.max.fill(f32::NEG_INFINITY);
        self.sum.fill(0.0);
        self.out.fill(0.0);
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    b: usize,
    s: usize,
    t: usize,
    n_h: usize,
    n_kv: usize,
    groups: usize,
    h_d: usize,
}

impl Sizes {
    fn of(q: &FlexTensor, k: &FlexTensor) -> Self {
        let ([b, s, n_h, h_d], [_, t, n_kv, _]) = (cpu::dims(q), cpu::dims(k));
        assert!(s <= t, "the {s} queries are the last of {t} positions");
        assert_eq!(n_h % n_kv, 0, "{n_h} heads in groups for {n_kv}");
        Self {
            b,
            s,
            t,
            n_h,
            n_kv,
            groups: n_h / n_kv,
            h_d,
        }
    }

    fn scale(&self) -> f32 {
        (self.h_d as f32).sqrt().recip()
    }

    fn queries_of_tile(&self) -> usize {
        (ROWS / self.groups).max(1)
    }

    /// Long rows are cut into several tasks if there are few heads, but only so many: each costs a
    /// copy of the queries' gradients.
    fn keys_of_task(&self) -> usize {
        let wanted = 16_usize.div_ceil(self.b * self.n_kv);
        let parts = wanted.min(self.t / 512).clamp(1, 4);
        self.t.div_ceil(parts).next_multiple_of(KEYS)
    }

    /// How many keys a query sees.
    fn seen_by(&self, query: usize) -> usize {
        self.t - self.s + query + 1
    }

    fn first_that_sees(&self, key: usize) -> usize {
        (key + self.s).saturating_sub(self.t)
    }

    /// Where, in `[b, s, n_h]`, the group of each of these queries begins.
    fn places(
        &self,
        batch: usize,
        kv_head: usize,
        queries: Range<usize>,
    ) -> impl Iterator<Item = usize> {
        let Self { s, n_h, groups, .. } = *self;
        queries.map(move |query| (batch * s + query) * n_h + kv_head * groups)
    }
}

/// Which scores of a tile are of keys that the row's query sees.
#[derive(Clone, Copy)]
struct Diagonal {
    /// How many of all keys the first query sees.
    seen: usize,
    /// The first key of the tile.
    start: usize,
    keys: usize,
    groups: usize,
}

impl Diagonal {
    fn new(seen: usize, start: usize, keys: usize, groups: usize) -> Self {
        Self {
            seen,
            start,
            keys,
            groups,
        }
    }

    #[inline(always)]
    fn visible(&self, row: usize) -> usize {
        (self.seen + row / self.groups)
            .saturating_sub(self.start)
            .min(self.keys)
    }
}

vectorized! {
    /// Takes a tile's scores into the softmax and turns them into `exp(score − max)`.
    fn weigh(tile: &mut Tile, scores: &mut [f32], diagonal: Diagonal) {
        let h_d = tile.out.len() / tile.max.len();
        let rows = scores.chunks_exact_mut(diagonal.keys).zip(tile.out.chunks_exact_mut(h_d));
        for (row, (scores, out)) in rows.enumerate() {
            let (scores, hidden) = scores.split_at_mut(diagonal.visible(row));
            hidden.fill(0.0);
            let max = cpu::max(scores).max(tile.max[row]);
            let shrink = exp(tile.max[row] - max);
            let sum = cpu::replace_and_sum(scores, |x| exp(x - max));
            tile.max[row] = max;
            tile.sum[row] = tile.sum[row] * shrink + sum;
            if shrink != 1.0 {
                out.iter_mut().for_each(|x| *x *= shrink);
            }
        }
    }
}
