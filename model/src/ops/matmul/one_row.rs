//! One row times a transposed weight on Flex, what generating is made of: each row of the weight is
//! read once, by all cores, and no part of it is packed.

use std::ops::Range;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::DType;
use half::bf16;
use rayon::prelude::*;

use crate::ops::cpu::{self, vectorized};

/// Elements of the weight that a task reads at least: they take longer than waking a thread.
const TASK: usize = 1 << 15;

/// A weight `[n, k]` whose rows are `stride` apart.
#[derive(Clone, Copy)]
struct Weight<'a> {
    elements: Elements<'a>,
    stride: usize,
}

#[derive(Clone, Copy)]
enum Elements<'a> {
    F32(&'a [f32]),
    Bf16(&'a [bf16]),
}

/// `a` `[1, k]` times `b` `[k, n]`: `[1, n]`; nothing if they are not one row of `f32` and the
/// transpose of a weight whose rows are contiguous.
pub(super) fn product(a: &FlexTensor, b: &FlexTensor) -> Option<FlexTensor> {
    let weight = Weight::of(a, b)?;
    let [_, n] = cpu::dims(b);
    let mut y = vec![0.0; n];
    add_product(&mut y, a, weight);
    Some(cpu::from_vec(y, [1, n]))
}

/// Adds the product to `sum` `[1, n]`, in place where nobody else holds it; gives `sum` back if the
/// product is none for [`product`].
pub(super) fn add(
    sum: FlexTensor,
    a: &FlexTensor,
    b: &FlexTensor,
) -> Result<FlexTensor, FlexTensor> {
    match Weight::of(a, b) {
        Some(weight) if sum.dtype() == DType::F32 => {
            let [_, n] = cpu::dims(b);
            let [sum] = cpu::update([sum], [n], |_, [sum]| add_product(sum, a, weight));
            Ok(sum)
        }
        _ => Err(sum),
    }
}

impl<'a> Weight<'a> {
    /// The weight that `b` is the transpose of.
    fn of(a: &FlexTensor, b: &'a FlexTensor) -> Option<Self> {
        let layout: &Layout = b.layout();
        let (&[1, k], &[from, n]) = (&a.layout().shape()[..], &layout.shape()[..]) else {
            return None;
        };
        assert_eq!(k, from, "columns of a row for a weight [{n}, {from}]");
        let is_row = a.dtype() == DType::F32 && a.is_contiguous();
        let stride = usize::try_from(layout.strides()[1]).ok()?;
        if !is_row || k * n == 0 || layout.strides()[0] != 1 || (stride < k && n > 1) {
            return None;
        }
        let all = layout.start_offset()..layout.start_offset() + (n - 1) * stride + k;
        Some(Self {
            elements: match b.dtype() {
                DType::F32 => Elements::F32(&b.storage()[all]),
                DType::BF16 => Elements::Bf16(&b.storage()[all]),
                _ => return None,
            },
            stride: stride.max(k),
        })
    }

    /// The elements of some rows.
    fn rows(&self, rows: Range<usize>, k: usize) -> Elements<'a> {
        let all = rows.start * self.stride..(rows.end - 1) * self.stride + k;
        match self.elements {
            Elements::F32(x) => Elements::F32(&x[all]),
            Elements::Bf16(x) => Elements::Bf16(&x[all]),
        }
    }
}

fn add_product(y: &mut [f32], x: &FlexTensor, weight: Weight) {
    let x = cpu::slice(x);
    let rows = TASK.div_ceil(x.len()); // of a task
    let task = |(task, y): (usize, &mut [f32])| {
        let start = task * rows;
        match weight.rows(start..start + y.len(), x.len()) {
            Elements::F32(w) => add_f32(y, x, w, weight.stride),
            Elements::Bf16(w) => add_bf16(y, x, w, weight.stride),
        }
    };
    match y.len() <= rows {
        true => task((0, y)), // no detour through the thread pool
        false => y.par_chunks_mut(rows).enumerate().for_each(task),
    }
}

vectorized! {
    fn add_f32(y: &mut [f32], x: &[f32], weight: &[f32], stride: usize) {
        add_scalar_products(y, x, weight, stride, |w| w);
    }
}

vectorized! {
    fn add_bf16(y: &mut [f32], x: &[f32], weight: &[bf16], stride: usize) {
        // what `bf16::to_f32` gives for all but some NaNs, in one instruction
        let widen = |w: bf16| f32::from_bits(u32::from(w.to_bits()) << 16);
        add_scalar_products(y, x, weight, stride, widen);
    }
}

/// Lanes of a sum, and chains of them: additions that do not wait for each other.
const LANES: usize = 16;
const CHAINS: usize = 4;

