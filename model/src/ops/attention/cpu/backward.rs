//! The gradients, tile by tile.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::matrix::{Heads, Matrix, Old, gather, inner_contiguous, multiply, scale};
use super::{Diagonal, KEYS, Sizes, take};
use crate::ops::attention::AttentionState;
use crate::ops::cpu::{self, exp, vectorized};
use crate::segments::{Segment, Segments};

/// Positions of a chunk when results are put in order.
const POSITIONS: usize = 32;

/// See [`super::super::AttentionBackend::causal_attention_backward`].
pub(in super::super) fn backward(
    saved: AttentionState<Flex>,
    d_out: FlexTensor,
) -> [FlexTensor; 3] {
    let segments = &saved.segments;
    let sizes = Sizes::of(&saved.q, &saved.k, segments);
    let Sizes {
        n,
        m,
        n_h,
        n_kv,
        h_d,
        ..
    } = sizes;
    let (q, out, d_out, lse) = (
        cpu::contiguous(saved.q),
        cpu::contiguous(saved.out),
        cpu::contiguous(d_out),
        cpu::contiguous(saved.lse),
    );
    let (k, v) = (inner_contiguous(saved.k), inner_contiguous(saved.v));
    let inputs = BackwardInputs {
        q: cpu::slice(&q),
        k: Heads::of(&k),
        v: Heads::of(&v),
        out: cpu::slice(&out),
        lse: cpu::slice(&lse),
        d_out: cpu::slice(&d_out),
    };

    // A task has all queries of a segment for its keys, so that nobody else adds to their
    // gradients; those of the queries come in one part a task.
    let keys_of_task = |segment: &Segment| {
        // Long segments are cut into several tasks if there are few, but only so many: each costs
        // a copy of the queries' gradients.
        let wanted = 16_usize.div_ceil(segments.rows() * n_kv);
        let parts = wanted.min(segment.keys.len() / 512).clamp(1, 4);
        segment.keys.len().div_ceil(parts).next_multiple_of(KEYS)
    };
    let parts = |segment: &Segment| segment.keys.len().div_ceil(keys_of_task(segment));
    let width = sizes.groups * h_d;
    let of_queries = |segment: Segment| parts(&segment) * segment.queries.len() * width;
    let mut dq = vec![0.0; n_kv * segments.iter().map(of_queries).sum::<usize>()];
    let mut dk = vec![0.0; n_kv * m * h_d]; // [n_kv, m, h_d]
    let mut dv = vec![0.0; n_kv * m * h_d];
    let (mut dqs, mut dks, mut dvs) = (&mut dq[..], &mut dk[..], &mut dv[..]);
    let mut tasks = Vec::new();
    for kv_head in 0..n_kv {
        for segment in segments.iter() {
            for start in (0..segment.keys.len()).step_by(keys_of_task(&segment)) {
                let end = segment.keys.len().min(start + keys_of_task(&segment));
                tasks.push(BackwardTask {
                    segment: segment.clone(),
                    kv_head,
                    keys: start..end,
                    dq: take(&mut dqs, segment.queries.len() * width),
                    dk: take(&mut dks, (end - start) * h_d),
                    dv: take(&mut dvs, (end - start) * h_d),
                });
            }
        }
    }
    cpu::for_each(tasks, |_, task| task.run(sizes, &inputs));
    [
        cpu::from_vec(sum_parts(&dq, sizes, segments, parts), [n, n_h, h_d]),
        cpu::from_vec(positions_first(&dk, sizes), [m, n_kv, h_d]),
        cpu::from_vec(positions_first(&dv, sizes), [m, n_kv, h_d]),
    ]
}

struct BackwardInputs<'a> {
    q: &'a [f32],
    k: Heads<'a>,
    v: Heads<'a>,
    out: &'a [f32],
    /// `[n, n_h]`.
    lse: &'a [f32],
    d_out: &'a [f32],
}

