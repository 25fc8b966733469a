//! The product with a 4-bit weight on the device of the tests, beside one by the book on the host.

use burn::backend::Autodiff;
use burn::tensor::{Tensor, TensorData};
use quant::{Format, PackedWeight, Precision, Quantized, Scheme, matmul, quantize};

#[cfg(not(feature = "wgpu"))]
type B = burn::backend::Flex;
#[cfg(feature = "wgpu")]
type B = burn::backend::Wgpu;

/// Numbers between -1 and 1 without a pattern.
fn noise(count: usize, seed: u32) -> Vec<f32> {
    let one = |i: u32| {
        let hash = (i ^ seed.wrapping_mul(0x9e37_79b9)).wrapping_mul(2_654_435_761);
        (hash ^ hash >> 15).wrapping_mul(0x85eb_ca6b) as f32 / 2_147_483_648.0 - 1.0
    };
    (0..count as u32).map(one).collect()
}

/// `x` `[n, in]` times `Wᵀ`, and `dy` `[n, out]` times `W`.
fn by_the_book(x: &[f32], dy: &[f32], weight: &Quantized) -> [Vec<f64>; 2] {
    let [out, r#in] = weight.shape();
    let values = weight.dequantize();
    let (mut y, mut dx) = (Vec::new(), Vec::new());
    for x in x.chunks(r#in) {
        let row = |w: &[f32]| {
            x.iter()
                .zip(w)
                .map(|(x, w)| f64::from(*x) * f64::from(*w))
                .sum()
        };
        y.extend(values.chunks(r#in).map(row).collect::<Vec<f64>>());
    }
    for dy in dy.chunks(out) {
        let column = |j: usize| {
            let w = values[j..].iter().step_by(r#in);
            dy.iter()
                .zip(w)
                .map(|(dy, w)| f64::from(*dy) * f64::from(*w))
                .sum()
        };
        dx.extend((0..r#in).map(column).collect::<Vec<f64>>());
    }
    [y, dx]
}

/// Largest distance, as a share of the largest element.
fn off(found: TensorData, expected: &[f64]) -> f64 {
    let found: Vec<f32> = found.iter().collect();
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0, |m: f64, x| m.max(x.abs()));
    let pairs = found.iter().zip(expected);
    pairs.fold(0.0, |m: f64, (a, b)| m.max((f64::from(*a) - b).abs())) / largest
}

/// Product and gradient.
fn check(n: usize, shape: [usize; 2], scheme: Scheme, precision: Precision) {
    let weight = quantize(&noise(shape[0] * shape[1], 1), shape, scheme).unwrap();
    check_weight(n, weight.with_precision(precision));
}

fn check_weight(n: usize, weight: Quantized) {
    let ([out, r#in], scheme, precision) = (weight.shape(), weight.scheme(), weight.precision());
    let (x, dy) = (noise(n * r#in, 2), noise(n * out, 3));
    let [expected_y, expected_dx] = by_the_book(&x, &dy, &weight);

    let device = Default::default();
    let tensor = |values, width| {
        Tensor::<Autodiff<B>, 2>::from_data(TensorData::new(values, [n, width]), &device)
    };
    let weight = PackedWeight::new(weight, &device);
    let x = tensor(x, r#in).require_grad();
    let y = matmul(x.clone(), &weight);
    let grads = (y.clone() * tensor(dy, out)).sum().backward();
    let dx = x.grad(&grads).unwrap();
    for (name, off, addends) in [
        ("y", off(y.into_data(), &expected_y), r#in),
        ("dx", off(dx.into_data(), &expected_dx), out),
    ] {
        assert!(
            off < 3e-6 * (addends as f64 / 1024.0).sqrt().max(1.0),
            "{name} for {n} × {out} × {0}, {scheme}, {precision:?}: off by {off}",
            r#in
        ); // f32 sums
    }
}

#[test]
fn products_and_gradients_are_right_on_this_device() {
    let check = |n, shape, scheme| check(n, shape, scheme, Precision::F32);
    check(5, [96, 64], Scheme::new(Format::Nf4, 64, false));
    check(33, [128, 192], Scheme::new(Format::Nf4, 64, true));
    check(4, [40, 700], Scheme::new(Format::Fp4, 32, true)); // two nested blocks
    check(3, [33, 51], Scheme::new(Format::Fp4, 32, false)); // blocks across rows, an odd value out
}

#[test]
fn values_of_16_bits_are_right_on_this_device() {
    for precision in [Precision::F16, Precision::Bf16] {
        check(3, [33, 51], Scheme::new(Format::Nf4, 64, true), precision);
        check(1, [33, 51], Scheme::new(Format::Nf4, 64, true), precision);
    }
}

#[test]
fn one_token_is_right_on_this_device() {
    let check = |shape, scheme| check(1, shape, scheme, Precision::F32);
    check([130, 100], Scheme::new(Format::Nf4, 64, true));
    check([40, 1100], Scheme::new(Format::Fp4, 64, false)); // several words a unit, rows within words
    check([1, 7], Scheme::new(Format::Nf4, 4096, false)); // a block larger than the weight
}

/// Dense it has 133 MiB, more than the 128 MiB that some devices take as one buffer.
#[test]
fn a_weight_larger_than_a_buffer_is_right_on_this_device() {
    let scheme = Scheme::new(Format::Nf4, 64, false);
    check(2, [8500, 4096], scheme, Precision::F32);
}
