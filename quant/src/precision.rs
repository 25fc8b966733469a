//! The type that codes decode to.

use half::{bf16, f16};

/// The type that a weight had before it was quantised, and that bitsandbytes decodes it to again:
/// `quant_state.dtype` of a checkpoint. Decoded values are f32 here, rounded to that type.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Precision {
    /// 24 significant bits: nothing is rounded.
    #[default]
    F32,
    /// 11 significant bits.
    F16,
    /// 8 significant bits.
    Bf16,
}

impl Precision {
    /// The nearest number of this type, the even one of two.
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => bf16::from_f32(x).to_f32(),
        }
    }
}