struct BackwardTask<'a> {
    segment: Segment,
    kv_head: usize,
    /// Counted in the segment, as all keys and queries here.
    keys: Range<usize>,
    /// `[queries, groups, h_d]`, before the scaling.
    dq: &'a mut [f32],
    /// `[keys, h_d]`, as `dv`.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl BackwardTask<'_> {
    fn run(self, sizes: Sizes, inputs: &BackwardInputs) {
        let Sizes { groups, h_d, .. } = sizes;
        let Segment { queries, keys } = &self.segment;
        let first_that_sees = |key: usize| (key + queries.len()).saturating_sub(keys.len());
        let first_query = first_that_sees(self.keys.start);
        let rows = (queries.len() - first_query) * groups;
        let at = || sizes.places(self.kv_head, queries.start + first_query..queries.end);
        let (mut q, mut d_out) = (vec![0.0; rows * h_d], vec![0.0; rows * h_d]);
        let mut along = vec![0.0; rows]; // Σ out · d_out
        let mut lse = vec![0.0; rows];
        gather(&mut d_out, inputs.d_out, at(), groups, h_d);
        gather(&mut q, inputs.out, at(), groups, h_d);
        row_products(&mut along, &q, &d_out, h_d);
        gather(&mut q, inputs.q, at(), groups, h_d);
        scale(&mut q, sizes.scale());
        gather(&mut lse, inputs.lse, at(), groups, 1);

        let queries_of_tile = sizes.queries_of_tile().min(queries.len());
        let mut p = vec![0.0; queries_of_tile * groups * KEYS.min(self.keys.len())];
        let mut ds = p.clone();
        for start in self.keys.clone().step_by(KEYS) {
            let tile = KEYS.min(self.keys.end - start); // keys
            let k = inputs.k.matrix(self.kv_head, keys.start + start, tile);
            let v = inputs.v.matrix(self.kv_head, keys.start + start, tile);
            let here = (start - self.keys.start) * h_d..(start - self.keys.start + tile) * h_d;
            let (dk, dv) = (&mut self.dk[here.clone()], &mut self.dv[here]);
            for query in (first_that_sees(start)..queries.len()).step_by(queries_of_tile) {
                let end = queries.len().min(query + queries_of_tile);
                let rows = (query - first_query) * groups..(end - first_query) * groups;
                let elements = rows.start * h_d..rows.end * h_d;
                let (p, ds) = (&mut p[..rows.len() * tile], &mut ds[..rows.len() * tile]);
                let q = Matrix::rows(&q[elements.clone()], h_d);
                let d_out = Matrix::rows(&d_out[elements], h_d);
                multiply(p, q, k.transposed(), Old::Forget);
                multiply(ds, d_out, v.transposed(), Old::Forget);
                let diagonal = Diagonal::new(self.segment.seen_by(query), start, tile, groups);
                score_gradients(p, ds, &lse[rows.clone()], &along[rows], diagonal);
                let (p, ds) = (Matrix::rows(p, tile), Matrix::rows(ds, tile));
                let dq = &mut self.dq[query * groups * h_d..end * groups * h_d];
                multiply(dv, p.transposed(), d_out, Old::Keep);
                multiply(dk, ds.transposed(), q, Old::Keep);
                multiply(dq, ds, k, Old::Keep);
            }
        }
    }
}

/// `[n_kv, segments, parts, queries, groups, h_d]` to the scaled sum of the parts, `[n, n_h, h_d]`.
fn sum_parts(
    dq: &[f32],
    sizes: Sizes,
    segments: &Segments,
    parts: impl Fn(&Segment) -> usize,
) -> Vec<f32> {
    let Sizes { n, n_h, n_kv, .. } = sizes;
    let width = sizes.groups * sizes.h_d;
    let mut out = vec![0.0; n * n_h * sizes.h_d];
    let mut outs = &mut out[..];
    let mut tasks = Vec::new();
    let mut first = 0; // element of the segment, of each KV head
    for segment in segments.iter() {
        let (part, parts) = (segment.queries.len() * width, parts(&segment));
        for start in (0..segment.queries.len()).step_by(POSITIONS) {
            let queries = POSITIONS.min(segment.queries.len() - start);
            let to = take(&mut outs, queries * n_kv * width);
            tasks.push((to, first + start * width, part, parts));
        }
        first += parts * part;
    }
    let head = dq.len() / n_kv;
    cpu::for_each(tasks, |_, (out, start, part, parts)| {
        for (i, row) in out.chunks_exact_mut(width).enumerate() {
            let at = i % n_kv * head + start + i / n_kv * width;
            row.copy_from_slice(&dq[at..][..width]);
            for other in 1..parts {
                let other = &dq[at + other * part..][..width];
                row.iter_mut().zip(other).for_each(|(to, x)| *to += x);
            }
        }
        scale(out, sizes.scale());
    });
    out
}

/// `[n_kv, m, h_d]` to `[m, n_kv, h_d]`.
fn positions_first(x: &[f32], sizes: Sizes) -> Vec<f32> {
    let Sizes { m, n_kv, h_d, .. } = sizes;
    let mut out = vec![0.0; x.len()];
    let chunks = out.chunks_mut(POSITIONS * n_kv * h_d).collect();
    cpu::for_each(chunks, |chunk, out: &mut [f32]| {
        for (i, row) in out.chunks_exact_mut(h_d).enumerate() {
            let (position, kv_head) = (chunk * POSITIONS + i / n_kv, i % n_kv);
            row.copy_from_slice(&x[(kv_head * m + position) * h_d..][..h_d]);
        }
    });
    out
}

vectorized! {
    /// Turns scores into probabilities `p`, and the gradients of these into those of the scores.
    fn score_gradients(p: &mut [f32], ds: &mut [f32], lse: &[f32], along: &[f32], diagonal: Diagonal) {
        let rows = p.chunks_exact_mut(diagonal.keys).zip(ds.chunks_exact_mut(diagonal.keys));
        for (row, (p, ds)) in rows.enumerate() {
            let visible = diagonal.visible(row);
            let (lse, along) = (lse[row], along[row]);
            for (p, ds) in p[..visible].iter_mut().zip(&mut ds[..visible]) {
                *p = exp(*p - lse);
                *ds = *p * (*ds - along);
            }
            p[visible..].fill(0.0);
            ds[visible..].fill(0.0);
        }
    }
}

vectorized! {
    /// The scalar products of the rows of `a` and `b`.
    fn row_products(out: &mut [f32], a: &[f32], b: &[f32], width: usize) {
        for ((out, a), b) in out.iter_mut().zip(a.chunks_exact(width)).zip(b.chunks_exact(width)) {
            *out = cpu::dot(a, b);
        }
    }
}