/// One row after the other: memory is fastest read in the order it lies in.
#[inline(always)]
fn add_scalar_products<T: Copy>(
    y: &mut [f32],
    x: &[f32],
    weight: &[T],
    stride: usize,
    widen: impl Fn(T) -> f32 + Copy,
) {
    for (i, y) in y.iter_mut().enumerate() {
        *y += scalar_product(x, &weight[i * stride..][..x.len()], widen);
    }
}

#[inline(always)]
fn scalar_product<T: Copy>(x: &[f32], row: &[T], widen: impl Fn(T) -> f32 + Copy) -> f32 {
    let add = |sums: &mut [f32; LANES], x: &[f32], row: &[T]| {
        for ((sum, x), w) in sums.iter_mut().zip(x).zip(row) {
            *sum += x * widen(*w);
        }
    };
    let mut sums = [[0.0; LANES]; CHAINS];
    let (x, x_end) = x.as_chunks::<{ CHAINS * LANES }>();
    let (row, row_end) = row.as_chunks::<{ CHAINS * LANES }>();
    for (x, row) in x.iter().zip(row) {
        for (i, sums) in sums.iter_mut().enumerate() {
            add(sums, &x[i * LANES..][..LANES], &row[i * LANES..][..LANES]);
        }
    }
    let (x, x_end) = x_end.as_chunks::<LANES>();
    let (row, row_end) = row_end.as_chunks::<LANES>();
    for (x, row) in x.iter().zip(row) {
        add(&mut sums[0], x, row);
    }
    add(&mut sums[1], x_end, row_end);
    let [a, b, c, d] = sums;
    let lanes = std::array::from_fn(|i| (a[i] + b[i]) + (c[i] + d[i]));
    cpu::fold(lanes, |a, b| a + b)
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::FloatDType;
    use burn::tensor::ops::FloatTensorOps;

    use super::*;
    use crate::ops::test::{assert_near, noise, values};

    const SIZES: [[usize; 2]; 6] = [
        [1, 1],
        [3, 7],
        [16, 33],
        [576, 192],
        [31, 2100],
        [700, 1001],
    ];

    /// A row, and a transposed weight `[n, k]`.
    fn operands([k, n]: [usize; 2]) -> [FlexTensor; 2] {
        [noise([1, k], 1.0, 1), noise([n, k], 1.0, 2).transpose(0, 1)]
    }

    fn halved(x: &FlexTensor) -> FlexTensor {
        Flex::float_cast(x.clone(), FloatDType::BF16)
    }

    #[test]
    fn the_kernel_equals_burns_product() {
        for size in SIZES {
            let [a, b] = operands(size);
            let expected = Flex::float_matmul(a.clone(), b.clone());
            let found = product(&a, &b).unwrap();
            assert_near(&found, &expected, 2e-6, &format!("{size:?}"));
        }
    }

    #[test]
    fn sixteen_bits_give_the_bits_of_the_same_numbers_in_32() {
        for size in SIZES {
            let [a, b] = operands(size);
            let narrow = halved(&b.transpose(0, 1)).transpose(0, 1);
            let wide = Flex::float_cast(narrow.clone(), FloatDType::F32);
            let wide = wide.transpose(0, 1).to_contiguous().transpose(0, 1);
            let [found, expected] = [&narrow, &wide].map(|b| values(&product(&a, b).unwrap()));
            assert_eq!(found, expected, "{size:?}");
        }
    }

    #[test]
    fn a_part_of_a_longer_weight_is_its_own_elements() {
        let [a, _] = operands([40, 1]);
        let whole = noise([9, 60], 1.0, 2);
        let part = whole.narrow(1, 11, 40).narrow(0, 2, 6).transpose(0, 1);
        let expected = Flex::float_matmul(a.clone(), part.to_contiguous());
        assert_near(&product(&a, &part).unwrap(), &expected, 2e-6, "a part");
    }

    #[test]
    fn other_operands_are_left_to_others() {
        let [a, b] = operands([24, 40]);
        let sum = noise([1, 40], 1.0, 3);
        assert!(product(&a, &b.to_contiguous()).is_none(), "not transposed");
        assert!(product(&noise([2, 24], 1.0, 1), &b).is_none(), "two rows");
        assert!(product(&halved(&a), &b).is_none(), "a row of 16 bits");
        assert!(add(halved(&sum), &a, &b).is_err(), "a sum of 16 bits");
    }

    #[test]
    fn the_product_is_added_to_a_sum() {
        for size in SIZES {
            let [a, b] = operands(size);
            let sum = noise([1, size[1]], 1.0, 3);
            let product = Flex::float_matmul(a.clone(), b.clone());
            let expected = Flex::float_add(sum.clone(), product);
            let found = add(sum, &a, &b).unwrap();
            assert_near(&found, &expected, 2e-6, &format!("{size:?}"));
        }
    }
}
