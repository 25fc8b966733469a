//! What a training step's time and memory go to: SmolLM2-135M's shape, LoRA r 16 on every linear
//! layer, one row of 1,024 tokens, all trained.
//!
//! `GLIBC_TUNABLES=glibc.malloc.hugetlb=1 cargo bench --workspace --profile dev --bench parts`,
//! which shares what `cargo test` compiled. Each part is timed alone, forward and backward, in turns
//! with the whole step; medians. A part keeps what is held between the two, inputs that backward needs
//! among it. `products.py` beside this file times the same products in torch.

#[path = "../tests/counting/mod.rs"]
mod counting;
mod rows;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use adapters::AdaptedLinear;
use burn::backend::{Autodiff, Flex};
use burn::optim::Optimizer;
use burn::tensor::{Distribution, Tensor};
use burn::train::TrainStep;
use counting::HELD;
use model::config::LlamaConfig;
use model::linear::Projection;
use model::ops::{attention, rms_norm, rotary, swiglu};
use model::rope::Rope;
use model::segments::Segments;
use rows::window;
use train::batch::Window;
use train::optimizer::AdamW;
use train::recipe::Recipe;
use train::step::{CausalLm, clip_gradients};

type B = Autodiff<Flex>;

const ROUNDS: usize = 7;
/// Times that a part is run in a round.
const REPEATS: usize = 5;
const TOKENS: usize = 1024;
const LAYERS: usize = 30;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49_152;
const RANK: usize = 16;

/// Something that a step does `count` times.
struct Part {
    name: &'static str,
    count: usize,
    /// Of the matrix products in one of them, forward and backward.
    flop: f64,
    inputs: Vec<Tensor<B, 2>>,
    /// Whether it is another part that keeps the inputs, or computes them again.
    borrows: bool,
    /// Goes forward, to a sum.
    forward: Forward,
}

type Forward = Box<dyn Fn(Vec<Tensor<B, 2>>) -> Tensor<B, 1>>;

impl Part {
    /// Forward and backward, all that a step has of it.
    fn seconds(&self) -> f64 {
        let run = || seconds(|| drop((self.forward)(self.inputs.clone()).backward()));
        median((0..REPEATS).map(|_| run()).collect()) * self.count as f64
    }

    /// MiB of a step that are there for backward.
    fn kept(&self) -> f64 {
        let before = HELD.load(Relaxed);
        let input = |x: &Tensor<B, 2>| match self.borrows {
            true => x.clone(),
            false => x.clone().mul_scalar(1.0), // a copy, and no part of the graph keeps it
        };
        let _sum = (self.forward)(self.inputs.iter().map(input).collect());
        let kept = HELD.load(Relaxed) - before;
        (kept * self.count) as f64 / f64::from(1 << 20)
    }
}

fn main() {
    let (lm, window) = (language_model(), window([1, TOKENS], VOCABULARY));
    let mut head = lm.clone();
    head.model.layers.clear();
    let mut update = update(&lm, &window);
    let (parts, shapes) = (parts(&lm), shapes(&lm));
    let all = parts.iter().chain(&shapes);
    let mut times = vec![Vec::new(); all.clone().count()];
    let [mut steps, mut heads, mut updates] = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        for (part, times) in all.clone().zip(&mut times) {
            times.push(part.seconds());
        }
        heads.push(seconds(|| drop(TrainStep::step(&head, window.clone()))));
        updates.push(update());
        steps.push(seconds(|| drop(TrainStep::step(&lm, window.clone()))));
    }
    let [head, update] = [heads, updates].map(median);
    let step = median(steps) + update;
    let mut times = times.into_iter().map(median);
    let row = |name: &str, seconds: f64, flop: f64, kept: Option<f64>| {
        let rate = (flop > 0.0).then(|| format!("{:.0}", flop / seconds / 1e9));
        let kept = kept.map(|kept| format!("{kept:.0}"));
        let (ms, share) = (1e3 * seconds, 100.0 * seconds / step);
        let [rate, kept] = [rate, kept].map(Option::unwrap_or_default);
        println!("{name:<20}  {ms:>5.0}  {share:>3.0} %  {rate:>8}  {kept:>9}");
    };
    println!("part                     ms  share   GFLOP/s  keeps MiB");
    let (mut rest, mut products) = (step - head - update, 0.0);
    for (part, mut seconds) in parts.iter().zip(&mut times) {
        match part.name {
            PRODUCTS => products = seconds,
            LORA => seconds -= products, // the layers as they are, less their bases
            _ => {}
        }
        rest -= seconds;
        let flop = part.flop * part.count as f64;
        row(part.name, seconds, flop, Some(part.kept()));
    }
    let flop = 4.0 * (TOKENS * HIDDEN * VOCABULARY) as f64;
    row("lm_head and loss", head, flop, None);
    row("clipping and AdamW", update, 0.0, None);
    row("the rest", rest, 0.0, None);
    row("a step", step, 0.0, None);
    println!("\nof the products:");
    for (part, seconds) in shapes.iter().zip(times) {
        row(part.name, seconds, part.flop * part.count as f64, None);
    }
}

const PRODUCTS: &str = "products of the base";
const LORA: &str = "LoRA";

