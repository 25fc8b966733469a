//! The steps that decide how long a run takes, on four layers of SmolLM2-135M's shape:
//! `cargo bench --workspace --profile dev --bench step`.

mod rows;

use std::ops::ControlFlow;

use adapters::attach;
use burn::backend::{Autodiff, Flex};
use burn::module::AutodiffModule;
use burn::optim::Optimizer;
use burn::tensor::{Distribution, Tensor};
use burn::train::TrainStep;
use divan::Bencher;
use model::config::LlamaConfig;
use model::generate::{Sampling, generate};
use model::linear::Projection;
use rows::window;
use train::optimizer::AdamW;
use train::recipe::Recipe;
use train::step::{CausalLm, clip_gradients};

type B = Autodiff<Flex>;

/// Rows and tokens of each.
const SHAPES: [[usize; 2]; 2] = [[4, 256], [1, 1024]];

const VOCABULARY: usize = 49_152;

fn main() {
    divan::main();
}

fn config() -> LlamaConfig {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 4, "num_attention_heads": 9, "num_key_value_heads": 3,
        "rope_theta": 100000.0, "tie_word_embeddings": true,
    });
    LlamaConfig::from_json(&json).expect("a good config")
}

/// LoRA r 16 on every linear layer.
fn language_model() -> CausalLm<B> {
    let device = Default::default();
    let mut model = adapters::init(&config(), 1, &device);
    attach(&mut model, &Recipe::default().adapter.config(), 1, &device).expect("it fits");
    CausalLm {
        model,
        method: None,
        seed: 1,
        recompute: false,
    }
}

/// Forward and backward.
#[divan::bench(args = SHAPES, sample_count = 5)]
fn gradients(bencher: Bencher<'_, '_>, shape: [usize; 2]) {
    let (lm, window) = (language_model(), window(shape, VOCABULARY));
    bencher.bench_local(|| TrainStep::step(&lm, window.clone()));
}

/// The same with every layer computed again.
#[divan::bench(args = SHAPES, sample_count = 5)]
fn gradients_by_block(bencher: Bencher<'_, '_>, shape: [usize; 2]) {
    let (mut lm, window) = (language_model(), window(shape, VOCABULARY));
    lm.recompute = true;
    bencher.bench_local(|| TrainStep::step(&lm, window.clone()));
}

/// Forward alone, as in an evaluation.
#[divan::bench(args = SHAPES, sample_count = 5)]
fn evaluation(bencher: Bencher<'_, '_>, shape: [usize; 2]) {
    let (lm, window) = (language_model().valid(), window(shape, VOCABULARY));
    bencher.bench_local(|| lm.token_nll(&window.micro_batches[0]));
}

/// Forward and backward of the widest layer at 1,024 tokens, adapted or without its update.
#[divan::bench(args = [true, false], sample_count = 20)]
fn layer(bencher: Bencher<'_, '_>, adapted: bool) {
    let lm = language_model();
    let layer = &lm.model.layers[0].mlp.gate_proj;
    let shape = [1024, config().hidden_size];
    let x = Tensor::<B, 2>::random(shape, Distribution::Default, &Default::default());
    let x = x.require_grad();
    bencher.bench_local(|| {
        let y = match adapted {
            true => layer.forward(x.clone()),
            false => layer.base.forward(x.clone()),
        };
        y.sum().backward()
    });
}

/// Clipping and AdamW over all adapters.
#[divan::bench(sample_count = 10)]
fn update(bencher: Bencher<'_, '_>) {
    let lm = language_model();
    let mut optimizer = AdamW::<Flex>::new(&Recipe::default().train);
    let inputs = || TrainStep::step(&lm, window([1, 16], VOCABULARY)).grads;
    bencher.with_inputs(inputs).bench_local_values(|mut grads| {
        clip_gradients::<B, _>(&mut grads, &lm, 1.0);
        Optimizer::<CausalLm<B>, B>::step(&mut optimizer, 1e-4, lm.clone(), grads)
    });
}

/// 32 tokens after a prompt of 32.
#[divan::bench(sample_count = 5)]
fn generation(bencher: Bencher<'_, '_>) {
    let lm = language_model().valid();
    let prompt: Vec<u32> = (100..132).collect();
    let greedy = Sampling::default();
    bencher.bench_local(|| {
        let go_on = &mut |_| ControlFlow::Continue(());
        let device = Default::default();
        generate(&lm.model, &prompt, 32, &[], greedy, &device, go_on).expect("it generates")
    });
}
