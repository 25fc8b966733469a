//! The fused operations of the CPU beside their references, in the sizes of SmolLM2-135M.
//!
//! `cargo bench --workspace --profile dev --bench ops`, which shares what `cargo test` compiled.
//! With `GLIBC_TUNABLES=glibc.malloc.hugetlb=1` before it, glibc keeps large tensors' memory instead
//! of returning it to the system each time.

use burn::backend::Flex;
use burn::backend::flex::FlexTensor;
use burn::tensor::{Distribution, Int, Tensor};
use divan::Bencher;
use model::ops::{
    AdamwStep, AttentionBackend, AttentionState, CrossEntropyBackend, MatmulBackend,
    RmsNormBackend, RotaryBackend, SwigluBackend, UpdateBackend, reference,
};
use model::segments::Segments;

const TOKENS: usize = 1024;
const HIDDEN: usize = 576;
const INTERMEDIATE: usize = 1536;
const HEADS: usize = 9;
const KV_HEADS: usize = 3;
const HEAD_DIM: usize = 64;
const VOCABULARY: usize = 49152;
const RANK: usize = 16;

fn main() {
    divan::main();
}

fn random<const D: usize>(shape: [usize; D]) -> FlexTensor {
    let distribution = Distribution::Normal(0.0, 1.0);
    let x = Tensor::<Flex, D>::random(shape, distribution, &Default::default());
    x.into_primitive().tensor()
}

/// The same elements in memory of their own, for what works in place.
fn copy(x: &FlexTensor) -> FlexTensor {
    FlexTensor::from_data(x.clone().into_data())
}

mod rms_norm {
    use super::*;

    fn inputs() -> [FlexTensor; 3] {
        [
            random([TOKENS, HIDDEN]),
            random([HIDDEN]),
            random([TOKENS, HIDDEN]),
        ]
    }

    #[divan::bench]
    fn fused(bencher: Bencher) {
        let [x, w, _] = inputs();
        bencher.bench(|| Flex::rms_norm(x.clone(), w.clone(), 1e-5));
    }

    #[divan::bench]
    fn plain(bencher: Bencher) {
        let [x, w, _] = inputs();
        bencher.bench(|| reference::rms_norm::<Flex>(x.clone(), w.clone(), 1e-5));
    }

    #[divan::bench(args = [false, true])]
    fn backward_fused(bencher: Bencher, with_weight: bool) {
        let [x, w, dy] = inputs();
        bencher
            .bench(|| Flex::rms_norm_backward(x.clone(), w.clone(), dy.clone(), 1e-5, with_weight));
    }

    #[divan::bench(args = [false, true])]
    fn backward_plain(bencher: Bencher, with_weight: bool) {
        let [x, w, dy] = inputs();
        bencher.bench(|| {
            let (x, w, dy) = (x.clone(), w.clone(), dy.clone());
            reference::rms_norm_backward::<Flex>(x, w, dy, 1e-5, with_weight)
        });
    }
}

mod rotary {
    use super::*;

    fn inputs() -> [FlexTensor; 3] {
        let table = || random([TOKENS, HEAD_DIM / 2]);
        [random([TOKENS, HEADS, HEAD_DIM]), table(), table()]
    }

    #[divan::bench]
    fn fused(bencher: Bencher) {
        let [x, cos, sin] = inputs();
        bencher.bench(|| Flex::rotary(x.clone(), cos.clone(), sin.clone(), false));
    }

    #[divan::bench]
    fn plain(bencher: Bencher) {
        let [x, cos, sin] = inputs();
        bencher.bench(|| reference::rotary::<Flex>(x.clone(), cos.clone(), sin.clone(), false));
    }
}

mod swiglu {
    use super::*;

    fn inputs() -> [FlexTensor; 3] {
        [(); 3].map(|()| random([TOKENS, INTERMEDIATE]))
    }

    #[divan::bench]
    fn fused(bencher: Bencher) {
        let [gate, up, _] = inputs();
        bencher.bench(|| Flex::swiglu(gate.clone(), up.clone()));
    }

    #[divan::bench]
    fn plain(bencher: Bencher) {
        let [gate, up, _] = inputs();
        bencher.bench(|| reference::swiglu::<Flex>(gate.clone(), up.clone()));
    }

    #[divan::bench]
    fn backward_fused(bencher: Bencher) {
        let [gate, up, dy] = inputs();
        bencher.bench(|| Flex::swiglu_backward(gate.clone(), up.clone(), dy.clone()));
    }

    #[divan::bench]
    fn backward_plain(bencher: Bencher) {
        let [gate, up, dy] = inputs();
        bencher.bench(|| reference::swiglu_backward::<Flex>(gate.clone(), up.clone(), dy.clone()));
    }
}

