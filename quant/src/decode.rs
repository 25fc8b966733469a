//! From codes to values, and to scalar products: what all kernels on the CPU are made of.
//!
//! One loop over runs, which lie in one block each, with bodies for a run: portable ones, and ones
//! for the vectors that the processor turns out to have. Values are `code_book[code] * absmax` in
//! f32, rounded to the type they decode to: the same bits by each.

/// Defines `decode` and `dot` of a module from its vectors: `Book`, which looks up `CODES` codes at
/// a time, and `Sum`.
macro_rules! kernels {
    ($features:literal) => {
        /// See [`View::decode`].
        #[target_feature(enable = $features)]
        pub(super) fn decode(view: &View, start: usize, out: &mut [f32]) {
            let book = Book::load(view.code_book);
            view.for_each_run(start, out.len(), |run, at, len| {
                let out = &mut out[at..at + len];
                let (head, whole) = run.words::<{ CODES / 2 }>(len);
                // Sixteen values stand for the whole run: rounding them costs next to nothing.
                let values = match view.precision {
                    Precision::F32 => book.scaled(run.absmax),
                    _ => Book::load(&run.values()),
                };
                let (first, words) = out.split_at_mut(head);
                let (words, tail) = words.as_chunks_mut::<CODES>();
                for (out, word) in words.iter_mut().zip(whole) {
                    values.write(*word, out);
                }
                if first.len() + tail.len() > 0 {
                    super::decode(&run, first);
                    super::decode(&run.after(len - tail.len()), tail);
                }
            });
        }

        /// See [`View::dot`].
        #[target_feature(enable = $features)]
        pub(super) fn dot(view: &View, start: usize, x: &[f32]) -> f32 {
            let code_book = Book::load(view.code_book);
            let (mut total, mut ends) = (Sum::zero(), 0.0);
            view.for_each_run(start, x.len(), |run, at, len| {
                let (book, absmax) = match view.precision {
                    Precision::F32 => (code_book, run.absmax),
                    _ => (Book::load(&run.values()), 1.0),
                };
                let x = &x[at..at + len];
                let (head, whole) = run.words::<{ CODES / 2 }>(len);
                let (first, words) = x.split_at(head);
                let (words, tail) = words.as_chunks::<CODES>();
                // Two chains of additions hide each other's latency.
                let mut sums = [Sum::zero(); 2];
                let (pairs, last) = words.as_chunks::<2>();
                let (whole_pairs, whole_last) = whole.as_chunks::<2>();
                for (x, word) in pairs.iter().zip(whole_pairs) {
                    sums[0] = sums[0].add(book, word[0], &x[0]);
                    sums[1] = sums[1].add(book, word[1], &x[1]);
                }
                for (x, word) in last.iter().zip(whole_last) {
                    sums[0] = sums[0].add(book, *word, x);
                }
                total = total.add_scaled(sums, absmax);
                if first.len() + tail.len() > 0 {
                    let after = run.after(len - tail.len());
                    ends += super::dot(&run, first) + super::dot(&after, tail);
                }
            });
            ends + total.lanes()
        }
    };
}

