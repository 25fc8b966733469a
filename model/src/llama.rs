//! The Llama decoder. Field names are checkpoint names.
//!
//! Shapes: `n` tokens, `m` keys, `d` hidden, `n_h` heads, `n_kv` KV heads, `h_d` head dim,
//! `i` intermediate, `v` vocabulary. The tokens are those of one row or of several end to end.
//!
//! Source: <https://arxiv.org/abs/2302.13971>, <https://arxiv.org/abs/2407.21783>,
//! `transformers/models/llama/modeling_llama.py`.

use std::marker::PhantomData;

use burn::module::Module;
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};

use crate::config::LlamaConfig;
use crate::kv_cache::{KvCache, LayerCache};
use crate::linear::Projection;
use crate::ops::{self, ModelBackend};
use crate::rope::Rope;
use crate::virtual_tokens::{self, Place, Prefix, VirtualTokens};
use crate::weight::BaseWeight;

/// The module of the embeddings, as checkpoints name it.
pub const EMBED_TOKENS: &str = "model.embed_tokens";
/// The module of the output layer.
pub const LM_HEAD: &str = "lm_head";

/// A causal language model; `P` is what its linear layers are.
#[derive(Module, Debug)]
pub struct Llama<B: Backend, P> {
    /// `[v, d]`.
    pub embed_tokens: BaseWeight<B, 2>,
    /// The embeddings as a linear layer `[d, v]`, if something is trained beside them; the output
    /// layer, if that is the embeddings, too, knows nothing of it.
    pub adapted_embeddings: Option<P>,
    /// The decoder layers, first to last.
    pub layers: Vec<DecoderLayer<B, P>>,
    /// The norm before `lm_head`.
    pub norm: RmsNorm<B>,
    /// `None` if the embeddings serve as output layer, too.
    pub lm_head: Option<P>,
    /// What stands in front of every row, in place of words.
    pub virtual_tokens: Option<VirtualTokens<B>>,
    /// The numbers of `config.json`.
    #[module(skip)]
    pub config: LlamaConfig,
}

impl<B: ModelBackend, P: Projection<B>> Llama<B, P> {
    /// Token ids `[n]` to normed hidden states `[n, d]`; `rope` says where the tokens stand.
    ///
    /// With a cache, the tokens of a row follow those of it that the cache has seen.
    pub fn forward(
        &self,
        ids: Tensor<B, 1, Int>,
        rope: &Rope<B>,
        cache: Option<&mut KvCache<B>>,
    ) -> Tensor<B, 2> {
        let input = self.input(ids, rope);
        let tokens = input.tokens.clone();
        self.norm.forward(only(self.decode(input, cache), tokens))
    }

    /// Token ids `[n]` to what the decoder layers read.
    ///
    /// Virtual tokens come in here, in front of the rows that begin here; `rope` does not count them.
    pub fn input(&self, ids: Tensor<B, 1, Int>, rope: &Rope<B>) -> Input<B> {
        let x = self.embed(ids);
        match &self.virtual_tokens {
            None => Input {
                x,
                rope: rope.clone(),
                prefix: None,
                tokens: None,
            },
            Some(virtual_tokens) => self.behind(virtual_tokens, x, rope),
        }
    }

