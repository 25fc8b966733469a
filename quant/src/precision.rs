//! The type that codes decode to.

use half::f16;

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
    /// The nearest number of this type, the even one of two; `x` is finite.
    #[inline(always)]
    pub fn round(self, x: f32) -> f32 {
        match self {
            Self::F32 => x,
            Self::F16 => f16::from_f32(x).to_f32(),
            Self::Bf16 => {
                let bits = x.to_bits();
                // half of the last bit that is kept, and a bit less where the number is even
                let half = 0x7fff + (bits >> 16 & 1);
                f32::from_bits((bits + half) & 0xffff_0000)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    #[test]
    fn numbers_round_to_bf16_as_by_the_half_crate() {
        let bits = (0..u32::MAX)
            .step_by(40_009)
            .chain([0x3f80_8000, 0x3f81_8000, 0x3f80_8001]);
        for x in bits.map(f32::from_bits).filter(|x| x.is_finite()) {
            let (found, expected) = (Precision::Bf16.round(x), bf16::from_f32(x).to_f32());
            assert_eq!(found.to_bits(), expected.to_bits(), "{x:e}");
        }
    }
}