mod cross_entropy {
    use super::*;

    fn logits() -> FlexTensor {
        random([TOKENS, VOCABULARY])
    }

    fn targets() -> FlexTensor {
        Tensor::<Flex, 1, Int>::arange(0..TOKENS as i64, &Default::default()).into_primitive()
    }

    #[divan::bench(sample_count = 10)]
    fn fused(bencher: Bencher) {
        let (logits, targets) = (logits(), targets());
        bencher.bench(|| Flex::cross_entropy(logits.clone(), targets.clone()));
    }

    #[divan::bench(sample_count = 5)]
    fn plain(bencher: Bencher) {
        let (logits, targets) = (logits(), targets());
        bencher.bench(|| reference::cross_entropy::<Flex>(logits.clone(), targets.clone()));
    }

    /// In place, as in training: each run has its own logits.
    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn with_gradient_fused(bencher: Bencher) {
        let (logits, targets) = (logits(), targets());
        let inputs = || (copy(&logits), targets.clone());
        let run = |(logits, targets)| Flex::cross_entropy_with_gradient(logits, targets);
        bencher.with_inputs(inputs).bench_values(run);
    }

    #[divan::bench(sample_count = 3, sample_size = 1)]
    fn with_gradient_plain(bencher: Bencher) {
        let (logits, targets) = (logits(), targets());
        bencher.bench(|| {
            reference::cross_entropy_with_gradient::<Flex>(logits.clone(), targets.clone())
        });
    }

    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn backward_fused(bencher: Bencher) {
        let (gradient, d_nll) = (logits(), random([TOKENS]));
        let inputs = || (copy(&gradient), d_nll.clone());
        let run = |(gradient, d_nll)| Flex::cross_entropy_backward(gradient, d_nll);
        bencher.with_inputs(inputs).bench_values(run);
    }

    #[divan::bench(sample_count = 5, sample_size = 1)]
    fn backward_plain(bencher: Bencher) {
        let (gradient, d_nll) = (logits(), random([TOKENS]));
        let inputs = || (copy(&gradient), d_nll.clone());
        let run = |(gradient, d_nll)| reference::cross_entropy_backward::<Flex>(gradient, d_nll);
        bencher.with_inputs(inputs).bench_values(run);
    }
}

/// Arguments: sequences, queries of each, positions of each.
mod attention {
    use super::*;

    const TRAINING: [[usize; 3]; 2] = [[4, 256, 256], [1, 2048, 2048]];
    const ALL: [[usize; 3]; 3] = [TRAINING[0], TRAINING[1], [1, 1, 2048]];

    fn segments([b, s, t]: [usize; 3]) -> Segments {
        Segments::new(vec![s; b]).after(t - s)
    }

    fn inputs([b, s, t]: [usize; 3]) -> [FlexTensor; 4] {
        let (q, k) = ([b * s, HEADS, HEAD_DIM], [b * t, KV_HEADS, HEAD_DIM]);
        [random(q), random(k), random(k), random(q)]
    }

    fn saved(sizes: [usize; 3]) -> (AttentionState<Flex>, FlexTensor) {
        let ([q, k, v, d_out], segments) = (inputs(sizes), segments(sizes));
        let (out, lse) = Flex::causal_attention(q.clone(), k.clone(), v.clone(), &segments);
        let state = AttentionState {
            q,
            k,
            v,
            out,
            lse,
            segments,
        };
        (state, d_out)
    }

    #[divan::bench(args = ALL)]
    fn fused(bencher: Bencher, sizes: [usize; 3]) {
        let ([q, k, v, _], segments) = (inputs(sizes), segments(sizes));
        bencher.bench(|| Flex::causal_attention(q.clone(), k.clone(), v.clone(), &segments));
    }

    #[divan::bench(args = ALL, max_time = 5)]
    fn plain(bencher: Bencher, sizes: [usize; 3]) {
        let ([q, k, v, _], segments) = (inputs(sizes), segments(sizes));
        let plain = reference::attention::<Flex>;
        bencher.bench(|| plain(q.clone(), k.clone(), v.clone(), &segments));
    }

    #[divan::bench(args = TRAINING)]
    fn backward_fused(bencher: Bencher, sizes: [usize; 3]) {
        let (saved, d_out) = saved(sizes);
        bencher.bench(|| Flex::causal_attention_backward(saved.clone(), d_out.clone()));
    }

    #[divan::bench(args = TRAINING, max_time = 5)]
    fn backward_plain(bencher: Bencher, sizes: [usize; 3]) {
        let (saved, d_out) = saved(sizes);
        bencher.bench(|| reference::attention_backward::<Flex>(saved.clone(), d_out.clone()));
    }
}

