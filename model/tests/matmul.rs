//! Products that fusion can spoil, such as those with one row or one column: see `ops::matmul`.

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData, backend::Backend};
use model::ops::matmul;

/// The tests run on the processor, or with `--features wgpu` on the first graphics adapter.
#[cfg(not(feature = "wgpu"))]
type B = burn::backend::Flex;
#[cfg(feature = "wgpu")]
type B = burn::backend::Wgpu;

type Train = Autodiff<B>;

/// Numbers between -1 and 1.
fn noise(len: usize, seed: usize) -> Vec<f32> {
    let number = |i| (((i * 7919 + seed * 104_729) % 1009) as f32) / 504.5 - 1.0;
    (0..len).map(number).collect()
}

fn upload<B: Backend>(values: &[f32], shape: [usize; 2]) -> Tensor<B, 2> {
    Tensor::from_data(TensorData::new(values.to_vec(), shape), &Default::default())
}

/// `out[i, j] = Σ_l a(i, l) b(l, j)` for the rows, inner size and columns `[m, k, n]`.
fn by_hand(
    [m, k, n]: [usize; 3],
    a: impl Fn(usize, usize) -> f32,
    b: impl Fn(usize, usize) -> f32,
) -> Vec<f32> {
    let element = |at| (0..k).map(|l| a(at / n, l) * b(l, at % n)).sum();
    (0..m * n).map(element).collect()
}

fn assert_near<B: Backend>(found: Tensor<B, 2>, expected: &[f32], what: &str) {
    let found = found.into_data().to_vec::<f32>().unwrap();
    assert_eq!(found.len(), expected.len(), "{what}");
    let off = found.iter().zip(expected).map(|(a, b)| (a - b).abs());
    let off = off.fold(0.0, f32::max);
    let size = expected.iter().fold(1.0f32, |most, x| most.max(x.abs()));
    // f32 sums of at most 64 numbers in another order: 2e-7 of the largest was seen
    assert!(off < 2e-6 * size, "{what}: {off} of {size}");
}

#[test]
fn what_follows_a_product_sees_it_as_it_is() {
    for [m, k, n] in [
        [1, 32, 64],
        [1, 9, 5],
        [7, 9, 1],
        [6, 1, 5],
        [5, 32, 7],
        [80, 32, 56],
        [80, 56, 32],
    ] {
        let (x, w) = (noise(m * k, 1), noise(n * k, 2));
        let (a, b) = (upload::<B>(&x, [m, k]), upload::<B>(&w, [n, k]).transpose());
        B::sync(&Default::default()).unwrap(); // so that fusion starts with the product
        let y = matmul(a, b).mul_scalar(0.5);
        let expected = by_hand([m, k, n], |i, l| x[i * k + l], |l, j| 0.5 * w[j * k + l]);
        assert_near(y, &expected, &format!("{m} by {k} by {n}"));
    }
}

/// `y = 4 x Aᵀ Bᵀ` with the gradients that `d_y` brings: LoRA of rank 1, and of one token.
#[test]
fn gradients_through_a_row_or_column_are_right() {
    for [n, r, d] in [[7, 1, 9], [33, 1, 32], [1, 4, 32], [80, 56, 32]] {
        let (x, d_y) = (noise(n * d, 1), noise(n * d, 2));
        let (a, b) = (noise(r * d, 3), noise(d * r, 4));
        let inputs = [(&x, [n, d]), (&a, [r, d]), (&b, [d, r])];
        let inputs = inputs.map(|(values, shape)| upload::<Train>(values, shape).require_grad());
        let [x_, a_, b_] = inputs.clone().map(|input| input.mul_scalar(0.5));
        let narrow = matmul(x_, a_.transpose()).mul_scalar(8.0); // [n, r]
        let y = matmul(narrow, b_.transpose()).mul_scalar(4.0); // [n, d]
        let mut grads = (y * upload(&d_y, [n, d])).sum().backward();

        let narrow = by_hand([n, d, r], |i, l| x[i * d + l], |l, j| 4.0 * a[j * d + l]);
        let d_narrow = by_hand([n, d, r], |i, l| d_y[i * d + l], |l, j| 4.0 * b[l * r + j]);
        let d_x = by_hand([n, r, d], |i, l| d_narrow[i * r + l], |l, j| a[l * d + j]);
        let d_a = by_hand([r, n, d], |i, l| d_narrow[l * r + i], |l, j| x[l * d + j]);
        let d_b = by_hand([d, n, r], |i, l| d_y[l * d + i], |l, j| narrow[l * r + j]);
        for ((input, expected), name) in inputs.iter().zip([d_x, d_a, d_b]).zip(["x", "a", "b"]) {
            let found = input.grad_remove(&mut grads).unwrap();
            assert_near(found, &expected, &format!("d{name} of {n}, {r}, {d}"));
        }
    }
}
