//! LoRA on embeddings, `y = E[ids] + s · A[:, ids]ᵀ Bᵀ`: a linear layer whose input has a one for each
//! token, of which only the columns of these tokens are ever read. Nothing is dropped.
//!
//! Shapes: `n` tokens, `d` hidden, `v` vocabulary, `r` rank; `lora_a` is `[r, v]`, `lora_b` `[d, r]`.
//!
//! Source: `Embedding` in `peft/tuners/lora/layer.py`, `DoraEmbeddingLayer` in `dora.py` there.

use std::ops::Range;

use burn::tensor::{Int, Tensor};
use model::linear::Projection;
use model::ops::matmul;

use super::{Lora, dora};
use crate::base::{AdaptedBackend, BaseLinear};

/// `ids` `[n]` to embeddings `[n, d]`; those of DoRA are scaled to the lengths of the columns.
pub(super) fn forward<B: AdaptedBackend>(
    lora: &Lora<B>,
    ids: Tensor<B, 1, Int>,
    base: &BaseLinear<B>,
) -> Tensor<B, 2> {
    let narrow = lora.lora_a.val().select(1, ids.clone()).transpose(); // [n, r]
    let y = base.embed(ids) + widened(lora, narrow);
    match &lora.magnitude {
        None => y,
        Some(magnitude) => y * (magnitude.val() / dora::lengths(lora, base)).unsqueeze(),
    }
}

/// `[n, r]` to the update `[n, d]`.
fn widened<B: AdaptedBackend>(lora: &Lora<B>, narrow: Tensor<B, 2>) -> Tensor<B, 2> {
    matmul(narrow, lora.lora_b.val().transpose()).mul_scalar(lora.scaling)
}

impl<B: AdaptedBackend> Lora<B> {
    /// Rows `[ids, d]` of the embeddings with the update in them. What DoRA scales is not scaled
    /// yet: that takes all rows, see [`Lora::column_scales`].
    pub(crate) fn add_to_embeddings(&self, ids: Range<usize>, rows: Tensor<B, 2>) -> Tensor<B, 2> {
        let narrow = self.lora_a.val().narrow(1, ids.start, ids.len());
        rows + widened(self, narrow.transpose())
    }

    /// The factors `[d]` on the columns of embeddings, of which `squares` `[d]` are the sums of
    /// squares of all rows; none but of DoRA.
    pub(crate) fn column_scales(&self, squares: Tensor<B, 1>) -> Option<Tensor<B, 1>> {
        let magnitude = self.magnitude.as_ref()?;
        Some(magnitude.val() / squares.sqrt())
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::{Autodiff, Flex};
    use burn::module::Param;
    use burn::tensor::TensorData;
    use model::linear::Linear;
    use model::load::normal;
    use model::weight::BaseWeight;

    use super::*;
    use crate::methods::Computes;

    type Train = Autodiff<Flex>;

    const VOCAB: usize = 30;
    const D: usize = 12;
    const RANK: usize = 3;
    const IDS: [i64; 6] = [7, 0, 29, 7, 7, 4];

    fn noise<const N: usize>(name: &str, shape: [usize; N]) -> Tensor<Train, N> {
        let values = normal(1, name, shape.iter().product(), 1.0);
        Tensor::from_data(TensorData::new(values, shape), &Default::default())
    }

    /// The output and the gradients of what is trained.
    fn run(
        use_dora: bool,
        op: impl Fn(&Lora<Train>, Tensor<Train, 1, Int>, &BaseLinear<Train>) -> Tensor<Train, 2>,
    ) -> Vec<Vec<f32>> {
        let mut lora = Lora::of(noise("a", [RANK, VOCAB]), noise("b", [D, RANK]), 0.7);
        lora.lora_a = Param::from_tensor(lora.lora_a.val());
        lora.lora_b = Param::from_tensor(lora.lora_b.val());
        lora.magnitude = use_dora.then(|| Param::from_tensor(noise("m", [D])));
        let base = BaseLinear::Dense(Linear {
            weight: BaseWeight::Frozen(noise("e", [VOCAB, D]).transpose()),
            bias: None,
        });
        lora.settle(&base);
        let y = op(&lora, Tensor::from_ints(IDS, &Default::default()), &base);
        let grads = (y.clone() * noise("dy", [IDS.len(), D])).sum().backward();
        let magnitude = lora.magnitude.as_ref();
        let found = [
            Some(y.inner().into_data()),
            lora.lora_a.grad(&grads).map(Tensor::into_data),
            lora.lora_b.grad(&grads).map(Tensor::into_data),
            magnitude.and_then(|m| Some(m.grad(&grads)?.into_data())),
        ];
        let found = found.into_iter().flatten();
        found.map(|data| data.into_vec().unwrap()).collect()
    }

    #[test]
    fn a_token_is_a_row_with_a_one_and_zeros() {
        for use_dora in [false, true] {
            let found = run(use_dora, |lora, ids, base| lora.embed(ids, base));
            let expected = run(use_dora, |lora, ids, base| {
                lora.forward(ids.one_hot::<2>(VOCAB).float(), base)
            });
            assert_eq!(found.len(), if use_dora { 4 } else { 3 });
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.len(), expected.len());
                assert!(expected.iter().any(|x| *x != 0.0));
                for (x, y) in found.iter().zip(expected) {
                    assert!(
                        (x - y).abs() < 2e-5,
                        "DoRA {use_dora}, tensor {i}: {x} for {y}"
                    );
                }
            }
        }
    }

    #[test]
    fn gradients_are_differences_of_the_loss() {
        // of one number of `lora_a`, that of a token that comes three times
        let at = VOCAB + 7;
        let loss = |step: f32| {
            let a = noise("a", [RANK, VOCAB]).into_data();
            let mut a = a.into_vec::<f32>().unwrap();
            a[at] += step;
            let a = Tensor::from_data(TensorData::new(a, [RANK, VOCAB]), &Default::default());
            let lora = Lora::of(a, noise("b", [D, RANK]), 0.7);
            let weight = BaseWeight::Frozen(noise("e", [VOCAB, D]).transpose());
            let base = BaseLinear::Dense(Linear { weight, bias: None });
            let y = lora.embed(Tensor::from_ints(IDS, &Default::default()), &base);
            let loss: f32 = (y * noise("dy", [IDS.len(), D])).sum().into_scalar();
            f64::from(loss)
        };
        let difference = loss(0.5) - loss(-0.5); // it is linear in `lora_a`
        let gradient = run(false, |lora, ids, base| lora.embed(ids, base))[1][at];
        assert!(
            (difference - f64::from(gradient)).abs() < 1e-4,
            "{difference} {gradient}"
        );
    }
}
