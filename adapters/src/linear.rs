//! The linear layer of an adapted model, and what it drops while it is trained.

#[cfg(feature = "gpu")]
mod gpu;

use burn::backend::autodiff::checkpoint::strategy::CheckpointStrategy;
use burn::backend::{Autodiff, Flex};
use burn::module::Module;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Int, Tensor, TensorData, TensorPrimitive, backend::Backend};
use model::linear::Projection;
use rayon::prelude::*;

use crate::base::{AdaptedBackend, BaseLinear};
use crate::methods::{Computes, Update};

/// A linear layer, with or without something that is trained beside it.
#[derive(Module, Debug)]
pub struct AdaptedLinear<B: Backend> {
    /// The layer of the base model.
    pub base: BaseLinear<B>,
    /// What is trained beside it.
    pub update: Option<Update<B>>,
}

impl<B: AdaptedBackend> Projection<B> for AdaptedLinear<B> {
    fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.update {
            None => self.base.forward(x),
            Some(update) => update.forward(x, &self.base),
        }
    }

    fn embed(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match &self.update {
            None => self.base.embed(ids),
            Some(update) => update.embed(ids, &self.base),
        }
    }
}

/// Which elements are dropped: a function of the seed, so that a block computed again drops the
/// same ones, and a resumed run goes on as the uninterrupted one would.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Dropout {
    /// Share of the elements that become zero.
    pub probability: f64,
    /// Decides which.
    pub seed: u64,
}

/// `x` `[n, d]` with the elements set to 0 that are dropped, and the others grown for it.
pub(crate) fn dropped<B: DropoutBackend>(
    x: Tensor<B, 2>,
    dropout: Option<Dropout>,
) -> Tensor<B, 2> {
    match dropout {
        Some(dropout) => {
            let mask = dropout.mask(x.dims(), &x.device());
            x * mask
        }
        None => x,
    }
}

/// A backend that knows what is dropped: the same on every one.
pub trait DropoutBackend: Backend {
    /// `[n, d]` of 0 and `1 / (1 - probability)`.
    fn dropout_mask(
        dropout: Dropout,
        shape: [usize; 2],
        device: &Self::Device,
    ) -> FloatTensor<Self> {
        let mask = TensorData::new(dropout.elements(shape), shape);
        let mask = Tensor::<Self, 2>::from_data(mask, device);
        mask.into_primitive().tensor()
    }
}

impl DropoutBackend for Flex {}

impl<B: DropoutBackend, C: CheckpointStrategy> DropoutBackend for Autodiff<B, C> {
    fn dropout_mask(
        dropout: Dropout,
        shape: [usize; 2],
        device: &Self::Device,
    ) -> FloatTensor<Self> {
        let mask = TensorPrimitive::Float(B::dropout_mask(dropout, shape, device));
        let mask = Tensor::<Self, 2>::from_inner(Tensor::from_primitive(mask));
        mask.into_primitive().tensor()
    }
}

impl Dropout {
    /// What stays of the others is grown by this.
    fn kept(&self) -> f32 {
        (1.0 / (1.0 - self.probability)) as f32
    }

    /// An element is dropped if the first half of its number is below this.
    fn threshold(&self) -> u32 {
        (self.probability * u32::MAX as f64) as u32
    }

    /// `[n, d]` of 0 and `1 / (1 - probability)`.
    pub(crate) fn mask<B: DropoutBackend>(
        self,
        shape: [usize; 2],
        device: &B::Device,
    ) -> Tensor<B, 2> {
        let mask = B::dropout_mask(self, shape, device);
        Tensor::from_primitive(TensorPrimitive::Float(mask))
    }

    /// The elements of a mask, made on the host: what kernels are held to.
    fn elements(&self, [n, d]: [usize; 2]) -> Vec<f32> {
        let (kept, threshold) = (self.kept(), self.threshold());
        let one = |i: usize| match (mix(self.seed.wrapping_add(i as u64)) >> 32) as u32 {
            bits if bits < threshold => 0.0,
            _ => kept,
        };
        (0..n * d)
            .into_par_iter()
            .with_min_len(1 << 14)
            .map(one)
            .collect()
    }
}

/// The output function of SplitMix64 (Steele, Lea, Flood: Fast splittable pseudorandom number
/// generators, 2014): neighbouring numbers become independent-looking ones.
pub(crate) fn mix(x: u64) -> u64 {
    let x = x.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mask_drops_its_share_and_keeps_the_mean() {
        let dropout = Dropout {
            probability: 0.25,
            seed: 3,
        };
        let values = dropout.elements([200, 500]);
        let dropped = values.iter().filter(|v| **v == 0.0).count() as f64 / values.len() as f64;
        assert!((dropped - 0.25).abs() < 0.005, "{dropped}");
        let mean = values.iter().sum::<f32>() / values.len() as f32;
        assert!((mean - 1.0).abs() < 0.01, "{mean}");
        let other = Dropout { seed: 4, ..dropout };
        assert_ne!(values, other.elements([200, 500]));
    }
}
