//! What a run holds when it holds the most: a prediction from the shapes alone.
//!
//! A run has five moments at which it may hold the most: while it loads, at the loss, at both ends
//! of the backward pass, and when the weights are updated. Each is one function of [`Work`] that
//! says what is there then; numbers are f32 but for frozen weights and what they are multiplied with.
//!
//! Shapes: `n` tokens of a micro batch, `d` hidden, `n_h` heads, `n_kv` KV heads, `h_d` head dim,
//! `i` intermediate, `v` vocabulary, `r` rank.

use std::collections::BTreeMap;

use adapters::Method;
use model::config::LlamaConfig;
use model::llama::{EMBED_TOKENS, LM_HEAD};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::recipe::{ComputeDtype, Recompute};
use crate::step::LOGITS_AT_A_TIME;
use crate::trained::Trained;

/// Gaps between the buffers of the heap, as a share of what is kept for backward: a layer frees
/// buffers of several sizes between those that it keeps, and what comes next does not fill them.
///
/// Empirical, on the CPU with glibc: the peaks of SmolLM2-135M with 256 to 4,096 tokens, dense and
/// in NF4, are so much of the activations and of the logits above what is allocated.
const GAPS: f64 = 0.025;
/// The same as a share of the logits, the largest buffers of a step.
const GAPS_OF_LOGITS: f64 = 0.75;

/// What computing adds to the program: pages of it that nothing touched before, threads, and the
/// parts of matrices that `gemm` packs.
///
/// Empirical, on the CPU.
const COMPUTING: u64 = 10 << 20;

/// A tile of a 4-bit weight that is decoded on the CPU, see `quant::matmul`.
const DECODED_TILE: u64 = 4 << 20;

/// What a run holds when it holds the most, in bytes, by part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Memory {
    /// The program itself, its tokenizer and the rows.
    pub program: u64,
    /// The base model.
    pub weights: u64,
    /// What is trained beside it; in a step also as it was before the last update, to fall back on.
    pub adapter: u64,
    /// Gradients of what is trained.
    pub gradients: u64,
    /// AdamW's two moments of what is trained.
    pub optimizer: u64,
    /// What backward needs of the forward pass.
    pub activations: u64,
    /// What exists for a moment only, but the logits: buffers inside of a layer, or all that the
    /// layer keeps which is computed again; a tensor that is being read or updated.
    pub workspace: u64,
    /// Logits and their gradient.
    pub logits: u64,
    /// Between the buffers.
    pub gaps: u64,
}

impl Memory {
    /// All parts together.
    pub fn total(&self) -> u64 {
        self.parts().iter().map(|(_, bytes)| bytes).sum()
    }

    /// Whether a run that holds no more than this, of which the program is there already, fits into
    /// the memory available: a tenth of that is for what a prediction may be off. Memory that nobody
    /// knows suffices.
    pub fn fits(&self, available_bytes: Option<u64>) -> bool {
        let needed = self.total() - self.program;
        available_bytes.is_none_or(|there| needed <= there / 10 * 9)
    }

    /// The parts with their names.
    pub fn parts(&self) -> [(&'static str, u64); 9] {
        [
            ("program", self.program),
            ("weights", self.weights),
            ("adapter", self.adapter),
            ("gradients", self.gradients),
            ("optimizer", self.optimizer),
            ("activations", self.activations),
            ("workspace", self.workspace),
            ("logits", self.logits),
            ("gaps", self.gaps),
        ]
    }
}

/// A prediction beside what was measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Compared {
    /// What [`Work::predict`] said before the run.
    pub predicted: Memory,
    /// The sum of its parts.
    pub predicted_bytes: u64,
    /// Most memory that the process has held, see
    /// [`peak_memory_bytes`](crate::run_folder::peak_memory_bytes); on a GPU, whose own memory it
    /// does not count, nothing.
    pub measured_bytes: Option<u64>,
}

/// Where a run computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// In the memory of this process, which holds `program` bytes before anything is loaded.
    Host {
        /// The program, its tokenizer and the rows.
        program: u64,
    },
    /// In the memory of a graphics card.
    Device,
}

