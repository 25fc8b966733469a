//! Embeddings with an update in them, some rows at a time.

use std::ops::Range;

use burn::backend::Flex;
use burn::tensor::{Tensor, TensorData};
use model::llama::EMBED_TOKENS;

use super::{Merge, PART, Weight};
use crate::base::EMBEDDINGS;
use crate::error::Result;
use crate::methods::Update;
use crate::methods::lora::Lora;

/// Embeddings `[vocab, d]` that an adapter changes.
pub(crate) struct Adapted<'a> {
    pub(super) base: Weight<'a>,
    lora: Lora<Flex>,
    width: usize,
    /// Factors on the columns, `[d]`.
    scales: Option<Tensor<Flex, 1>>,
}

impl Merge<'_> {
    /// The embeddings of the merged model, and of the trained one.
    pub(crate) fn embeddings(&self) -> Result<Weight<'_>> {
        let base = self.dense(EMBEDDINGS);
        let update = self.update(EMBED_TOKENS, &Default::default())?;
        let Some(Update::Lora(lora)) = update else {
            return Ok(base); // no other method is on embeddings
        };
        let mut adapted = Adapted {
            base,
            lora,
            width: self.config.hidden_size,
            scales: None,
        };
        adapted.scales = adapted.column_scales(self.config.vocab_size)?;
        Ok(Weight::Adapted(Box::new(adapted)))
    }
}

impl Adapted<'_> {
    /// What DoRA scales by, which takes all rows.
    fn column_scales(&self, vocab_size: usize) -> Result<Option<Tensor<Flex, 1>>> {
        if self.lora.magnitude.is_none() {
            return Ok(None);
        }
        let step = (PART / self.width).max(1);
        let mut squares = Tensor::zeros([self.width], &Default::default());
        for start in (0..vocab_size).step_by(step) {
            let rows = self.sums(start..vocab_size.min(start + step))?;
            squares = squares + rows.powi_scalar(2).sum_dim(0).squeeze_dim(0);
        }
        Ok(self.lora.column_scales(squares))
    }

    /// Rows `[ids, d]` with the update added.
    fn sums(&self, ids: Range<usize>) -> model::Result<Tensor<Flex, 2>> {
        let values = self.base.rows(ids.clone())?;
        let data = TensorData::new(values, [ids.len(), self.width]);
        let rows = Tensor::from_data(data, &Default::default());
        Ok(self.lora.add_to_embeddings(ids, rows))
    }

    /// Elements of some rows.
    pub(super) fn rows(&self, ids: Range<usize>) -> model::Result<Vec<f32>> {
        let rows = self.sums(ids)?;
        let rows = match &self.scales {
            Some(scales) => rows * scales.clone().unsqueeze(),
            None => rows,
        };
        Ok(rows.into_data().into_vec().expect("computed in f32"))
    }
}
