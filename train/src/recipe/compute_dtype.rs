//! What the frozen weights are stored and multiplied in.

use burn::tensor::DType;
use serde::{Deserialize, Serialize};

use super::Recipe;
use crate::error::{Error, Result};

/// `train.compute_dtype`: the type of the frozen matrices and of their products. Everything else is
/// f32: what is trained and its optimizer, norms, attention, the loss, and the sums between products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeDtype {
    /// 16 bits on a card that has them, bf16 before f16; else f32.
    Auto,
    /// 32 bits.
    F32,
    /// 16 bits, 11 of them precision; the loss is scaled so that gradients stay in range.
    F16,
    /// 16 bits with the range of f32, 8 of them precision.
    Bf16,
}

impl ComputeDtype {
    /// Its name, in a recipe and among the formats of a device.
    pub fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::F32 => "f32",
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }

    /// The type of tensors; `auto` that nobody has settled is f32.
    pub fn dtype(self) -> DType {
        match self {
            Self::Auto | Self::F32 => DType::F32,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

impl Recipe {
    /// Settles `train.compute_dtype` for a device that `offers` these formats; `is_card` is whether
    /// it is real graphics hardware, where 16 bits are faster and not just smaller.
    ///
    /// # Errors
    /// [`Error::ComputeDtype`] if the device does not offer the one that is asked for.
    pub fn settle_compute_dtype(&mut self, offers: &[&'static str], is_card: bool) -> Result<()> {
        let has = |dtype: &ComputeDtype| offers.contains(&dtype.name());
        let asked = self.train.compute_dtype;
        self.train.compute_dtype = match asked {
            ComputeDtype::Auto if is_card && !self.adapter.is_full() => {
                let narrow = [ComputeDtype::Bf16, ComputeDtype::F16];
                narrow.into_iter().find(has).unwrap_or(ComputeDtype::F32)
            }
            ComputeDtype::Auto => ComputeDtype::F32,
            asked if has(&asked) => asked,
            asked => {
                return Err(Error::ComputeDtype {
                    asked: asked.name(),
                    offers: offers.into(),
                });
            }
        };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(
        asked: ComputeDtype,
        offers: &[&'static str],
        is_card: bool,
    ) -> Result<&'static str> {
        let mut recipe = Recipe::default();
        recipe.train.compute_dtype = asked;
        recipe.settle_compute_dtype(offers, is_card)?;
        Ok(recipe.train.compute_dtype.name())
    }

    #[test]
    fn auto_takes_the_wider_range_of_16_bits_on_cards_alone() {
        let auto = |offers: &[&'static str], is_card| {
            settled(ComputeDtype::Auto, offers, is_card).unwrap()
        };
        assert_eq!(auto(&["f32", "f16", "bf16"], true), "bf16");
        assert_eq!(auto(&["f32", "f16"], true), "f16");
        assert_eq!(auto(&["f32"], true), "f32");
        assert_eq!(auto(&["f32", "f16"], false), "f32"); // in software
        let mut full = Recipe::default();
        full.adapter.method = "full".into();
        full.settle_compute_dtype(&["f32", "f16"], true).unwrap();
        assert_eq!(full.train.compute_dtype, ComputeDtype::F32);
    }

    #[test]
    fn what_a_device_does_not_offer_is_refused_with_what_it_does() {
        assert_eq!(
            settled(ComputeDtype::F16, &["f32", "f16"], false).unwrap(),
            "f16"
        );
        let error = settled(ComputeDtype::Bf16, &["f32", "f16"], true).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("bf16") && text.contains("f32 and f16"),
            "{text}"
        );
        let text = settled(ComputeDtype::F16, &["f32"], false)
            .unwrap_err()
            .to_string();
        assert!(text.ends_with("in f32"), "{text}");
    }
}