    /// Embeddings `[n, d]` of tokens that stand behind virtual ones.
    fn behind(
        &self,
        virtual_tokens: &VirtualTokens<B>,
        x: Tensor<B, 2>,
        rope: &Rope<B>,
    ) -> Input<B> {
        let (segments, p) = (&rope.segments, virtual_tokens.count());
        let device = x.device();
        let rope = |segments| Rope::new(&self.config, segments, &device);
        let later = segments.clone().after(segments.seen() + p);
        if segments.seen() > 0 {
            return Input {
                x,
                rope: rope(later), // the cache has them
                prefix: None,
                tokens: None,
            };
        }
        let indices = |places: Vec<i64>| {
            let shape = [places.len()];
            Tensor::from_data(TensorData::new(places, shape), &device)
        };
        let (tasks, blocks) = virtual_tokens.tasks_of(segments);
        let places = indices(virtual_tokens::places(segments, &blocks, tasks.len(), p));
        let encoded = virtual_tokens.encode(&tasks);
        match virtual_tokens.place {
            Place::Embeddings => Input {
                x: virtual_tokens::in_front(encoded, x, places),
                rope: rope(segments.clone().longer_by(p)),
                prefix: None,
                tokens: Some(indices(virtual_tokens::tokens(segments, p))),
            },
            Place::KeysAndValues => {
                let [_, width] = encoded.dims();
                let parts = 2 * self.config.num_hidden_layers;
                let keys_and_values = encoded.reshape([p, parts, width / parts]).swap_dims(0, 1);
                Input {
                    x,
                    rope: rope(later),
                    prefix: Some(Prefix {
                        keys_and_values,
                        places,
                    }),
                    tokens: None,
                }
            }
        }
    }

    /// What the layers make of their input: hidden states of all positions, `[m, d]`.
    pub fn decode(&self, input: Input<B>, mut cache: Option<&mut KvCache<B>>) -> Tensor<B, 2> {
        let Input {
            mut x,
            rope,
            prefix,
            ..
        } = input;
        if let (Some(cache), Some(prefix)) = (cache.as_deref_mut(), &prefix) {
            cache.begin(
                prefix,
                self.config.num_key_value_heads,
                rope.segments.rows(),
            );
        }
        for (index, layer) in self.layers.iter().enumerate() {
            let past = match cache.as_deref_mut() {
                Some(cache) => Past::Cache(cache.layer(index)),
                None => Past::of(&prefix, index),
            };
            x = layer.forward(x, &rope, past);
        }
        x
    }

    /// Token ids `[n]` to their embeddings `[n, d]`, in f32.
    fn embed(&self, ids: Tensor<B, 1, Int>) -> Tensor<B, 2> {
        match &self.adapted_embeddings {
            Some(embeddings) => embeddings.embed(ids),
            None => self.embed_tokens.select(ids),
        }
    }

    /// Normed hidden states `[n, d]` to logits `[n, v]`.
    pub fn logits(&self, hidden: Tensor<B, 2>) -> Tensor<B, 2> {
        match &self.lm_head {
            Some(lm_head) => lm_head.forward(hidden),
            None => self.embed_tokens.product(hidden),
        }
    }
}

impl<B: Backend, P> Llama<B, P> {
    /// Every linear layer with its name in the checkpoint (without `.weight`), embeddings among them
    /// where they are one.
    pub fn projections(&self) -> impl Iterator<Item = (String, &P)> {
        let embeddings = self.adapted_embeddings.iter();
        let embeddings = embeddings.map(|p| (EMBED_TOKENS.to_owned(), p));
        let layers = self.layers.iter().enumerate();
        let layers = layers.flat_map(|(index, layer)| {
            let (self_attn, mlp) = (&layer.self_attn, &layer.mlp);
            let all = [
                ("self_attn.q_proj", &self_attn.q_proj),
                ("self_attn.k_proj", &self_attn.k_proj),
                ("self_attn.v_proj", &self_attn.v_proj),
                ("self_attn.o_proj", &self_attn.o_proj),
                ("mlp.gate_proj", &mlp.gate_proj),
                ("mlp.up_proj", &mlp.up_proj),
                ("mlp.down_proj", &mlp.down_proj),
            ];
            all.map(|(name, p)| (format!("model.layers.{index}.{name}"), p))
        });
        let head = self.lm_head.iter().map(|p| (LM_HEAD.to_owned(), p));
        embeddings.chain(layers).chain(head)
    }

