//! What a training step costs a graphics adapter, counted: launches, and bytes that are allocated or
//! move between host and device.
//!
//! The table of the README:
//! `cargo test --workspace --features trainer/wgpu --test cost -- --ignored --nocapture`

#![cfg(feature = "wgpu")]

mod counted;

use adapters::methods::lora::LoraSettings;
use adapters::{AdaptedLlama, AdapterConfig, BaseLinear, Selection, attach};
use burn::backend::wgpu::WgpuDevice;
use burn::optim::Optimizer;
use burn::train::TrainStep;
use counted::{B, Counts, count};
use model::config::LlamaConfig;
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
            ..LoraSettings::default()
        };
        AdapterConfig {
            selection: Selection::default(),
            method: lora.into(),
        }
    }

    fn language_model(&self, device: &WgpuDevice) -> CausalLm<B> {
        let mut model = adapters::init(&self.config(), 1, device);
        if self.nf4 {
            pack(&mut model, device);
        }
        attach(&mut model, &self.adapter(), 1, device).expect("it fits");
        CausalLm {
            model,
            method: None,
            seed: 1,
            recompute: self.recompute,
        }
    }

    /// Counts a whole step on micro batches of rows of these lengths.
    fn count(&self, batches: &[&[usize]]) -> Counts {
        let device = WgpuDevice::default();
        let mut lm = Some(self.language_model(&device));
        let mut optimizer = AdamW::new(&Recipe::default().train);
        count(&device, || {
            let model = lm.take().expect("it is put back");
            let mut output = TrainStep::step(&model, self.window(batches));
            let norm = clip_gradients::<B, _>(&mut output.grads, &model, 1.0);
            assert!(output.item.loss.is_finite() && norm > 0.0);
            lm = Some(Optimizer::<CausalLm<B>, B>::step(
                &mut optimizer,
                1e-4,
                model,
                output.grads,
            ));
        })
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
        }
    }
}

/// Puts the decoder's linear layers into NF4.
fn pack(model: &mut AdaptedLlama<B>, device: &WgpuDevice) {
    for (_, layer) in model.projections_mut() {
        let BaseLinear::Dense(linear) = &layer.base else {
            continue;
        };
        let (shape, values) = (linear.weight.val().dims(), linear.weight.val().into_data());
        let values = values.to_vec::<f32>().expect("it is f32");
        let weight = quantize(&values, shape, Scheme::new(Format::Nf4, 64, false));
        layer.base = BaseLinear::Quantized(QuantLinear {
            weight: PackedWeight::new(weight.expect("finite weights"), device),
            bias: None,
        });
    }
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

/// Launches do not grow with the rows of a batch.
#[test]
fn more_rows_are_not_more_launches() {
    let launches = |batch: &[usize]| TINY.count(&[batch]).launches;
    assert_eq!(launches(&[10, 14]), launches(&[3, 2, 5, 4, 9, 1]));
}

#[test]
#[ignore = "takes minutes on a software device"]
fn table() {
    let smol = Shape {
        vocab_size: 49_152,
        hidden_size: 576,
        intermediate_size: 1536,
        layers: 2,
        heads: [9, 3],
        tied: true,
        nf4: false,
        recompute: false,
        rank: 16,
    };
    let seven_b = Shape {
        vocab_size: 256,
        hidden_size: 4096,
        intermediate_size: 11_008,
        layers: 1,
        heads: [32, 32],
        tied: true,
        nf4: true,
        recompute: true,
        rank: 16,
    };
    for (name, shape, batch) in [
        (
            "SmolLM2-135M, 2 of 30 layers, 4 rows of 256",
            smol,
            vec![256; 4],
        ),
        (
            "the same, 3 layers",
            Shape { layers: 3, ..smol },
            vec![256; 4],
        ),
        (
            "one layer of Llama-2-7B, NF4, recompute, 1 row of 128",
            seven_b,
            vec![128],
        ),
    ] {
        println!("{name}: {:#?}", shape.count(&[&batch]));
    }
}