/// What decides how much memory a run takes.
#[derive(Debug, Clone, Copy)]
pub struct Work<'a> {
    /// What is trained.
    pub trained: &'a Trained,
    /// The shape of the model.
    pub config: &'a LlamaConfig,
    /// Whether the linear layers of the decoder are in 4 bits.
    pub quantised: bool,
    /// Bytes of the base model's weights, see `adapters::base_bytes`.
    pub weights: u64,
    /// Tokens of the largest micro batch.
    pub tokens: usize,
    /// What frozen weights are multiplied in.
    pub compute_dtype: ComputeDtype,
    /// Whether an optimizer step is more than one micro batch.
    pub accumulates: bool,
    /// Whether decoder layers are computed again.
    pub recompute: bool,
    /// Where.
    pub place: Place,
}

impl Work<'_> {
    /// What the run holds at the moment when it holds the most.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if the adapter does not fit the model.
    pub fn predict(&self) -> Result<Memory> {
        let trained = self.updated()?;
        let moments = [self.loading(), self.step()?, self.update(trained)];
        Ok(most(moments))
    }

    /// What it holds when it holds the most between the beginning of a step and its update.
    ///
    /// # Errors
    /// As [`Work::predict`].
    pub fn step(&self) -> Result<Memory> {
        let layers = Kept::of(self.trained, self.config, self.tokens)?.layers();
        let trained = self.updated()?;
        Ok(most([
            self.loss(&layers, trained),
            self.backward(&layers, trained),
            self.end_of_backward(&layers, trained),
        ]))
    }

    fn updated(&self) -> Result<Updated> {
        let parameters = self.trained.parameters(self.config)?;
        let sizes = parameters.iter().map(|(_, shape)| product(shape));
        let whole = |module: &str| {
            let found = parameters
                .iter()
                .find(|(name, _)| name.strip_suffix(".weight") == Some(module));
            bytes(found.map_or(0, |(_, shape)| product(shape)))
        };
        let method = self.trained.method();
        let embeddings = whole(EMBED_TOKENS);
        Ok(Updated {
            all: bytes(sizes.clone().sum()),
            largest: bytes(sizes.max().unwrap_or(0)),
            embeddings,
            head: match self.config.tie_word_embeddings {
                true => embeddings,
                false => whole(LM_HEAD),
            },
            frozen: match self.trained {
                Trained::Full => 0,
                Trained::Adapter(adapter) => bytes(adapter.num_frozen(self.config)?.into()),
            },
            remembered: method.map_or(0, |method| method.remembers() as u64),
        })
    }

    /// Settles whether layers are computed again, by the memory available if the recipe leaves it to
    /// that, and predicts.
    ///
    /// # Errors
    /// As [`Work::predict`].
    pub fn settle_recompute(
        &mut self,
        asked: Recompute,
        available_bytes: Option<u64>,
    ) -> Result<Memory> {
        self.recompute = asked == Recompute::Block;
        let memory = self.predict()?;
        if asked != Recompute::Auto || memory.fits(available_bytes) {
            return Ok(memory);
        }
        self.recompute = true;
        self.predict()
    }

    /// Tensors are read one after the other, the output layer last. While one is read, as much of the
    /// file is there, mostly in 16 bits, and the numbers of one that is to be quantised.
    fn loading(&self) -> Memory {
        let config = self.config;
        let head = match config.tie_word_embeddings {
            true => 0,
            false => bytes(product(&[config.vocab_size, config.hidden_size])),
        };
        let linear = bytes(self.largest_linear());
        let numbers = if self.quantised { linear } else { 0 };
        let last_layer = (self.weights.saturating_sub(head)) + numbers + linear / 2;
        let last = self.weights + head / 2;
        Memory {
            workspace: match self.place {
                Place::Host { .. } => last.max(last_layer) - self.weights,
                Place::Device => 0,
            },
            ..self.held(Updated::default())
        }
    }

    /// What is there from the first step to the last.
    fn held(&self, trained: Updated) -> Memory {
        Memory {
            program: match self.place {
                Place::Host { program } => program + COMPUTING,
                Place::Device => 0,
            },
            weights: self.weights,
            adapter: match self.trained {
                Trained::Full => 0, // they are the weights
                Trained::Adapter(_) => trained.all + trained.frozen,
            },
            optimizer: (2 + trained.remembered) * trained.all,
            gradients: match self.accumulates {
                true => trained.all, // of the micro batches before
                false => 0,
            },
            ..Memory::default()
        }
    }

    /// What is there while a step computes: the run then holds the last good adapter, too, see
    /// `fit::guard`.
    fn held_in_a_step(&self, trained: Updated) -> Memory {
        let held = self.held(trained);
        Memory {
            adapter: 2 * held.adapter,
            gaps: self.gaps(bytes(self.logits()), GAPS_OF_LOGITS),
            ..held
        }
    }

    /// Elements of the logits that exist at a time.
    fn logits(&self) -> u128 {
        let all = self.tokens as u128 * self.config.vocab_size as u128;
        all.min(LOGITS_AT_A_TIME as u128)
    }

    /// What lies between buffers of so many bytes on the heap.
    fn gaps(&self, bytes: u64, share: f64) -> u64 {
        match self.place {
            Place::Host { .. } => (bytes as f64 * share) as u64,
            Place::Device => 0,
        }
    }

    /// What the layers keep from forward to backward, with the gaps between it.
    fn kept(&self, layers: &[u64], memory: Memory) -> Memory {
        let (n, d) = (self.tokens as u128, self.config.hidden_size as u128);
        let ends = 3 * n * d; // hidden states before and after the norm, and those that predict
        let layers = match self.recompute {
            true => d * layers.len() as u128, // their inputs
            false => layers.iter().map(|layer| u128::from(*layer)).sum(),
        };
        let activations = bytes(n * layers + ends);
        Memory {
            activations,
            gaps: memory.gaps + self.gaps(activations, GAPS),
            ..memory
        }
    }

    /// Everything is kept, and logits exist for a part of the tokens; their gradient takes their
    /// place. An output layer that is trained has its gradient of that part beside that of those
    /// before.
    fn loss(&self, layers: &[u64], trained: Updated) -> Memory {
        let (n, d) = (self.tokens as u128, self.config.hidden_size as u128);
        let logits = n * self.config.vocab_size as u128;
        let at_a_time = self.logits();
        let held = self.held_in_a_step(trained);
        let before = match logits > LOGITS_AT_A_TIME as u128 {
            true => held.gradients.max(trained.head),
            false => held.gradients,
        };
        Memory {
            logits: bytes(at_a_time) + self.narrow(at_a_time),
            workspace: bytes(n * d), // their gradients so far
            gradients: before + trained.head,
            ..self.kept(layers, held)
        }
    }

    /// The last layer is differentiated, and the others wait.
    fn backward(&self, layers: &[u64], trained: Updated) -> Memory {
        let held = self.held_in_a_step(trained);
        Memory {
            workspace: self.inside_of_a_layer(layers),
            gradients: held.gradients.max(trained.head),
            ..self.kept(layers, held)
        }
    }

    /// The first layer is differentiated, or the embeddings are, and all gradients are there; those
    /// of embeddings once more if they are the output layer, too.
    fn end_of_backward(&self, layers: &[u64], trained: Updated) -> Memory {
        let held = self.held_in_a_step(trained);
        let again = match self.config.tie_word_embeddings {
            true => trained.embeddings,
            false => 0,
        };
        Memory {
            gradients: held.gradients + trained.all + again,
            workspace: self.inside_of_a_layer(layers).max(trained.embeddings),
            ..held
        }
    }

    /// Gradients inside of a layer; those of the gate, of the up projection and of their input, with
    /// dropout a mask and what it leaves of an input, too, and with recompute all that the layer keeps.
    fn inside_of_a_layer(&self, layers: &[u64]) -> u64 {
        let n = self.tokens as u128;
        let (d, i) = (
            self.config.hidden_size as u128,
            self.config.intermediate_size as u128,
        );
        let again = match self.recompute {
            true => layers.iter().copied().max().unwrap_or(0).into(),
            false => 0,
        };
        let wide = if self.trained.method().is_some_and(Method::is_random) {
            4
        } else {
            2
        };
        let linear = n * (wide * i + 2 * d + again);
        bytes(linear) + self.narrow(n * (d + i)) + self.decoded_weights()
    }

    /// What 4-bit weights are decoded to for a product: a tile on the CPU, else the layer.
    fn decoded_weights(&self) -> u64 {
        match (self.quantised, self.place) {
            (false, _) => 0,
            (true, Place::Host { .. }) => DECODED_TILE,
            (true, Place::Device) => match self.is_narrow() {
                true => bytes(self.largest_linear()) / 2,
                false => bytes(self.largest_linear()),
            },
        }
    }

    fn is_narrow(&self) -> bool {
        self.compute_dtype.dtype().size() < size_of::<f32>()
    }

    /// So many numbers in 16 bits beside themselves, if products are computed in those.
    fn narrow(&self, numbers: u128) -> u64 {
        if self.is_narrow() {
            bytes(numbers) / 2
        } else {
            0
        }
    }

    /// Numbers of the largest linear layer of the decoder.
    fn largest_linear(&self) -> u128 {
        let layers = self.config.projections();
        let sizes = layers.iter().map(|(_, shape, _)| product(shape));
        sizes.max().unwrap_or(0)
    }

    /// AdamW makes the new weights while the learner still holds the old ones; each new one takes
    /// the place of its gradient. On a graphics card there are three temporaries of the tensor at hand.
    fn update(&self, trained: Updated) -> Memory {
        Memory {
            gradients: trained.all,
            workspace: match self.place {
                Place::Host { .. } => 0,
                Place::Device => 3 * trained.largest,
            },
            ..self.held(trained)
        }
    }
}

