//! A weight in 4 bits: made, checked and decoded.

use std::ops::Range;

use rayon::prelude::*;

use crate::decode::{AbsmaxView, View};
use crate::{DoubleQuantized, Error, Format, NESTED_BLOCK_SIZE, Precision, Result};

/// The smallest and the largest block size.
const BLOCK_SIZES: [usize; 2] = [32, 4096];
/// What follows the block size in the words for a scheme with 8-bit absmax values.
const DOUBLE: &str = " with double quantization";
/// bitsandbytes' lower bound where it divides by an absmax.
const MIN_ABSMAX: f32 = 1e-38;
/// How many values a rayon task quantises or decodes at least.
const TASK_VALUES: usize = 1 << 14;

/// How a weight is quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Scheme {
    /// What the codes stand for.
    pub format: Format,
    /// How many values share one absmax: a power of two from 32 to 4096.
    pub block_size: usize,
    /// Whether the absmax values are in 8 bits, too.
    pub double_quant: bool,
}

impl Scheme {
    /// What bitsandbytes and transformers take if nothing else is asked for.
    pub const DEFAULT_BLOCK_SIZE: usize = 64;

    /// About how many bytes `len` values take.
    pub fn bytes(&self, len: u64) -> u64 {
        let blocks = len.div_ceil(self.block_size as u64);
        let absmax = match self.double_quant {
            true => blocks + 4 * blocks.div_ceil(NESTED_BLOCK_SIZE as u64),
            false => 4 * blocks,
        };
        len.div_ceil(2) + absmax
    }

    /// Whether bitsandbytes has this block size.
    pub fn is_supported(&self) -> bool {
        check_block_size(self.block_size).is_ok()
    }

    /// A scheme by its own words, those of its `Display`.
    pub fn from_words(words: &str) -> Option<Self> {
        let (format, rest) = words.split_once(" in blocks of ")?;
        let (block_size, double_quant) = match rest.strip_suffix(DOUBLE) {
            Some(block_size) => (block_size, true),
            None => (rest, false),
        };
        let block_size = block_size.parse().ok()?;
        let scheme = Self::new(Format::from_name(format)?, block_size, double_quant);
        scheme.is_supported().then_some(scheme)
    }

    /// A format, its block size, and whether the absmax values are in 8 bits, too.
    pub fn new(format: Format, block_size: usize, double_quant: bool) -> Self {
        Self {
            format,
            block_size,
            double_quant,
        }
    }
}

impl std::fmt::Display for Scheme {
    fn fmt(&self, f: &mut std::fmt::Formatter) -> std::fmt::Result {
        write!(f, "{} in blocks of {}", self.format.name(), self.block_size)?;
        match self.double_quant {
            true => f.write_str(DOUBLE),
            false => Ok(()),
        }
    }
}

/// A weight `[out, in]` in 4 bits.
#[derive(Debug, Clone, PartialEq)]
pub struct Quantized {
    shape: [usize; 2],
    format: Format,
    block_size: usize,
    precision: Precision,
    codes: Vec<u8>,
    absmax: Absmax,
}

/// The largest magnitude of each block.
#[derive(Debug, Clone, PartialEq)]
pub enum Absmax {
    /// One value per block.
    Plain(Vec<f32>),
    /// One 8-bit code per block.
    Double(DoubleQuantized),
}

impl Absmax {
    /// The absmax of one block, decoded if need be.
    ///
    /// # Panics
    /// If there is no such block.
    pub fn get(&self, block: usize) -> f32 {
        self.view().get(block)
    }

    fn view(&self) -> AbsmaxView<'_> {
        match self {
            Absmax::Plain(absmax) => AbsmaxView::Plain(absmax),
            Absmax::Double(double) => AbsmaxView::Double {
                codes: &double.codes,
                absmax: &double.absmax,
                code_book: &*double.code_book,
                offset: double.offset,
            },
        }
    }

    fn check(&self, blocks: usize) -> Result<()> {
        match self {
            Absmax::Plain(absmax) => {
                check_len("absmax", blocks, absmax.len())?;
                check_finite("absmax", absmax)
            }
            Absmax::Double(double) => {
                let nested_blocks = blocks.div_ceil(NESTED_BLOCK_SIZE);
                check_len("absmax", blocks, double.codes.len())?;
                check_len("nested_absmax", nested_blocks, double.absmax.len())?;
                check_finite("nested_offset", &[double.offset])?;
                check_finite("nested_absmax", &double.absmax)?;
                check_finite("nested_quant_map", &*double.code_book)
            }
        }
    }
}

