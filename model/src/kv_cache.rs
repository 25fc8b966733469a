//! Keys and values of the positions that a generating model has already seen.
//!
//! Shapes: `b` rows, of which `s` positions are new and `t` are seen in all; `n_kv` KV heads,
//! `h_d` head dim.

use burn::tensor::{Tensor, backend::Backend};

use crate::virtual_tokens::Prefix;

/// One entry a layer; grows by what each forward pass adds.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache.
    pub fn new(num_layers: usize) -> Self {
        Self {
            layers: vec![LayerCache { seen: None }; num_layers],
        }
    }

    /// Forgets all but the first `length` positions.
    pub fn truncate(&mut self, length: usize) {
        self.layers
            .iter_mut()
            .for_each(|layer| layer.truncate(length));
    }

    /// Puts learned keys and values in front of what `rows` rows will add.
    pub(crate) fn begin(&mut self, prefix: &Prefix<B>, n_kv: usize, rows: usize) {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let (k, v) = prefix.layer(index).repeated(rows, n_kv);
            layer.extend(k, v, rows);
        }
    }

    /// The cache of one layer.
    pub fn layer(&mut self, index: usize) -> &mut LayerCache<B> {
        &mut self.layers[index]
    }
}

/// Keys and values of one layer, both `[b, t, n_kv, h_d]`.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    seen: Option<(Tensor<B, 4>, Tensor<B, 4>)>,
}

impl<B: Backend> LayerCache<B> {
    /// Adds the keys and values `[b · s, n_kv, h_d]` of new positions of `b` rows, equally many of
    /// each, and returns all of them, `[b · t, n_kv, h_d]`.
    pub fn extend(
        &mut self,
        k: Tensor<B, 3>,
        v: Tensor<B, 3>,
        b: usize,
    ) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let apart = |x: Tensor<B, 3>| {
            let [n, n_kv, h_d] = x.dims();
            x.reshape([b, n / b, n_kv, h_d])
        };
        let (k, v) = (apart(k), apart(v));
        let (k, v) = match self.seen.take() {
            None => (k, v),
            Some((old_k, old_v)) => (
                Tensor::cat(vec![old_k, k], 1),
                Tensor::cat(vec![old_v, v], 1),
            ),
        };
        self.seen = Some((k.clone(), v.clone()));
        (k.flatten(0, 1), v.flatten(0, 1))
    }

    fn truncate(&mut self, length: usize) {
        let seen = self.seen.take().filter(|_| length > 0);
        self.seen = seen.map(|(k, v)| {
            let [_, t, _, _] = k.dims();
            let kept = length.min(t);
            (k.narrow(1, 0, kept), v.narrow(1, 0, kept))
        });
    }
}
