//! Decompositions of a weight for LoRA to start from: its largest singular values with their
//! vectors, and its first columns made orthonormal.
//!
//! Products with the weight are computed where it lies, in f32; all that is small, on the host in
//! f64. Vectors are rows.
//!
//! Source: Musco, Musco: Randomized block Krylov methods (<https://arxiv.org/abs/1504.05477>);
//! Golub, Van Loan: Matrix computations, 8.3 (the symmetric QR algorithm).

use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::load::normal;
use rayon::prelude::*;

/// Vectors beyond those that are asked for, which let these converge sooner.
const OVERSAMPLING: usize = 8;
/// How far `W v` may be from `σ u`, as a share of the largest `σ`: what products in f32 leave.
const TOLERANCE: f64 = 1e-5;

/// Singular values, the largest first, with their vectors.
pub(super) struct Triplets {
    /// `[k]`.
    pub values: Vec<f64>,
    /// `[k, out]`.
    pub left: Vec<Vec<f64>>,
    /// `[k, in]`.
    pub right: Vec<Vec<f64>>,
}

/// The `rank` largest singular values of `w` `[out, in]`, or all if there are fewer. With `passes`,
/// that many products with `W Wᵀ` are enough; without, as many as they take to converge.
pub(super) fn leading<B: Backend>(
    w: &Tensor<B, 2>,
    rank: usize,
    passes: Option<usize>,
) -> Triplets {
    let [out, r#in] = w.dims();
    let most = out.min(r#in);
    let rank = rank.min(most);
    let width = (rank + OVERSAMPLING).min(most);
    let start = normal(0, "singular vectors", width * r#in, 1.0);
    let start = Tensor::from_data(TensorData::new(start, [width, r#in]), &w.device());
    let mut space = Space {
        basis: Vec::new(),
        images: Vec::new(),
        rank,
    };
    let mut next = rows(start.matmul(w.clone().transpose())); // in the range of `w`
    for pass in 0.. {
        let added = extend(&mut space.basis, next, most);
        let new = &space.basis[space.basis.len() - added..];
        let is_last = added == 0 || space.basis.len() == most || passes == Some(pass);
        if added > 0 {
            space
                .images
                .extend(rows(tensor(new, &w.device()).matmul(w.clone())));
        }
        if is_last || passes.is_none() {
            let found = space.triplets();
            if is_last || found.error(w) < TOLERANCE {
                return found;
            }
        }
        let new = tensor(&space.images[space.images.len() - added..], &w.device());
        next = rows(new.matmul(w.clone().transpose()));
    }
    unreachable!("the basis is complete at some time")
}

/// An orthonormal basis `[k, out]` of the directions seen so far, and its products with the matrix,
/// `[k, in]`.
struct Space {
    basis: Vec<Vec<f64>>,
    images: Vec<Vec<f64>>,
    rank: usize,
}

impl Space {
    /// The best triplets in this space: those of its `[k, in]` images.
    fn triplets(&self) -> Triplets {
        let k = self.images.len();
        let products = |i: usize| {
            self.images
                .iter()
                .map(move |image| dot(&self.images[i], image))
        };
        let gram: Vec<Vec<f64>> = (0..k)
            .into_par_iter()
            .map(|i| products(i).collect())
            .collect();
        let (squares, vectors) = symmetric_eigen(gram);
        let mut order: Vec<usize> = (0..k).collect();
        order.sort_by(|a, b| squares[*b].total_cmp(&squares[*a]));
        order.truncate(self.rank);
        let values: Vec<f64> = order.iter().map(|i| squares[*i].max(0.0).sqrt()).collect();
        let mix = |rows: &[Vec<f64>], by: &[f64], scale: f64| {
            let mut sum = vec![0.0; rows.first().map_or(0, Vec::len)];
            for (row, factor) in rows.iter().zip(by) {
                add(&mut sum, row, factor * scale);
            }
            sum
        };
        let pairs = || order.par_iter().zip(&values);
        let inverse = |value: f64| if value > 0.0 { 1.0 / value } else { 0.0 };
        Triplets {
            left: pairs()
                .map(|(i, _)| mix(&self.basis, &vectors[*i], 1.0))
                .collect(),
            right: pairs()
                .map(|(i, value)| mix(&self.images, &vectors[*i], inverse(*value)))
                .collect(),
            values,
        }
    }
}

impl Triplets {
    /// The largest `‖W v - σ u‖`, as a share of the largest `σ`.
    fn error<B: Backend>(&self, w: &Tensor<B, 2>) -> f64 {
        let products = rows(tensor(&self.right, &w.device()).matmul(w.clone().transpose()));
        let triplets = products.into_iter().zip(&self.left).zip(&self.values);
        let errors = triplets.map(|((mut product, left), value)| {
            add(&mut product, left, -value);
            dot(&product, &product).sqrt()
        });
        errors.fold(0.0, f64::max)
            / self
                .values
                .first()
                .map_or(1.0, |s| s.max(f64::MIN_POSITIVE))
    }
}

/// The first `rank` columns of `w` `[out, in]` made orthonormal, as rows `[rank, out]`, and their
/// products with `w`, `[rank, in]`: the leading parts of its QR decomposition.
pub(super) fn first_columns<B: Backend>(
    w: &Tensor<B, 2>,
    rank: usize,
) -> (Vec<Vec<f64>>, Vec<Vec<f64>>) {
    let [out, r#in] = w.dims();
    let rank = rank.min(out).min(r#in);
    let mut basis = Vec::new();
    extend(
        &mut basis,
        rows(w.clone().narrow(1, 0, rank).transpose()),
        rank,
    );
    let products = rows(tensor(&basis, &w.device()).matmul(w.clone()));
    (basis, products)
}

/// Adds vectors to an orthonormal basis of at most `most`, made orthonormal to it; those that it
/// spans already are left out. Gives how many were added.
pub(super) fn extend(basis: &mut Vec<Vec<f64>>, vectors: Vec<Vec<f64>>, most: usize) -> usize {
    let before = basis.len();
    for mut vector in vectors.into_iter().take(most - before) {
        let length = dot(&vector, &vector).sqrt();
        for _ in 0..2 {
            // once leaves rounding errors of what is large
            let parts: Vec<f64> = basis.par_iter().map(|one| dot(one, &vector)).collect();
            for (one, part) in basis.iter().zip(parts) {
                add(&mut vector, one, -part);
            }
        }
        let left = dot(&vector, &vector).sqrt();
        if left > 1e-10 * length {
            vector.iter_mut().for_each(|x| *x /= left);
            basis.push(vector);
        }
    }
    basis.len() - before
}

/// Eigenvalues of a symmetric matrix, and its eigenvectors as rows, in no order.
fn symmetric_eigen(mut a: Vec<Vec<f64>>) -> (Vec<f64>, Vec<Vec<f64>>) {
    let n = a.len();
    let unit = |i: usize| (0..n).map(|j| f64::from(u8::from(i == j))).collect();
    let mut vectors: Vec<Vec<f64>> = (0..n).map(unit).collect();
    tridiagonalise(&mut a, &mut vectors);
    let mut diagonal: Vec<f64> = (0..n).map(|i| a[i][i]).collect();
    let mut beside: Vec<f64> = (1..n).map(|i| a[i][i - 1]).collect();
    let mut end = n.saturating_sub(1);
    while end > 0 {
        let is_zero = |i: usize| {
            beside[i].abs() <= f64::EPSILON * (diagonal[i].abs() + diagonal[i + 1].abs())
        };
        if is_zero(end - 1) {
            end -= 1;
            continue;
        }
        let start = (0..end - 1)
            .rev()
            .find(|i| is_zero(*i))
            .map_or(0, |i| i + 1);
        qr_step(&mut diagonal, &mut beside, start, end, &mut vectors);
    }
    (diagonal, vectors)
}

/// Mirrors a symmetric matrix to a tridiagonal one, and the rows of `vectors` with it.
fn tridiagonalise(a: &mut [Vec<f64>], vectors: &mut [Vec<f64>]) {
    let n = a.len();
    for column in 0..n.saturating_sub(2) {
        let mut mirror: Vec<f64> = (column + 1..n).map(|row| a[row][column]).collect();
        let length = dot(&mirror, &mirror).sqrt();
        mirror[0] += length.copysign(mirror[0]);
        let length = dot(&mirror, &mirror).sqrt();
        if length == 0.0 {
            continue;
        }
        mirror.iter_mut().for_each(|x| *x /= length);
        let mirror: Vec<f64> = std::iter::repeat_n(0.0, column + 1).chain(mirror).collect();
        // (1 - 2 m mᵀ) A (1 - 2 m mᵀ) = A - 2 m qᵀ - 2 q mᵀ with q = A m - (mᵀ A m) m
        let mut q: Vec<f64> = a.par_iter().map(|row| dot(row, &mirror)).collect();
        let inner = dot(&q, &mirror);
        add(&mut q, &mirror, -inner);
        a.par_iter_mut().enumerate().for_each(|(i, row)| {
            add(row, &q, -2.0 * mirror[i]);
            add(row, &mirror, -2.0 * q[i]);
        });
        let mut parts = vec![0.0; n]; // of the mirror in the columns of `vectors`
        for (row, factor) in vectors.iter().zip(&mirror) {
            add(&mut parts, row, *factor);
        }
        for (row, factor) in vectors.iter_mut().zip(&mirror) {
            add(row, &parts, -2.0 * factor);
        }
    }
}

/// One step of the QR algorithm, with Wilkinson's shift, on the rows `start..=end` of a tridiagonal
/// matrix.
fn qr_step(
    diagonal: &mut [f64],
    beside: &mut [f64],
    start: usize,
    end: usize,
    vectors: &mut [Vec<f64>],
) {
    let half = (diagonal[end - 1] - diagonal[end]) / 2.0;
    let last = beside[end - 1];
    let shift = diagonal[end] - last * last / (half + half.hypot(last).copysign(half));
    let (mut x, mut z) = (diagonal[start] - shift, beside[start]);
    for k in start..end {
        let r = x.hypot(z);
        let (c, s) = if r > 0.0 { (x / r, z / r) } else { (1.0, 0.0) };
        if k > start {
            beside[k - 1] = r;
        }
        let (upper, lower, side) = (diagonal[k], diagonal[k + 1], beside[k]);
        diagonal[k] = c * c * upper + 2.0 * c * s * side + s * s * lower;
        diagonal[k + 1] = s * s * upper - 2.0 * c * s * side + c * c * lower;
        beside[k] = (c * c - s * s) * side + c * s * (lower - upper);
        if k + 1 < end {
            x = beside[k];
            z = s * beside[k + 1];
            beside[k + 1] *= c;
        }
        let (one, two) = vectors.split_at_mut(k + 1);
        for (a, b) in one[k].iter_mut().zip(&mut two[0]) {
            (*a, *b) = (c * *a + s * *b, c * *b - s * *a);
        }
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(sum: &mut [f64], row: &[f64], factor: f64) {
    sum.iter_mut()
        .zip(row)
        .for_each(|(sum, x)| *sum += factor * x);
}

fn tensor<B: Backend>(rows: &[Vec<f64>], device: &B::Device) -> Tensor<B, 2> {
    let shape = [rows.len(), rows.first().map_or(0, Vec::len)];
    let values: Vec<f32> = rows.iter().flatten().map(|x| *x as f32).collect();
    Tensor::from_data(TensorData::new(values, shape), device)
}

fn rows<B: Backend>(tensor: Tensor<B, 2>) -> Vec<Vec<f64>> {
    let [_, width] = tensor.dims();
    let values: Vec<f64> = tensor.into_data().iter::<f64>().collect();
    values.chunks(width).map(<[f64]>::to_vec).collect()
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;

    use super::*;

    fn noise(shape: [usize; 2]) -> Tensor<Flex, 2> {
        let values = normal(7, "w", shape[0] * shape[1], 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    /// The largest difference of the products of all pairs from those of orthonormal vectors.
    fn off_orthonormal(vectors: &[Vec<f64>]) -> f64 {
        let mut most = 0f64;
        for (i, a) in vectors.iter().enumerate() {
            for (j, b) in vectors.iter().enumerate() {
                let wanted = if i == j { 1.0 } else { 0.0 };
                most = most.max((dot(a, b) - wanted).abs());
            }
        }
        most
    }

    #[test]
    fn all_triplets_together_are_the_matrix() {
        for shape in [[30, 20], [20, 30], [5, 5], [1, 9]] {
            let w = noise(shape);
            let found = leading(&w, 100, None);
            assert_eq!(found.values.len(), shape[0].min(shape[1]));
            assert!(found.values.is_sorted_by(|a, b| a >= b));
            assert!(off_orthonormal(&found.left) < 1e-6 && off_orthonormal(&found.right) < 1e-4);
            for (i, row) in rows(w).iter().enumerate() {
                let mut sum = vec![0.0; shape[1]];
                for ((value, left), right) in found.values.iter().zip(&found.left).zip(&found.right)
                {
                    add(&mut sum, right, value * left[i]);
                }
                let off = sum.iter().zip(row).map(|(a, b)| (a - b).abs());
                assert!(off.fold(0.0, f64::max) < 1e-5);
            }
        }
    }

    #[test]
    fn a_few_triplets_are_the_largest_of_all() {
        let w = noise([90, 140]);
        let all = leading(&w, 90, None);
        let few = leading(&w, 6, None);
        for i in 0..6 {
            assert!((few.values[i] / all.values[i] - 1.0).abs() < 1e-5);
            let same = dot(&few.left[i], &all.left[i]).abs();
            assert!((same - 1.0).abs() < 1e-3, "{i}: {same}");
        }
        let quick = leading(&w, 6, Some(4));
        assert!((quick.values[0] / all.values[0] - 1.0).abs() < 1e-3);
    }

    #[test]
    fn first_columns_are_spanned_and_orthonormal() {
        let w = noise([12, 9]);
        let (columns, products) = first_columns(&w, 4);
        assert!(off_orthonormal(&columns) < 1e-12);
        let column = rows(w.transpose()).swap_remove(3);
        let mut sum = vec![0.0; 12];
        for (one, product) in columns.iter().zip(&products) {
            add(&mut sum, one, product[3]);
        }
        let off = sum.iter().zip(&column).map(|(a, b)| (a - b).abs());
        assert!(off.fold(0.0, f64::max) < 1e-5);
    }
}
