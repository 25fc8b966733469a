//! What the tests of the operations share.

use burn::backend::{Autodiff, Flex, flex::FlexTensor};
use burn::tensor::{Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::primitive;

pub type Inner = Flex;
pub type Train = Autodiff<Flex>;

/// Numbers from -1 to 1 that depend on `seed` alone.
pub fn random(shape: [usize; 2], seed: u64) -> Tensor<Inner, 2> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let values: Vec<f32> = (0..shape[0] * shape[1])
        .map(|_| rng.random_range(-1.0..1.0))
        .collect();
    Tensor::from_data(TensorData::new(values, shape), &Default::default())
}

/// The output of `op` and the gradients of its inputs when each output element has its own weight.
pub fn grads_of<const N: usize>(
    inputs: [Tensor<Inner, 2>; N],
    op: impl Fn([Tensor<Train, 2>; N]) -> Tensor<Train, 2>,
) -> Vec<Tensor<Inner, 2>> {
    let inputs = inputs.map(|x| Tensor::<Train, 2>::from_inner(x).require_grad());
    let out = op(inputs.clone());
    let weights = Tensor::from_inner(random(out.dims(), 99));
    let grads = (out.clone() * weights).sum().backward();
    let gradients = inputs
        .iter()
        .map(|x| x.grad(&grads).expect("every input is used"));
    std::iter::once(out.inner()).chain(gradients).collect()
}

/// Compares element by element, relative to the largest element.
pub fn assert_close(left: Vec<Tensor<Inner, 2>>, right: Vec<Tensor<Inner, 2>>, tolerance: f32) {
    assert_eq!(left.len(), right.len());
    for (i, (left, right)) in left.into_iter().zip(right).enumerate() {
        let scale = right.clone().abs().max().into_scalar();
        assert!(scale > 0.0, "tensor {i} is all zero");
        let off = (left - right).abs().max().into_scalar();
        assert!(off <= tolerance * scale, "tensor {i}: {off} of {scale}");
    }
}

/// Numbers from `-scale` to `scale` that depend on `seed` alone.
pub fn noise<const D: usize>(shape: [usize; D], scale: f64, seed: u64) -> FlexTensor {
    let values = random([1, shape.iter().product()], seed).mul_scalar(scale);
    primitive(values.reshape(shape))
}

/// The elements in row-major order.
pub fn values(x: &FlexTensor) -> Vec<f32> {
    let data = x.clone().into_data();
    data.to_vec().expect("32-bit floats")
}

/// Checks that a fused version's output has the reference's shape and, relative to the largest
/// element, its elements.
pub fn assert_near(fused: &FlexTensor, reference: &FlexTensor, tolerance: f32, case: &str) {
    assert_eq!(fused.layout().shape(), reference.layout().shape(), "{case}");
    let (fused, reference) = (values(fused), values(reference));
    let largest = reference.iter().fold(0.0, |m: f32, x| m.max(x.abs()));
    assert!(largest > 0.0, "{case}: all zero");
    for (i, (x, y)) in fused.iter().zip(&reference).enumerate() {
        let off = (x - y).abs();
        assert!(
            off <= tolerance * largest,
            "{case}, element {i}: {x} for {y}, largest {largest}"
        );
    }
}

/// Checks that repeating `f` gives the same bits.
pub fn assert_repeats(f: impl Fn() -> Vec<FlexTensor>) {
    let bits = || -> Vec<Vec<u32>> {
        let outputs = f();
        let bits = |x| values(x).into_iter().map(f32::to_bits).collect();
        outputs.iter().map(bits).collect()
    };
    let first = bits();
    for _ in 0..5 {
        assert!(bits() == first, "the results differ");
    }
}
