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
    Int, Tensor,
    backend::{AutodiffBackend, Backend},
};
use model::rope::Rope;

/// A forward pass through the decoder layers that can be differentiated.
///
/// Shapes: `n` tokens, `d` hidden.
pub(crate) struct Blocks<'a, B: TrainBackend> {
    model: &'a AdaptedLlama<B>,
    ids: Tensor<B, 1, Int>,
    rope: Rope<B>,
    /// What went into the layers from the first trained one on, `[n, d]` each.
    inputs: Vec<Tensor<B::InnerBackend, 2>>,
}

impl<'a, B: TrainBackend> Blocks<'a, B> {
    /// Token ids `[n]` to hidden states `[n, d]`, which are tracked if anything that led to
    /// them is trained.
    pub fn forward(
        model: &'a AdaptedLlama<B>,
        ids: Tensor<B, 1, Int>,
        rope: Rope<B>,
    ) -> (Self, Tensor<B, 2>) {
        let embeds = trains(&model.embed_tokens);
        let trained = |layer| embeds || trains(layer);
        let first = model.layers.iter().position(trained);
        let inner = model.valid(); // shares the weights
        let inner_rope = Rope {
            cos: rope.cos.clone().inner(),
            sin: rope.sin.clone().inner(),
            segments: rope.segments.clone(),
        };
        let mut inputs = Vec::new();
        let mut x = inner.embed(ids.clone().inner()); // [n, d]
        for (index, layer) in inner.layers.iter().enumerate() {
            if first.is_some_and(|first| index >= first) {
                inputs.push(x.clone());
            }
            x = layer.forward(x, &inner_rope, None);
        }
        let blocks = Self {
            model,
            ids,
            rope,
            inputs,
        };
        (blocks, tracked_if(first.is_some(), x))
    }

    /// Adds the gradients of the layers, and of the embeddings if they are trained, from that of
    /// the hidden states, `[n, d]`.
    pub fn backward(
        mut self,
        mut d_x: Tensor<B::InnerBackend, 2>,
        gradients: &mut GradientsAccumulator<AdaptedLlama<B>>,
    ) {
        let embeds = trains(&self.model.embed_tokens);
        for layer in self.model.layers.iter().rev() {
            let Some(input) = self.inputs.pop() else {
                return; // nothing below is trained
            };
            let goes_on = embeds || !self.inputs.is_empty();
            let x = tracked_if(goes_on, input);
            let y = layer.forward(x.clone(), &self.rope, None);
            let mut grads = backward(y, d_x);
            gradients.accumulate(self.model, GradientsParams::from_module(&mut grads, layer));
            match x.grad_remove(&mut grads) {
                Some(gradient) => d_x = gradient,
                None => return,
            }
        }
        let grads = backward(self.model.embed(self.ids), d_x);
        gradients.accumulate(self.model, GradientsParams::from_grads(grads, self.model));
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
