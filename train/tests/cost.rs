//! What a training step costs a graphics adapter, counted: launches, and bytes that are allocated or
//! move between host and device.
//!
//! The table of the README:
//! `CUBECL_AUTOTUNE_LEVEL=minimal cargo test --workspace --features trainer/wgpu --test cost table -- --ignored
//! --nocapture`

#![cfg(feature = "wgpu")]

mod counted;

use std::path::Path;

use adapters::methods::lora::LoraSettings;
use adapters::{AdaptedLinear, AdapterConfig, BaseLinear, Selection, attach};
use burn::backend::wgpu::WgpuDevice;
use burn::optim::Optimizer;
use burn::tensor::DType;
use burn::train::TrainStep;
use counted::{B, Counts, count};
use model::config::LlamaConfig;
use model::folder::ModelFolder;
use model::load::{LinearSource, build, fresh};
use quant::{Format, PackedWeight, QuantLinear, Scheme, quantize};
use serde_json::json;
use train::batch::{MicroBatch, Window};
use train::data::Sample;
use train::optimizer::AdamW;
use train::recipe::Recipe;
use train::step::{CausalLm, clip_gradients};

/// A model shape, and what is trained on it.
#[derive(Clone, Copy)]
struct Shape {
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    layers: usize,
    /// Query heads and KV heads.
    heads: [usize; 2],
    tied: bool,
    nf4: bool,
    recompute: bool,
    rank: usize,
    dropout: f64,
}

const TINY: Shape = Shape {
    vocab_size: 96,
    hidden_size: 64,
    intermediate_size: 96,
    layers: 2,
    heads: [4, 2],
    tied: true,
    nf4: true,
    recompute: true,
    rank: 4,
    dropout: 0.0,
};

impl Shape {
    fn config(&self) -> LlamaConfig {
        let json = json!({
            "model_type": "llama", "vocab_size": self.vocab_size, "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads[0], "num_key_value_heads": self.heads[1],
            "rope_theta": 10000.0, "tie_word_embeddings": self.tied,
        });
        LlamaConfig::from_json(&json).expect("a good config")
    }

    /// LoRA on every linear layer.
    fn adapter(&self) -> AdapterConfig {
        let lora = LoraSettings {
            rank: self.rank,
            dropout: self.dropout,
            ..LoraSettings::default()
        };
        AdapterConfig {
            selection: Selection::default(),
            method: lora.into(),
        }
    }

    fn language_model(&self, device: &WgpuDevice) -> CausalLm<B> {
        let config = self.config();
        let mut model = match self.nf4 {
            true => build(&config, device, fresh(&config, 1), packed).expect("fresh weights"),
            false => adapters::init(&config, 1, device),
        };
        attach(&mut model, &self.adapter(), 1, device).expect("it fits");
        CausalLm {
            model,
            method: Some(self.adapter().method),
            seed: 1,
            recompute: self.recompute,
        }
    }

    /// Counts a whole step on micro batches of rows of these lengths.
    fn count(&self, batches: &[&[usize]]) -> Counts {
        let device = WgpuDevice::default();
        let mut optimizer = AdamW::new(&Recipe::default().train);
        count(
            &device,
            || self.language_model(&device),
            |model| {
                let mut output = TrainStep::step(&model, self.window(batches));
                let norm = clip_gradients::<B, _>(&mut output.grads, &model, 1.0);
                assert!(output.item.loss.is_finite() && norm > 0.0);
                Optimizer::<CausalLm<B>, B>::step(&mut optimizer, 1e-4, model, output.grads)
            },
        )
    }

    fn window(&self, batches: &[&[usize]]) -> Window {
        let ids = |length| (0..length).map(|i| (i * 104_729 + 3) % self.vocab_size);
        let sample = |length: &usize| Sample {
            input_ids: ids(*length).map(|id| id as u32).collect(),
            labels: ids(*length).map(|id| id as i32).collect(),
            task: 0,
        };
        let batch = |rows: &&[usize]| {
            let samples: Vec<Sample> = rows.iter().map(sample).collect();
            MicroBatch::new(&samples)
        };
        Window {
            micro_batches: batches.iter().map(batch).collect(),
            step: 0,
            epoch: 1.0,
            loss_scale: 1.0,
        }
    }
}

/// A linear layer in NF4 that never was dense on the device.
fn packed(mut source: LinearSource<B>) -> model::error::Result<AdaptedLinear<B>> {
    let weight = quantize(
        &source.weight()?,
        source.shape,
        Scheme::new(Format::Nf4, 64, false),
    );
    let base = BaseLinear::Quantized(QuantLinear {
        weight: PackedWeight::new(weight.expect("finite weights"), source.device),
        bias: source.bias()?,
        dtype: source.dtype,
    });
    Ok(AdaptedLinear { base, update: None })
}

