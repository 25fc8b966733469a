//! From a checkpoint, or from random numbers, to a model; and back to a checkpoint.

use std::marker::PhantomData;

use burn::tensor::{DType, Tensor, TensorData, backend::Backend};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::checkpoint::Checkpoint;
use crate::config::LlamaConfig;
use crate::error::{Error, Result};
use crate::linear::Linear;
use crate::llama::{DecoderLayer, LM_HEAD, Llama, Mlp, RmsNorm, SelfAttention};
use crate::ops::MatmulBackend;
use crate::weight::BaseWeight;

/// Reads the model that `config` describes, tensor by tensor.
///
/// # Errors
/// [`Error::Tensors`] with everything that is missing, unexpected or of another shape.
pub fn load<B: MatmulBackend>(
    config: &LlamaConfig,
    checkpoint: &Checkpoint,
    device: &B::Device,
) -> Result<Llama<B, Linear<B>>> {
    checkpoint.check(&config.tensors(), |name| is_redundant(config, name))?;
    let values = |name: &str, _: &[usize]| checkpoint.read(name);
    build(config, device, values, |source| source.linear())
}

/// Makes the model that `config` describes: `values` gives each tensor's elements by name and
/// shape, and `make` turns each linear layer into what it shall be, before the next one is read.
///
/// # Errors
/// Those of `values` and `make`.
pub fn build<B: MatmulBackend, P, E: From<Error>>(
    config: &LlamaConfig,
    device: &B::Device,
    values: impl FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    make: impl FnMut(LinearSource<B>) -> std::result::Result<P, E>,
) -> std::result::Result<Llama<B, P>, E> {
    Parts::new(config, device, values, make).llama()
}

/// Values for [`build`] that begin a model anew: normal with `initializer_range`, gains 1, biases
/// 0, as transformers' `_init_weights`; each tensor's numbers follow from `seed` and its name.
pub fn fresh(config: &LlamaConfig, seed: u64) -> impl Fn(&str, &[usize]) -> Result<Vec<f32>> {
    let deviation = config.initializer_range;
    move |name, shape| {
        let count = shape.iter().product();
        Ok(match shape {
            [_] if name.ends_with("bias") => vec![0.0; count],
            [_] => vec![1.0; count],
            _ => normal(seed, name, count, deviation),
        })
    }
}

/// The elements of tensors, by name and shape.
type Values<'a> = dyn FnMut(&str, &[usize]) -> Result<Vec<f32>> + 'a;

/// A linear layer that has not been read yet.
pub struct LinearSource<'a, B: Backend> {
    /// Its name in the checkpoint, without `.weight`.
    pub name: &'a str,
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Where the layer shall be.
    pub device: &'a B::Device,
    /// What its weight is multiplied in.
    pub dtype: DType,
    /// Most bytes of a tensor.
    largest: Option<u64>,
    has_bias: bool,
    values: &'a mut Values<'a>,
}

impl<B: Backend> LinearSource<'_, B> {
    /// The elements of the weight, row by row.
    ///
    /// # Errors
    /// Those of the values that the model is made of.
    pub fn weight(&mut self) -> Result<Vec<f32>> {
        (self.values)(&format!("{}.weight", self.name), &self.shape)
    }

    /// The bias `[out]`, if the layer has one.
    ///
    /// # Errors
    /// As [`LinearSource::weight`].
    pub fn bias(&mut self) -> Result<Option<Tensor<B, 1>>> {
        if !self.has_bias {
            return Ok(None);
        }
        let shape = [self.shape[0]];
        let values = (self.values)(&format!("{}.bias", self.name), &shape)?;
        Ok(Some(Tensor::from_data(
            TensorData::new(values, shape),
            self.device,
        )))
    }

    /// The layer as it is.
    ///
    /// # Errors
    /// As [`LinearSource::weight`].
    pub fn linear(mut self) -> Result<Linear<B>> {
        let options = (self.device, self.dtype);
        Ok(Linear {
            weight: BaseWeight::from_data(self.weight()?, self.shape, self.largest, options),
            bias: self.bias()?.map(BaseWeight::Frozen),
        })
    }
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

