//! Views of the operands, and products of them.

use burn::backend::flex::FlexTensor;

use crate::ops::cpu::{self, vectorized};

/// `[m, n_kv, h_d]` with adjacent elements in each head: a part of a longer buffer, for one.
#[derive(Clone, Copy)]
pub(super) struct Heads<'a> {
    data: &'a [f32],
    position_stride: usize,
    head_stride: usize,
    pub(super) h_d: usize,
}

/// Copies only if [`Heads`] cannot stand for the tensor as it is.
pub(super) fn inner_contiguous(x: FlexTensor) -> FlexTensor {
    let [_, _, h_d] = cpu::dims(&x);
    let strides = x.layout().strides();
    if strides[2] == 1 && strides[0] >= h_d as isize && strides.iter().all(|x| *x >= 0) {
        return x;
    }
    x.to_contiguous()
}

impl<'a> Heads<'a> {
    pub(super) fn of(x: &'a FlexTensor) -> Self {
        let layout = x.layout();
        let stride = |i: usize| layout.strides()[i] as usize;
        let [_, _, h_d] = cpu::dims(x);
        Self {
            data: &x.storage()[layout.start_offset()..],
            position_stride: stride(0),
            head_stride: stride(1),
            h_d,
        }
    }

    /// `[h_d]`, one head of a position.
    #[inline(always)]
    pub(super) fn head(&self, position: usize, head: usize) -> &'a [f32] {
        &self.data[position * self.position_stride + head * self.head_stride..][..self.h_d]
    }

    /// `[positions, h_d]`, the positions from `first` on.
    pub(super) fn matrix(&self, head: usize, first: usize, positions: usize) -> Matrix<'a> {
        let start = first * self.position_stride + head * self.head_stride;
        Matrix {
            data: &self.data[start..],
            rows: positions,
            columns: self.h_d,
            row_stride: self.position_stride,
            column_stride: 1,
        }
    }
}

#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    pub(super) data: &'a [f32],
    pub(super) rows: usize,
    pub(super) columns: usize,
    pub(super) row_stride: usize,
    pub(super) column_stride: usize,
}

impl<'a> Matrix<'a> {
    /// Rows one after the other.
    pub(super) fn rows(data: &'a [f32], columns: usize) -> Self {
        Self {
            data,
            rows: data.len() / columns,
            columns,
            row_stride: columns,
            column_stride: 1,
        }
    }

    pub(super) fn transposed(self) -> Self {
        Self {
            data: self.data,
            rows: self.columns,
            columns: self.rows,
            row_stride: self.column_stride,
            column_stride: self.row_stride,
        }
    }

    fn last(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride
    }
}

/// What happens to the elements that a product is written over.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum Old {
    Forget,
    /// The product is added to them.
    Keep,
}

/// `out = a b`, or `out += a b`, with the rows of `out` one after the other.
pub(super) fn multiply(out: &mut [f32], a: Matrix, b: Matrix, old: Old) {
    assert_eq!(a.columns, b.rows);
    assert_eq!(out.len(), a.rows * b.columns);
    assert!(a.last() < a.data.len() && b.last() < b.data.len());
    // SAFETY: by the assertions every element is inside its slice; `out` is borrowed mutably, so
    // it is neither of the others.
    unsafe {
        gemm::gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            b.columns as isize,
            old == Old::Keep,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            1.0,
            1.0,
            false,
            false,
            false,
            gemm::Parallelism::None,
        );
    }
}

/// Collects groups of heads that begin at `places`; `from` has `width` elements a head.
pub(super) fn gather(
    to: &mut [f32],
    from: &[f32],
    places: impl Iterator<Item = usize>,
    groups: usize,
    width: usize,
) {
    for (to, place) in to.chunks_exact_mut(groups * width).zip(places) {
        to.copy_from_slice(&from[place * width..][..groups * width]);
    }
}

vectorized! {
    pub(super) fn scale(x: &mut [f32], by: f32) {
        x.iter_mut().for_each(|x| *x *= by);
    }
}

vectorized! {
    /// `scores` `[rows, keys]` of `q` `[rows, h_d]` and keys that are `stride` apart.
    pub(super) fn scalar_products(scores: &mut [f32], q: &[f32], k: &[f32], stride: usize, h_d: usize) {
        let keys = scores.len() / (q.len() / h_d);
        for (scores, q) in scores.chunks_exact_mut(keys).zip(q.chunks_exact(h_d)) {
            for (score, k) in scores.iter_mut().zip(k.chunks(stride)) {
                *score = cpu::dot(q, &k[..h_d]);
            }
        }
    }
}

vectorized! {
    /// Adds to `out` `[rows, h_d]` the values, `stride` apart, times `weights` `[rows, keys]`.
    pub(super) fn weighted_sums(out: &mut [f32], weights: &[f32], v: &[f32], stride: usize, h_d: usize) {
        let keys = weights.len() / (out.len() / h_d);
        for (out, weights) in out.chunks_exact_mut(h_d).zip(weights.chunks_exact(keys)) {
            for (weight, v) in weights.iter().zip(v.chunks(stride)) {
                for (out, v) in out.iter_mut().zip(&v[..h_d]) {
                    *out += weight * v;
                }
            }
        }
    }
}