/// Defines `dot_rows` of a module from `Book::choose`, `Sum` and `bytes_to_lanes`: the even and
/// the odd codes of bytes are looked up apart, so that no code has to move to another lane.
#[cfg(target_arch = "x86_64")]
macro_rules! block_kernels {
    ($features:literal) => {
        /// Fills `y` with the scalar products of `x`, see [`Operand`], and rows of whole blocks.
        #[target_feature(enable = $features)]
        pub(super) fn dot_rows(view: &View, first: usize, x: &[f32], y: &mut [f32]) {
            let dot = match (view.block_size, view.precision) {
                (32, Precision::F32) => dot_stretches::<32, false>,
                (32, _) => dot_stretches::<32, true>,
                (_, Precision::F32) => dot_stretches::<64, false>,
                (_, _) => dot_stretches::<64, true>,
            };
            let mut absmax = Vec::new();
            for (row, y) in (first..).zip(y) {
                let start = row * x.len();
                let codes = &view.codes[start / 2..][..x.len() / 2];
                *y = dot(view, codes, view.stretches(start, x.len(), &mut absmax), x);
            }
        }

        /// The scalar product of `x` and codes of stretches that are `LEN` long.
        #[target_feature(enable = $features)]
        fn dot_stretches<const LEN: usize, const ROUNDED: bool>(
            view: &View,
            codes: &[u8],
            absmax: &[f32],
            x: &[f32],
        ) -> f32 {
            let code_book = Book::load(view.code_book);
            let mut sums = [Sum::zero(); 4]; // their latencies hide each other
            let stretches = x
                .as_chunks::<LEN>()
                .0
                .iter()
                .zip(codes.chunks_exact(LEN / 2));
            for ((x, codes), absmax) in stretches.zip(absmax) {
                let book = match ROUNDED {
                    true => Book::load(&view.values(*absmax)),
                    false => code_book.scaled(*absmax),
                };
                let (x, _) = x.as_chunks::<CODES>();
                let (codes, _) = codes.as_chunks::<CODES>();
                for i in 0..LEN / (2 * CODES) {
                    let [high, low] = bytes_to_lanes(&codes[i]);
                    let at = 2 * (i % 2);
                    sums[at] = sums[at].add_values(book.choose(high), &x[2 * i]);
                    sums[at + 1] = sums[at + 1].add_values(book.choose(low), &x[2 * i + 1]);
                }
            }
            let [a, b, c, d] = sums;
            a.plus(b).plus(c.plus(d)).lanes()
        }
    };
}

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

use std::iter::repeat_n;

use crate::{NESTED_BLOCK_SIZE, Precision};

/// A 4-bit weight, borrowed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View<'a> {
    /// `[out, in]`.
    pub shape: [usize; 2],
    pub block_size: usize,
    /// What the codes stand for.
    pub code_book: &'a [f32; 16],
    /// What values are rounded to.
    pub precision: Precision,
    /// Two codes a byte, the earlier one in the high nibble; there may be more than are used.
    pub codes: &'a [u8],
    pub absmax: AbsmaxView<'a>,
}

/// The largest magnitude of each block, borrowed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum AbsmaxView<'a> {
    Plain(&'a [f32]),
    Double {
        codes: &'a [u8],
        absmax: &'a [f32],
        code_book: &'a [f32],
        offset: f32,
    },
}

impl AbsmaxView<'_> {
    /// The absmax of one block.
    #[inline(always)]
    pub fn get(&self, block: usize) -> f32 {
        match *self {
            Self::Plain(absmax) => absmax[block],
            Self::Double {
                codes,
                absmax,
                code_book,
                offset,
            } => {
                let value = code_book[usize::from(codes[block])];
                value * absmax[block / NESTED_BLOCK_SIZE] + offset
            }
        }
    }
}

/// One row to be multiplied with many of a weight.
#[derive(Debug)]
pub(crate) struct Operand<'a> {
    x: &'a [f32],
    /// For vectors of `n` lanes, of each `2 n` elements first the even ones, which high nibbles
    /// meet, then the odd ones; empty where there are no such kernels, or rows end within a block.
    parted: Vec<f32>,
}

/// Values in one block, from the flat index `start` on.
struct Run<'a> {
    codes: &'a [u8],
    start: usize,
    code_book: &'a [f32; 16],
    precision: Precision,
    absmax: f32,
}

