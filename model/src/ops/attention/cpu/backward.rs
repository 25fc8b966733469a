//! The gradients, tile by tile.

use std::ops::Range;

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;

use super::matrix::{Heads, Matrix, Old, gather, inner_contiguous, multiply, scale};
use super::{Diagonal, KEYS, ROWS, Sizes};
use crate::ops::attention::AttentionState;
use crate::ops::cpu::{self, exp, vectorized};

/// Positions of a chunk when results are put in order.
const POSITIONS: usize = 32;

/// See [`super::super::AttentionBackend::causal_attention_backward`].
pub(in super::super) fn backward(
    saved: AttentionState<Flex>,
    d_out: FlexTensor,
) -> [FlexTensor; 3] {
    let sizes = Sizes::of(&saved.q, &saved.k);
    let Sizes {
        b,
        s,
        t,
        n_h,
        n_kv,
        h_d,
        ..
    } = sizes;
    let (q, out, d_out) = (
        cpu::contiguous(saved.q),
        cpu::contiguous(saved.out),
        cpu::contiguous(d_out),
    );
    let lse = cpu::contiguous(saved.lse.transpose(1, 2)); // [b, s, n_h]
    let (k, v) = (inner_contiguous(saved.k), inner_contiguous(saved.v));
    let inputs = BackwardInputs {
        q: cpu::slice(&q),
        k: Heads::of(&k),
        v: Heads::of(&v),
        out: cpu::slice(&out),
        lse: cpu::slice(&lse),
        d_out: cpu::slice(&d_out),
    };

    // A task has all queries for its keys, so that nobody else adds to their gradients; those of
    // the queries come in one part a task.
    let keys = sizes.keys_of_task();
    let parts = t.div_ceil(keys);
    let mut dq = vec![0.0; b * n_kv * parts * s * sizes.groups * h_d]; // [b, n_kv, parts, s, ...]
    let mut dk = vec![0.0; b * n_kv * t * h_d]; // [b, n_kv, t, h_d]
    let mut dv = vec![0.0; b * n_kv * t * h_d];
    let mut dq_parts = dq.chunks_mut(s * sizes.groups * h_d);
    let mut tasks = Vec::new();
    let heads = dk.chunks_mut(t * h_d).zip(dv.chunks_mut(t * h_d));
    for (head, (dk, dv)) in heads.enumerate() {
        let pieces = dk.chunks_mut(keys * h_d).zip(dv.chunks_mut(keys * h_d));
        for (part, (dk, dv)) in pieces.enumerate() {
            tasks.push(BackwardTask {
                batch: head / n_kv,
                kv_head: head % n_kv,
                keys: part * keys..t.min((part + 1) * keys),
                dq: dq_parts.next().expect("one a task"),
                dk,
                dv,
            });
        }
    }
    cpu::for_each(tasks, |_, task| task.run(sizes, &inputs));
    [
        cpu::from_vec(sum_parts(&dq, sizes, parts), [b, s, n_h, h_d]),
        cpu::from_vec(positions_first(&dk, sizes), [b, t, n_kv, h_d]),
        cpu::from_vec(positions_first(&dv, sizes), [b, t, n_kv, h_d]),
    ]
}

struct BackwardInputs<'a> {
    q: &'a [f32],
    k: Heads<'a>,
    v: Heads<'a>,
    out: &'a [f32],
    /// `[b, s, n_h]`.
    lse: &'a [f32],
    d_out: &'a [f32],
}

struct BackwardTask<'a> {
    batch: usize,
    kv_head: usize,
    keys: Range<usize>,
    /// `[s, groups, h_d]`, before the scaling.
    dq: &'a mut [f32],
    /// `[keys, h_d]`, as `dv`.
    dk: &'a mut [f32],
    dv: &'a mut [f32],
}

