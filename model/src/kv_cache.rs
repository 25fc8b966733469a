//! Keys and values of the positions that a generating model has already seen.

use burn::tensor::{Tensor, backend::Backend};

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
    /// Adds the keys and values `[b, s, n_kv, h_d]` of new positions and returns all of them.
    pub fn extend(&mut self, k: Tensor<B, 4>, v: Tensor<B, 4>) -> (Tensor<B, 4>, Tensor<B, 4>) {
        let all = match self.seen.take() {
            None => (k, v),
            Some((old_k, old_v)) => (
                Tensor::cat(vec![old_k, k], 1),
                Tensor::cat(vec![old_v, v], 1),
            ),
        };
        self.seen = Some(all.clone());
        all
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
