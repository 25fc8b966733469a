//! A linear layer with a 4-bit weight.

use burn::module::Module;
use burn::tensor::{DType, Tensor, TensorPrimitive, backend::Backend};

use crate::{PackedWeight, QuantBackend, Side, matmul};

/// `y = x Wᵀ + b`, where `W` is in 4 bits and stays so.
#[derive(Module, Debug)]
pub struct QuantLinear<B: Backend> {
    /// `[out, in]`.
    pub weight: PackedWeight<B>,
    /// `[out]`, not quantised.
    pub bias: Option<Tensor<B, 1>>,
    /// What the products are computed in; `x` and `y` are f32.
    #[module(skip)]
    pub dtype: DType,
}

impl<B: QuantBackend> QuantLinear<B> {
    /// `x` `[n, in]` to `[n, out]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let y = matmul(x.cast(self.dtype), &self.weight).cast(DType::F32);
        match &self.bias {
            Some(bias) => y + bias.clone().unsqueeze(),
            None => y,
        }
    }

    /// The gradient `[n, in]` of the input from that of the output, `dy` `[n, out]`: `dy W`.
    pub fn input_gradient(&self, dy: Tensor<B, 2>) -> Tensor<B, 2> {
        let dy = dy.cast(self.dtype).into_primitive().tensor();
        let dx = B::quant_matmul(dy, &self.weight, Side::Plain);
        let dx = Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(dx));
        dx.cast(DType::F32)
    }
}