/// A low-rank update of the widest output, and the products of these layers alone: 2 · n · in · out
/// operations each, by which their share of a step and their rate follow.
mod matmul {
    use super::*;

    fn inputs() -> [FlexTensor; 3] {
        [
            random([TOKENS, INTERMEDIATE]),
            random([TOKENS, RANK]),
            random([RANK, INTERMEDIATE]),
        ]
    }

    #[divan::bench]
    fn add_fused(bencher: Bencher) {
        let [sum, a, b] = inputs();
        bencher
            .with_inputs(|| copy(&sum))
            .bench_values(|sum| Flex::add_matmul(sum, a.clone(), b.clone()));
    }

    #[divan::bench]
    fn add_plain(bencher: Bencher) {
        let [sum, a, b] = inputs();
        bencher
            .with_inputs(|| copy(&sum))
            .bench_values(|sum| reference::add_matmul::<Flex>(sum, a.clone(), b.clone()));
    }

    #[divan::bench(args = [[HIDDEN, HIDDEN], [HIDDEN, INTERMEDIATE], [INTERMEDIATE, HIDDEN]])]
    fn layer(bencher: Bencher, [r#in, out]: [usize; 2]) {
        let random = |shape: [usize; 2]| {
            Tensor::<Flex, 2>::random(shape, Distribution::Default, &Default::default())
        };
        let (x, weight) = (random([TOKENS, r#in]), random([out, r#in]));
        bencher
            .counter(divan::counter::ItemsCount::new(2 * TOKENS * r#in * out))
            .bench(|| model::ops::matmul(x.clone(), weight.clone().transpose()));
    }

    /// The same by Burn's own product, which copies its output.
    #[divan::bench(args = [[HIDDEN, HIDDEN], [HIDDEN, INTERMEDIATE], [INTERMEDIATE, HIDDEN]])]
    fn layer_by_burn(bencher: Bencher, [r#in, out]: [usize; 2]) {
        let random = |shape: [usize; 2]| {
            Tensor::<Flex, 2>::random(shape, Distribution::Default, &Default::default())
        };
        let (x, weight) = (random([TOKENS, r#in]), random([out, r#in]));
        bencher
            .counter(divan::counter::ItemsCount::new(2 * TOKENS * r#in * out))
            .bench(|| x.clone().matmul(weight.clone().transpose()));
    }
}

/// A tensor as large as all adapters of rank 16 together.
mod update {
    use super::*;

    const NUMBERS: usize = 4_884_480;
    const STEP: AdamwStep = AdamwStep {
        betas: [0.9, 0.999],
        eps: 1e-8,
        decay: 1.0,
        step_size: 1e-3,
        root: 0.1,
    };

    /// The weight, which others hold, too, its moments and its gradient.
    fn inputs() -> ([FlexTensor; 3], FlexTensor) {
        let [first, gradient] = [(); 2].map(|()| random([NUMBERS]));
        let second = Flex::scale(first.clone(), 0.0);
        ([random([NUMBERS]), first, second], gradient)
    }

    type Adamw = fn([FlexTensor; 3], FlexTensor, &AdamwStep) -> [FlexTensor; 3];

    fn adamw(bencher: Bencher, step: Adamw) {
        let ([weight, first, second], gradient) = inputs();
        let own = || {
            let moments = [&first, &second].map(copy);
            (moments, copy(&gradient))
        };
        bencher
            .with_inputs(own)
            .bench_values(|([first, second], gradient)| {
                step([weight.clone(), first, second], gradient, &STEP)
            });
    }

    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn adamw_fused(bencher: Bencher) {
        adamw(bencher, Flex::adamw);
    }

    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn adamw_plain(bencher: Bencher) {
        adamw(bencher, reference::adamw::<Flex>);
    }

    #[divan::bench]
    fn norm_fused(bencher: Bencher) {
        let (_, gradient) = inputs();
        bencher.bench(|| Flex::sum_of_squares(gradient.clone()));
    }

    #[divan::bench]
    fn norm_plain(bencher: Bencher) {
        let (_, gradient) = inputs();
        bencher.bench(|| reference::sum_of_squares::<Flex>(gradient.clone()));
    }

    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn clip_fused(bencher: Bencher) {
        let (_, gradient) = inputs();
        bencher
            .with_inputs(|| copy(&gradient))
            .bench_values(|gradient| Flex::scale(gradient, 0.5));
    }

    #[divan::bench(sample_count = 10, sample_size = 1)]
    fn clip_plain(bencher: Bencher) {
        let (_, gradient) = inputs();
        bencher
            .with_inputs(|| copy(&gradient))
            .bench_values(|gradient| reference::scale::<Flex>(gradient, 0.5));
    }
}
