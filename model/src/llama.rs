//! The Llama decoder. Field names are checkpoint names.
//!
//! Shapes: `b` batch, `s` sequence, `n = b · s` tokens, `d` hidden, `n_h` heads, `n_kv` KV heads,
//! `h_d` head dim, `i` intermediate, `v` vocabulary.
//!
//! Source: <https://arxiv.org/abs/2302.13971>, <https://arxiv.org/abs/2407.21783>,
//! `transformers/models/llama/modeling_llama.py`.

use std::marker::PhantomData;

use burn::module::Module;
use burn::tensor::{Int, Tensor, backend::Backend};

use crate::config::LlamaConfig;
use crate::kv_cache::{KvCache, LayerCache};
use crate::linear::Projection;
use crate::ops::{self, ModelBackend};
use crate::rope::Rope;
use crate::weight::BaseWeight;

/// A causal language model; `P` is what its linear layers are.
#[derive(Module, Debug)]
pub struct Llama<B: Backend, P> {
    /// `[v, d]`.
    pub embed_tokens: BaseWeight<B, 2>,
    /// The decoder layers, first to last.
    pub layers: Vec<DecoderLayer<B, P>>,
    /// The norm before `lm_head`.
    pub norm: RmsNorm<B>,
    /// `None` if the embeddings serve as output layer, too.
    pub lm_head: Option<P>,
    /// The numbers of `config.json`.
    #[module(skip)]
    pub config: LlamaConfig,
}

impl<B: ModelBackend, P: Projection<B>> Llama<B, P> {
    /// Token ids `[b, s]` to normed hidden states `[b, s, d]`.
    ///
    /// With a cache, the tokens follow those that it has seen; `rope` holds their positions.
    pub fn forward(
        &self,
        ids: Tensor<B, 2, Int>,
        rope: &Rope<B>,
        cache: Option<&mut KvCache<B>>,
    ) -> Tensor<B, 3> {
        let x = self.decode(self.embed(ids), rope, cache); // [b, s, d]
        let [b, s, d] = x.dims();
        self.norm.forward(x.reshape([b * s, d])).reshape([b, s, d])
    }

    /// Embeddings `[b, s, d]` through all decoder layers to hidden states `[b, s, d]`.
    pub fn decode(
        &self,
        mut x: Tensor<B, 3>,
        rope: &Rope<B>,
        mut cache: Option<&mut KvCache<B>>,
    ) -> Tensor<B, 3> {
        for (index, layer) in self.layers.iter().enumerate() {
            let cache = cache.as_deref_mut().map(|cache| cache.layer(index));
            x = layer.forward(x, rope, cache);
        }
        x
    }

    /// Token ids `[b, s]` to their embeddings `[b, s, d]`.
    pub fn embed(&self, ids: Tensor<B, 2, Int>) -> Tensor<B, 3> {
        let [b, s] = ids.dims();
        let table = self.embed_tokens.val();
        let [_, d] = table.dims();
        table.select(0, ids.reshape([b * s])).reshape([b, s, d])
    }

    /// Normed hidden states `[n, d]` to logits `[n, v]`.
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.lm_head {
            Some(lm_head) => lm_head.forward(hidden),
            None => ops::matmul(hidden, self.embed_tokens.val().transpose()),
        }
    }
}

impl<B: Backend, P> Llama<B, P> {
    /// Every linear layer with its name in the checkpoint (without `.weight`).
    pub fn projections_mut(&mut self) -> impl Iterator<Item = (String, &mut P)> {
        let layers = self.layers.iter_mut().enumerate();
        let layers = layers.flat_map(|(index, layer)| {
            let (self_attn, mlp) = (&mut layer.self_attn, &mut layer.mlp);
            let all = [
                ("self_attn.q_proj", &mut self_attn.q_proj),
                ("self_attn.k_proj", &mut self_attn.k_proj),
                ("self_attn.v_proj", &mut self_attn.v_proj),
                ("self_attn.o_proj", &mut self_attn.o_proj),
                ("mlp.gate_proj", &mut mlp.gate_proj),
                ("mlp.up_proj", &mut mlp.up_proj),
                ("mlp.down_proj", &mut mlp.down_proj),
            ];
            all.map(|(name, p)| (format!("model.layers.{index}.{name}"), p))
        });
        let head = self.lm_head.iter_mut();
        layers.chain(head.map(|p| ("lm_head".to_owned(), p)))
    }
}

