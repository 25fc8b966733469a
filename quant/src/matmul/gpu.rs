//! The product on CubeCL's backends, bare and under Burn's fusion. For one row, codes and `x` meet in
//! registers; for more, one kernel decodes the weight of this layer and the matrix product that the
//! backend tunes takes it; it is freed right after.

mod fusion;
mod kernels;

use std::ops::Range;

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement, element::BoolElement};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::{QuantBackend, Side};
use crate::packed::PackedWeight;
use kernels::{AbsmaxArgs, CODES, ROW_UNITS, WeightLaunch};

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> QuantBackend
    for CubeBackend<R, F, I, BT>
{
    fn quant_matmul(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let [n, _] = x.meta.shape().dims();
        if (n, side) == (1, Side::Transposed) {
            return one_row(x, weight);
        }
        let [out, _] = weight.layout.shape;
        let rows = rows_at_once(weight.layout.shape, &x);
        let parts = (0..out).step_by(rows);
        let parts = parts.map(|first| {
            let rows = first..out.min(first + rows);
            let dense = floats::<Self>(dense(&x, weight, rows.clone())); // [rows, in]
            let x = floats::<Self>(x.clone());
            match side {
                Side::Transposed => x.matmul(dense.transpose()), // [n, rows]
                Side::Plain if rows.len() == out => x.matmul(dense),
                Side::Plain => x.narrow(1, rows.start, rows.len()).matmul(dense), // [n, in]
            }
        });
        let y = match side {
            Side::Transposed => Tensor::cat(parts.collect(), 1),
            Side::Plain => parts.reduce(|sum, part| sum + part).expect("rows"),
        };
        y.into_primitive().tensor()
    }
}

/// Rows of a weight that are dense at a time: all of them, unless that is more than one buffer of
/// the device may hold. They are whole words.
fn rows_at_once<R: CubeRuntime>([out, r#in]: [usize; 2], like: &CubeTensor<R>) -> usize {
    let largest = like.client.properties().memory.max_page_size;
    let rows = largest as usize / (r#in * like.dtype.size());
    match rows >= out {
        true => out.max(1),
        false => (rows / CODES * CODES).max(CODES),
    }
}

fn floats<B: Backend>(tensor: FloatTensor<B>) -> Tensor<B, 2> {
    Tensor::from_primitive(TensorPrimitive::Float(tensor))
}

/// `x` `[1, in]` times `Wᵀ` is `[1, out]`: reads each code once and writes no value.
fn one_row<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    weight: &PackedWeight<CubeBackend<R, F, I, BT>>,
) -> CubeTensor<R> {
    let [out, _] = weight.layout.shape;
    let x = into_contiguous(x);
    let y = empty(&x, [1, out]);
    let cube = CubeDim::new_1d(ROW_UNITS as u32); // one a row
    kernels::one_row::launch::<R>(
        &x.client,
        calculate_cube_count_elemwise(&x.client, out * ROW_UNITS, cube),
        cube,
        x.clone().into_array_arg(),
        arguments(weight),
        y.clone().into_array_arg(),
        x.dtype.into(),
    );
    y
}

/// Some rows of the dense weight, `[rows, in]`, in the type of `like` and on its device.
fn dense<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    like: &CubeTensor<R>,
    weight: &PackedWeight<CubeBackend<R, F, I, BT>>,
    rows: Range<usize>,
) -> CubeTensor<R> {
    let [_, r#in] = weight.layout.shape;
    let words = (rows.len() * r#in).div_ceil(CODES);
    assert!(
        u32::try_from(rows.end * r#in).is_ok(),
        "the kernel counts in 32 bits"
    );
    let dense = empty(like, [rows.len(), r#in]);
    let cube = CubeDim::new(&like.client, words);
    kernels::dequantize::launch::<R>(
        &like.client,
        calculate_cube_count_elemwise(&like.client, words, cube),
        cube,
        arguments(weight),
        dense.clone().into_array_arg(),
        (rows.start * r#in / CODES) as u32,
        like.dtype.into(),
    );
    dense
}

/// A tensor that is yet to be written.
fn empty<R: CubeRuntime>(like: &CubeTensor<R>, shape: [usize; 2]) -> CubeTensor<R> {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from(shape), like.dtype)
}

/// A weight as the kernels take it.
fn arguments<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    weight: &PackedWeight<CubeBackend<R, F, I, BT>>,
) -> WeightLaunch<R> {
    let float = |tensor: &Tensor<CubeBackend<R, F, I, BT>, 1>| {
        into_contiguous(tensor.clone().into_primitive().tensor()).into_array_arg()
    };
    let int = |tensor: &Tensor<CubeBackend<R, F, I, BT>, 1, burn::tensor::Int>| {
        into_contiguous(tensor.clone().into_primitive()).into_array_arg()
    };
    let absmax = match &weight.nested {
        None => AbsmaxArgs::Plain(float(&weight.absmax)),
        Some(nested) => AbsmaxArgs::Nested {
            codes: int(&nested.codes),
            code_book: float(&nested.code_book),
            absmax: float(&weight.absmax),
            offset: nested.offset,
        },
    };
    WeightLaunch::new(
        int(&weight.codes),
        float(&weight.code_book),
        absmax,
        weight.layout.scheme.block_size,
        weight.layout.precision,
    )
}
