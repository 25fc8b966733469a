//! A linear layer in 4 bits beside the same one in f32, in turns, so that whatever else the machine
//! does meets both: at 1,024 tokens forward and backward, and at one token.
//!
//! `cargo bench --workspace --profile dev --bench matmul`, which shares what `cargo test` compiled.
//! `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` before it keeps large tensors' memory in the process, as
//! `trainer` does.

use std::hint::black_box;
use std::time::{Duration, Instant};

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{Distribution, Tensor, ops::FloatTensorOps};
use quant::{Format, PackedWeight, QuantBackend, Scheme, Side, quantize};

/// `[out, in]`: SmolLM2-135M's `q_proj`, `gate_proj`, `down_proj`, Llama-2-7B's `q_proj`,
/// `gate_proj`.
const SHAPES: [[usize; 2]; 5] = [
    [576, 576],
    [1536, 576],
    [576, 1536],
    [4096, 4096],
    [11008, 4096],
];
const ROUNDS: usize = 30;
/// At one token the weights of a round are these many bytes of f32 together, as a generating model
/// reads every layer once a token: no weight is still in the cache when its turn comes again.
const COLD_BYTES: usize = 256 << 20;

fn main() {
    println!("tokens  product  [out, in]       f32 ms   nf4 ms   ratio of medians  double quant");
    for shape in SHAPES {
        for side in [Side::Transposed, Side::Plain] {
            compare(1024, shape, side, 1);
        }
    }
    for shape in SHAPES {
        let copies = COLD_BYTES / (4 * shape[0] * shape[1]);
        compare(1, shape, Side::Transposed, copies.max(1));
    }
}

/// Prints the medians of all rounds, each of which goes once through all copies.
fn compare(n: usize, shape: [usize; 2], side: Side, copies: usize) {
    let [columns, _] = side.columns(shape);
    let x = random([n, columns]);
    let dense: Vec<FlexTensor> = (0..copies).map(|_| random(shape)).collect();
    let packed = |double_quant| -> Vec<PackedWeight<Flex>> {
        let pack = |dense: &FlexTensor| {
            let values = dense.as_slice().expect("just made");
            let weight = quantize(values, shape, Scheme::new(Format::Nf4, 64, double_quant));
            PackedWeight::new(weight.expect("finite"), &Default::default())
        };
        dense.iter().map(pack).collect()
    };
    let (nf4, double) = (packed(false), packed(true));
    let mut seconds = [const { Vec::new() }; 3];
    for _ in 0..ROUNDS {
        let mut time = |i: usize, run: &dyn Fn()| {
            let start = Instant::now();
            run();
            seconds[i].push(start.elapsed() / copies as u32);
        };
        time(0, &|| {
            for weight in &dense {
                let weight = match side {
                    Side::Transposed => Flex::float_transpose(weight.clone()),
                    Side::Plain => weight.clone(),
                };
                black_box(Flex::float_matmul(x.clone(), weight));
            }
        });
        for (i, weights) in [(1, &nf4), (2, &double)] {
            time(i, &|| {
                for weight in weights {
                    black_box(Flex::quant_matmul(x.clone(), weight, side));
                }
            });
        }
    }
    let [f32, nf4, double] = seconds.map(median);
    let product = match side {
        Side::Transposed => "x Wᵀ",
        Side::Plain => "dy W",
    };
    println!(
        "{n:>6}  {product:<7}  {:<14} {:>7.3}  {:>7.3}  {:>16.2}  {:>12.2}",
        format!("{shape:?}"),
        f32 * 1e3,
        nf4 * 1e3,
        nf4 / f32,
        double / f32,
    );
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64()
}

fn random(shape: [usize; 2]) -> FlexTensor {
    let distribution = Distribution::Normal(0.0, 1.0);
    let x = Tensor::<Flex, 2>::random(shape, distribution, &Default::default());
    x.into_primitive().tensor()
}
