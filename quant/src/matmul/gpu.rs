//! The product on CubeCL's backends, bare and under Burn's fusion. For one row, codes and `x` meet in
//! registers. For more there are two ways, and each device takes the one that is faster there: a
//! kernel that decodes tiles of the weight as it multiplies them ([`tiled`]), or one that decodes the
//! weight of this layer for the matrix product that the backend tunes ([`decoded`]); it is freed right
//! after.

mod fusion;
mod kernels;
mod tune;

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
use kernels::{AbsmaxArgs, CODES, ROW_UNITS, TILE, TILE_UNITS, WeightLaunch};

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> QuantBackend
    for CubeBackend<R, F, I, BT>
{
    fn quant_matmul(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let [n, _] = x.meta.shape().dims();
        let [_, r#in] = weight.layout.shape;
        match (n, side) {
            (1, Side::Transposed) => one_row(x, weight),
            _ if r#in % CODES != 0 => decoded(x, weight, side), // words across rows
            _ => tune::faster(x, weight, side),
        }
    }
}

/// The product by way of the dense weight, or of as many of its rows as a buffer holds.
fn decoded<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    weight: &PackedWeight<CubeBackend<R, F, I, BT>>,
    side: Side,
) -> CubeTensor<R> {
    let floats = floats::<CubeBackend<R, F, I, BT>>;
    let [out, _] = weight.layout.shape;
    let rows = rows_at_once(weight.layout.shape, &x);
    let parts = (0..out).step_by(rows);
    let parts = parts.map(|first| {
        let rows = first..out.min(first + rows);
        let dense = floats(dense(&x, weight, rows.clone())); // [rows, in]
        let x = floats(x.clone());
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

/// The product by tiles, with no dense weight at all; rows of the weight are whole words.
fn tiled<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement>(
    x: CubeTensor<R>,
    weight: &PackedWeight<CubeBackend<R, F, I, BT>>,
    side: Side,
) -> CubeTensor<R> {
    let [n, _] = x.meta.shape().dims();
    let [depth, columns] = side.columns(weight.layout.shape);
    assert!(
        u32::try_from(depth * columns).is_ok(),
        "the kernel counts in 32 bits"
    );
    let x = into_contiguous(x);
    let y = empty(&x, [n, columns]);
    let tiles = |count: usize| count.div_ceil(TILE) as u32;
    kernels::tiled::launch::<R>(
        &x.client,
        CubeCount::Static(tiles(columns), tiles(n), 1),
        CubeDim::new_1d(TILE_UNITS as u32),
        x.clone().into_array_arg(),
        arguments(weight),
        y.clone().into_array_arg(),
        depth as u32,
        columns as u32,
        side,
        x.dtype.into(),
    );
    y
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

#[cfg(all(test, feature = "wgpu"))]
mod tests {
    use burn::backend::wgpu::WgpuRuntime;
    use burn::tensor::TensorData;

    use super::*;
    use crate::{Format, Precision, Scheme, quantize};

    type B = CubeBackend<WgpuRuntime, f32, i32, u32>;

    /// Whichever the device takes, both ways are right: several tiles and a part of one, blocks
    /// longer than rows, each kind of absmax.
    #[test]
    fn both_ways_to_multiply_agree_on_this_device() {
        let device = Default::default();
        let matrix = |[rows, columns]: [usize; 2]| {
            let values = (0..rows * columns)
                .map(|i| (i as f32 * 0.37).sin())
                .collect();
            let data = TensorData::new(values, [rows, columns]);
            Tensor::<B, 2>::from_data(data, &device)
                .into_primitive()
                .tensor()
        };
        for (n, shape, format, block_size, double_quant, precision) in [
            (2, [40, 64], Format::Nf4, 64, false, Precision::F32),
            (70, [130, 200], Format::Fp4, 128, true, Precision::Bf16),
            (129, [64, 72], Format::Nf4, 4096, true, Precision::F16),
        ] {
            let values: Vec<f32> = (0..shape[0] * shape[1]).map(|i| (i as f32).cos()).collect();
            let weight = quantize(
                &values,
                shape,
                Scheme::new(format, block_size, double_quant),
            );
            let weight = weight.expect("finite").with_precision(precision);
            let weight = PackedWeight::<B>::new(weight, &device);
            for side in [Side::Transposed, Side::Plain] {
                let x = || matrix([n, side.columns(shape)[0]]);
                let found = floats::<B>(tiled(x(), &weight, side)).into_data();
                let expected = floats::<B>(decoded(x(), &weight, side)).into_data();
                assert_eq!(found.shape, expected.shape);
                let largest = expected.iter::<f32>().fold(0.0, |m: f32, x| m.max(x.abs()));
                let pairs = found.iter::<f32>().zip(expected.iter::<f32>());
                let off = pairs.fold(0.0, |m: f32, (a, b)| m.max((a - b).abs())) / largest;
                assert!(off < 3e-6, "{n} {shape:?} {side:?}: off by {off}");
            }
        }
    }
}
