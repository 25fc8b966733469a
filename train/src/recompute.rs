//! Activation recompute: backward layer by layer, each layer run again from its input.
//!
//! The forward pass runs without a graph and keeps nothing but the inputs of the decoder layers; the
//! graph of a layer exists only while that layer is differentiated.
//!
//! Source: <https://arxiv.org/abs/1604.06174>.

use adapters::{AdaptedLlama, TrainBackend};
use burn::module::{AutodiffModule, Module};
use burn::optim::{GradientsAccumulator, GradientsParams};
use burn::tensor::{
    Tensor,
    backend::{AutodiffBackend, Backend},
};
use model::llama::{Input, Past};
use model::rope::Rope;
use model::virtual_tokens::Prefix;

/// A forward pass through the decoder layers that can be differentiated.
///
/// Shapes: `m` positions, `d` hidden, `l` layers, `p` virtual tokens, `w` width of keys.
pub(crate) struct Blocks<'a, B: TrainBackend> {
    model: &'a AdaptedLlama<B>,
    /// What the first layer read, if anything is trained that led to it, `[m, d]`.
    x: Option<Tensor<B, 2>>,
    rope: Rope<B>,
    prefix: Option<Prefix<B>>,
    /// What went into the layers from the first trained one on, `[m, d]` each.
    inputs: Vec<Tensor<B::InnerBackend, 2>>,
}

impl<'a, B: TrainBackend> Blocks<'a, B> {
    /// What the layers read to hidden states `[m, d]`, which are tracked if anything that led to
    /// them is trained.
    pub fn forward(model: &'a AdaptedLlama<B>, input: Input<B>) -> (Self, Tensor<B, 2>) {
        let embeds = trains(&model.embed_tokens) || trains(&model.adapted_embeddings);
        let reads = embeds || input.tokens.is_some();
        let begins = reads || input.prefix.is_some();
        let trained = |layer| begins || trains(layer);
        let first = model.layers.iter().position(trained);
        let inner = model.valid(); // shares the weights
        let rope = Rope {
            cos: input.rope.cos.clone().inner(),
            sin: input.rope.sin.clone().inner(),
            segments: input.rope.segments.clone(),
        };
        let prefix = input.prefix.as_ref().map(|prefix| Prefix {
            keys_and_values: prefix.keys_and_values.clone().inner(),
            places: prefix.places.clone().inner(),
        });
        let mut inputs = Vec::new();
        let first_input = reads.then(|| input.x.clone());
        let mut x = input.x.inner();
        for (index, layer) in inner.layers.iter().enumerate() {
            if first.is_some_and(|first| index >= first) {
                inputs.push(x.clone());
            }
            x = layer.forward(x, &rope, Past::of(&prefix, index));
        }
        let blocks = Self {
            model,
            x: first_input,
            rope: input.rope,
            prefix: input.prefix,
            inputs,
        };
        (blocks, tracked_if(first.is_some(), x))
    }

    /// Adds the gradients of the layers, and of what led to their input, from that of the hidden
    /// states, `[m, d]`.
    pub fn backward(
        mut self,
        d_x: Tensor<B::InnerBackend, 2>,
        gradients: &mut GradientsAccumulator<AdaptedLlama<B>>,
    ) {
        let model = self.model;
        let first = model.layers.len() - self.inputs.len();
        let mut d_x = Some(d_x);
        let mut d_prefix = Vec::new(); // of the layers, the last one first
        while let Some(x) = self.inputs.pop() {
            let Some(d_y) = d_x.take() else { break }; // nothing below is trained
            let index = first + self.inputs.len();
            let x = tracked_if(self.x.is_some() || index > first, x);
            let prefix = self.prefix.as_ref().map(|all| {
                let prefix = all.layer(index);
                let leaf = tracked_if(true, prefix.keys_and_values.inner());
                Prefix {
                    keys_and_values: leaf,
                    ..prefix
                }
            });
            let layer = &model.layers[index];
            let past = prefix.clone().map_or(Past::Nothing, Past::Prefix);
            let mut grads = backward(layer.forward(x.clone(), &self.rope, past), d_y);
            gradients.accumulate(model, GradientsParams::from_module(&mut grads, layer));
            d_prefix
                .extend(prefix.and_then(|prefix| prefix.keys_and_values.grad_remove(&mut grads)));
            d_x = x.grad_remove(&mut grads);
        }
        let mut add =
            |grads| gradients.accumulate(model, GradientsParams::from_grads(grads, model));
        if let (Some(x), Some(d_x)) = (self.x, d_x) {
            add(backward(x, d_x));
        }
        if let Some(prefix) = self.prefix {
            d_prefix.reverse();
            add(backward(prefix.keys_and_values, Tensor::cat(d_prefix, 0)));
        }
    }
}

/// The gradients of what led to `y`, from that of `y`; none if nothing of it is tracked.
pub(crate) fn backward<B: AutodiffBackend, const D: usize>(
    y: Tensor<B, D>,
    d_y: Tensor<B::InnerBackend, D>,
) -> B::Gradients {
    (y * Tensor::from_inner(d_y)).sum().backward()
}

/// Whether anything of a module is trained: frozen weights are no parameters.
fn trains<B: Backend>(module: &impl Module<B>) -> bool {
    module.num_params() > 0
}

fn tracked_if<B: AutodiffBackend, const D: usize>(
    tracked: bool,
    x: Tensor<B::InnerBackend, D>,
) -> Tensor<B, D> {
    let x = Tensor::from_inner(x);
    match tracked {
        true => x.require_grad(),
        false => x,
    }
}