/// Bytes of what is trained.
#[derive(Debug, Clone, Copy, Default)]
struct Updated {
    all: u64,
    largest: u64,
    /// The embeddings and the output layer, if they are trained as a whole; both are the same if
    /// they are tied.
    embeddings: u64,
    head: u64,
    /// Of what belongs to the adapter and is not trained.
    frozen: u64,
    /// Numbers that the method remembers from step to step for each that is trained.
    remembered: u64,
}

fn most<const N: usize>(moments: [Memory; N]) -> Memory {
    let most = moments.into_iter().max_by_key(Memory::total);
    most.expect("there is one")
}

fn product(shape: &[usize]) -> u128 {
    shape.iter().map(|n| *n as u128).product()
}

/// Bytes of numbers in f32; of more than there can be, a lot, which can still be added up.
fn bytes(numbers: u128) -> u64 {
    let most = u128::from(u64::MAX / 32);
    numbers.saturating_mul(size_of::<f32>() as u128).min(most) as u64
}

/// What the decoder layers keep of each token for backward.
struct Kept<'a> {
    config: &'a LlamaConfig,
    /// Numbers a token that the trained modules keep, by name; none for one that is trained as a
    /// whole.
    modules: BTreeMap<String, usize>,
    /// Whether what is trained stands in front of the rows.
    in_front: bool,
}

