//! The operations of the decoder and of its training, one file each: a trait method whose default body is the readable
//! reference in plain tensor operations, its backward, and faster versions for single backends.
//!
//! Shapes: `n` tokens, `d` hidden, `n_h` heads, `n_kv` KV heads, `h_d` head dim,
//! `i` intermediate, `v` vocabulary.

mod again;
mod attention;
mod cat;
mod cpu;
mod cross_entropy;
mod matmul;
mod rms_norm;
mod rotary;
mod swiglu;
mod update;

#[cfg(test)]
mod test;

#[cfg(feature = "gpu")]
mod gpu;

pub use attention::{AttentionBackend, AttentionState, attention, write_positions};
pub use cat::cat;
pub use cross_entropy::{CrossEntropyBackend, cross_entropy};
pub use matmul::{MatmulBackend, add_matmul, matmul, weight_matmul};
pub use rms_norm::{RmsNormBackend, rms_norm};
pub use rotary::{RotaryBackend, rotary};
pub use swiglu::{SwigluBackend, swiglu};
pub use update::{AdamwStep, UpdateBackend, Updated, adamw, scale, sum_of_squares};

/// The operations in plain tensor operations: what the fused versions are checked and timed against.
pub mod reference {
    pub use super::attention::reference as attention;
    pub use super::attention::reference_backward as attention_backward;
    pub use super::cross_entropy::reference as cross_entropy;
    pub use super::cross_entropy::reference_backward as cross_entropy_backward;
    pub use super::cross_entropy::reference_with_gradient as cross_entropy_with_gradient;
    pub use super::matmul::reference as add_matmul;
    pub use super::rms_norm::reference as rms_norm;
    pub use super::rms_norm::reference_backward as rms_norm_backward;
    pub use super::rotary::reference as rotary;
    pub use super::swiglu::reference as swiglu;
    pub use super::swiglu::reference_backward as swiglu_backward;
    pub use super::update::reference as adamw;
    pub use super::update::reference_scale as scale;
    pub use super::update::reference_sum_of_squares as sum_of_squares;
}

use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{Tensor, TensorPrimitive};

/// A backend that has every operation of the decoder.
pub trait ModelBackend:
    AttentionBackend
    + CrossEntropyBackend
    + MatmulBackend
    + RmsNormBackend
    + RotaryBackend
    + SwigluBackend
    + UpdateBackend
{
}

impl<B> ModelBackend for B where
    B: AttentionBackend
        + CrossEntropyBackend
        + MatmulBackend
        + RmsNormBackend
        + RotaryBackend
        + SwigluBackend
        + UpdateBackend
{
}

fn tensor<B: Backend, const D: usize>(primitive: FloatTensor<B>) -> Tensor<B, D> {
    Tensor::from_primitive(TensorPrimitive::Float(primitive))
}

fn primitive<B: Backend, const D: usize>(tensor: Tensor<B, D>) -> FloatTensor<B> {
    tensor.into_primitive().tensor()
}