/// Quantises a weight of shape `[out, in]`, given row by row, on all cores.
///
/// # Errors
/// If the block size is not a power of two from 32 to 4096, the shape has no values or doesn't fit
/// the weight, a weight is infinite or NaN, or the mean absmax of a double quantization overflows.
pub fn quantize(weight: &[f32], shape: [usize; 2], scheme: Scheme) -> Result<Quantized> {
    let Scheme {
        format,
        block_size,
        double_quant,
    } = scheme;
    check_block_size(block_size)?;
    let len = count_values(shape)?;
    check_len("weight", len, weight.len())?;

    let mut codes = vec![0; len.div_ceil(2)];
    let mut absmax = vec![0.0; len.div_ceil(block_size)];
    let finite = weight
        .par_chunks(block_size)
        .zip(codes.par_chunks_mut(block_size / 2))
        .zip(&mut absmax)
        .with_min_len(TASK_VALUES / block_size)
        .map(|((weight, codes), absmax)| {
            *absmax = max_magnitude(weight);
            let finite = absmax.is_finite();
            if finite {
                *absmax = quantize_block(weight, *absmax, format, block_size, codes);
            }
            finite
        })
        .all(|finite| finite);
    if !finite {
        return Err(first_non_finite(weight, shape[1]));
    }
    let absmax = if double_quant {
        Absmax::Double(DoubleQuantized::quantize(&absmax))
    } else {
        Absmax::Plain(absmax)
    };
    Quantized::new(shape, format, block_size, codes, absmax)
}

impl Quantized {
    /// A weight of parts that were quantised before, such as those of a checkpoint.
    ///
    /// `codes` holds two codes a byte, the earlier one in the high nibble, over the weight
    /// flattened row by row.
    ///
    /// # Errors
    /// If the block size is not a power of two from 32 to 4096, the shape has no values, a part's
    /// length doesn't fit them, or a value that scales weights is infinite or NaN.
    pub fn new(
        shape: [usize; 2],
        format: Format,
        block_size: usize,
        codes: Vec<u8>,
        absmax: Absmax,
    ) -> Result<Self> {
        check_block_size(block_size)?;
        let len = count_values(shape)?;
        check_len("codes", len.div_ceil(2), codes.len())?;
        absmax.check(len.div_ceil(block_size))?;
        Ok(Self {
            shape,
            format,
            block_size,
            precision: Precision::F32,
            codes,
            absmax,
        })
    }

    /// The same weight, whose values are rounded to the type that it decodes to.
    pub fn with_precision(self, precision: Precision) -> Self {
        Self { precision, ..self }
    }

    /// What values are rounded to; f32 unless it was said otherwise.
    pub fn precision(&self) -> Precision {
        self.precision
    }

    /// The shape `[out, in]`.
    pub fn shape(&self) -> [usize; 2] {
        self.shape
    }

    /// What the codes stand for.
    pub fn format(&self) -> Format {
        self.format
    }

    /// How many values share one absmax.
    pub fn block_size(&self) -> usize {
        self.block_size
    }

    /// Format and blocks.
    pub fn scheme(&self) -> Scheme {
        let double_quant = matches!(self.absmax, Absmax::Double(_));
        Scheme::new(self.format, self.block_size, double_quant)
    }

    /// The codes, two a byte, the earlier one in the high nibble.
    pub fn codes(&self) -> &[u8] {
        &self.codes
    }

    /// The largest magnitude of each block.
    pub fn absmax(&self) -> &Absmax {
        &self.absmax
    }

    /// The codes and the largest magnitudes.
    pub fn into_parts(self) -> (Vec<u8>, Absmax) {
        (self.codes, self.absmax)
    }

    /// The whole weight, row by row, decoded on all cores.
    pub fn dequantize(&self) -> Vec<f32> {
        let [out_features, in_features] = self.shape;
        let mut weight = vec![0.0; out_features * in_features];
        self.dequantize_rows(0..out_features, &mut weight);
        weight
    }

    /// Writes some of the rows into `out`, row by row, decoded on all cores.
    ///
    /// # Panics
    /// If there are no such rows, or `out` is not exactly as long as they are.
    pub fn dequantize_rows(&self, rows: Range<usize>, out: &mut [f32]) {
        let [out_features, in_features] = self.shape;
        assert!(
            rows.start <= rows.end && rows.end <= out_features,
            "rows {rows:?} of a weight with {out_features} rows"
        );
        assert_eq!(
            out.len(),
            rows.len() * in_features,
            "length of the output for {rows:?}"
        );
        let (view, start) = (self.view(), rows.start * in_features);
        let tasks = out.par_chunks_mut(TASK_VALUES).enumerate();
        tasks.for_each(|(task, out)| view.decode(start + task * TASK_VALUES, out));
    }