/// The parts of the decoder layers.
fn parts(lm: &CausalLm<B>) -> Vec<Part> {
    let linears = linears(lm);
    let all: Vec<_> = linears.iter().flat_map(|(_, same)| same.clone()).collect();
    let bases = all.iter().map(|linear| AdaptedLinear {
        update: None,
        ..linear.clone()
    });
    let shapes = all.iter().map(|linear| linear.base.weight().dims());
    let updates = shapes.map(|[out, r#in]| RANK * (out + r#in)).sum::<usize>();
    let mut parts = vec![layers(PRODUCTS, bases.collect())];
    parts.push(Part {
        flop: 6.0 * (TOKENS * updates) as f64,
        ..layers(LORA, all)
    });
    parts.extend(others(lm));
    parts
}

/// The products with weights of each shape apart.
fn shapes(lm: &CausalLm<B>) -> Vec<Part> {
    let part = |(name, mut linears): (_, Vec<AdaptedLinear<B>>)| {
        linears.iter_mut().for_each(|linear| linear.update = None);
        layers(name, linears)
    };
    linears(lm).map(part).into()
}

/// The linear layers of a decoder layer, by shape.
fn linears(lm: &CausalLm<B>) -> [(&'static str, Vec<AdaptedLinear<B>>); 4] {
    let layer = lm.model.layers[0].clone();
    let (attn, mlp) = (layer.self_attn, layer.mlp);
    [
        ("576 to 576", vec![attn.q_proj, attn.o_proj]),
        ("576 to 192", vec![attn.k_proj, attn.v_proj]),
        ("576 to 1,536", vec![mlp.gate_proj, mlp.up_proj]),
        ("1,536 to 576", vec![mlp.down_proj]),
    ]
}

/// Linear layers of every decoder layer: with the weight, and for the gradient of the input.
fn layers(name: &'static str, linears: Vec<AdaptedLinear<B>>) -> Part {
    let shapes = linears.iter().map(|linear| linear.base.weight().dims());
    let numbers: usize = shapes.clone().map(|[out, r#in]| out * r#in).sum();
    Part {
        name,
        count: LAYERS,
        flop: 4.0 * (TOKENS * numbers) as f64,
        inputs: shapes.map(|[_, r#in]| random([TOKENS, r#in])).collect(),
        borrows: true,
        forward: Box::new(move |x| {
            let all = linears.iter().zip(x);
            let sums = all.map(|(linear, x)| linear.forward(x).sum());
            sums.reduce(|a, b| a + b).expect("there are some")
        }),
    }
}

fn others(lm: &CausalLm<B>) -> Vec<Part> {
    let weight = lm.model.norm.weight.val();
    let segments = Segments::new([TOKENS]);
    let Rope { cos, sin, .. } = Rope::new(&lm.model.config, segments.clone(), &Default::default());
    let part = |name, count, widths: &[usize], forward| Part {
        name,
        count: count * LAYERS,
        flop: 0.0,
        borrows: false,
        inputs: widths
            .iter()
            .map(|width| random([TOKENS, *width]))
            .collect(),
        forward,
    };
    let heads = |x: &Tensor<B, 2>| {
        let [n, width] = x.dims();
        x.clone().reshape([n, width / HEAD_DIM, HEAD_DIM])
    };
    let [q, kv] = [HEADS, KV_HEADS].map(|heads| heads * HEAD_DIM);
    let attend: Forward =
        Box::new(move |x| attention(heads(&x[0]), heads(&x[1]), heads(&x[2]), &segments).sum());
    let turn: Forward = Box::new(move |x| rotary(heads(&x[0]), cos.clone(), sin.clone()).sum());
    let norm: Forward = Box::new(move |x| rms_norm(x[0].clone(), weight.clone(), 1e-5).sum());
    let gate: Forward = Box::new(|x| swiglu(x[0].clone(), x[1].clone()).sum());
    vec![
        part("attention", 1, &[q, kv, kv], attend),
        part("rotary", 1, &[q + kv], turn), // of queries and keys
        part("norms", 2, &[HIDDEN], norm),
        part("swiglu", 1, &[INTERMEDIATE; 2], gate),
    ]
}

fn language_model() -> CausalLm<B> {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE, "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "rope_theta": 100000.0, "tie_word_embeddings": true,
    });
    let config = LlamaConfig::from_json(&json).expect("a good config");
    let device = Default::default();
    let mut model = adapters::init(&config, 1, &device);
    let adapter = Recipe::default().adapter.config();
    adapters::attach(&mut model, &adapter, 1, &device).expect("it fits");
    CausalLm {
        model,
        method: None,
        seed: 1,
        recompute: false,
    }
}

/// Times clipping and AdamW over all adapters.
fn update(lm: &CausalLm<B>, window: &Window) -> impl FnMut() -> f64 {
    let (mut lm, window) = (lm.clone(), window.clone());
    let mut optimizer = AdamW::<Flex>::new(&Recipe::default().train);
    move || {
        let mut grads = TrainStep::step(&lm, window.clone()).grads;
        seconds(|| {
            clip_gradients::<B, _>(&mut grads, &lm, 1.0);
            let grads = std::mem::take(&mut grads);
            lm = Optimizer::<CausalLm<B>, B>::step(&mut optimizer, 1e-6, lm.clone(), grads);
        })
    }
}

fn random(shape: [usize; 2]) -> Tensor<B, 2> {
    let usual = Distribution::Normal(0.0, 1.0);
    Tensor::random(shape, usual, &Default::default()).require_grad()
}

fn seconds(run: impl FnOnce()) -> f64 {
    let start = Instant::now();
    run();
    start.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
