//! Virtual tokens in front of rows: rows that lie end to end, a cache and gradients.

use std::ops::ControlFlow;
use std::path::Path;

use burn::backend::{Autodiff, Flex};
use burn::module::{Module, ModuleMapper, Param};
use burn::tensor::{Int, Tensor, TensorData, backend::Backend};
use model::checkpoint::Checkpoint;
use model::config::LlamaConfig;
use model::generate::{Generator, Sampling};
use model::linear::Linear;
use model::llama::Llama;
use model::load::normal;
use model::ops::{self, ModelBackend};
use model::rope::Rope;
use model::segments::Segments;
use model::virtual_tokens::{
    Activation, Dense, Encoder, Lstm, LstmCell, Place, Tasks, VirtualTokens,
};
use model::weight::named_param;

type Train = Autodiff<Flex>;
type Plain<B> = Llama<B, Linear<B>>;

const P: usize = 3;

fn random<B: Backend, const D: usize>(
    name: &str,
    shape: [usize; D],
    deviation: f64,
) -> Param<Tensor<B, D>> {
    let values = normal(3, name, shape.iter().product(), deviation);
    let data = TensorData::new(values, shape);
    named_param(name, Tensor::from_data(data, &Default::default()))
}

fn dense<B: Backend>(name: &str, [out, r#in]: [usize; 2]) -> Dense<B> {
    Dense {
        weight: random(&format!("{name}.weight"), [out, r#in], 0.4),
        bias: random(&format!("{name}.bias"), [out], 0.3),
    }
}

fn cell<B: Backend>(name: &str, [h, r#in]: [usize; 2]) -> LstmCell<B> {
    let name = |part: &str| format!("{name}.{part}");
    LstmCell {
        weight_ih: random(&name("weight_ih"), [4 * h, r#in], 0.4),
        weight_hh: random(&name("weight_hh"), [4 * h, h], 0.4),
        bias_ih: random(&name("bias_ih"), [4 * h], 0.3),
        bias_hh: random(&name("bias_hh"), [4 * h], 0.3),
    }
}

fn lstm<B: Backend>(name: &str, [h, r#in]: [usize; 2]) -> Lstm<B> {
    Lstm {
        ahead: cell(&format!("{name}.ahead"), [h, r#in]),
        reverse: cell(&format!("{name}.reverse"), [h, r#in]),
    }
}

/// Every kind, for a model.
fn kinds<B: Backend>(config: &LlamaConfig) -> Vec<(&'static str, VirtualTokens<B>)> {
    let d = config.hidden_size;
    let w = config.num_key_value_heads * config.head_dim;
    let all = 2 * config.num_hidden_layers * w;
    let plain = |width| VirtualTokens {
        embedding: random("embedding", [P, width], 0.5),
        encoder: None,
        tasks: None,
        place: Place::Embeddings,
    };
    let keys_and_values = Place::KeysAndValues;
    let encoder = |lstm, layers, activation| {
        Some(Encoder {
            lstm,
            layers,
            activation,
        })
    };
    let mlp = vec![dense("0", [7, d]), dense("2", [7, 7]), dense("4", [d, 7])];
    let head = vec![dense("0", [10, 10]), dense("2", [d, 10])];
    let project = vec![dense("0", [9, w]), dense("2", [all, 9])];
    vec![
        ("prompt", plain(d)),
        (
            "prefix",
            VirtualTokens {
                place: keys_and_values,
                ..plain(all)
            },
        ),
        (
            "projected prefix",
            VirtualTokens {
                place: keys_and_values,
                encoder: encoder(Vec::new(), project, Activation::Tanh),
                ..plain(w)
            },
        ),
        (
            "p-tuning",
            VirtualTokens {
                encoder: encoder(Vec::new(), mlp, Activation::Relu),
                ..plain(d)
            },
        ),
        (
            "p-tuning with an lstm",
            VirtualTokens {
                encoder: encoder(
                    vec![lstm("l0", [5, d]), lstm("l1", [5, 10])],
                    head,
                    Activation::Relu,
                ),
                ..plain(d)
            },
        ),
        (
            "multitask",
            VirtualTokens {
                tasks: Some(Tasks {
                    prefix_task_cols: random("cols", [3, P, 2], 1.0),
                    prefix_task_rows: random("rows", [3, 2, d], 1.0),
                }),
                ..plain(d)
            },
        ),
    ]
}

fn model<B: ModelBackend>() -> Plain<B> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/models/gqa");
    let config = LlamaConfig::from_file(&folder.join("config.json")).unwrap();
    let checkpoint = Checkpoint::open_folder(&folder).unwrap();
    model::load::load(&config, &checkpoint, &Default::default()).unwrap()
}

/// Logits `[n, v]` of rows that lie end to end, each of its task.
fn logits<B: ModelBackend>(model: &Plain<B>, rows: &[(&[u32], usize)]) -> Tensor<B, 2> {
    let device = Default::default();
    let segments = Segments::new(rows.iter().map(|(ids, _)| ids.len()));
    let segments = segments.of_tasks(rows.iter().map(|(_, task)| *task).collect());
    let ids: Vec<i32> = rows
        .iter()
        .flat_map(|(ids, _)| *ids)
        .map(|id| *id as i32)
        .collect();
    let ids = TensorData::new(ids.clone(), [ids.len()]);
    let ids = Tensor::<B, 1, Int>::from_data(ids, &device);
    let rope = Rope::new(&model.config, segments, &device);
    model.logits(model.forward(ids, &rope, None))
}

fn off(a: Tensor<Flex, 2>, b: Tensor<Flex, 2>) -> f32 {
    assert_eq!(a.dims(), b.dims());
    (a - b).abs().max().into_scalar()
}

#[test]
fn every_row_has_virtual_tokens_of_its_own() {
    let mut model = model::<Flex>();
    let rows: [(&[u32], usize); 4] = [(&[5, 9, 33, 8], 2), (&[7], 0), (&[5, 9], 1), (&[5, 9], 2)];
    let without = logits(&model, &rows[..1]);
    for (name, virtual_tokens) in kinds(&model.config) {
        let has_tasks = virtual_tokens.tasks.is_some();
        model.virtual_tokens = Some(virtual_tokens);
        let together = logits(&model, &rows);
        let alone = rows.iter().map(|row| logits(&model, &[*row]));
        let alone = Tensor::cat(alone.collect(), 0);
        // sums in another order
        assert!(off(together.clone(), alone.clone()) < 2e-5, "{name}");
        assert!(
            off(together.clone().narrow(0, 0, 4), without.clone()) > 0.01,
            "{name}"
        );
        let same_row = [together.clone().narrow(0, 5, 2), together.narrow(0, 7, 2)];
        let [one, other] = same_row;
        assert_eq!(off(one, other) > 0.01, has_tasks, "{name}");
    }
}

/// Virtual tokens that are the embeddings of words are as good as these words.
#[test]
fn embeddings_of_words_are_words() {
    let mut model = model::<Flex>();
    let words = logits(&model, &[(&[40, 41, 42, 5, 9, 33], 0)]).narrow(0, P, 3);
    let ids = Tensor::<Flex, 1, Int>::from_ints([40, 41, 42], &Default::default());
    let embedding = model.embed_tokens.val().select(0, ids);
    model.virtual_tokens = Some(VirtualTokens {
        embedding: named_param("embedding", embedding),
        encoder: None,
        tasks: None,
        place: Place::Embeddings,
    });
    assert!(off(logits(&model, &[(&[5, 9, 33], 0)]), words) < 2e-5);
}

#[test]
fn a_text_goes_on_as_without_a_cache() {
    let mut model = model::<Flex>();
    for (name, virtual_tokens) in kinds(&model.config) {
        model.virtual_tokens = Some(virtual_tokens);
        let device = Default::default();
        let mut generator = Generator::new(&model, &device).of_task(1);
        let sampling = Sampling {
            repetition_penalty: 1.3,
            ..Sampling::default()
        };
        let mut continued = |prompt: &[u32]| {
            let mut go_on = |_| ControlFlow::Continue(());
            let text = generator
                .generate(prompt, 6, &[], sampling, &mut go_on)
                .unwrap();
            let mut whole = prompt.to_vec();
            whole.extend(&text.token_ids);
            // the last logits, and what was chosen by them, for each new token
            let all = logits(&model, &[(&whole[..whole.len() - 1], 1)]);
            let [n, v] = all.dims();
            let values = all.into_data().to_vec::<f32>().unwrap();
            for at in prompt.len()..whole.len() {
                let mut row = values[(at - 1) * v..at * v].to_vec();
                for seen in whole[..at]
                    .iter()
                    .collect::<std::collections::BTreeSet<_>>()
                {
                    let logit = &mut row[*seen as usize];
                    *logit = if *logit < 0.0 {
                        *logit * 1.3
                    } else {
                        *logit / 1.3
                    };
                }
                let best = (0..v).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
                assert_eq!(
                    best as u32, whole[at],
                    "{name}, {n}: token {at} of {whole:?}"
                );
            }
            whole
        };
        let first = continued(&[5, 9, 33, 8]);
        continued(&[&first[..], &[7, 8]].concat()); // all of it is remembered
        continued(&[5, 9, 60, 8]); // a beginning
        continued(&[90]); // nothing
    }
}

/// Moves every parameter along the direction that its name decides.
struct Move(f64);

impl<B: Backend> ModuleMapper<B> for Move {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        let moved = param.val() + direction(&param).mul_scalar(self.0);
        Param::initialized(param.id, moved.detach().require_grad())
    }
}

fn direction<B: Backend, const D: usize>(param: &Param<Tensor<B, D>>) -> Tensor<B, D> {
    let name = format!("{:?}", param.id);
    let values = normal(8, &name, param.shape().num_elements(), 1.0);
    let data = TensorData::new(values, param.shape());
    Tensor::from_data(data, &Default::default())
}

/// The slope of a loss along a direction, by the gradients and by two losses beside each other.
#[test]
fn gradients_are_the_slopes_of_the_loss() {
    struct Along<'a>(
        &'a <Train as burn::tensor::backend::AutodiffBackend>::Gradients,
        f64,
    );
    impl burn::module::ModuleVisitor<Train> for Along<'_> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<Train, D>>) {
            let gradient = param.val().grad(self.0).expect("every parameter is used");
            let along = gradient * direction(param).inner();
            self.1 += f64::from(along.sum().into_scalar());
        }
    }
    let mut model = model::<Train>();
    let rows: [(&[u32], usize); 3] = [(&[5, 9, 33, 8], 2), (&[7, 1], 0), (&[5, 9], 2)];
    let loss = |model: &Plain<Train>| {
        let targets = [9, 33, 8, 2, 1, 2, 9, 2];
        let targets = Tensor::from_ints(targets, &Default::default());
        ops::cross_entropy(logits(model, &rows), targets).sum()
    };
    for (name, virtual_tokens) in kinds(&model.config) {
        model.virtual_tokens = Some(virtual_tokens);
        let grads = loss(&model).backward();
        let mut along = Along(&grads, 0.0);
        model.visit(&mut along);
        let by_gradients = along.1;
        let step = 2e-3;
        let at = |step: f64| f64::from(loss(&model.clone().map(&mut Move(step))).into_scalar());
        let by_losses = (at(step) - at(-step)) / (2.0 * step);
        let off = (by_gradients - by_losses).abs() / by_losses.abs();
        // f32 losses around 40 end in 4e-6, of which a slope of 1 shows 1e-3
        assert!(off < 5e-3, "{name}: {by_gradients} for {by_losses}");
    }
}
