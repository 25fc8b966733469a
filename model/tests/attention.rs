//! Attention with its gradients against the reference on the processor.

use burn::backend::{Autodiff, Flex};
#[cfg(feature = "wgpu")]
use burn::tensor::backend::Backend;
use burn::tensor::ops::FloatTensor;
use burn::tensor::{DType, Tensor, TensorData, TensorPrimitive};
use model::ops::{AttentionState, attention, reference};
use model::segments::Segments;

/// The tests run on the processor, or with `--features wgpu` on the first graphics adapter.
#[cfg(not(feature = "wgpu"))]
type B = Flex;
#[cfg(feature = "wgpu")]
type B = burn::backend::Wgpu;

type Train = Autodiff<B>;

struct Case {
    segments: Segments,
    /// Query heads and KV heads.
    heads: [usize; 2],
    h_d: usize,
}

/// Numbers between -1 and 1 without a pattern.
fn noise(shape: [usize; 3], seed: u32) -> TensorData {
    let number = |i: u32| {
        let hash = (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761);
        (hash ^ hash >> 15).wrapping_mul(0x85eb_ca6b) as f32 / 2_147_483_648.0 - 1.0
    };
    let count: usize = shape.iter().product();
    let values: Vec<f32> = (0..count as u32).map(number).collect();
    TensorData::new(values, shape)
}

impl Case {
    fn new(segments: Segments, heads: [usize; 2], h_d: usize) -> Self {
        Self {
            segments,
            heads,
            h_d,
        }
    }

    /// `q`, `k`, `v` and the output's gradient.
    fn inputs(&self) -> [TensorData; 4] {
        let last = self.segments.iter().last().expect("there are rows");
        let ([n_h, n_kv], h_d) = (self.heads, self.h_d);
        let (n, m) = (last.queries.end, last.keys.end);
        let shapes = [[n, n_h, h_d], [m, n_kv, h_d], [m, n_kv, h_d], [n, n_h, h_d]];
        let mut seed = 0;
        shapes.map(|shape| {
            seed += 1;
            noise(shape, seed)
        })
    }

    /// The output and the gradients of `q`, `k` and `v`, as training has them.
    fn found(&self, dtype: DType) -> [TensorData; 4] {
        let upload = |data| Tensor::<Train, 3>::from_data(data, &Default::default()).cast(dtype);
        let [q, k, v, d_out] = self.inputs().map(upload);
        let inputs = [q, k, v].map(|x| x.detach().require_grad());
        let [q, k, v] = inputs.clone();
        // as a product's, so that what comes before and after is there for fusion to spoil
        let out = attention(q * 2.0, k * 1.0, v * 1.0, &self.segments);
        let mut grads = (out.clone() * d_out).sum().backward();
        let [dq, dk, dv] = inputs.map(|x| x.grad_remove(&mut grads).expect("it is used"));
        [out.inner(), dq * 0.5, dk, dv].map(|x| x.cast(DType::F32).into_data())
    }

    fn expected(&self) -> [TensorData; 4] {
        let upload = |data| Tensor::<Flex, 3>::from_data(data, &Default::default());
        let [q, k, v, d_out] = self.inputs().map(upload);
        let [q, k, v, d_out] = [q * 2.0, k, v, d_out].map(|x| x.into_primitive().tensor());
        let (segments, all) = (self.segments.clone(), [q.clone(), k.clone(), v.clone()]);
        let (out, lse) = reference::attention::<Flex>(q, k, v, &segments);
        let [q, k, v] = all;
        let saved = AttentionState {
            q,
            k,
            v,
            out: out.clone(),
            lse,
            segments,
        };
        let [dq, dk, dv] = reference::attention_backward::<Flex>(saved, d_out);
        let download = |x: FloatTensor<Flex>| {
            Tensor::<Flex, 3>::from_primitive(TensorPrimitive::Float(x)).into_data()
        };
        [out, dq, dk, dv].map(download)
    }

    fn check(&self, dtype: DType, tolerance: f32) {
        let names = ["out", "dq", "dk", "dv"];
        let pairs = self.found(dtype).into_iter().zip(self.expected());
        for (name, (found, expected)) in names.into_iter().zip(pairs) {
            let case = format!(
                "{name} of {:?}, heads {:?}, h_d {}, {dtype:?}",
                self.segments, self.heads, self.h_d
            );
            assert_eq!(found.shape, expected.shape, "{case}");
            let largest = expected.iter::<f32>().fold(0.0, |m: f32, x| m.max(x.abs()));
            let pairs = found.iter::<f32>().zip(expected.iter::<f32>());
            let off = pairs.map(|(a, b)| (a - b).abs());
            let off = off.fold(0.0, |m: f32, x| if x.is_nan() { x } else { m.max(x) });
            assert!(off <= tolerance * largest, "{case}: {off} of {largest}");
        }
    }
}

/// One row and several, grouped heads, heads that tiles do and do not divide, rows that begin in
/// the middle of a tile, positions in a cache, and heads too wide for a kernel.
fn cases() -> Vec<Case> {
    let rows = |lengths: &[usize]| Segments::new(lengths.iter().copied());
    vec![
        Case::new(rows(&[37]), [4, 2], 16),
        Case::new(rows(&[1, 33, 2, 17, 20]), [9, 3], 64),
        Case::new(rows(&[40, 5]), [4, 4], 80),
        Case::new(rows(&[35, 1]), [2, 1], 128),
        Case::new(rows(&[5, 5, 5]), [100, 1], 6),
        Case::new(rows(&[2]).after(70), [9, 3], 64),
        Case::new(rows(&[1, 1]).after(35), [4, 2], 24),
        Case::new(rows(&[3, 19, 3]).after(30), [6, 2], 10),
        Case::new(rows(&[3, 4]), [2, 2], 512),
    ]
}

#[test]
fn output_and_gradients_equal_the_reference() {
    for case in cases() {
        // f32 sums in another order
        case.check(DType::F32, 1e-5);
    }
}

#[test]
fn one_query_sees_all_that_is_cached() {
    let case = Case::new(Segments::new([1]).after(70), [9, 3], 64);
    let [found, ..] = case.found(DType::F32);
    let [expected, ..] = case.expected();
    let off = found.iter::<f32>().zip(expected.iter::<f32>());
    assert!(off.fold(0.0, |m: f32, (a, b)| m.max((a - b).abs())) < 1e-5);
}

/// Where a device computes in 16 bits, sums and the softmax are still those of 32.
#[cfg(feature = "wgpu")] // the processor computes in f32
#[test]
fn numbers_of_16_bits_are_summed_in_32() {
    if !B::supports_dtype(&Default::default(), DType::F16) {
        return;
    }
    let of_kernels = cases().into_iter().filter(|case| case.h_d <= 128);
    for case in of_kernels {
        // inputs and outputs are rounded to 11 bits
        case.check(DType::F16, 4e-3);
    }
}

/// The rows are the same for every layer, and what a backend keeps of them belongs to its device.
#[test]
fn rows_can_be_shared_by_many_calls() {
    let case = Case::new(Segments::new([3, 20, 9]), [2, 1], 8);
    let first = case.found(DType::F32);
    let again = case.found(DType::F32);
    assert_eq!(first, again); // to the bit
    let longer = Case::new(case.segments.clone().after(4), [2, 1], 8);
    longer.check(DType::F32, 1e-5);
}
