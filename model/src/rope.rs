//! Tables of rotary angles for given positions.
//!
//! Source: `transformers/modeling_rope_utils.py`; computed in f32 as there, since positions
//! multiply every rounding error.

use std::f64::consts::PI;

use burn::tensor::{Tensor, TensorData, backend::Backend};

use crate::config::{LlamaConfig, RopeScaling};
use crate::segments::Segments;

/// Where every token stands: its row, and the cosines and sines of its position in it.
#[derive(Debug, Clone)]
pub struct Rope<B: Backend> {
    /// `[n, h_d/2]`.
    pub cos: Tensor<B, 2>,
    /// `[n, h_d/2]`.
    pub sin: Tensor<B, 2>,
    /// The rows of the `n` tokens.
    pub segments: Segments,
}

impl<B: Backend> Rope<B> {
    /// Tables for the positions of the tokens in their rows.
    pub fn new(config: &LlamaConfig, segments: Segments, device: &B::Device) -> Self {
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for row in segments.iter() {
            let (frequencies, factor) = frequencies(config, row.keys.len());
            let angles = row
                .positions()
                .flat_map(|at| frequencies.iter().map(move |f| at as f32 * f));
            for angle in angles {
                cos.push(angle.cos() * factor);
                sin.push(angle.sin() * factor);
            }
        }
        let shape = [segments.tokens(), config.head_dim / 2];
        let table = |values| Tensor::from_data(TensorData::new(values, shape), device);
        Self {
            cos: table(cos),
            sin: table(sin),
            segments,
        }
    }
}

/// The `h_d/2` frequencies for rows of `length` positions, and the factor on cos and sin.
fn frequencies(config: &LlamaConfig, length: usize) -> (Vec<f32>, f32) {
    let dim = config.head_dim;
    let theta = config.rope_theta;
    let plain = |theta: f64| -> Vec<f32> {
        let exponents = (0..dim).step_by(2).map(|i| i as f32 / dim as f32);
        exponents.map(|e| 1.0 / (theta as f32).powf(e)).collect()
    };
    match config.rope_scaling {
        RopeScaling::Default => (plain(theta), 1.0),
        RopeScaling::Linear { factor } => {
            let scaled = plain(theta).iter().map(|f| f / factor as f32).collect();
            (scaled, 1.0)
        }
        RopeScaling::Dynamic { factor } => {
            let max = config.max_position_embeddings as f64;
            let stretch = factor * (length as f64).max(max) / max - (factor - 1.0);
            let exponent = dim as f64 / (dim as f64 - 2.0);
            (plain(theta * stretch.powf(exponent)), 1.0)
        }
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f32;
            let (low, high) = (low_freq_factor as f32, high_freq_factor as f32);
            let scale = |f: &f32| {
                let wavelength = 2.0 * PI as f32 / f;
                if wavelength < original / high {
                    *f
                } else if wavelength > original / low {
                    f / factor as f32
                } else {
                    let smooth = (original / wavelength - low) / (high - low);
                    (1.0 - smooth) * f / factor as f32 + smooth * f
                }
            };
            (plain(theta).iter().map(scale).collect(), 1.0)
        }
        RopeScaling::Yarn {
            factor,
            attention_factor,
            beta_fast,
            beta_slow,
            truncate,
            original_max_position_embeddings,
        } => {
            let original = original_max_position_embeddings as f64;
            let turns_at = |rotations: f64| {
                dim as f64 * (original / (rotations * 2.0 * PI)).ln() / (2.0 * theta.ln())
            };
            let (mut low, mut high) = (turns_at(beta_fast), turns_at(beta_slow));
            if truncate {
                (low, high) = (low.floor(), high.ceil());
            }
            let low = low.max(0.0);
            let mut high = high.min(dim as f64 - 1.0);
            if low == high {
                high += 0.001; // the ramp needs a width
            }
            let scale = |(i, f): (usize, &f32)| {
                let ramp = ((i as f32 - low as f32) / (high - low) as f32).clamp(0.0, 1.0);
                f / factor as f32 * ramp + f * (1.0 - ramp)
            };
            let scaled = plain(theta).iter().enumerate().map(scale).collect();
            (scaled, attention_factor as f32)
        }
    }
}
