//! How far a merged model is from the trained one, measured on a few tokens. Both models are read
//! layer by layer; neither is ever whole in memory.
//!
//! Shapes: `n` tokens, `d` hidden, `v` vocabulary.

use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::checkpoint::Checkpoint;
use model::config::LlamaConfig;
use model::llama::{LM_HEAD, Past};
use model::load::{LinearSource, Parts};
use model::ops::matmul;
use model::rope::Rope;
use model::segments::Segments;
use rayon::prelude::*;

use crate::base::{AdaptedBackend, EMBEDDINGS, HEAD, dense};
use crate::error::{Error, Result};
use crate::linear::AdaptedLinear;
use crate::merge::{Merge, Weight};
use crate::methods::{Computes, Update};

/// How many elements of the output layer are in memory at a time.
const HEAD_PART: usize = 1 << 24;

/// Differences between the logits of two models on the same tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Drift {
    /// Number of tokens.
    pub tokens: usize,
    /// The largest difference of a logit.
    pub max_abs: f64,
    /// The mean magnitude of the differences.
    pub mean_abs: f64,
    /// Kullback-Leibler divergence of the second model's next-token probabilities from the first's,
    /// in nats, the mean of all tokens.
    pub kl: f64,
    /// Share of the tokens after which both models find the same token the most likely.
    pub same_top: f64,
}

/// Measures the model that [`Merge::write`] made, `merged`, against the trained one: the base that
/// the adapters were trained on, with the adapters beside it. Before each layer, `go_on` is asked.
///
/// # Errors
/// [`Error::Interrupted`] if `go_on` says so; [`model::Error::LogitsNotFinite`]; what reading fails
/// with.
///
/// # Panics
/// If there are no `ids`, or one is outside of the vocabulary.
pub fn drift<B: AdaptedBackend>(
    merge: &Merge,
    merged: &Checkpoint,
    ids: &[u32],
    device: &B::Device,
    go_on: &dyn Fn() -> bool,
) -> Result<Drift> {
    let config = &merge.config;
    let probe = Probe::<B> {
        config,
        ids,
        device,
        go_on,
    };
    let shape = [config.vocab_size, config.hidden_size];
    let head = Head {
        weight: merge.weight(HEAD, &shape)?,
        update: merge.update(LM_HEAD, device)?,
    };
    let trained = probe.logits(
        merge.embeddings()?,
        |name| merge.dense(name),
        |source| merge.trained(source),
        head,
    )?;
    let read = |name: &str| Weight::Dense(merged, name.to_owned());
    let head = Head {
        weight: read(if config.tie_word_embeddings {
            EMBEDDINGS
        } else {
            HEAD
        }),
        update: None,
    };
    let merged = probe.logits(read(EMBEDDINGS), read, dense, head)?;
    compare(&trained, &merged, config.vocab_size)
}

/// A sequence of tokens that models are given.
struct Probe<'a, B: Backend> {
    config: &'a LlamaConfig,
    ids: &'a [u32],
    device: &'a B::Device,
    go_on: &'a dyn Fn() -> bool,
}

/// The output layer of a model.
struct Head<'a, B: Backend> {
    weight: Weight<'a>,
    update: Option<Update<B>>,
}

impl<B: AdaptedBackend> Probe<'_, B> {
    /// The logits `[n, v]` of a model, row by row. `dense` finds its tensors that are no weights of
    /// linear layers, `linear` makes its linear layers.
    fn logits<'m>(
        &self,
        embeddings: Weight<'m>,
        dense: impl Fn(&str) -> Weight<'m>,
        linear: impl Fn(LinearSource<B>) -> Result<AdaptedLinear<B>>,
        head: Head<B>,
    ) -> Result<Vec<f32>> {
        let (n, d) = (self.ids.len(), self.config.hidden_size);
        let row = |id: &u32| embeddings.rows(*id as usize..*id as usize + 1);
        let rows = self
            .ids
            .iter()
            .map(row)
            .collect::<model::Result<Vec<_>>>()?;
        let mut x = self.tensor(rows.concat(), [n, d]);
        let values = |name: &str, shape: &[usize]| dense(name).rows(0..shape[0]);
        let mut parts = Parts::new(self.config, self.device, values, linear);
        let rope = Rope::new(self.config, Segments::new([n]), self.device);
        for index in 0..self.config.num_hidden_layers {
            if !(self.go_on)() {
                return Err(Error::Interrupted);
            }
            x = parts.layer(index)?.forward(x, &rope, Past::Nothing);
        }
        let x = parts.final_norm()?.forward(x);
        let logits = self.head(x, head)?.into_data();
        Ok(logits
            .convert::<f32>()
            .into_vec()
            .expect("converted to f32"))
    }

    /// Normed hidden states `[n, d]` to logits `[n, v]`.
    fn head(&self, x: Tensor<B, 2>, head: Head<B>) -> Result<Tensor<B, 2>> {
        let (v, d) = (self.config.vocab_size, self.config.hidden_size);
        let step = (HEAD_PART / d).max(1);
        let part = |start| {
            let rows = start..v.min(start + step);
            let mut weight = self.tensor(head.weight.rows(rows.clone())?, [rows.len(), d]);
            if let Some(update) = &head.update {
                weight = update.merge(rows, weight);
            }
            Ok(matmul(x.clone(), weight.transpose())) // [n, rows]
        };
        let parts = (0..v).step_by(step).map(part).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::cat(parts, 1))
    }

    fn tensor(&self, values: Vec<f32>, shape: [usize; 2]) -> Tensor<B, 2> {
        Tensor::from_data(TensorData::new(values, shape), self.device)
    }
}

