//! Tokens a second beside what the memory allows: a token reads every weight once, so no machine
//! generates faster than its bandwidth ÷ the bytes of the weights. SmolLM2-135M's shape with random
//! weights, the base in f32 and on NF4, each without and with LoRA r 16 on every linear layer.
//!
//! `cargo bench --workspace --profile dev --bench generation`. The bandwidth is measured in turns
//! with the cases, by reading a buffer with all cores, so that whatever else the machine does meets
//! both; medians of all rounds.

use std::hint::black_box;
use std::ops::ControlFlow;
use std::time::Instant;

use adapters::{AdaptedLlama, attach};
use burn::backend::Flex;
use model::checkpoint::{Checkpoint, LazyTensor, encode, write_lazily};
use model::config::LlamaConfig;
use model::generate::{Sampling, generate};
use model::load::fresh;
use quant::{Format, Scheme};
use rayon::prelude::*;
use safetensors::Dtype;
use train::recipe::Recipe;

const ROUNDS: usize = 7;
const PROMPT: usize = 16;
const TOKENS: usize = 128;
const RANK: u64 = 16;
/// Larger than any cache.
const BUFFER_BYTES: usize = 512 << 20;

fn main() {
    let config = config();
    let checkpoint = checkpoint(&config, Dtype::F32);
    let case = |nf4, lora| Case::new(&config, &checkpoint, nf4, lora);
    let cases = [false, true].map(|nf4| [false, true].map(|lora| case(nf4, lora)));
    let cases = cases.as_flattened();
    let buffer = vec![1_u64; BUFFER_BYTES / size_of::<u64>()];
    let mut bandwidths = Vec::new();
    let mut rates = vec![Vec::new(); cases.len()];
    for _ in 0..ROUNDS {
        for (case, rates) in cases.iter().zip(&mut rates) {
            bandwidths.push(bandwidth(&buffer));
            rates.push(case.tokens_per_second());
        }
    }
    let bandwidth = median(bandwidths);
    println!("bandwidth: {:.1} GB/s", bandwidth / 1e9);
    println!("base  adapter  MB a token  tokens/s  limit  share");
    for (case, rates) in cases.iter().zip(rates) {
        let (bytes, rate) = (case.bytes as f64, median(rates));
        let limit = bandwidth / bytes;
        println!(
            "{:<4}  {:<7}  {:>10.1}  {:>8.1}  {:>5.0}  {:>4.0} %",
            if case.nf4 { "nf4" } else { "f32" },
            if case.lora { "r 16" } else { "none" },
            bytes / 1e6,
            rate,
            limit,
            100.0 * rate / limit,
        );
    }
}

fn config() -> LlamaConfig {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rope_theta": 100000.0, "tie_word_embeddings": true,
    });
    LlamaConfig::from_json(&json).expect("a good config")
}

/// Random weights as a file, which is gone when they have been read.
fn checkpoint(config: &LlamaConfig, dtype: Dtype) -> Checkpoint {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("model.safetensors");
    let tensors = config.tensors().into_iter().map(|(name, shape)| {
        let (values, key, dims) = (fresh(config, 1), name.clone(), shape.clone());
        let bytes = move || {
            let mut bytes = Vec::new();
            encode(&values(&key, &dims)?, dtype, &mut bytes);
            Ok(bytes.into())
        };
        LazyTensor::<model::Error> {
            name,
            dtype,
            shape,
            bytes: Box::new(bytes),
        }
    });
    write_lazily(&path, tensors.collect(), &[]).expect("it is written");
    Checkpoint::open_file(&path).expect("what was written")
}

struct Case {
    nf4: bool,
    lora: bool,
    model: AdaptedLlama<Flex>,
    /// What a token reads: the weights, and of the cache what is there after half of the tokens.
    bytes: u64,
}

impl Case {
    fn new(config: &LlamaConfig, checkpoint: &Checkpoint, nf4: bool, lora: bool) -> Self {
        let device = Default::default();
        let scheme = nf4.then(|| Scheme::new(Format::Nf4, 64, false));
        let model = adapters::load(config, checkpoint, scheme, &device);
        let mut model: AdaptedLlama<Flex> = model.expect("it fits");
        if lora {
            let lora = Recipe::default().adapter.config();
            attach(&mut model, &lora, 1, &device).expect("it fits");
        }
        Self {
            nf4,
            lora,
            bytes: bytes(config, scheme, lora),
            model,
        }
    }

    fn tokens_per_second(&self) -> f64 {
        let prompt: Vec<u32> = (100..100 + PROMPT as u32).collect();
        let mut seconds = Vec::new();
        let mut last = Instant::now();
        let mut show = |_| {
            seconds.push(last.elapsed().as_secs_f64());
            last = Instant::now();
            ControlFlow::Continue(())
        };
        let (greedy, device) = (Sampling::default(), Default::default());
        generate(
            &self.model,
            &prompt,
            TOKENS,
            &[],
            greedy,
            &device,
            &mut show,
        )
        .expect("tokens");
        let tokens = &seconds[1..]; // the first one is the prompt's
        tokens.len() as f64 / tokens.iter().sum::<f64>()
    }
}

fn bytes(config: &LlamaConfig, scheme: Option<Scheme>, lora: bool) -> u64 {
    const F32: u64 = size_of::<f32>() as u64;
    let shapes = config
        .projections()
        .map(|(_, shape, _)| shape.map(|x| x as u64));
    let layer = shapes.iter().map(|[out, r#in]| out * r#in).sum();
    let layer = scheme.map_or(F32 * layer, |scheme| scheme.bytes(layer));
    let update: u64 = shapes.iter().map(|[out, r#in]| RANK * (out + r#in)).sum();
    let kv_width = config.num_key_value_heads * config.head_dim;
    let cached = 2 * F32 * (kv_width * (PROMPT + TOKENS / 2)) as u64;
    let layer = layer + cached + if lora { F32 * update } else { 0 };
    let head = F32 * (config.vocab_size * config.hidden_size) as u64;
    config.num_hidden_layers as u64 * layer + head
}

/// Bytes a second that all cores read together.
fn bandwidth(buffer: &[u64]) -> f64 {
    let start = Instant::now();
    let part = buffer.len() / rayon::current_num_threads();
    buffer.par_chunks(part).for_each(|part| {
        let mut sums = [0_u64; 16]; // in lanes: one chain of additions is slower than memory
        for block in part.as_chunks::<16>().0 {
            for (sum, x) in sums.iter_mut().zip(block) {
                *sum = sum.wrapping_add(*x);
            }
        }
        black_box(sums);
    });
    size_of_val(buffer) as f64 / start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
