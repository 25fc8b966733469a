//! The operations on CubeCL's backends, bare and under Burn's fusion: the reference bodies, whose
//! element-wise runs the fusion compiles into single kernels. Attention has kernels of its own.

use burn::tensor::ops::{FloatTensor, FloatTensorOps};
use burn::tensor::{Shape, TensorMetadata};
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement, element::BoolElement};
use burn_fusion::{Fusion, FusionBackend};

use super::{
    CrossEntropyBackend, MatmulBackend, RmsNormBackend, RotaryBackend, SwigluBackend, UpdateBackend,
};

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> CrossEntropyBackend
    for CubeBackend<R, F, I, BT>
{
}
impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> MatmulBackend
    for CubeBackend<R, F, I, BT>
{
    fn largest_tensor(device: &R::Device) -> Option<u64> {
        Some(R::client(device).properties().memory.max_page_size)
    }
}
impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> RmsNormBackend
    for CubeBackend<R, F, I, BT>
{
}
impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> RotaryBackend
    for CubeBackend<R, F, I, BT>
{
}
impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> SwigluBackend
    for CubeBackend<R, F, I, BT>
{
}
impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> UpdateBackend
    for CubeBackend<R, F, I, BT>
{
}

impl<B: FusionBackend> CrossEntropyBackend for Fusion<B> {}
impl<B: FusionBackend + MatmulBackend> MatmulBackend for Fusion<B> {
    fn largest_tensor(device: &B::Device) -> Option<u64> {
        B::largest_tensor(device)
    }

    /// Through a flat shape: fusion ends at a reshape to fewer dimensions.
    fn product(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        let y = Self::float_matmul(a, b);
        let shape = y.shape();
        let flat = Self::float_reshape(y, Shape::from([shape.num_elements()]));
        Self::float_reshape(flat, shape)
    }
}
impl<B: FusionBackend> RmsNormBackend for Fusion<B> {}
impl<B: FusionBackend> RotaryBackend for Fusion<B> {}
impl<B: FusionBackend> SwigluBackend for Fusion<B> {}
impl<B: FusionBackend> UpdateBackend for Fusion<B> {}