    /// The parts, borrowed, as the kernels read them.
    pub(crate) fn view(&self) -> View<'_> {
        View {
            shape: self.shape,
            block_size: self.block_size,
            code_book: self.format.decoded(),
            precision: self.precision,
            codes: &self.codes,
            absmax: self.absmax.view(),
        }
    }
}

/// The largest magnitude; infinite or NaN if one of the values is.
fn max_magnitude(values: &[f32]) -> f32 {
    // Without the sign, the bits of floats order as the floats do, and NaN comes last.
    let bits = values
        .iter()
        .fold(0, |max, value| max.max(value.to_bits() & 0x7fff_ffff));
    f32::from_bits(bits)
}

/// Fills the codes of one block and returns the absmax to keep.
///
/// bitsandbytes multiplies a whole block by the inverse absmax but divides the partial one at the
/// end of a weight, and keeps the bounded absmax of the partial one only.
fn quantize_block(
    weight: &[f32],
    absmax: f32,
    format: Format,
    block_size: usize,
    codes: &mut [u8],
) -> f32 {
    let bounded = absmax.max(MIN_ABSMAX);
    if weight.len() == block_size {
        let inverse = 1.0 / bounded;
        encode(weight, |value| value * inverse, format, codes);
        absmax
    } else {
        encode(weight, |value| value / bounded, format, codes);
        bounded
    }
}

/// Packs the codes nearest to the scaled values; half a byte left over gets the code of zero.
fn encode(weight: &[f32], scale: impl Fn(f32) -> f32, format: Format, codes: &mut [u8]) {
    let code = |value: f32| format.nearest(scale(value));
    let (pairs, last) = weight.as_chunks::<2>();
    for (byte, [high, low]) in codes.iter_mut().zip(pairs) {
        *byte = code(*high) << 4 | code(*low);
    }
    if let ([high], Some(byte)) = (last, codes.last_mut()) {
        *byte = code(*high) << 4 | code(0.0);
    }
}

pub(crate) fn check_block_size(block_size: usize) -> Result<()> {
    let [smallest, largest] = BLOCK_SIZES;
    if block_size.is_power_of_two() && (smallest..=largest).contains(&block_size) {
        Ok(())
    } else {
        Err(Error::UnsupportedBlockSize { block_size })
    }
}

fn count_values(shape: [usize; 2]) -> Result<usize> {
    match shape[0].checked_mul(shape[1]) {
        None | Some(0) => Err(Error::InvalidShape { shape }),
        Some(len) => Ok(len),
    }
}

fn check_len(part: &'static str, expected: usize, found: usize) -> Result<()> {
    if found == expected {
        Ok(())
    } else {
        Err(Error::WrongLength {
            part,
            expected,
            found,
        })
    }
}

fn check_finite(part: &'static str, values: &[f32]) -> Result<()> {
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(()),
        Some(index) => Err(Error::NonFinitePart {
            part: part.into(),
            index,
            value: values[index],
        }),
    }
}

