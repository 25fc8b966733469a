//! Matrix products with a 4-bit weight: `x Wᵀ`, and `x W` for its backward. The weight is frozen:
//! it gets no gradient, and between forward and backward nothing but its codes is kept.
//!
//! Source: QLoRA, <https://arxiv.org/abs/2305.14314>, equations 5 and 6; `MatMul4Bit` in
//! bitsandbytes.

mod cpu;
#[cfg(feature = "gpu")]
mod gpu;

use burn::backend::autodiff::checkpoint::{base::Checkpointer, strategy::CheckpointStrategy};
use burn::backend::autodiff::grads::Gradients;
use burn::backend::autodiff::ops::{Backward, Ops, OpsKind};
use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::module::AutodiffModule;
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorPrimitive};
use serde::{Deserialize, Serialize};

use crate::PackedWeight;

/// `x` `[n, in]` times `Wᵀ`: `[n, out]`.
pub fn matmul<B: QuantBackend>(x: Tensor<B, 2>, weight: &PackedWeight<B>) -> Tensor<B, 2> {
    let x = x.into_primitive().tensor();
    let y = B::quant_matmul(x, weight, Side::Transposed);
    Tensor::from_primitive(TensorPrimitive::Float(y))
}

/// Which way round the weight `[out, in]` stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Side {
    /// `x` `[n, in]` times `Wᵀ` is `[n, out]`.
    Transposed,
    /// `x` `[n, out]` times `W` is `[n, in]`.
    Plain,
}

impl Side {
    /// The other one: the backward of each.
    pub fn other(self) -> Self {
        match self {
            Self::Transposed => Self::Plain,
            Self::Plain => Self::Transposed,
        }
    }