impl View<'_> {
    /// The absmax of each stretch of 64 codes, or of a block if that is shorter, of `len` codes from
    /// `start` on; both are whole numbers of blocks.
    #[inline(always)]
    fn stretches<'a>(&'a self, start: usize, len: usize, room: &'a mut Vec<f32>) -> &'a [f32] {
        let stretches = (self.block_size / 64).max(1); // of a block
        let blocks = start / self.block_size..(start + len) / self.block_size;
        match self.absmax {
            AbsmaxView::Plain(absmax) if stretches == 1 => &absmax[blocks],
            absmax => {
                room.clear();
                room.extend(blocks.flat_map(|block| repeat_n(absmax.get(block), stretches)));
                room
            }
        }
    }

    /// What each code of a block decodes to.
    #[inline(always)]
    fn values(&self, absmax: f32) -> [f32; 16] {
        self.code_book
            .map(|value| self.precision.round(value * absmax))
    }

    /// Writes the values from the flat index `start` on, until `out` is full.
    pub fn decode(&self, start: usize, out: &mut [f32]) {
        // SAFETY, of each call: the processor has the features.
        #[cfg(target_arch = "x86_64")]
        match vectors() {
            Vectors::Avx512 => return unsafe { avx512::decode(self, start, out) },
            Vectors::Avx2 => return unsafe { avx2::decode(self, start, out) },
            Vectors::None => {}
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            return unsafe { neon::decode(self, start, out) };
        }
        self.decode_portably(start, out);
    }

    /// A row for [`View::dot_row`].
    pub fn operand<'a>(&self, x: &'a [f32]) -> Operand<'a> {
        #[cfg(target_arch = "x86_64")]
        let lanes = match vectors() {
            Vectors::Avx512 => 16,
            Vectors::Avx2 => 8,
            Vectors::None => 0,
        };
        #[cfg(not(target_arch = "x86_64"))]
        let lanes = 0;
        self.operand_for(lanes, x)
    }

    fn operand_for<'a>(&self, lanes: usize, x: &'a [f32]) -> Operand<'a> {
        let whole = x.len().is_multiple_of(self.block_size);
        let group = match whole && self.block_size.is_multiple_of(2 * lanes.max(1)) {
            true => 2 * lanes,
            false => 0,
        };
        let mut parted = vec![0.0; if group > 0 { x.len() } else { 0 }];
        let groups = x.chunks_exact(group.max(1));
        for (to, from) in parted.chunks_exact_mut(group.max(1)).zip(groups) {
            let (even, odd) = to.split_at_mut(lanes);
            for ((even, odd), pair) in even.iter_mut().zip(odd).zip(from.as_chunks().0) {
                [*even, *odd] = *pair;
            }
        }
        Operand { x, parted }
    }

    /// Fills `y` with the scalar products of `x` and rows of the weight from `first` on.
    pub fn dot_rows(&self, first: usize, x: &Operand, y: &mut [f32]) {
        #[cfg(target_arch = "x86_64")]
        if !x.parted.is_empty() {
            // SAFETY, of each call: the processor has the features.
            match vectors() {
                Vectors::Avx512 => return unsafe { avx512::dot_rows(self, first, &x.parted, y) },
                Vectors::Avx2 => return unsafe { avx2::dot_rows(self, first, &x.parted, y) },
                Vectors::None => {}
            }
        }
        for (row, y) in (first..).zip(y) {
            *y = self.dot(row * x.x.len(), x.x);
        }
    }

    /// The scalar product of `x` and the values from the flat index `start` on.
    pub fn dot(&self, start: usize, x: &[f32]) -> f32 {
        // SAFETY, of each call: the processor has the features.
        #[cfg(target_arch = "x86_64")]
        match vectors() {
            Vectors::Avx512 => return unsafe { avx512::dot(self, start, x) },
            Vectors::Avx2 => return unsafe { avx2::dot(self, start, x) },
            Vectors::None => {}
        }
        #[cfg(target_arch = "aarch64")]
        if std::arch::is_aarch64_feature_detected!("neon") {
            return unsafe { neon::dot(self, start, x) };
        }
        self.dot_portably(start, x)
    }

    fn decode_portably(&self, start: usize, out: &mut [f32]) {
        self.for_each_run(start, out.len(), |run, at, len| {
            decode(&run, &mut out[at..at + len]);
        });
    }

    fn dot_portably(&self, start: usize, x: &[f32]) -> f32 {
        let mut sum = 0.0;
        self.for_each_run(start, x.len(), |run, at, len| {
            sum += dot(&run, &x[at..at + len]);
        });
        sum
    }

    /// Calls `f(run, at, len)` for the runs that make up `len` values from `start` on; `at` counts
    /// from `start`.
    #[inline(always)]
    fn for_each_run(&self, start: usize, len: usize, mut f: impl FnMut(Run, usize, usize)) {
        let mut at = 0;
        let shift = self.block_size.trailing_zeros(); // block sizes are powers of two
        while at < len {
            let block = (start + at) >> shift;
            let run = Run {
                codes: self.codes,
                start: start + at,
                code_book: self.code_book,
                precision: self.precision,
                absmax: self.absmax.get(block),
            };
            let in_block = (block + 1) * self.block_size - run.start;
            let in_run = in_block.min(len - at);
            f(run, at, in_run);
            at += in_run;
        }
    }
}