fn first_non_finite(weight: &[f32], in_features: usize) -> Error {
    let index = weight
        .iter()
        .position(|value| !value.is_finite())
        .expect("a block with an absmax that is not finite has such a value");
    let (row, column) = (index / in_features, index % in_features);
    Error::NonFiniteWeight {
        row,
        column,
        value: weight[index],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ramp(len: usize) -> Vec<f32> {
        (0..len).map(|i| (i as f32 * 0.37).sin()).collect()
    }

    #[test]
    fn a_scheme_is_read_from_its_own_words() {
        for scheme in [
            Scheme::new(Format::Nf4, 64, false),
            Scheme::new(Format::Fp4, 4096, true),
        ] {
            assert_eq!(Scheme::from_words(&scheme.to_string()), Some(scheme));
        }
        for other in [
            "none",
            "",
            "nf4",
            "nf5 in blocks of 64",
            "nf4 in blocks of 65",
            "nf4 in blocks of -64",
            "nf4 in blocks of 64 with",
        ] {
            assert_eq!(Scheme::from_words(other), None, "{other}");
        }
    }

    #[test]
    fn the_earlier_code_is_in_the_high_nibble() {
        let mut weight = vec![0.0; 32];
        (weight[0], weight[3]) = (1.0, -1.0);
        let quantized = quantize(&weight, [1, 32], Scheme::new(Format::Nf4, 32, false)).unwrap();
        assert_eq!(quantized.codes()[..3], [0xf7, 0x70, 0x77]);
    }

    #[test]
    fn an_odd_value_out_is_padded_with_the_code_of_zero() {
        for (format, byte) in [(Format::Nf4, 0xf7), (Format::Fp4, 0x30)] {
            let quantized = quantize(&[2.0], [1, 1], Scheme::new(format, 64, false)).unwrap();
            assert_eq!(quantized.codes(), [byte]);
            assert_eq!(quantized.dequantize(), [2.0]);
        }
    }

    #[test]
    fn a_value_on_a_midpoint_takes_the_lower_code() {
        for format in [Format::Nf4, Format::Fp4] {
            let mut weight = vec![1.0; 32];
            weight[..15].copy_from_slice(format.midpoints());
            let quantized = quantize(&weight, [1, 32], Scheme::new(format, 32, false)).unwrap();
            let codes = quantized
                .codes()
                .iter()
                .flat_map(|byte| [byte >> 4, byte & 0xf]);
            assert!(codes.take(15).eq(format.ascending()[..15].iter().copied()));
        }
    }

    #[test]
    fn a_block_may_span_rows() {
        let weight = ramp(3 * 48);
        let quantized = quantize(&weight, [3, 48], Scheme::new(Format::Nf4, 64, false)).unwrap();
        let Absmax::Plain(absmax) = quantized.absmax() else {
            panic!("double quantised")
        };
        let expected: Vec<f32> = weight.chunks(64).map(max_magnitude).collect();
        assert_eq!(*absmax, expected);
    }

    #[test]
    fn tasks_meet_without_a_seam() {
        // Longer than one rayon task, with an odd row length.
        let [out, inp] = [401, 123];
        let quantized = quantize(
            &ramp(out * inp),
            [out, inp],
            Scheme::new(Format::Nf4, 32, true),
        )
        .unwrap();
        let whole = quantized.dequantize();
        let mut rows = vec![0.0; out * inp];
        quantized.dequantize_rows(0..out, &mut rows);
        assert_eq!(whole, rows);
    }

    #[test]
    fn block_sizes_that_bitsandbytes_lacks_are_refused() {
        for block_size in [0, 1, 16, 48, 63, 100, 4097, 8192] {
            let error = quantize(
                &ramp(64),
                [1, 64],
                Scheme::new(Format::Nf4, block_size, false),
            )
            .unwrap_err();
            assert_eq!(
                error.to_string(),
                format!("block size {block_size} is not a power of two from 32 to 4096")
            );
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused() {
        let refused = |shape, len| {
            quantize(&ramp(len), shape, Scheme::new(Format::Fp4, 64, false))
                .unwrap_err()
                .to_string()
        };
        assert_eq!(
            refused([0, 4], 0),
            "shape [0, 4] has no values or too many to address"
        );
        assert!(refused([usize::MAX, 2], 4).starts_with("shape ["));
        assert_eq!(refused([2, 3], 5), "weight has 5 values, expected 6");
    }

    #[test]
    fn a_mean_absmax_that_overflows_is_refused() {
        let error =
            quantize(&[3e38; 128], [2, 64], Scheme::new(Format::Nf4, 64, true)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "nested_offset[0] is inf, expected a finite value"
        );
    }

    #[test]
    fn the_first_value_that_is_not_finite_is_named() {
        let mut weight = ramp(70_000);
        (weight[69_999], weight[350]) = (f32::NAN, f32::NEG_INFINITY);
        let error = quantize(&weight, [700, 100], Scheme::new(Format::Nf4, 64, false)).unwrap_err();
        assert_eq!(
            error.to_string(),
            "weight[3, 50] is -inf, and only finite values can be quantised"
        );
    }

    #[test]
    fn parts_of_the_wrong_length_are_refused() {
        let with = |codes: usize, absmax| {
            Quantized::new([2, 64], Format::Nf4, 64, vec![0; codes], absmax)
                .unwrap_err()
                .to_string()
        };
        let double = |codes, absmax| {
            Absmax::Double(DoubleQuantized {
                codes: vec![0; codes],
                absmax: vec![1.0; absmax],
                offset: 0.0,
                code_book: Box::new([0.0; 256]),
            })
        };
        assert_eq!(
            with(63, Absmax::Plain(vec![1.0; 2])),
            "codes has 63 values, expected 64"
        );
        assert_eq!(
            with(64, Absmax::Plain(vec![1.0; 3])),
            "absmax has 3 values, expected 2"
        );
        assert_eq!(with(64, double(1, 1)), "absmax has 1 values, expected 2");
        assert_eq!(
            with(64, double(2, 2)),
            "nested_absmax has 2 values, expected 1"
        );
        assert_eq!(
            with(64, Absmax::Plain(vec![1.0, f32::NAN])),
            "absmax[1] is NaN, expected a finite value"
        );
    }

    #[test]
    #[should_panic(expected = "rows 1..3 of a weight with 2 rows")]
    fn rows_beyond_the_weight_are_a_bug() {
        let quantized = quantize(&ramp(64), [2, 32], Scheme::new(Format::Nf4, 32, false)).unwrap();
        quantized.dequantize_rows(1..3, &mut [0.0; 64]);
    }
}
