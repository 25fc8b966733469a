//! What a step really holds: counted by the allocator.

#![cfg(not(feature = "wgpu"))]

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};

use burn::backend::{Autodiff, Flex};
use burn::train::TrainStep;
use model::config::LlamaConfig;
use train::batch::{MicroBatch, Window};
use train::data::Sample;
use train::memory::{Memory, Place, Work};
use train::recipe::{Recipe, Recompute, parse_setting};
use train::session;
use train::step::CausalLm;
use train::trained::Trained;

/// The system's allocator, with a count of the bytes that are held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(held, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const ROWS: usize = 4;
const LENGTH: usize = 128;

fn config() -> LlamaConfig {
    let json = serde_json::json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 96, "intermediate_size": 256,
        "num_hidden_layers": 12, "num_attention_heads": 6, "num_key_value_heads": 2,
        "tie_word_embeddings": true,
    });
    LlamaConfig::from_json(&json).unwrap()
}

fn window() -> Window {
    let sample = |row: usize| Sample {
        input_ids: (0..LENGTH)
            .map(|i| ((row * 31 + i * 7) % 300) as u32)
            .collect(),
        labels: (0..LENGTH)
            .map(|i| ((row * 31 + i * 7) % 300) as i32)
            .collect(),
    };
    let rows: Vec<Sample> = (0..ROWS).map(sample).collect();
    Window {
        micro_batches: vec![MicroBatch::new(&rows)],
        step: 0,
        epoch: 1.0,
    }
}

fn recipe(settings: &[&str]) -> Recipe {
    let given = ["model.path=m", "data.train=d"].iter().chain(settings);
    let given: Vec<_> = given.map(|text| parse_setting(text).unwrap()).collect();
    Recipe::read(None, &given).unwrap()
}

/// Most bytes that a step adds to what is held before it, and the estimate of them.
fn measure(settings: &[&str], recompute: bool) -> (u64, u64) {
    let recipe = recipe(settings);
    let (trained, device) = (session::resumed(&recipe), Default::default());
    let mut model = adapters::init(&config(), 1, &device);
    trained.attach(&mut model, 1, &device).unwrap();
    let lm = CausalLm::<Autodiff<Flex>> {
        model,
        dropout: recipe.adapter.dropout,
        seed: 1,
        recompute,
    };
    let window = window();
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
        ..work(&trained, &config(), recompute).step().unwrap()
    };
    (most as u64, held.total())
}

fn work<'a>(trained: &'a Trained, config: &'a LlamaConfig, recompute: bool) -> Work<'a> {
    Work {
        trained,
        config,
        quantised: false,
        weights: 4 * config.num_params(),
        tokens: ROWS * LENGTH,
        longest: LENGTH,
        accumulates: false,
        recompute,
        place: Place::Host { program: 0 },
    }
}

#[test]
fn the_estimate_is_near_and_recompute_saves_memory() {
    for settings in [
        &["adapter.rank=8"][..],
        &["adapter.rank=8", "adapter.dropout=0.1"],
        &["adapter.target_modules=[q_proj,v_proj]"],
        &["adapter.layers_to_transform=[6,8]"],
        &["adapter.method=full"],
    ] {
        let [plain, again] = [false, true].map(|recompute| {
            let (measured, estimate) = measure(settings, recompute);
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

#[test]
fn the_memory_decides_whether_layers_are_computed_again() {
    let (config, recipe) = (config(), recipe(&[]));
    let trained = session::resumed(&recipe);
    let mut work = work(&trained, &config, false);
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
    let (config, recipe) = (config(), recipe(&["adapter.rank=8"]));
    let trained = session::resumed(&recipe);
    let plain = work(&trained, &config, false);
    let memory = plain.predict().unwrap();
    let adapter = 4 * trained.num_params(&config).unwrap();
    assert_eq!(memory.weights, 4 * config.num_params());
    assert_eq!((memory.adapter, memory.optimizer), (adapter, 2 * adapter));
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
    // a card has the scores of whole rows
    let card = Work {
        place: Place::Device,
        tokens: 4096,
        longest: 4096,
        ..plain
    };
    assert!(card.predict().unwrap().workspace > 4 * 4096 * 4096);
    // numbers beyond all memory can still be added up
    let vast = Work {
        tokens: usize::MAX,
        weights: u64::MAX / 32,
        ..plain
    };
    assert!(vast.predict().unwrap().total() > u64::MAX / 32);
}