/// The vectors of an x86-64 processor that have kernels.
#[cfg(target_arch = "x86_64")]
enum Vectors {
    Avx512,
    Avx2,
    None,
}

#[cfg(target_arch = "x86_64")]
fn vectors() -> Vectors {
    match is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
        true if is_x86_feature_detected!("avx512f") => Vectors::Avx512,
        true => Vectors::Avx2,
        false => Vectors::None,
    }
}

impl<'a> Run<'a> {
    /// What each code of the run decodes to.
    fn values(&self) -> [f32; 16] {
        self.code_book
            .map(|value| self.precision.round(value * self.absmax))
    }

    /// The rest of the run, `count` codes later.
    #[inline(always)]
    fn after(&self, count: usize) -> Self {
        Self {
            start: self.start + count,
            ..*self
        }
    }

    /// How many codes come before the first whole byte of a run of `len`, and the words of `BYTES`
    /// bytes after them.
    #[inline(always)]
    fn words<const BYTES: usize>(&self, len: usize) -> (usize, &'a [[u8; BYTES]]) {
        let head = (self.start % 2).min(len);
        let from = self.start.div_ceil(2);
        let bytes = &self.codes[from..from + (len - head) / 2];
        (head, bytes.as_chunks().0)
    }

    /// The codes of a run of `len`, as it lies in the bytes: perhaps a low nibble, whole bytes,
    /// perhaps a high nibble.
    fn parts(&self, len: usize) -> (Option<u8>, &[u8], Option<u8>) {
        let first = (self.start % 2 == 1 && len > 0).then(|| self.codes[self.start / 2] & 0xf);
        let whole = (len - usize::from(first.is_some())) / 2;
        let from = self.start.div_ceil(2);
        let left = len - usize::from(first.is_some()) - 2 * whole;
        let last = (left == 1).then(|| self.codes[from + whole] >> 4);
        (first, &self.codes[from..from + whole], last)
    }
}

/// Decodes a run; portable.
fn decode(run: &Run, out: &mut [f32]) {
    let values = run.values();
    let (first, bytes, last) = run.parts(out.len());
    let (head, out) = out.split_at_mut(usize::from(first.is_some()));
    let (pairs, tail) = out.as_chunks_mut::<2>();
    for (x, code) in head
        .iter_mut()
        .chain(tail)
        .zip(first.into_iter().chain(last))
    {
        *x = values[usize::from(code)];
    }
    for (pair, byte) in pairs.iter_mut().zip(bytes) {
        *pair = [
            values[usize::from(byte >> 4)],
            values[usize::from(byte & 0xf)],
        ];
    }
}

