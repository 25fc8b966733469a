//! The operation on CubeCL's backends, bare and under Burn's fusion: as it is.

use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement, element::BoolElement};
use burn_fusion::{Fusion, FusionBackend};
use model::ops::MatmulBackend;
use quant::QuantBackend;

use super::LoraBackend;
use crate::linear::DropoutBackend;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> LoraBackend
    for CubeBackend<R, F, I, BT>
{
}

impl<B: FusionBackend + QuantBackend + MatmulBackend + DropoutBackend> LoraBackend for Fusion<B> {}
