//! Double quantization: the absmax values themselves in 8 bits.

use std::sync::LazyLock;

use rayon::prelude::*;

/// How many absmax values share one second-level absmax.
pub const NESTED_BLOCK_SIZE: usize = 256;
/// How many second-level blocks a rayon task quantises at least.
const TASK_BLOCKS: usize = 16;

/// The absmax values of a weight in 8 bits: `code_book[code] * absmax + offset`.
#[derive(Debug, Clone, PartialEq)]
pub struct DoubleQuantized {
    /// One code per block of the weight.
    pub codes: Vec<u8>,
    /// The second-level absmax, one per [`NESTED_BLOCK_SIZE`] codes.
    pub absmax: Vec<f32>,
    /// The mean of the absmax values, taken off before they are quantised.
    pub offset: f32,
    /// What each code stands for (`nested_quant_map`).
    pub code_book: Box<[f32; 256]>,
}

impl DoubleQuantized {
    /// Quantises the absmax values of a weight with the dynamic code book.
    ///
    /// The offset is the mean as torch computes it in one thread ([`mean`]).
    pub(crate) fn quantize(absmax: &[f32]) -> Self {
        let offset = mean(absmax);
        let centred: Vec<f32> = absmax.iter().map(|value| value - offset).collect();
        let mut codes = vec![0; centred.len()];
        let absmax = centred
            .par_chunks(NESTED_BLOCK_SIZE)
            .zip(codes.par_chunks_mut(NESTED_BLOCK_SIZE))
            .with_min_len(TASK_BLOCKS)
            .map(|(values, codes)| quantize_block(values, codes))
            .collect();
        Self {
            codes,
            absmax,
            offset,
            code_book: Box::new(DYNAMIC.code_book),
        }
    }
}

/// Fills the codes of one block and returns its absmax. A block of zeros gets codes 0, which its
/// absmax of zero decodes to zero.
fn quantize_block(values: &[f32], codes: &mut [u8]) -> f32 {
    let absmax = values
        .iter()
        .fold(0.0_f32, |absmax, value| absmax.max(value.abs()));
    if absmax > 0.0 {
        let inverse = 1.0 / absmax;
        for (code, value) in codes.iter_mut().zip(values) {
            *code = DYNAMIC.code(value * inverse);
        }
    }
    absmax
}

/// The dynamic code book and its decision boundaries.
struct Dynamic {
    code_book: [f32; 256],
    midpoints: [f32; 255],
}

static DYNAMIC: LazyLock<Dynamic> = LazyLock::new(|| {
    let code_book = dynamic_code_book();
    let midpoints = std::array::from_fn(|i| (code_book[i] + code_book[i + 1]) * 0.5);
    Dynamic {
        code_book,
        midpoints,
    }
});

impl Dynamic {
    /// The code of a value between -1 and 1.
    ///
    /// Not quite the nearest: as in bitsandbytes, the value first moves to a grid of 2^16 points
    /// over [-1, 1], and the code is the one nearest to the grid point (the lower one of two).
    /// `1 / absmax` is infinite for an absmax below 2^-128, so the value may be infinite, too, or
    /// NaN for zero; NaN takes the first grid point.
    fn code(&self, value: f32) -> u8 {
        const LAST: f32 = 65535.0;
        let unit = (value.clamp(-1.0, 1.0) + 1.0) * 0.5;
        // A fused multiply-add: in f64 product and sum are exact, and the cast rounds them once.
        let index = (f64::from(unit) * f64::from(LAST) + 0.5) as f32 as u16;
        let grid_point = 2.0 * f32::from(index) / LAST - 1.0;
        // At most 255 boundaries lie below.
        self.midpoints
            .partition_point(|midpoint| *midpoint < grid_point) as u8
    }
}

/// The signed dynamic code book: for each power of ten from 1e-6 to 1, twice as many values as for
/// the one before, spread evenly over a decade, with both signs; and 0 and 1.
///
/// Source: 8-Bit Approximations for Parallelism in Deep Learning,
/// <https://arxiv.org/abs/1511.04561>.
fn dynamic_code_book() -> [f32; 256] {
    const SCALES: [f32; 7] = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0];
    let mut values = vec![0.0, 1.0];
    for (exponent, scale) in SCALES.into_iter().enumerate() {
        let count = 1 << exponent;
        for i in 0..count {
            let mean = (boundary(i, count) + boundary(i + 1, count)) / 2.0;
            values.extend([scale * mean, -scale * mean]);
        }
    }
    values.sort_by(f32::total_cmp);
    std::array::from_fn(|i| values[i])
}