impl<'a> Kept<'a> {
    fn of(trained: &Trained, config: &'a LlamaConfig, tokens: usize) -> Result<Self> {
        let mut modules = BTreeMap::new();
        for (name, _) in trained.parameters(config)? {
            let (module, _) = name.rsplit_once('.').unwrap_or((&name, ""));
            modules.insert(module.to_owned(), 0);
        }
        if let Trained::Adapter(adapter) = trained {
            for layer in adapter.layers(config)? {
                let [each, beside] = adapter.method.kept(&layer);
                modules.insert(layer.name, each + beside.div_ceil(tokens.max(1)));
            }
        }
        let in_front = match trained {
            Trained::Adapter(adapter) => !adapter.method.changes_layers(),
            Trained::Full => false,
        };
        Ok(Self {
            config,
            modules,
            in_front,
        })
    }

    /// Numbers a token, for each layer from the first trained one on: those below it keep nothing.
    fn layers(&self) -> Vec<u64> {
        let all = 0..self.config.num_hidden_layers;
        let trained = |index: &usize| {
            let start = format!("model.layers.{index}.");
            self.modules.keys().any(|name| name.starts_with(&start))
        };
        let first = match self.modules.contains_key(EMBED_TOKENS) || self.in_front {
            true => 0,
            false => all.clone().find(trained).unwrap_or(all.end),
        };
        (first..all.end).map(|index| self.layer(index)).collect()
    }

    /// Numbers a token that one layer keeps.
    ///
    /// What an operation keeps is the state of its backward in `model::ops`; a frozen weight keeps
    /// nothing, and the input of a trained one, the output of a norm, of attention or of the gate,
    /// is kept by that already or computed again.
    fn layer(&self, index: usize) -> u64 {
        let config = self.config;
        let (d, i) = (config.hidden_size, config.intermediate_size);
        let q = config.num_attention_heads * config.head_dim;
        let kv = config.num_key_value_heads * config.head_dim;
        let norms = 2 * d; // their inputs
        let attention = 2 * (q + kv) + config.num_attention_heads; // q, k, v, output, log-sum-exp
        let swiglu = 2 * i; // gate and up
        let start = format!("model.layers.{index}.");
        let adapters = self
            .modules
            .iter()
            .filter(|(name, _)| name.starts_with(&start) || (index == 0 && *name == EMBED_TOKENS));
        let narrow: usize = adapters.map(|(_, kept)| kept).sum();
        (norms + attention + swiglu + narrow) as u64
    }
}