/// Two models' logits `[n, v]`.
fn compare(trained: &[f32], merged: &[f32], v: usize) -> Result<Drift> {
    for logits in [trained, merged] {
        if let Some(at) = logits.iter().position(|x| !x.is_finite()) {
            let position = at / v + 1;
            return Err(model::Error::LogitsNotFinite { position }.into());
        }
    }
    let rows: Vec<_> = trained
        .par_chunks(v)
        .zip(merged.par_chunks(v))
        .map(|(trained, merged)| compare_row(trained, merged))
        .collect();
    let mean = |of: fn(&Drift) -> f64| rows.iter().map(of).sum::<f64>() / rows.len() as f64;
    Ok(Drift {
        tokens: rows.len(),
        max_abs: rows.iter().fold(0.0, |most, row| row.max_abs.max(most)),
        mean_abs: mean(|row| row.mean_abs),
        kl: mean(|row| row.kl),
        same_top: mean(|row| row.same_top),
    })
}

/// The same for one token.
fn compare_row(trained: &[f32], merged: &[f32]) -> Drift {
    let pairs = || {
        trained
            .iter()
            .zip(merged)
            .map(|(p, q)| (f64::from(*p), f64::from(*q)))
    };
    let (log_p, log_q) = (log_sum_exp(trained), log_sum_exp(merged));
    let differences = || pairs().map(|(p, q)| (p - q).abs());
    let kl = pairs().map(|(p, q)| (p - log_p).exp() * ((p - log_p) - (q - log_q)));
    Drift {
        tokens: 1,
        max_abs: differences().fold(0.0, f64::max),
        mean_abs: differences().sum::<f64>() / trained.len() as f64,
        kl: kl.sum::<f64>().max(0.0), // rounding alone makes it negative
        same_top: f64::from(u8::from(top(trained) == top(merged))),
    }
}

fn log_sum_exp(logits: &[f32]) -> f64 {
    let most = logits
        .iter()
        .fold(f32::NEG_INFINITY, |most, x| most.max(*x));
    let sum: f64 = logits.iter().map(|x| f64::from(x - most).exp()).sum();
    f64::from(most) + sum.ln()
}

fn top(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drift_is_what_its_definition_says() {
        let trained = [1.0, 2.0, 0.0, 3.0, 3.5, -1.0];
        let merged = [1.0, 2.0, 0.0, 3.5, 3.0, -1.0];
        let drift = compare(&trained, &merged, 3).unwrap();
        assert_eq!((drift.tokens, drift.max_abs), (2, 0.5));
        assert!((drift.mean_abs - 1.0 / 6.0).abs() < 1e-12);
        assert_eq!(drift.same_top, 0.5);
        // the second token: the two logits change places
        let sum = 3f64.exp() + 3.5f64.exp() + (-1f64).exp();
        let kl = (3.5f64.exp() - 3f64.exp()) / sum * 0.5;
        assert!((drift.kl - kl / 2.0).abs() < 1e-12, "{}", drift.kl);
    }

    #[test]
    fn logits_that_are_no_numbers_are_an_error() {
        let error = compare(&[0.0, 1.0, 2.0, 3.0], &[0.0, 1.0, f32::NAN, 3.0], 2).unwrap_err();
        assert!(error.to_string().contains("token 2"), "{error}");
    }
}
