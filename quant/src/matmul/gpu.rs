//! The product on CubeCL's backends, bare and under Burn's fusion: one kernel decodes the weight
//! of this layer, and the matrix product that the backend tunes takes it; it is freed right after.

use std::marker::PhantomData;

use burn::tensor::ops::{FloatTensor, FloatTensorOps, IntTensor};
use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement, element::BoolElement};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, OperationOutput, TensorIr};
use cubecl::calculate_cube_count_elemwise;
use cubecl::prelude::*;

use super::{QuantBackend, Side};
use crate::Precision;
use crate::packed::{NestedAbsmax, PackedLayout, PackedWeight};

/// Decodes eight codes a unit: `values` `[len]` are `code_book[code] * absmax`, rounded.
#[cube(launch)]
fn dequantize<F: Float>(
    codes: &Array<u32>,
    absmax: &Array<f32>,
    code_book: &Array<f32>,
    values: &mut Array<F>,
    #[comptime] block_size: usize,
    #[comptime] precision: Precision,
    #[define(F)] _dtype: StorageType,
) {
    let word = ABSOLUTE_POS;
    if word < codes.len() {
        let bits = codes[word];
        #[unroll]
        for i in 0..8u32 {
            let at = word * 8 + i as usize;
            if at < values.len() {
                let shift = (i ^ 1u32) * 4u32; // the high nibble of a byte is the earlier code
                let code = (bits >> shift) & 15u32;
                let value = code_book[code as usize] * absmax[at / block_size];
                values[at] = F::cast_from(round(value, precision));
            }
        }
    }
}

/// [`Precision::round`] for finite numbers, by their bits: not every device has the types.
#[cube]
fn round(x: f32, #[comptime] precision: Precision) -> f32 {
    match comptime!(precision) {
        Precision::F32 => x,
        Precision::Bf16 => keep_bits(x, 16u32),
        Precision::F16 => {
            // Below f16's normal numbers its steps are those of f32 numbers from 0.5 to 1.
            let subnormal = (x + 0.75) - 0.75;
            select(f32::abs(x) < 6.103_515_6e-5, subnormal, keep_bits(x, 13u32))
        }
    }
}

/// `x` without its last `dropped` bits, rounded to nearest, the even one of two.
#[cube]
fn keep_bits(x: f32, #[comptime] dropped: u32) -> f32 {
    let bits = u32::reinterpret(x);
    let half = comptime!((1u32 << (dropped - 1)) - 1);
    let rounded = bits + half + ((bits >> dropped) & 1u32);
    f32::reinterpret((rounded >> dropped) << dropped)
}

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> QuantBackend
    for CubeBackend<R, F, I, BT>
{
    fn quant_matmul(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let PackedLayout {
            shape,
            scheme,
            precision,
        } = weight.layout;
        let float = |tensor: Tensor<Self, 1>| into_contiguous(tensor.into_primitive().tensor());
        let codes = into_contiguous(weight.codes.clone().into_primitive());
        let absmax = float(weight.block_absmax());
        let code_book = float(weight.code_book.clone());
        let (client, dtype) = (x.client.clone(), x.dtype);
        let shape = Shape::from(shape);
        let dense = empty_device_contiguous_dtype(client.clone(), x.device.clone(), shape, dtype);
        let num_values = weight.layout.num_values();
        assert!(
            u32::try_from(num_values).is_ok(),
            "the kernel counts in 32 bits"
        );
        let words = num_values.div_ceil(8);
        let cube = CubeDim::new(&client, words);
        dequantize::launch::<R>(
            &client,
            calculate_cube_count_elemwise(&client, words, cube),
            cube,
            codes.into_array_arg(),
            absmax.into_array_arg(),
            code_book.into_array_arg(),
            dense.clone().into_array_arg(),
            scheme.block_size,
            precision,
            dtype.into(),
        );
        match side {
            Side::Transposed => Self::float_matmul(x, Self::float_transpose(dense)),
            Side::Plain => Self::float_matmul(x, dense),
        }
    }
}

/// The product as an operation that fusion leaves alone.
#[derive(Debug)]
struct QuantMatmul<B> {
    /// Inputs `x`, `codes`, `absmax`, `code_book`, and of a nested absmax its codes and code book.
    desc: CustomOpIr,
    /// Of a nested absmax.
    offset: Option<f32>,
    layout: PackedLayout,
    side: Side,
    backend: PhantomData<B>,
}

impl<B: FusionBackend + QuantBackend> Operation<B::FusionRuntime> for QuantMatmul<B> {
    fn execute(
        &self,
        handles: &mut HandleContainer<<B::FusionRuntime as FusionRuntime>::FusionHandle>,
    ) {
        let [x, codes, absmax, code_book, nested @ ..] = self.desc.inputs.as_slice() else {
            unreachable!("made with at least four inputs");
        };
        let float =
            |tensor: FloatTensor<B>| Tensor::<B, 1>::from_primitive(TensorPrimitive::Float(tensor));
        let int = |tensor: IntTensor<B>| Tensor::from_primitive(tensor);
        let nested = match (nested, self.offset) {
            ([codes, code_book], Some(offset)) => Some(NestedAbsmax {
                codes: int(handles.get_int_tensor::<B>(codes)),
                code_book: float(handles.get_float_tensor::<B>(code_book)),
                offset,
            }),
            _ => None,
        };
        let weight = PackedWeight {
            codes: int(handles.get_int_tensor::<B>(codes)),
            absmax: float(handles.get_float_tensor::<B>(absmax)),
            code_book: float(handles.get_float_tensor::<B>(code_book)),
            nested,
            layout: self.layout,
        };
        let x = handles.get_float_tensor::<B>(x);
        let y = B::quant_matmul(x, &weight, self.side);
        handles.register_float_tensor::<B>(&self.desc.outputs[0].id, y);
    }
}

impl<B: FusionBackend + QuantBackend> QuantBackend for Fusion<B> {
    fn quant_matmul(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let (client, dtype) = (x.client.clone(), x.dtype);
        let [n, _] = x.shape.dims();
        let [_, columns] = side.columns(weight.layout.shape);
        let float = |tensor: &Tensor<Self, 1>| tensor.clone().into_primitive().tensor();
        let mut inputs = vec![
            x,
            weight.codes.clone().into_primitive(),
            float(&weight.absmax),
            float(&weight.code_book),
        ];
        if let Some(nested) = &weight.nested {
            inputs.push(nested.codes.clone().into_primitive());
            inputs.push(float(&nested.code_book));
        }
        let streams = OperationStreams::with_inputs(&inputs);
        let y = TensorIr::uninit(
            client.create_empty_handle(),
            Shape::from([n, columns]),
            dtype,
        );
        let inputs: Vec<TensorIr> = inputs.into_iter().map(|input| input.into_ir()).collect();
        let desc = CustomOpIr::new("quant_matmul", &inputs, &[y]);
        let operation = QuantMatmul::<B> {
            desc: desc.clone(),
            offset: weight.nested.as_ref().map(|nested| nested.offset),
            layout: weight.layout,
            side,
            backend: PhantomData,
        };
        client
            .register(streams, OperationIr::Custom(desc), operation)
            .output()
    }
}
