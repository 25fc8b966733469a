//! From a checkpoint, or from random numbers, to a model; and back to a checkpoint.

use std::marker::PhantomData;

use burn::tensor::{Tensor, TensorData, backend::Backend};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::Checkpoint;
use crate::config::LlamaConfig;
use crate::error::Result;
use crate::linear::Linear;
use crate::llama::{DecoderLayer, Llama, Mlp, RmsNorm, SelfAttention};
use crate::weight::BaseWeight;

/// Reads the model that `config` describes, tensor by tensor.
///
/// `make` gets each linear layer with its name as soon as it is read, so that what it drops or
/// shrinks is never held for the whole model.
///
/// # Errors
/// [`crate::Error::Tensors`] with everything that is missing, unexpected or of another shape.
pub fn load<B: Backend, P>(
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    device: &B::Device,
    make: impl FnMut(&str, Linear<B>) -> P,
) -> Result<Llama<B, P>> {
    checkpoint.check(&config.tensors(), |name| is_redundant(config, name))?;
    let values = |name: &str, _: &[usize]| checkpoint.read(name);
    Builder {
        config,
        device,
        values,
        make,
    }
    .llama()
}

/// Makes a model with fresh weights: normal with `initializer_range`, gains 1, biases 0, as
/// transformers' `_init_weights`; each tensor's numbers follow from `seed` and its name.
pub fn init<B: Backend, P>(
    config: &LlamaConfig,
    seed: u64,
    device: &B::Device,
    make: impl FnMut(&str, Linear<B>) -> P,
) -> Llama<B, P> {
    let fresh = |name: &str, shape: &[usize]| -> Result<Vec<f32>> {
        let count = shape.iter().product();
        Ok(match shape {
            [_] if name.ends_with("bias") => vec![0.0; count],
            [_] => vec![1.0; count],
            _ => normal(seed, name, count, config.initializer_range),
        })
    };
    let builder = Builder {
        config,
        device,
        values: fresh,
        make,
    };
    builder.llama().expect("fresh values cannot fail")
}

/// `count` normally distributed numbers that follow from `seed` and `name` alone.
pub fn normal(seed: u64, name: &str, count: usize, deviation: f64) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ crate::weight::param_id(name).val());
    // Box and Muller, 1958: two uniform numbers make two normal ones.
    let pairs = (0..count.div_ceil(2)).flat_map(|_| {
        let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let angle = std::f64::consts::TAU * rng.random::<f64>();
        [radius * angle.cos(), radius * angle.sin()]
    });
    pairs.take(count).map(|x| (x * deviation) as f32).collect()
}

/// Tensors that some checkpoints hold although they follow from the others.
fn is_redundant(config: &LlamaConfig, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || (config.tie_word_embeddings && name == "lm_head.weight")
}

/// Makes modules out of named values.
struct Builder<'a, B: Backend, V, M> {
    config: &'a LlamaConfig,
    device: &'a B::Device,
    /// Values of a tensor, by name and shape.
    values: V,
    /// What a linear layer becomes.
    make: M,
}

impl<B: Backend, V, M, P> Builder<'_, B, V, M>
where
    V: FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    M: FnMut(&str, Linear<B>) -> P,
{
    fn weight<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<BaseWeight<B, D>> {
        let values = (self.values)(name, &shape)?;
        let data = TensorData::new(values, shape);
        Ok(BaseWeight::Frozen(Tensor::from_data(data, self.device)))
    }

    fn norm(&mut self, name: &str) -> Result<RmsNorm<B>> {
        Ok(RmsNorm {
            weight: self.weight(&format!("{name}.weight"), [self.config.hidden_size])?,
            eps: self.config.rms_norm_eps,
        })
    }

    fn linear(&mut self, name: &str, [out, r#in]: [usize; 2], bias: bool) -> Result<P> {
        let weight = self.weight(&format!("{name}.weight"), [out, r#in])?;
        let bias = match bias {
            true => Some(self.weight(&format!("{name}.bias"), [out])?),
            false => None,
        };
        Ok((self.make)(name, Linear { weight, bias }))
    }

    fn layer(&mut self, index: usize) -> Result<DecoderLayer<B, P>> {
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let config = self.config;
        let [q, k, v, o, gate, up, down] = config.projections();
        let mut linear = |(part, shape, bias)| self.linear(&name(part), shape, bias);
        let self_attn = SelfAttention {
            q_proj: linear(q)?,
            k_proj: linear(k)?,
            v_proj: linear(v)?,
            o_proj: linear(o)?,
            head_dim: config.head_dim,
            backend: PhantomData,
        };
        let mlp = Mlp {
            gate_proj: linear(gate)?,
            up_proj: linear(up)?,
            down_proj: linear(down)?,
            backend: PhantomData,
        };
        Ok(DecoderLayer {
            self_attn,
            mlp,
            input_layernorm: self.norm(&name("input_layernorm"))?,
            post_attention_layernorm: self.norm(&name("post_attention_layernorm"))?,
        })
    }

    fn llama(mut self) -> Result<Llama<B, P>> {
        let vocab = [self.config.vocab_size, self.config.hidden_size];
        Ok(Llama {
            embed_tokens: self.weight("model.embed_tokens.weight", vocab)?,
            layers: (0..self.config.num_hidden_layers)
                .map(|index| self.layer(index))
                .collect::<Result<_>>()?,
            norm: self.norm("model.norm")?,
            lm_head: match self.config.tie_word_embeddings {
                true => None,
                false => Some(self.linear("lm_head", vocab, false)?),
            },
            config: self.config.clone(),
        })
    }
}
