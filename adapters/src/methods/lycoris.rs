//! What LoHa and LoKr have in common: ranks and scalings by layer, and what is dropped of an update.
//!
//! Source: `peft/tuners/lycoris_utils.py`.

use burn::tensor::Tensor;
use serde_json::{Map, Value, json};

use super::{alpha_problem, rank_problem, share_problem};
use crate::config::{Pattern, number};
use crate::linear::{Dropout, DropoutBackend, mix};

/// The settings that both have.
pub(super) struct Common<'a> {
    pub rank: usize,
    pub alpha: f64,
    pub rank_dropout: f64,
    pub module_dropout: f64,
    pub rank_pattern: &'a Pattern<usize>,
    pub alpha_pattern: &'a Pattern<f64>,
}

impl<'a> Common<'a> {
    /// The rank of a layer, and the factor on its update.
    pub fn rank_and_scaling(&self, layer: &str) -> (usize, f64) {
        let rank = self.rank_pattern.find(layer).unwrap_or(self.rank);
        let alpha = self.alpha_pattern.find(layer).unwrap_or(self.alpha);
        (rank, alpha / rank as f64)
    }

    pub fn problems(&self) -> Vec<(&'static str, String)> {
        let ranks = self.rank_pattern.0.iter().map(|(_, rank)| *rank);
        let alphas = self.alpha_pattern.0.iter().map(|(_, alpha)| *alpha);
        let all = [
            rank_problem("rank", [self.rank]),
            rank_problem("rank_pattern", ranks),
            alpha_problem("alpha", [self.alpha]),
            alpha_problem("alpha_pattern", alphas),
            share_problem("rank_dropout", self.rank_dropout),
            share_problem("module_dropout", self.module_dropout),
        ];
        all.into_iter().flatten().collect()
    }

    pub fn patterns(&self) -> Vec<&'a str> {
        let keys = self.rank_pattern.keys().chain(self.alpha_pattern.keys());
        keys.collect()
    }

    pub fn is_random(&self) -> bool {
        self.rank_dropout > 0.0 || self.module_dropout > 0.0
    }

    /// In PEFT's spelling, with `others`.
    pub fn to_peft(&self, others: Value) -> Map<String, Value> {
        let settings = json!({
            "alpha": number(self.alpha),
            "alpha_pattern": self.alpha_pattern.to_peft(),
            "module_dropout": self.module_dropout,
            "r": self.rank,
            "rank_dropout": self.rank_dropout,
            "rank_pattern": self.rank_pattern,
            "use_effective_conv2d": false,
        });
        let all = [settings, others].map(|part| part.as_object().cloned().unwrap_or_default());
        all.into_iter().flatten().collect()
    }

    pub fn drops(&self) -> Drops {
        Drops {
            rank: self.rank_dropout,
            module: self.module_dropout,
            seed: None,
        }
    }
}

/// What of an update is dropped while training.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drops {
    /// Share of the rows of the update that are dropped.
    pub rank: f64,
    /// Probability with which all of it is.
    pub module: f64,
    /// Set while training: decides which.
    pub seed: Option<u64>,
}

impl Drops {
    /// Whether the layer does without its update this time.
    pub fn skips(&self) -> bool {
        let drawn = self.seed.map(|seed| mix(seed ^ 0x6d6f_6475_6c65));
        drawn.is_some_and(|bits| (bits as f64) < self.module * u64::MAX as f64)
    }

    /// The factors on the rows of the update, `[1, out]`: 0 of those that are dropped, and 1 of the
    /// others, which are `grown` so that the mean stays 1.
    pub fn rows<B: DropoutBackend>(
        &self,
        out: usize,
        grown: bool,
        device: &B::Device,
    ) -> Option<Tensor<B, 2>> {
        let seed = self.seed.filter(|_| self.rank > 0.0)?;
        let dropout = Dropout {
            probability: self.rank,
            seed,
        };
        let mask = dropout.mask([1, out], device).mul_scalar(1.0 - self.rank);
        Some(match grown {
            true => {
                let mean = mask.clone().mean().clamp_min(f32::MIN_POSITIVE); // of no row at all, too
                mask / mean.unsqueeze()
            }
            false => mask,
        })
    }
}