/// The `i`-th of the `count + 1` points that cut [0.1, 1] into `count` parts, counted from the
/// nearer end, with fused multiply-adds, as torch's `linspace` does.
fn boundary(i: u16, count: u16) -> f32 {
    const START: f32 = 0.1;
    const END: f32 = 1.0;
    let step = (END - START) / f32::from(count);
    if i < count.div_ceil(2) {
        step.mul_add(f32::from(i), START)
    } else {
        step.mul_add(-f32::from(count - i), END)
    }
}

/// The mean, in the order of additions of `torch.mean` on a CPU with one thread, to the bit.
///
/// With several threads torch sums 32,768 values or more in one part per thread, so there the last
/// bits depend on the number of threads; we take one thread's order, whatever the machine.
fn mean(values: &[f32]) -> f32 {
    let sum = if values.len() < 8 {
        lane_sum::<1>(values)
    } else {
        lane_sum::<8>(values)
    };
    sum / values.len() as f32
}

/// The sum over `L` lanes, each over four interleaved columns of cascaded partial sums.
fn lane_sum<const L: usize>(values: &[f32]) -> f32 {
    let (rows, tail) = values.as_chunks::<L>();
    let (quads, rest) = rows.as_chunks::<4>();
    let mut columns = cascade_sum(quads);
    for row in rest {
        add(&mut columns[0], row);
    }
    let [mut lanes, others @ ..] = columns;
    for column in &others {
        add(&mut lanes, column);
    }
    tail.iter()
        .chain(&lanes)
        .fold(0.0, |sum, value| sum + value)
}

/// Sums rows on four levels: a level goes into the next whenever it holds `2^power` of its terms.
fn cascade_sum<const L: usize>(quads: &[[[f32; L]; 4]]) -> [[f32; L]; 4] {
    const LEVELS: usize = 4;
    // ceil(log2(length)), but 1 for a length up to 2.
    let log2 = quads.len().max(2).next_power_of_two().ilog2();
    let power = (log2 / LEVELS as u32).max(4);
    let step = 1 << power;
    let mut levels = [[[0.0; L]; 4]; LEVELS];
    let mut done = 0_usize;
    let mut steps = quads.chunks_exact(step);
    for quads in &mut steps {
        quads.iter().for_each(|quad| add_quad(&mut levels[0], quad));
        done += step;
        for level in 1..LEVELS {
            let full = std::mem::replace(&mut levels[level - 1], [[0.0; L]; 4]);
            add_quad(&mut levels[level], &full);
            if done & ((step - 1) << (level as u32 * power)) != 0 {
                break;
            }
        }
    }
    let [mut sum, higher @ ..] = levels;
    steps
        .remainder()
        .iter()
        .chain(&higher)
        .for_each(|quad| add_quad(&mut sum, quad));
    sum
}

fn add_quad<const L: usize>(sum: &mut [[f32; L]; 4], quad: &[[f32; L]; 4]) {
    sum.iter_mut()
        .zip(quad)
        .for_each(|(sum, row)| add(sum, row));
}

fn add<const L: usize>(sum: &mut [f32; L], row: &[f32; L]) {
    sum.iter_mut()
        .zip(row)
        .for_each(|(sum, value)| *sum += value);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_dynamic_code_book_ascends_from_near_minus_one_to_one() {
        let code_book = dynamic_code_book();
        assert!(code_book.is_sorted());
        assert_eq!((code_book[127], code_book[255]), (0.0, 1.0));
        assert_eq!(code_book[0], -0.992_968_74);
    }

    #[test]
    fn every_code_is_reached_but_those_finer_than_the_grid() {
        let reached = |code: &u8| DYNAMIC.code(DYNAMIC.code_book[usize::from(*code)]) == *code;
        let missed: Vec<u8> = (0..=255).filter(|code| !reached(code)).collect();
        // These have neighbours closer than 2^-15.
        assert!(
            missed.iter().all(|code| (118..=137).contains(code)),
            "{missed:?}"
        );
    }

    #[test]
    fn a_constant_absmax_is_kept_by_the_offset() {
        let quantized = DoubleQuantized::quantize(&[0.25; 300]);
        assert_eq!(quantized.offset, 0.25);
        assert_eq!(quantized.absmax, [0.0, 0.0]);
        let absmax = crate::Absmax::Double(quantized);
        assert!((0..300).all(|block| absmax.get(block) == 0.25));
    }

    #[test]
    fn the_mean_is_close_to_the_exact_one_at_every_size() {
        for len in (1..200).chain([511, 512, 513, 4096, 70_001]) {
            let values: Vec<f32> = (0..len).map(|i| 1.0 + (i as f32 * 0.37).sin()).collect();
            let exact = values.iter().map(|value| f64::from(*value)).sum::<f64>() / len as f64;
            assert!((f64::from(mean(&values)) - exact).abs() < 1e-6, "{len}");
        }
    }
}