impl BackwardTask<'_> {
    fn run(self, sizes: Sizes, inputs: &BackwardInputs) {
        let Sizes { s, groups, h_d, .. } = sizes;
        let first_query = sizes.first_that_sees(self.keys.start);
        let queries = first_query..s;
        let rows = queries.len() * groups;
        let at = || sizes.places(self.batch, self.kv_head, queries.clone());
        let (mut q, mut d_out) = (vec![0.0; rows * h_d], vec![0.0; rows * h_d]);
        let mut along = vec![0.0; rows]; // Σ out · d_out
        let mut lse = vec![0.0; rows];
        gather(&mut d_out, inputs.d_out, at(), groups, h_d);
        gather(&mut q, inputs.out, at(), groups, h_d);
        row_products(&mut along, &q, &d_out, h_d);
        gather(&mut q, inputs.q, at(), groups, h_d);
        scale(&mut q, sizes.scale());
        gather(&mut lse, inputs.lse, at(), groups, 1);

        let mut p = vec![0.0; ROWS.max(groups) * KEYS];
        let mut ds = p.clone();
        for start in self.keys.clone().step_by(KEYS) {
            let keys = start..self.keys.end.min(start + KEYS);
            let k = inputs.k.matrix(self.batch, self.kv_head, &keys);
            let v = inputs.v.matrix(self.batch, self.kv_head, &keys);
            let here = (start - self.keys.start) * h_d..(keys.end - self.keys.start) * h_d;
            let (dk, dv) = (&mut self.dk[here.clone()], &mut self.dv[here]);
            let tiles = sizes.first_that_sees(start)..s;
            for query in tiles.step_by(sizes.queries_of_tile()) {
                let end = s.min(query + sizes.queries_of_tile());
                let rows = (query - first_query) * groups..(end - first_query) * groups;
                let elements = rows.start * h_d..rows.end * h_d;
                let (p, ds) = (
                    &mut p[..rows.len() * keys.len()],
                    &mut ds[..rows.len() * keys.len()],
                );
                let q = Matrix::rows(&q[elements.clone()], h_d);
                let d_out = Matrix::rows(&d_out[elements], h_d);
                multiply(p, q, k.transposed(), Old::Forget);
                multiply(ds, d_out, v.transposed(), Old::Forget);
                let diagonal = Diagonal::new(sizes.seen_by(query), start, keys.len(), groups);
                score_gradients(p, ds, &lse[rows.clone()], &along[rows], diagonal);
                let (p, ds) = (Matrix::rows(p, keys.len()), Matrix::rows(ds, keys.len()));
                let dq = &mut self.dq[query * groups * h_d..end * groups * h_d];
                multiply(dv, p.transposed(), d_out, Old::Keep);
                multiply(dk, ds.transposed(), q, Old::Keep);
                multiply(dq, ds, k, Old::Keep);
            }
        }
    }
}

/// `[b, n_kv, parts, s, groups, h_d]` to the scaled sum of the parts, `[b, s, n_h, h_d]`.
fn sum_parts(dq: &[f32], sizes: Sizes, parts: usize) -> Vec<f32> {
    let Sizes { s, n_kv, .. } = sizes;
    let width = sizes.groups * sizes.h_d;
    let mut out = vec![0.0; dq.len() / parts];
    let chunks = out.chunks_mut(POSITIONS * n_kv * width).collect();
    cpu::for_each(chunks, |chunk, out: &mut [f32]| {
        for (i, row) in out.chunks_exact_mut(width).enumerate() {
            let (position, kv_head) = (chunk * POSITIONS + i / n_kv, i % n_kv);
            let first = (position / s * n_kv + kv_head) * parts * s + position % s;
            row.copy_from_slice(&dq[first * width..][..width]);
            for part in 1..parts {
                let other = &dq[(first + part * s) * width..][..width];
                row.iter_mut().zip(other).for_each(|(to, x)| *to += x);
            }
        }
        scale(out, sizes.scale());
    });
    out
}

/// `[b, n_kv, t, h_d]` to `[b, t, n_kv, h_d]`.
fn positions_first(x: &[f32], sizes: Sizes) -> Vec<f32> {
    let Sizes { t, n_kv, h_d, .. } = sizes;
    let mut out = vec![0.0; x.len()];
    let chunks = out.chunks_mut(POSITIONS * n_kv * h_d).collect();
    cpu::for_each(chunks, |chunk, out: &mut [f32]| {
        for (i, row) in out.chunks_exact_mut(h_d).enumerate() {
            let (position, kv_head) = (chunk * POSITIONS + i / n_kv, i % n_kv);
            let from = (position / t * n_kv + kv_head) * t + position % t;
            row.copy_from_slice(&x[from * h_d..][..h_d]);
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
