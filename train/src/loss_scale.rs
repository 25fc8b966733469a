//! What the loss is multiplied by so that gradients in f16 neither vanish nor overflow.
//!
//! Source: <https://arxiv.org/abs/1710.03740>, `torch/amp/grad_scaler.py`, whose numbers these are.

use serde::{Deserialize, Serialize};

use crate::exact;

/// Where it begins.
const FIRST: f64 = 65_536.0;
/// Steps without an overflow after which it is doubled.
const STEADY: usize = 2000;
/// It grows no further: f32 sums of gradients have room above it.
const LARGEST: f64 = 16_777_216.0;

/// The scale of a run that computes in f16; a power of two, so that scaling rounds nothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LossScale {
    /// What the loss is multiplied by, and the gradients are divided by.
    #[serde(with = "exact")]
    pub factor: f64,
    /// Steps since it changed.
    pub steady: usize,
    /// How often it was lowered.
    pub lowered: usize,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            factor: FIRST,
            steady: 0,
            lowered: 0,
        }
    }
}

impl LossScale {
    /// A gradient was no finite number: halves the scale. False if it is 1, and the gradient is no
    /// number by itself.
    pub fn lower(&mut self) -> bool {
        if self.factor <= 1.0 {
            return false;
        }
        *self = Self {
            factor: self.factor / 2.0,
            steady: 0,
            lowered: self.lowered + 1,
        };
        true
    }

    /// A step was taken.
    pub fn hold(&mut self) {
        self.steady += 1;
        if self.steady >= STEADY && self.factor < LARGEST {
            self.factor *= 2.0;
            self.steady = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_falls_by_halves_to_one_and_rises_after_steady_steps() {
        let mut scale = LossScale::default();
        for lowered in 1..=16 {
            assert!(scale.lower());
            assert_eq!(scale.factor, FIRST / 2.0_f64.powi(lowered));
        }
        assert!(!scale.lower());
        assert_eq!((scale.factor, scale.lowered), (1.0, 16));
        for _ in 1..STEADY {
            scale.hold();
        }
        assert_eq!((scale.factor, scale.steady), (1.0, STEADY - 1));
        scale.hold();
        assert_eq!((scale.factor, scale.steady), (2.0, 0));
        for _ in 0..40 * STEADY {
            scale.hold();
        }
        assert_eq!(scale.factor, LARGEST);
    }

    #[test]
    fn it_is_read_as_it_was_written() {
        let scale = LossScale {
            factor: 512.0,
            steady: 7,
            lowered: 3,
        };
        let json = serde_json::to_string(&scale).unwrap();
        assert_eq!(serde_json::from_str::<LossScale>(&json).unwrap(), scale);
    }
}