/// Token ids, where they stand (a cosine and a sine for each pair of a head's elements), what is
/// predicted where, and where rows start.
fn bytes_of(shape: Shape, batches: &[&[usize]]) -> usize {
    let h_d = shape.hidden_size / shape.heads[0];
    let of_batch = |rows: &&[usize]| {
        let tokens: usize = rows.iter().sum();
        let trained = tokens - rows.len();
        4 * (tokens + tokens * h_d + 2 * trained + rows.len() + 1)
    };
    batches.iter().map(of_batch).sum()
}

/// Nothing is uploaded a layer or a parameter, and the host waits for the device twice a step,
/// however many micro batches there are: for the loss, and for the norm of the gradients.
#[test]
fn a_step_copies_the_batch_in_and_two_numbers_out() {
    let batches: [&[usize]; 2] = [&[7, 12, 5], &[20]];
    for (nf4, recompute) in [(false, false), (true, true)] {
        let shape = Shape {
            nf4,
            recompute,
            ..TINY
        };
        let counts = shape.count(&batches);
        assert_eq!(
            counts.uploaded_bytes,
            bytes_of(shape, &batches),
            "{counts:?}"
        );
        assert_eq!(counts.uploads, 6 * batches.len(), "{counts:?}");
        assert_eq!((counts.reads, counts.read_bytes), (2, 8), "{counts:?}");
    }
}

/// Loading makes the tensors in the type that they stay in.
#[test]
fn weights_take_half_of_the_device_in_16_bits() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../model/tests/fixtures/models/gqa");
    let base = ModelFolder::open(&folder).expect("a model folder");
    let checkpoint = base.checkpoint().expect("its weights");
    let device = WgpuDevice::default();
    let allocated = |dtype| {
        let load = |_: Option<_>| {
            let model = adapters::load_in::<B>(dtype, &base.config, &checkpoint, None, &device);
            Some(model.expect("it loads"))
        };
        let counts = count(&device, || None, load);
        let expected = adapters::base_bytes(&base, None, dtype).expect("a plain model");
        let found = counts.allocated_bytes as u64;
        assert!(
            found.abs_diff(expected) < expected / 50,
            "{dtype:?}: {found}"
        );
        found
    };
    let (wide, narrow) = (allocated(DType::F32), allocated(DType::F16));
    assert!(narrow < wide * 52 / 100, "{narrow} of {wide}"); // norms stay as they are
}

/// Launches do not grow with the rows of a batch; but which kernels are the fastest, and whether one
/// or two make a sum, is measured anew for each shape.
#[test]
fn more_rows_are_not_more_launches() {
    let launches = |batch: &[usize]| TINY.count(&[batch]).launches;
    let (few, many) = (launches(&[10, 14]), launches(&[3, 2, 5, 4, 9, 1]));
    assert!(many < few + few / 20, "{few} and {many}");
}

/// Dropout goes to the device as a seed for each layer, among the kernels' arguments.
#[test]
fn what_is_dropped_is_not_uploaded() {
    let batches: [&[usize]; 1] = [&[7, 12]];
    let shape = Shape {
        dropout: 0.1,
        ..TINY
    };
    let counts = shape.count(&batches);
    assert_eq!(counts.uploaded_bytes, bytes_of(shape, &batches));
    assert!(counts.launches > TINY.count(&batches).launches);
}

/// The table of the README. Every layer costs the same, so that two and three of them tell of all.
#[test]
#[ignore = "takes minutes on a software device"]
fn table() {
    let smol = Shape {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 2,
        heads: [9, 3],
        nf4: false,
        recompute: false,
        rank: 16,
        ..TINY
    };
    let rows: &[usize] = &[64; 4];
    let two = smol.count(&[rows]);
    let three = Shape { layers: 3, ..smol }.count(&[rows]);
    let all = |of: fn(&Counts) -> usize| of(&two) + 28 * (of(&three) - of(&two));
    println!("SmolLM2-135M, 4 rows of 64: {two:#?} with two layers; with 30:");
    println!("launches {}", all(|counts| counts.launches));
    println!("argument_bytes {}", all(|counts| counts.argument_bytes));
    println!("allocated_bytes {}", all(|counts| counts.allocated_bytes));
    println!("peak_bytes {}", all(|counts| counts.peak_bytes));
    let seven_b = Shape {
        vocab_size: 256,
        hidden_size: 4096,
        intermediate_size: 11_008,
        layers: 1,
        heads: [32, 32],
        rank: 16,
        ..TINY
    };
    let counts = seven_b.count(&[&[64]]);
    println!("one layer of Llama-2-7B, NF4, recompute, 1 row of 64: {counts:#?}");
}
