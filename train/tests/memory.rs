//! What a step really holds: counted by the allocator.

#![cfg(not(feature = "wgpu"))]

mod counting;

use std::sync::atomic::Ordering::Relaxed;

use burn::backend::{Autodiff, Flex};
use burn::train::TrainStep;
use counting::{HELD, MOST};
use model::config::LlamaConfig;
use train::batch::{MicroBatch, Window};
use train::data::Sample;
use train::memory::{Memory, Place, Work};
use train::recipe::{ComputeDtype, Recipe, Recompute, parse_setting};
use train::session;
use train::step::CausalLm;
use train::trained::Trained;

/// As many logits may exist at a time.
const LOGITS: usize = 1 << 23;
/// Rows, and tokens of each.
const SHAPE: [usize; 2] = [4, 128];
/// The tokens are from a vocabulary of this size.
const VOCABULARY: usize = 300;

fn config(vocabulary: usize) -> LlamaConfig {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": vocabulary, "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
        "tie_word_embeddings": true,
    });
    LlamaConfig::from_json(&json).unwrap()
}

fn window([rows, length]: [usize; 2]) -> Window {
    let ids = |row: usize| (0..length).map(move |i| (row * 31 + i * 7) % VOCABULARY);
    let sample = |row: usize| Sample {
        task: 0,
        input_ids: ids(row).map(|id| id as u32).collect(),
        labels: ids(row).map(|id| id as i32).collect(),
    };
    let rows: Vec<Sample> = (0..rows).map(sample).collect();
    Window {
        micro_batches: vec![MicroBatch::new(&rows)],
        step: 0,
        epoch: 1.0,
        loss_scale: 1.0,
    }
}

fn recipe(settings: &[&str]) -> Recipe {
    let given = ["model.path=m", "data.train=d"].iter().chain(settings);
    let given: Vec<_> = given.map(|text| parse_setting(text).unwrap()).collect();
    Recipe::read(None, &given).unwrap()
}

/// Most bytes that a step adds to what is held before it, and the estimate of them.
fn measure(
    settings: &[&str],
    recompute: bool,
    config: &LlamaConfig,
    shape: [usize; 2],
) -> (u64, u64) {
    let recipe = recipe(settings);
    let (trained, device) = (session::resumed(&recipe), Default::default());
    let mut model = adapters::init(config, 1, &device);
    trained.attach(&mut model, 1, &device).unwrap();
    let lm = CausalLm::<Autodiff<Flex>> {
        model,
        method: trained.method().cloned(),
        seed: 1,
        recompute,
    };
    let window = window(shape);
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    let output = TrainStep::step(&lm, window);
    let most = MOST.load(Relaxed) - before;
    drop(output);
    let held = Memory {
        program: 0, // only what the step adds is counted
        weights: 0,
        adapter: 0,
        optimizer: 0, // there are no moments before the first update
        gaps: 0,      // nor gaps in what is counted
        ..work(&trained, config, recompute, shape).step().unwrap()
    };
    (most as u64, held.total())
}

fn work<'a>(
    trained: &'a Trained,
    config: &'a LlamaConfig,
    recompute: bool,
    [rows, length]: [usize; 2],
) -> Work<'a> {
    Work {
        trained,
        config,
        quantised: false,
        weights: 4 * config.num_params(),
        tokens: rows * length,
        compute_dtype: ComputeDtype::F32,
        accumulates: false,
        recompute,
        place: Place::Host { program: 0 },
    }
}

/// One test, because the allocator counts what all of them hold.
#[test]
fn memory_of_a_step() {
    the_estimate_is_near_and_recompute_saves_memory();
    it_grows_with_the_tokens_and_no_faster();
    it_does_not_grow_with_a_large_vocabulary();
    the_estimate_knows_the_gradients_of_a_trained_output_layer();
    logits_exist_once();
    dropout_keeps_nothing();
}

fn the_estimate_is_near_and_recompute_saves_memory() {
    for settings in [
        &["adapter.rank=8"][..],
        &["adapter.rank=8", "adapter.dropout=0.1"],
        &["adapter.target_modules=[q_proj,v_proj]"],
        &["adapter.layers_to_transform=[6,8]"],
        &["adapter.method=adalora", "adapter.init_r=8"],
        &["adapter.method=loha", "adapter.rank=4"],
        &["adapter.method=loha", "adapter.rank=12"],
        &["adapter.method=lokr", "adapter.rank=4"],
        &["adapter.method=ia3"],
        &["adapter.method=vera", "adapter.rank=32"],
        &["adapter.method=full"],
    ] {
        let [plain, again] = [false, true].map(|recompute| {
            let (measured, estimate) = measure(settings, recompute, &config(VOCABULARY), SHAPE);
            let off = estimate as f64 / measured as f64;
            assert!(
                (0.8..1.25).contains(&off),
                "{settings:?} {recompute}: {off}"
            );
            measured
        });
        assert!(3 * again < plain, "{settings:?}: {again} of {plain}");
    }
}