    /// Columns of `x` and of the product.
    pub fn columns(self, [out, r#in]: [usize; 2]) -> [usize; 2] {
        match self {
            Self::Transposed => [r#in, out],
            Self::Plain => [out, r#in],
        }
    }
}

/// A backend that multiplies with 4-bit weights.
pub trait QuantBackend: Backend {
    /// `x` times the weight, see [`Side`].
    fn quant_matmul(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        reference::<Self>(x, weight, side)
    }
}

/// [`QuantBackend::quant_matmul`] in plain tensor operations.
pub fn reference<B: Backend>(
    x: FloatTensor<B>,
    weight: &PackedWeight<B>,
    side: Side,
) -> FloatTensor<B> {
    let x = Tensor::<B, 2>::from_primitive(TensorPrimitive::Float(x));
    let weight = weight.dequantize().cast(x.dtype()); // [out, in]
    let y = x.matmul(match side {
        Side::Transposed => weight.transpose(),
        Side::Plain => weight,
    });
    y.into_primitive().tensor()
}

impl QuantBackend for Flex {
    fn quant_matmul(x: FlexTensor, weight: &PackedWeight<Flex>, side: Side) -> FlexTensor {
        if x.dtype() != DType::F32 {
            return reference::<Flex>(x, weight, side);
        }
        cpu::matmul(x, weight, side)
    }
}

#[derive(Debug)]
struct QuantMatmulBackward;

impl<B: QuantBackend> Backward<B, 1> for QuantMatmulBackward {
    type State = (PackedWeight<B>, Side);

    fn backward(self, ops: Ops<Self::State, 1>, grads: &mut Gradients, _: &mut Checkpointer) {
        let (weight, side) = ops.state;
        let dy = grads.consume::<B>(&ops.node);
        if let [Some(node)] = ops.parents {
            grads.register::<B>(node.id, B::quant_matmul(dy, &weight, side.other()));
        }
    }
}

impl<B: QuantBackend, C: CheckpointStrategy> QuantBackend for Autodiff<B, C> {
    fn quant_matmul(
        x: FloatTensor<Self>,
        weight: &PackedWeight<Self>,
        side: Side,
    ) -> FloatTensor<Self> {
        let weight = weight.valid();
        let y = B::quant_matmul(x.primitive, &weight, side);
        match QuantMatmulBackward
            .prepare::<C>([x.node])
            .compute_bound()
            .stateful()
        {
            OpsKind::Tracked(prep) => prep.finish((weight, side), y),
            OpsKind::UnTracked(prep) => prep.finish(y),
        }
    }
}

#[cfg(test)]
mod tests {
    use burn::tensor::TensorData;

    use super::*;
    use crate::{Format, Precision, Quantized, Scheme, quantize};

    type Train = Autodiff<Flex>;

    /// Numbers between -1 and 1 without a pattern.
    fn noise(len: usize, seed: u32) -> Vec<f32> {
        let one = |i: u32| {
            let hash = (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761);
            (hash ^ hash >> 15).wrapping_mul(0x85eb_ca6b) as f32 / 2_147_483_648.0 - 1.0
        };
        (0..len as u32).map(one).collect()
    }

    type Case = (Format, usize, bool, Precision);

    fn on_host(
        shape: [usize; 2],
        (format, block_size, double_quant, precision): Case,
    ) -> Quantized {
        let dense = noise(shape[0] * shape[1], 1);
        let scheme = Scheme::new(format, block_size, double_quant);
        let weight = quantize(&dense, shape, scheme).unwrap();
        weight.with_precision(precision)
    }

    fn weight<B: Backend>(shape: [usize; 2], case: Case) -> PackedWeight<B> {
        PackedWeight::new(on_host(shape, case), &Default::default())
    }

    fn matrix<B: Backend>(shape: [usize; 2], seed: u32) -> Tensor<B, 2> {
        let data = TensorData::new(noise(shape[0] * shape[1], seed), shape);
        Tensor::from_data(data, &Default::default())
    }

    const SCHEMES: [Case; 5] = [
        (Format::Nf4, 64, false, Precision::F32),
        (Format::Nf4, 64, true, Precision::Bf16),
        (Format::Fp4, 32, false, Precision::F16),
        (Format::Nf4, 4096, true, Precision::F32),
        (Format::Nf4, 32, false, Precision::Bf16),
    ];

    /// Even and odd widths, blocks across rows, several tiles, one token and many.
    const CASES: [(usize, [usize; 2]); 7] = [
        (5, [96, 64]),
        (1, [130, 100]),
        (3, [33, 51]),
        (2, [1, 7]),
        (1, [700, 576]),
        (17, [1100, 1030]),
        (1, [3, 5000]),
    ];

    /// Largest distance, as a share of the largest element.
    fn off(found: TensorData, expected: TensorData) -> f32 {
        assert_eq!(found.shape, expected.shape);
        let pairs = found.iter::<f32>().zip(expected.iter::<f32>());
        let largest = expected.iter::<f32>().fold(0.0, |m: f32, x| m.max(x.abs()));
        pairs.fold(0.0, |m: f32, (a, b)| m.max((a - b).abs())) / largest
    }

    #[test]
    fn plain_operations_decode_to_the_bits_of_the_host() {
        for scheme in SCHEMES {
            for (_, shape) in CASES {
                let host = on_host(shape, scheme);
                let expected: Vec<u32> = host.dequantize().iter().map(|x| x.to_bits()).collect();
                let found = weight::<Flex>(shape, scheme).dequantize().into_data();
                let found: Vec<u32> = found.iter::<f32>().map(f32::to_bits).collect();
                assert!(found == expected, "{scheme:?} {shape:?}");
            }
        }
    }

    #[test]
    fn the_kernel_equals_the_reference() {
        for scheme in SCHEMES {
            for (n, shape) in CASES {
                let weight = weight::<Flex>(shape, scheme);
                for side in [Side::Transposed, Side::Plain] {
                    let [columns, _] = side.columns(shape);
                    let x = || matrix::<Flex>([n, columns], 2).into_primitive().tensor();
                    let found = Flex::quant_matmul(x(), &weight, side);
                    let expected = reference::<Flex>(x(), &weight, side);
                    let off = off(found.into_data(), expected.into_data());
                    assert!(
                        off < 3e-6,
                        "{scheme:?} {n} {shape:?} {side:?}: off by {off}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_part_of_a_longer_matrix_is_its_own_elements() {
        let weight = weight::<Flex>([24, 64], SCHEMES[0]);
        let x = matrix::<Flex>([9, 64], 3);
        let whole = matmul(x.clone(), &weight).narrow(0, 4, 3).into_data();
        let part = matmul(x.clone().narrow(0, 4, 3), &weight).into_data();
        assert!(off(part, whole) < 1e-6);
        let turned = matrix::<Flex>([64, 9], 3).transpose();
        let expected = turned.clone().matmul(weight.dequantize().transpose());
        assert!(off(matmul(turned, &weight).into_data(), expected.into_data()) < 3e-6);
    }

    #[test]
    fn the_gradient_is_that_of_the_dense_weight() {
        for scheme in SCHEMES {
            let weight = weight::<Train>([48, 80], scheme);
            let dy = matrix::<Train>([6, 48], 5);
            let run = |f: &dyn Fn(Tensor<Train, 2>) -> Tensor<Train, 2>| {
                let x = matrix::<Train>([6, 80], 4).require_grad();
                let y = f(x.clone());
                let grads = (y.clone() * dy.clone()).sum().backward();
                (y.into_data(), x.grad(&grads).unwrap().into_data())
            };
            let dense = weight.dequantize().transpose();
            let (y, dx) = run(&|x| matmul(x, &weight));
            let (expected_y, expected_dx) = run(&|x| x.matmul(dense.clone()));
            assert!(off(y, expected_y) < 3e-6);
            assert!(off(dx, expected_dx) < 3e-6);
        }
    }

    #[test]
    fn results_repeat_bit_by_bit() {
        let weight = weight::<Flex>([700, 576], SCHEMES[1]);
        for n in [1, 40] {
            let run = || matmul(matrix::<Flex>([n, 576], 6), &weight).into_data();
            assert_eq!(run(), run());
        }
    }

    #[test]
    fn no_rows_give_no_rows() {
        let weight = weight::<Flex>([24, 64], SCHEMES[0]);
        let y = matmul(
            Tensor::<Flex, 2>::zeros([0, 64], &Default::default()),
            &weight,
        );
        assert_eq!(y.dims(), [0, 24]);
    }
}