/// One decoder layer: attention and feed-forward, each behind a norm and added to its input.
#[derive(Module, Debug)]
pub struct DecoderLayer<B: Backend, P> {
    /// Attention.
    pub self_attn: SelfAttention<B, P>,
    /// Feed-forward.
    pub mlp: Mlp<B, P>,
    /// The norm before attention.
    pub input_layernorm: RmsNorm<B>,
    /// The norm before feed-forward.
    pub post_attention_layernorm: RmsNorm<B>,
}

impl<B: ModelBackend, P: Projection<B>> DecoderLayer<B, P> {
    /// `[b, s, d]` to `[b, s, d]`.
    pub fn forward(
        &self,
        x: Tensor<B, 3>,
        rope: &Rope<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 3> {
        let [b, s, d] = x.dims();
        let x = x.reshape([b * s, d]); // [n, d]
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, [b, s], rope, cache);
        let normed = self.post_attention_layernorm.forward(x.clone());
        let x = x + self.mlp.forward(normed);
        x.reshape([b, s, d])
    }
}

/// Grouped-query attention with rotary positions.
#[derive(Module, Debug)]
pub struct SelfAttention<B: Backend, P> {
    /// `d` to `n_h · h_d`.
    pub q_proj: P,
    /// `d` to `n_kv · h_d`.
    pub k_proj: P,
    /// `d` to `n_kv · h_d`.
    pub v_proj: P,
    /// `n_h · h_d` to `d`.
    pub o_proj: P,
    /// `h_d`.
    pub head_dim: usize,
    /// The backend is known to the projections alone.
    pub backend: PhantomData<B>,
}

impl<B: ModelBackend, P: Projection<B>> SelfAttention<B, P> {
    /// `x` `[n, d]` to `[n, d]`, where `n = b · s`.
    pub fn forward(
        &self,
        x: Tensor<B, 2>,
        [b, s]: [usize; 2],
        rope: &Rope<B>,
        cache: Option<&mut LayerCache<B>>,
    ) -> Tensor<B, 2> {
        let n = b * s;
        let heads = |y: Tensor<B, 2>| {
            let [_, width] = y.dims();
            y.reshape([n, width / self.head_dim, self.head_dim]) // [n, heads, h_d]
        };
        let turned = |y| ops::rotary(heads(y), rope.cos.clone(), rope.sin.clone());
        let batch = |y: Tensor<B, 3>| {
            let [_, heads, h_d] = y.dims();
            y.reshape([b, s, heads, h_d])
        };
        let q = batch(turned(self.q_proj.forward(x.clone()))); // [b, s, n_h, h_d]
        let k = batch(turned(self.k_proj.forward(x.clone()))); // [b, s, n_kv, h_d]
        let v = batch(heads(self.v_proj.forward(x))); // [b, s, n_kv, h_d]
        let (k, v) = match cache {
            Some(cache) => cache.extend(k, v), // [b, t, n_kv, h_d]
            None => (k, v),
        };
        let [_, _, n_h, h_d] = q.dims();
        let out = ops::attention(q, k, v); // [b, s, n_h, h_d]
        self.o_proj.forward(out.reshape([n, n_h * h_d]))
    }
}

/// The gated feed-forward layer.
#[derive(Module, Debug)]
pub struct Mlp<B: Backend, P> {
    /// `d` to `i`.
    pub gate_proj: P,
    /// `d` to `i`.
    pub up_proj: P,
    /// `i` to `d`.
    pub down_proj: P,
    /// The backend is known to the projections alone.
    pub backend: PhantomData<B>,
}

impl<B: ModelBackend, P: Projection<B>> Mlp<B, P> {
    /// `[n, d]` to `[n, d]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        let gate = self.gate_proj.forward(x.clone()); // [n, i]
        let up = self.up_proj.forward(x); // [n, i]
        self.down_proj.forward(ops::swiglu(gate, up))
    }
}

/// Root-mean-square norm with a gain.
#[derive(Module, Debug)]
pub struct RmsNorm<B: Backend> {
    /// `[d]`.
    pub weight: BaseWeight<B, 1>,
    /// Added to the mean square.
    pub eps: f64,
}

impl<B: ModelBackend> RmsNorm<B> {
    /// `[n, d]` to `[n, d]`.
    pub fn forward(&self, x: Tensor<B, 2>) -> Tensor<B, 2> {
        ops::rms_norm(x, self.weight.val(), self.eps)
    }
}
