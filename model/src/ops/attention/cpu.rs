//! Attention on Flex in FlashAttention-2's tiles: no matrix of all queries and keys, and no tile
//! above the diagonal or between segments.
//!
//! The rows of a tile are the `groups` query heads of each of its queries, next to each other as
//! in memory: each tile of keys and values serves its whole group, and the products themselves sum
//! the gradients over the group.

mod backward;
mod lone;
mod matrix;

use std::ops::Range;

use burn::backend::flex::FlexTensor;

use crate::ops::cpu::{self, exp, vectorized};
use crate::segments::{Segment, Segments};
use matrix::{
    Heads, Matrix, Old, gather, inner_contiguous, multiply, scalar_products, scale, weighted_sums,
};

pub(super) use backward::backward;

/// Rows and keys of a tile: whole numbers of the blocks that `gemm` computes in registers, and
/// what a tile's products read stays in the second-level cache.
const ROWS: usize = 96;
const KEYS: usize = 64;

/// Up to this many rows scalar products beat `gemm`, which repacks the keys.
const FEW_ROWS: usize = 4;

/// See [`super::AttentionBackend::write_positions`].
pub(super) fn write_positions(all: FlexTensor, new: FlexTensor, at: usize) -> FlexTensor {
    let (mut all, new) = (cpu::contiguous(all), cpu::contiguous(new));
    let ([b, c, n_kv, h_d], [rows, s, ..]) = (cpu::dims(&all), cpu::dims::<4>(&new));
    assert_eq!(cpu::dims(&new), [b, s, n_kv, h_d]);
    assert!(
        rows == b && at + s <= c,
        "{s} positions from {at} on of {c}"
    );
    let width = n_kv * h_d;
    let first = all.layout().start_offset();
    let storage = all.storage_mut::<f32>(); // copies what somebody else holds, too
    let rows = storage[first..].chunks_exact_mut(c * width);
    for (to, from) in rows.zip(cpu::slice(&new).chunks_exact(s * width)) {
        to[at * width..][..s * width].copy_from_slice(from);
    }
    all
}

/// See [`super::AttentionBackend::causal_attention`].
pub(super) fn forward(
    q: FlexTensor,
    k: FlexTensor,
    v: FlexTensor,
    segments: &Segments,
) -> (FlexTensor, FlexTensor) {
    let sizes = Sizes::of(&q, &k, segments);
    let Sizes { n, n_h, h_d, .. } = sizes;
    let (q, k, v) = (cpu::contiguous(q), inner_contiguous(k), inner_contiguous(v));
    let (q, k, v) = (cpu::slice(&q), Heads::of(&k), Heads::of(&v));
    if n == 1 {
        let (out, lse) = lone::forward(sizes, q, k, v);
        return (
            cpu::from_vec(out, [1, n_h, h_d]),
            cpu::from_vec(lse, [1, n_h]),
        );
    }

    let mut out = vec![0.0; n * n_h * h_d];
    let mut lse = vec![0.0; n * n_h];
    let (mut outs, mut lses) = (&mut out[..], &mut lse[..]);
    let mut tasks = Vec::new();
    let queries = sizes.queries_of_tile();
    for piece in segments.iter().flat_map(|segment| segment.pieces(queries)) {
        let length = piece.queries.len() * n_h;
        tasks.push(ForwardTask {
            piece,
            out: take(&mut outs, length * h_d),
            lse: take(&mut lses, length),
        });
    }
    cpu::for_each(tasks, |_, task| task.run(sizes, q, k, v));
    (
        cpu::from_vec(out, [n, n_h, h_d]),
        cpu::from_vec(lse, [n, n_h]),
    )
}

/// Takes so many elements off the front.
fn take<'a>(rest: &mut &'a mut [f32], length: usize) -> &'a mut [f32] {
    rest.split_off_mut(..length)
        .expect("the pieces are no longer than the whole")
}

struct ForwardTask<'a> {
    /// Part of a segment.
    piece: Segment,
    /// `[queries, n_h, h_d]`.
    out: &'a mut [f32],
    /// `[queries, n_h]`.
    lse: &'a mut [f32],
}

impl ForwardTask<'_> {
    fn run(self, sizes: Sizes, q: &[f32], k: Heads, v: Heads) {
        let Sizes { groups, h_d, .. } = sizes;
        let rows = self.piece.queries.len() * groups;
        let all_seen = self.piece.keys.len();
        let mut q_rows = vec![0.0; rows * h_d];
        let mut scores = vec![0.0; rows * KEYS];
        let mut tile = Tile::new(rows, h_d);
        for kv_head in 0..sizes.n_kv {
            let at = sizes.places(kv_head, self.piece.queries.clone());
            gather(&mut q_rows, q, at, groups, h_d);
            scale(&mut q_rows, sizes.scale());
            tile.clear();
            for start in (0..all_seen).step_by(KEYS) {
                let keys = KEYS.min(all_seen - start);
                let (k, v) = (
                    k.matrix(kv_head, self.piece.keys.start + start, keys),
                    v.matrix(kv_head, self.piece.keys.start + start, keys),
                );
                let scores = &mut scores[..rows * keys];
                let diagonal = Diagonal::new(self.piece.seen_by(0), start, keys, groups);
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
                    multiply(&mut tile.out, Matrix::rows(scores, keys), v, Old::Keep);
                }
            }
            for row in 0..rows {
                let to = row / groups * sizes.n_h + kv_head * groups + row % groups;
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
    n: usize,
    m: usize,
    n_h: usize,
    n_kv: usize,
    groups: usize,
    h_d: usize,
}

impl Sizes {
    fn of(q: &FlexTensor, k: &FlexTensor, segments: &Segments) -> Self {
        let ([n, n_h, h_d], [m, n_kv, _]) = (cpu::dims(q), cpu::dims(k));
        let end = segments.iter().last();
        let end = end.map_or((0, 0), |last| (last.queries.end, last.keys.end));
        assert_eq!(end, (n, m), "the segments are all queries and keys");
        assert_eq!(n_h % n_kv, 0, "{n_h} heads in groups for {n_kv}");
        Self {
            n,
            m,
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

    /// Where, in `[n, n_h]`, the group of each of these queries begins.
    fn places(&self, kv_head: usize, queries: Range<usize>) -> impl Iterator<Item = usize> {
        let Self { n_h, groups, .. } = *self;
        queries.map(move |query| query * n_h + kv_head * groups)
    }
}

/// Which scores of a tile are of keys that the row's query sees.
#[derive(Clone, Copy)]
struct Diagonal {
    /// How many keys of the segment the first query sees.
    seen: usize,
    /// The first key of the tile, counted in the segment.
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