    /// The same to change them.
    pub fn projections_mut(&mut self) -> impl Iterator<Item = (String, &mut P)> {
        let embeddings = self.adapted_embeddings.iter_mut();
        let embeddings = embeddings.map(|p| (EMBED_TOKENS.to_owned(), p));
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
        let head = self.lm_head.iter_mut().map(|p| (LM_HEAD.to_owned(), p));
        embeddings.chain(layers).chain(head)
    }
}

/// What the decoder layers read. Shapes: `m` positions, of which `n` are tokens.
#[derive(Debug, Clone)]
pub struct Input<B: Backend> {
    /// The embeddings `[m, d]`, those of virtual tokens among them.
    pub x: Tensor<B, 2>,
    /// Where they stand.
    pub rope: Rope<B>,
    /// What every row's tokens attend to before themselves: of all layers, `[2l, p, w]`.
    pub prefix: Option<Prefix<B>>,
    /// Which of the positions are tokens, `[n]`, if not all are.
    pub tokens: Option<Tensor<B, 1, Int>>,
}

/// Of values `[m, ..]` those of the tokens, `[n, ..]`.
pub fn only<B: Backend>(x: Tensor<B, 2>, tokens: Option<Tensor<B, 1, Int>>) -> Tensor<B, 2> {
    match tokens {
        Some(tokens) => x.select(0, tokens),
        None => x,
    }
}

/// What a layer's tokens attend to before themselves.
pub enum Past<'a, B: Backend> {
    /// Nothing.
    Nothing,
    /// Learned keys and values.
    Prefix(Prefix<B>),
    /// Those of the passes so far; it takes up what is new.
    Cache(&'a mut LayerCache<B>),
}

impl<B: Backend> Past<'_, B> {
    /// What a layer finds in the prefix of all of them.
    pub fn of(prefix: &Option<Prefix<B>>, layer: usize) -> Self {
        match prefix {
            Some(prefix) => Self::Prefix(prefix.layer(layer)),
            None => Self::Nothing,
        }
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
    /// `[n, d]` to `[n, d]`.
    pub fn forward(&self, x: Tensor<B, 2>, rope: &Rope<B>, past: Past<'_, B>) -> Tensor<B, 2> {
        let normed = self.input_layernorm.forward(x.clone());
        let x = x + self.self_attn.forward(normed, rope, past);
        let normed = self.post_attention_layernorm.forward(x.clone());
        x + self.mlp.forward(normed)
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
    /// `[n, d]` to `[n, d]`.
    pub fn forward(&self, x: Tensor<B, 2>, rope: &Rope<B>, past: Past<'_, B>) -> Tensor<B, 2> {
        let heads = |y: Tensor<B, 2>| {
            let [n, width] = y.dims();
            y.reshape([n, width / self.head_dim, self.head_dim])
        };
        let turned = |y| ops::rotary(heads(y), rope.cos.clone(), rope.sin.clone());
        let [n, _] = x.dims();
        let (q, (k, v)) = B::join(
            n,
            || turned(self.q_proj.forward(x.clone())), // [n, n_h, h_d]
            || {
                let k = turned(self.k_proj.forward(x.clone())); // [n, n_kv, h_d]
                (k, heads(self.v_proj.forward(x.clone()))) // [n, n_kv, h_d]
            },
        );
        let (k, v) = match past {
            Past::Nothing => (k, v),
            Past::Prefix(prefix) => prefix.before(k, v), // [m, n_kv, h_d]
            Past::Cache(cache) => cache.extend(k, v, rope.segments.rows()), // [m, n_kv, h_d]
        };
        let [n, n_h, h_d] = q.dims();
        let out = ops::attention(q, k, v, &rope.segments); // [n, n_h, h_d]
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
        let [n, _] = x.dims();
        let (gate, up) = B::join(
            n,
            || self.gate_proj.forward(x.clone()), // [n, i]
            || self.up_proj.forward(x.clone()),   // [n, i]
        );
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
