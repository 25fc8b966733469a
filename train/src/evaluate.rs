//! The loss of a model on given rows, token by token if wanted.

use adapters::AdaptedBackend;

use crate::batch::{EvalBatches, MicroBatch};
use crate::step::CausalLm;

/// The result of an evaluation.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Evaluation {
    /// Mean cross entropy of the trained tokens, in nats.
    pub loss: f64,
    /// `exp(loss)`.
    pub perplexity: f64,
    /// Trained tokens.
    pub tokens: usize,
    /// Rows.
    pub rows: usize,
}

/// Evaluates all batches; `None` if `interrupted` says yes before one of them.
///
/// `heard` gets each batch with the negative natural-log probabilities of its trained tokens,
/// which [`MicroBatch::by_row`] takes apart.
pub fn evaluate<B: AdaptedBackend, E>(
    lm: &CausalLm<B>,
    batches: &EvalBatches,
    interrupted: &dyn Fn() -> bool,
    mut heard: impl FnMut(&MicroBatch, &[f32]) -> Result<(), E>,
) -> Result<Option<Evaluation>, E> {
    let (mut total, mut tokens, mut rows) = (0.0, 0, 0);
    for batch in batches.batches() {
        if interrupted() {
            return Ok(None);
        }
        let nll = lm.token_nll(&batch);
        total += sum(&nll);
        tokens += nll.len();
        rows += batch.by_row(&nll).count();
        heard(&batch, &nll)?;
    }
    let loss = total / tokens as f64;
    Ok(Some(Evaluation {
        loss,
        perplexity: loss.exp(),
        tokens,
        rows,
    }))
}

/// The sum of a batch, in f64.
pub(crate) fn sum(nll: &[f32]) -> f64 {
    nll.iter().map(|nll| f64::from(*nll)).sum()
}
