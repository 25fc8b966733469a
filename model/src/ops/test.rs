//! What the tests of the operations share.

use burn::backend::{Autodiff, Flex};
use burn::tensor::{Tensor, TensorData};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

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