/// `count` numbers from `-bound` to `bound` that follow from `seed` and `name` alone.
pub fn uniform(seed: u64, name: &str, count: usize, bound: f32) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed ^ crate::weight::param_id(name).val());
    let values = (0..count).map(|_| rng.random_range(-bound..bound));
    values.collect()
}

/// Tensors that some checkpoints hold although they follow from the others.
pub fn is_redundant(config: &LlamaConfig, name: &str) -> bool {
    name.ends_with("rotary_emb.inv_freq")
        || (config.tie_word_embeddings && name == "lm_head.weight")
}

/// Makes the parts of a model one by one: [`build`] keeps them all; who drops each when it has been
/// computed with needs no memory for the model.
pub struct Parts<'a, B: Backend, V, M> {
    config: &'a LlamaConfig,
    device: &'a B::Device,
    dtype: DType,
    /// Most bytes of a tensor.
    largest: Option<u64>,
    /// Values of a tensor, by name and shape.
    values: V,
    /// What a linear layer becomes.
    make: M,
}

impl<'a, B: MatmulBackend, V, M, P, E> Parts<'a, B, V, M>
where
    V: FnMut(&str, &[usize]) -> Result<Vec<f32>>,
    M: FnMut(LinearSource<B>) -> std::result::Result<P, E>,
    E: From<Error>,
{
    /// `values` and `make` as in [`build`].
    pub fn new(config: &'a LlamaConfig, device: &'a B::Device, values: V, make: M) -> Self {
        Self {
            config,
            device,
            dtype: DType::F32,
            largest: B::largest_tensor(device),
            values,
            make,
        }
    }

    /// The same with embeddings and matrices of linear layers in `dtype`; the rest stays in f32.
    pub fn in_dtype(self, dtype: DType) -> Self {
        Self { dtype, ..self }
    }

    /// The same with matrices in parts that have no more than `largest` bytes, as on a device that takes
    /// no more.
    pub fn within(self, largest: u64) -> Self {
        let largest = Some(largest);
        Self { largest, ..self }
    }

    fn weight<const D: usize>(
        &mut self,
        name: &str,
        shape: [usize; D],
    ) -> Result<BaseWeight<B, D>> {
        let values = (self.values)(name, &shape)?;
        let (dtype, most) = match D {
            1 => (DType::F32, None),
            _ => (self.dtype, self.largest),
        };
        Ok(BaseWeight::from_data(
            values,
            shape,
            most,
            (self.device, dtype),
        ))
    }

    fn norm(&mut self, name: &str) -> Result<RmsNorm<B>> {
        Ok(RmsNorm {
            weight: self.weight(&format!("{name}.weight"), [self.config.hidden_size])?,
            eps: self.config.rms_norm_eps,
        })
    }

    fn linear(
        &mut self,
        name: &str,
        shape: [usize; 2],
        has_bias: bool,
    ) -> std::result::Result<P, E> {
        (self.make)(LinearSource {
            name,
            shape,
            device: self.device,
            dtype: self.dtype,
            largest: self.largest,
            has_bias,
            values: &mut self.values,
        })
    }

    /// A decoder layer.
    ///
    /// # Errors
    /// Those of `values` and `make`.
    pub fn layer(&mut self, index: usize) -> std::result::Result<DecoderLayer<B, P>, E> {
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

    /// The norm before `lm_head`.
    ///
    /// # Errors
    /// Those of `values`.
    pub fn final_norm(&mut self) -> Result<RmsNorm<B>> {
        self.norm("model.norm")
    }

    /// All of them.
    ///
    /// # Errors
    /// Those of `values` and `make`.
    pub fn llama(mut self) -> std::result::Result<Llama<B, P>, E> {
        let vocab = [self.config.vocab_size, self.config.hidden_size];
        Ok(Llama {
            embed_tokens: self.weight("model.embed_tokens.weight", vocab)?,
            layers: (0..self.config.num_hidden_layers)
                .map(|index| self.layer(index))
                .collect::<std::result::Result<_, E>>()?,
            norm: self.final_norm()?,
            lm_head: match self.config.tie_word_embeddings {
                true => None,
                false => Some(self.linear(LM_HEAD, vocab, false)?),
            },
            virtual_tokens: None,
            adapted_embeddings: None,
            config: self.config.clone(),
        })
    }
}
