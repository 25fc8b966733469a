//! How the time and the memory of a step grow with tokens, layers, vocabulary and rank, in the
//! widths of SmolLM2-135M: forward and backward of LoRA on every linear layer, each row one step.
//!
//! `GLIBC_TUNABLES=glibc.malloc.hugetlb=1 cargo bench --workspace --profile dev --bench growth`,
//! which shares what `cargo test` compiled. The tunable keeps large tensors' memory in the process,
//! as `trainer` does. Memory is what a step adds to what is held before it, by the allocator.

#[path = "../tests/counting/mod.rs"]
mod counting;
mod rows;

use std::sync::atomic::Ordering::Relaxed;
use std::time::Instant;

use burn::backend::{Autodiff, Flex};
use burn::train::TrainStep;
use counting::{HELD, MOST};
use model::config::LlamaConfig;
use rows::window;
use train::recipe::{Recipe, parse_setting};
use train::step::CausalLm;

/// What a row of the table varies.
#[derive(Clone, Copy)]
struct Case {
    tokens: usize,
    layers: usize,
    vocabulary: usize,
    rank: usize,
}

const USUAL: Case = Case {
    tokens: 1024,
    layers: 30,
    vocabulary: 49_152,
    rank: 16,
};

fn main() {
    println!("tokens  layers  vocabulary  rank    plain s      MiB    block s      MiB");
    let of_tokens = |tokens| Case { tokens, ..USUAL };
    let of_layers = |layers| Case { layers, ..USUAL };
    let of_vocabulary = |vocabulary| Case {
        vocabulary,
        ..USUAL
    };
    let of_rank = |rank| Case { rank, ..USUAL };
    let tokens = [512, 1024, 2048, 4096].map(of_tokens);
    let layers = [15, 30].map(of_layers);
    let vocabularies = [32_000, 128_000].map(of_vocabulary);
    let ranks = [8, 64, 256].map(of_rank);
    let cases = tokens.iter().chain(&layers).chain(&vocabularies);
    for case in cases.chain(&ranks) {
        let [(plain, held), (block, held_by_block)] = [false, true].map(|again| step(case, again));
        println!(
            "{:>6}  {:>6}  {:>10}  {:>4}  {plain:>9.2}  {held:>7.0}  {block:>9.2}  {held_by_block:>7.0}",
            case.tokens, case.layers, case.vocabulary, case.rank,
        );
    }
}

/// Seconds of a step, and the MiB that it adds at most.
fn step(case: &Case, recompute: bool) -> (f64, f64) {
    let lm = language_model(case, recompute);
    let window = window([1, case.tokens], case.vocabulary);
    let (before, start) = (HELD.load(Relaxed), Instant::now());
    MOST.store(before, Relaxed);
    let output = TrainStep::step(&lm, window);
    let seconds = start.elapsed().as_secs_f64();
    let most = MOST.load(Relaxed) - before;
    drop(output);
    (seconds, most as f64 / f64::from(1 << 20))
}

fn language_model(case: &Case, recompute: bool) -> CausalLm<Autodiff<Flex>> {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": case.vocabulary, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": case.layers, "num_attention_heads": 9,
        "num_key_value_heads": 3, "rope_theta": 100000.0, "tie_word_embeddings": true,
    });
    let config = LlamaConfig::from_json(&json).expect("a good config");
    let rank = format!("adapter.rank={}", case.rank);
    let given = ["model.path=m", "data.train=d", &rank];
    let given = given.map(|setting| parse_setting(setting).expect("a setting"));
    let recipe = Recipe::read(None, &given).expect("a good recipe");
    let device = Default::default();
    let mut model = adapters::init(&config, 1, &device);
    adapters::attach(&mut model, &recipe.adapter.config(), 1, &device).expect("it fits");
    CausalLm {
        model,
        method: None,
        seed: 1,
        recompute,
    }
}
