//! The loss of a model on given rows, token by token if wanted.

use adapters::AdaptedBackend;

use crate::batch::EvalBatches;
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

/// Evaluates all batches; `row` hears of each row's natural-log probabilities, in order.
pub fn evaluate<B: AdaptedBackend, E>(
    lm: &CausalLm<B>,
    batches: &EvalBatches,
    mut row: impl FnMut(usize, &[f32]) -> Result<(), E>,
) -> Result<Evaluation, E> {
    let (mut total, mut tokens, mut rows) = (0.0, 0, 0);
    for batch in batches.batches() {
        let nll = lm.token_nll(&batch);
        total += nll.iter().map(|nll| f64::from(*nll)).sum::<f64>();
        tokens += nll.len();
        let log_p: Vec<f32> = nll.iter().map(|nll| -nll).collect();
        let mut rest = log_p.as_slice();
        for &trained in batch.trained_by_row() {
            let (here, after) = rest.split_at(trained);
            row(rows, here)?;
            rest = after;
            rows += 1;
        }
    }
    let loss = total / tokens as f64;
    Ok(Evaluation {
        loss,
        perplexity: loss.exp(),
        tokens,
        rows,
    })
}
