//! The product under Burn's fusion.

use std::marker::PhantomData;

use burn::tensor::ops::{FloatTensor, IntTensor};
use burn::tensor::{Shape, Tensor, TensorPrimitive};
use burn_fusion::stream::{Operation, OperationStreams};
use burn_fusion::{Fusion, FusionBackend, FusionRuntime};
use burn_ir::{CustomOpIr, HandleContainer, OperationIr, OperationOutput, TensorIr};

use super::super::{QuantBackend, Side};
use crate::packed::{NestedAbsmax, PackedLayout, PackedWeight};

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