/// The most that a step of LoRA holds.
fn most(dropout: &str, recompute: bool, vocabulary: usize, shape: [usize; 2]) -> f64 {
    let settings = ["adapter.rank=8", dropout];
    measure(&settings, recompute, &config(vocabulary), shape).0 as f64
}

fn it_grows_with_the_tokens_and_no_faster() {
    for recompute in [false, true] {
        let [short, long] =
            [512, 1024].map(|length| most("adapter.dropout=0", recompute, VOCABULARY, [1, length]));
        let growth = long / short;
        assert!((1.6..2.02).contains(&growth), "{recompute}: {growth}");
    }
}

/// Where the logits of all tokens would not fit into what they may take together.
fn it_does_not_grow_with_a_large_vocabulary() {
    let [small, large] =
        [32_000, 128_000].map(|vocabulary| most("adapter.dropout=0", true, vocabulary, SHAPE));
    let growth = large / small;
    assert!((0.98..1.02).contains(&growth), "{growth}");
}

/// Its gradient by some of the tokens is there beside that by the tokens before.
fn the_estimate_knows_the_gradients_of_a_trained_output_layer() {
    for recompute in [false, true] {
        let (measured, estimate) =
            measure(&["adapter.method=full"], recompute, &config(32_000), SHAPE);
        let off = estimate as f64 / measured as f64;
        assert!((0.9..1.1).contains(&off), "{recompute}: {off}");
    }
}

/// Of the logits of a part of the tokens there is one copy, which becomes their gradient.
fn logits_exist_once() {
    let held = |vocabulary| most("adapter.dropout=0", true, vocabulary, SHAPE);
    let (few, many) = (held(300), held(128_000));
    let logits = many - few;
    assert!(logits < 1.01 * (LOGITS << 2) as f64, "{logits}");
}

fn dropout_keeps_nothing() {
    let [without, with] = ["adapter.dropout=0", "adapter.dropout=0.1"]
        .map(|dropout| most(dropout, false, VOCABULARY, SHAPE));
    assert!(with < 1.1 * without, "{with} of {without}");
}

#[test]
fn the_memory_decides_whether_layers_are_computed_again() {
    let (config, recipe) = (config(VOCABULARY), recipe(&[]));
    let trained = session::resumed(&recipe);
    let mut work = work(&trained, &config, false, SHAPE);
    let plain = work.predict().unwrap();
    let mut settle = |asked, available| {
        let memory = work.settle_recompute(asked, available).unwrap();
        (memory.total(), work.recompute)
    };
    let needed = plain.total() - plain.program; // the program is there already
    let enough = needed / 9 * 10 + 20;
    assert_eq!(settle(Recompute::Auto, None), (plain.total(), false)); // unknown memory
    assert_eq!(
        settle(Recompute::Auto, Some(enough)),
        (plain.total(), false)
    );
    let (again, recompute) = settle(Recompute::Auto, Some(needed));
    assert!(recompute && again < plain.total());
    assert!(!settle(Recompute::None, Some(1)).1);
    assert_eq!(settle(Recompute::Block, None), (again, true));
}

#[test]
fn the_parts_are_those_of_the_model() {
    let (config, recipe) = (config(VOCABULARY), recipe(&["adapter.rank=8"]));
    let trained = session::resumed(&recipe);
    let plain = work(&trained, &config, false, SHAPE);
    let memory = plain.predict().unwrap();
    let adapter = 4 * trained.num_params(&config).unwrap();
    assert_eq!(memory.weights, 4 * config.num_params());
    // the last good one, too
    assert_eq!(
        (memory.adapter, memory.optimizer),
        (2 * adapter, 2 * adapter)
    );
    assert_eq!(
        memory.total(),
        memory.parts().iter().map(|(_, bytes)| bytes).sum::<u64>()
    );
    let more = |work: Work| work.predict().unwrap().total() > memory.total();
    assert!(more(Work {
        tokens: 2 * plain.tokens,
        ..plain
    }));
    assert!(more(Work {
        accumulates: true,
        ..plain
    }));
    assert!(more(Work {
        place: Place::Host { program: 1 << 20 },
        ..plain
    }));
    // on a card, 16 bits halve a decoded weight and add narrow copies of what it is multiplied with
    let card = |compute_dtype, tokens| {
        let work = Work {
            place: Place::Device,
            quantised: true,
            compute_dtype,
            tokens,
            ..plain
        };
        work.step().unwrap().workspace
    };
    let (wide, narrow) = (ComputeDtype::F32, ComputeDtype::F16);
    assert_eq!(card(wide, 0), 4 * 96 * 256);
    assert_eq!(card(narrow, 0), 2 * 96 * 256);
    let copies = |tokens: u64| 2 * tokens * (96 + 256);
    let decoded = card(wide, 0) - card(narrow, 0);
    assert_eq!(
        card(narrow, 4096) + decoded,
        card(wide, 4096) + copies(4096)
    );
    // numbers beyond all memory can still be added up
    let vast = Work {
        tokens: usize::MAX,
        weights: u64::MAX / 32,
        ..plain
    };
    assert!(vast.predict().unwrap().total() > u64::MAX / 32);
}
