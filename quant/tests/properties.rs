//! Laws of the 4-bit formats on random weights.

use proptest::collection::vec;
use proptest::prelude::*;
use quant::{Absmax, Format, NESTED_BLOCK_SIZE, Quantized, Scheme, quantize};

fn format() -> impl Strategy<Value = Format> {
    prop_oneof![Just(Format::Nf4), Just(Format::Fp4)]
}

fn block_size() -> impl Strategy<Value = usize> {
    (5_u32..=12).prop_map(|exponent| 1 << exponent)
}

/// A value of any size a weight can have, zeros and denormals included.
fn value() -> impl Strategy<Value = f32> {
    use proptest::num::f32::{NEGATIVE, NORMAL, POSITIVE, SUBNORMAL, ZERO};
    prop_oneof![
        8 => -1.0_f32..1.0,
        1 => POSITIVE | NEGATIVE | NORMAL | SUBNORMAL | ZERO,
    ]
}

/// A weight whose rows and blocks rarely end together.
fn weight() -> impl Strategy<Value = ([usize; 2], Vec<f32>)> {
    (1_usize..24, 1_usize..200)
        .prop_flat_map(|(out, inp)| (Just([out, inp]), vec(value(), out * inp)))
}

/// Half the widest gap between neighbouring values of the format.
fn half_widest_gap(format: Format) -> f32 {
    let mut values = *format.code_book();
    values.sort_by(f32::total_cmp);
    values
        .windows(2)
        .map(|pair| (pair[1] - pair[0]) / 2.0)
        .fold(0.0, f32::max)
}

fn code(quantized: &Quantized, i: usize) -> u8 {
    let byte = quantized.codes()[i / 2];
    if i.is_multiple_of(2) {
        byte >> 4
    } else {
        byte & 0xf
    }
}

proptest! {
    #[test]
    fn round_trip_stays_within_half_the_widest_gap(
        (shape, weight) in weight(), format in format(), block_size in block_size(),
    ) {
        let quantized = quantize(&weight, shape, Scheme::new(format, block_size, false)).unwrap();
        // Rounding of value / absmax, of the midpoints and of the product, a few 2^-24 together
        // (2^-22 where 1 / absmax is a denormal).
        let gap = half_widest_gap(format) + 1e-6;
        for (i, (value, decoded)) in weight.iter().zip(quantized.dequantize()).enumerate() {
            let absmax = quantized.absmax().get(i / block_size);
            // bitsandbytes divides by 1e-38 where absmax is smaller.
            let bound = if absmax <= 1e-38 { 1e-38 } else { absmax * gap };
            prop_assert!((value - decoded).abs() <= bound, "{i}: {value} {decoded} {absmax}");
        }
    }

    #[test]
    fn absmax_is_the_largest_magnitude_of_its_block(
        (shape, weight) in weight(), format in format(), block_size in block_size(),
    ) {
        let quantized = quantize(&weight, shape, Scheme::new(format, block_size, false)).unwrap();
        for (block, values) in weight.chunks(block_size).enumerate() {
            let largest = values.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
            let bounded = if values.len() < block_size { largest.max(1e-38) } else { largest };
            prop_assert_eq!(quantized.absmax().get(block), bounded);
        }
    }

    #[test]
    fn packed_high_nibble_first_over_the_flattened_weight(
        (shape, weight) in weight(), format in format(), block_size in block_size(),
        double_quant in any::<bool>(),
    ) {
        // A double quantised absmax that overflows is an error, tested elsewhere.
        let weight: Vec<f32> = weight.iter().map(|value| value.clamp(-1e30, 1e30)).collect();
        let quantized = quantize(&weight, shape, Scheme::new(format, block_size, double_quant)).unwrap();
        prop_assert_eq!(quantized.codes().len(), weight.len().div_ceil(2));
        for (i, decoded) in quantized.dequantize().into_iter().enumerate() {
            let value = format.decoded()[usize::from(code(&quantized, i))];
            let expected = value * quantized.absmax().get(i / block_size);
            prop_assert_eq!(decoded.to_bits(), expected.to_bits(), "{}", i);
        }
        if weight.len() % 2 == 1 {
            let padding = code(&quantized, weight.len());
            prop_assert_eq!(format.code_book()[usize::from(padding)], 0.0);
        }
    }

    #[test]
    fn dequantised_rows_are_those_of_the_whole(
        (shape, weight) in weight(), format in format(), block_size in block_size(),
        ends in any::<[prop::sample::Index; 2]>(),
    ) {
        let quantized = quantize(&weight, shape, Scheme::new(format, block_size, false)).unwrap();
        let [out_features, in_features] = shape;
        let mut ends = ends.map(|end| end.index(out_features + 1));
        ends.sort_unstable();
        let rows = ends[0]..ends[1];
        let mut found = vec![f32::NAN; rows.len() * in_features];
        quantized.dequantize_rows(rows.clone(), &mut found);
        let whole = quantized.dequantize();
        prop_assert_eq!(&found, &whole[rows.start * in_features..rows.end * in_features]);
    }

    #[test]
    fn zeros_stay_zero(
        shape in [1_usize..40, 1_usize..40], format in format(), block_size in block_size(),
        double_quant in any::<bool>(),
    ) {
        let weight = vec![0.0; shape[0] * shape[1]];
        let quantized = quantize(&weight, shape, Scheme::new(format, block_size, double_quant)).unwrap();
        prop_assert_eq!(quantized.dequantize(), weight);
    }

    #[test]
    fn double_quantised_absmax_stays_within_half_the_widest_gap(
        weight in vec(-1.0_f32..1.0, 32 * 600), format in format(),
    ) {
        let plain = quantize(&weight, [600, 32], Scheme::new(format, 32, false)).unwrap();
        let double = quantize(&weight, [600, 32], Scheme::new(format, 32, true)).unwrap();
        prop_assert_eq!(plain.codes(), double.codes());
        let Absmax::Double(nested) = double.absmax() else { panic!("not double quantised") };
        for block in 0..600 {
            let error = (plain.absmax().get(block) - double.absmax().get(block)).abs();
            // Half the widest gap of the code book (the top decade, 0.9 wide, in 64 parts), half a grid step, rounding.
            let bound = nested.absmax[block / NESTED_BLOCK_SIZE] * (0.9 / 128.0 + 1.6e-5) + 1e-6;
            prop_assert!(error <= bound, "{block}: {error} {bound}");
        }
    }

    #[test]
    fn a_value_that_is_not_finite_is_named(
        (shape, mut weight) in weight(), format in format(), at in any::<prop::sample::Index>(),
        value in prop_oneof![Just(f32::INFINITY), Just(f32::NEG_INFINITY), Just(f32::NAN)],
    ) {
        let index = at.index(weight.len());
        weight[index] = value;
        let error = quantize(&weight, shape, Scheme::new(format, 64, false)).unwrap_err();
        let [row, column] = [index / shape[1], index % shape[1]];
        let message = format!("weight[{row}, {column}] is {value}, and only finite values can be quantised");
        prop_assert_eq!(error.to_string(), message);
    }
}