/// The scalar product of `x` and the values of a run; portable.
fn dot(run: &Run, x: &[f32]) -> f32 {
    let (first, bytes, last) = run.parts(x.len());
    let (head, x) = x.split_at(usize::from(first.is_some()));
    let (pairs, tail) = x.as_chunks::<2>();
    let values = run.values();
    let value = |code: u8| values[usize::from(code)];
    let ends = head.iter().chain(tail).zip(first.into_iter().chain(last));
    let ends: f32 = ends.map(|(x, code)| x * value(code)).sum();
    let mut sums = [0.0; 2]; // two chains of additions
    for ([even, odd], byte) in pairs.iter().zip(bytes) {
        sums[0] += even * value(byte >> 4);
        sums[1] += odd * value(byte & 0xf);
    }
    ends + sums[0] + sums[1]
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Format, Scheme, quantize};

    /// By every kernel that runs here.
    fn decoded(view: &View, start: usize, len: usize) -> Vec<Vec<f32>> {
        let by = |decode: &dyn Fn(&mut [f32])| {
            let mut out = vec![0.0; len];
            decode(&mut out);
            out
        };
        vec![
            by(&|out| view.decode(start, out)),
            by(&|out| view.decode_portably(start, out)),
            #[cfg(target_arch = "x86_64")]
            by(&|out| match vectors() {
                // SAFETY: the processor has the features.
                Vectors::Avx512 | Vectors::Avx2 => unsafe { avx2::decode(view, start, out) },
                Vectors::None => view.decode_portably(start, out),
            }),
        ]
    }

    fn dots(view: &View, start: usize, x: &[f32]) -> Vec<f32> {
        vec![
            view.dot(start, x),
            view.dot_portably(start, x),
            #[cfg(target_arch = "x86_64")]
            match vectors() {
                // SAFETY: the processor has the features.
                Vectors::Avx512 | Vectors::Avx2 => unsafe { avx2::dot(view, start, x) },
                Vectors::None => view.dot_portably(start, x),
            },
        ]
    }

    #[test]
    fn rows_of_whole_blocks_give_the_products_of_any_part() {
        let noise = |i: u32| (i.wrapping_mul(2_654_435_761) >> 8) as f32 / 8e6 - 1.0;
        for (block_size, columns) in [(32, 96), (64, 64), (64, 576), (256, 1024), (64, 100)] {
            let weight: Vec<f32> = (0..3 * columns as u32).map(noise).collect();
            for precision in [Precision::F32, Precision::Bf16] {
                for double_quant in [false, true] {
                    let scheme = Scheme::new(Format::Nf4, block_size, double_quant);
                    let quantized = quantize(&weight, [3, columns], scheme).unwrap();
                    let quantized = quantized.with_precision(precision);
                    let view = quantized.view();
                    let x: Vec<f32> = (7000..7000 + columns as u32).map(noise).collect();
                    let mut found = vec![[0.0; 3]];
                    view.dot_rows(0, &view.operand(&x), &mut found[0]);
                    #[cfg(target_arch = "x86_64")]
                    if !matches!(vectors(), Vectors::None) && columns % block_size == 0 {
                        let x = view.operand_for(8, &x).parted;
                        let mut y = [0.0; 3];
                        // SAFETY: the processor has the features.
                        unsafe { avx2::dot_rows(&view, 0, &x, &mut y[..1]) };
                        unsafe { avx2::dot_rows(&view, 1, &x, &mut y[1..]) };
                        found.push(y);
                    }
                    for row in 0..3 {
                        let expected = view.dot_portably(row * columns, &x);
                        for found in &found {
                            let off = (found[row] - expected).abs() / columns as f32;
                            assert!(off < 1e-6, "{columns}: {found:?} for {expected}");
                        }
                    }
                }
            }
        }
    }

    proptest! {
        /// Every start and length, odd ones and across blocks.
        #[test]
        fn any_part_decodes_as_in_the_whole(
            seed in 0_u32..1000,
            format in prop_oneof![Just(Format::Nf4), Just(Format::Fp4)],
            double_quant: bool,
            precision in prop_oneof![Just(Precision::F32), Just(Precision::F16), Just(Precision::Bf16)],
            start in 0_usize..300,
            len in 0_usize..200,
        ) {
            let noise = |i: u32| ((i ^ seed).wrapping_mul(2_654_435_761) as f32 / 4e9 - 0.5) * 3.0;
            let weight: Vec<f32> = (0..500).map(noise).collect();
            let quantized = quantize(&weight, [5, 100], Scheme::new(format, 32, double_quant)).unwrap();
            let quantized = quantized.with_precision(precision);
            let (view, whole) = (quantized.view(), quantized.dequantize());
            let expected: Vec<u32> = whole[start..start + len].iter().map(|x| x.to_bits()).collect();

            for found in decoded(&view, start, len) {
                let bits: Vec<u32> = found.iter().map(|x| x.to_bits()).collect();
                prop_assert_eq!(&bits, &expected);
            }

            let x: Vec<f32> = (1000..1000 + len as u32).map(noise).collect();
            let expected: f64 = x.iter().zip(&whole[start..]).map(|(x, w)| f64::from(x * w)).sum();
            let scale: f64 = x.iter().zip(&whole[start..]).map(|(x, w)| f64::from((x * w).abs())).sum();
            for found in dots(&view, start, &x) {
                let off = (f64::from(found) - expected).abs();
                prop_assert!(off <= 2e-6 * scale, "{found} is off by {off}");
            }
        }
    }
}
