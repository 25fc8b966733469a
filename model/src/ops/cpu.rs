//! What the fused versions for [`Flex`](burn::backend::Flex) share: slices of its tensors, work
//! over chunks, and vectorised pieces.
//!
//! Chunks depend on shapes alone and each is computed by one thread, so that results do not depend
//! on how threads are scheduled.

use std::mem::MaybeUninit;

use burn::backend::flex::{FlexTensor, Layout};
use burn::tensor::{Bytes, DType, Shape};
use rayon::prelude::*;

/// Elements of an element-wise chunk: long enough to be worth a task, and it stays in the cache.
pub(super) const CHUNK: usize = 8192;

/// Defines a function that runs compiled for AVX2 and FMA on processors that have them, and for
/// the target's baseline on others. The body is the same.
macro_rules! vectorized {
    ($(#[$meta:meta])* $visibility:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?)
        $(-> $out:ty)? $body:block) => {
        $(#[$meta])*
        $visibility fn $name($($arg: $type),*) $(-> $out)? {
            #[inline(always)]
            fn body($($arg: $type),*) $(-> $out)? $body

            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma")]
            fn avx2($($arg: $type),*) $(-> $out)? {
                body($($arg),*)
            }

            #[cfg(target_arch = "x86_64")]
            if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
                // SAFETY: the processor has both features.
                return unsafe { avx2($($arg),*) };
            }
            body($($arg),*)
        }
    };
}
pub(super) use vectorized;

/// Whether the fused versions, which compute in `f32`, can take these tensors.
pub(super) fn all_f32<const N: usize>(tensors: [&FlexTensor; N]) -> bool {
    tensors.iter().all(|x| x.dtype() == DType::F32)
}

/// The sizes of a tensor's dimensions.
pub(super) fn dims<const D: usize>(x: &FlexTensor) -> [usize; D] {
    x.layout().shape().dims()
}

/// The same tensor with its elements in row-major order; copies only if they are not.
pub(super) fn contiguous(x: FlexTensor) -> FlexTensor {
    if x.is_contiguous() {
        return x;
    }
    x.to_contiguous()
}

/// The elements of a contiguous tensor.
pub(super) fn slice(x: &FlexTensor) -> &[f32] {
    x.as_slice().expect("a contiguous tensor of 32-bit floats")
}

/// A tensor that takes over `values`.
pub(super) fn from_vec<const D: usize>(values: Vec<f32>, shape: [usize; D]) -> FlexTensor {
    let layout = Layout::contiguous(Shape::from(shape));
    assert_eq!(layout.num_elements(), values.len());
    FlexTensor::new(Bytes::from_elems(values), layout, DType::F32)
}

/// Calls `f(i, item)` for each item, in parallel if there are several.
pub(super) fn for_each<T: Send>(items: Vec<T>, f: impl Fn(usize, T) + Sync) {
    // One item is what generation has, token by token: no detour through the thread pool.
    if items.len() < 2 {
        return items.into_iter().enumerate().for_each(|(i, x)| f(i, x));
    }
    items
        .into_par_iter()
        .with_max_len(1)
        .enumerate()
        .for_each(|(i, x)| f(i, x));
}

/// Cuts the tensors into chunks of `lengths` elements and rewrites them by `f(i, chunks)`: in
/// place where nobody else holds the tensor's memory, else in a copy.
///
/// All tensors have equally many chunks; the last one can be shorter.
pub(super) fn update<const N: usize>(
    tensors: [FlexTensor; N],
    lengths: [usize; N],
    f: impl Fn(usize, [&mut [f32]; N]) + Sync,
) -> [FlexTensor; N] {
    let mut places = tensors.map(Place::new);
    let mut lengths = lengths.into_iter();
    let chunks: [Vec<Chunk>; N] = places.each_mut().map(|place| {
        let length = lengths.next().expect("one a tensor");
        place.chunks(length)
    });
    assert!(chunks.iter().all(|x| x.len() == chunks[0].len()));
    let mut chunks = chunks.map(Vec::into_iter);
    let tasks = (0..chunks[0].len())
        .map(|_| chunks.each_mut().map(|x| x.next().expect("counted above")))
        .collect();
    for_each(tasks, |i, task: [Chunk; N]| f(i, task.map(Chunk::filled)));
    // SAFETY: `filled` has been called on every chunk.
    places.map(|place| unsafe { place.finish() })
}

/// Where a tensor's new elements go.
enum Place {
    Own(FlexTensor),
    Copy { from: FlexTensor, to: Vec<f32> },
}

enum Chunk<'a> {
    Own(&'a mut [f32]),
    Copy(&'a [f32], &'a mut [MaybeUninit<f32>]),
}

impl Place {
    fn new(x: FlexTensor) -> Self {
        let x = contiguous(x);
        if x.is_unique() {
            return Self::Own(x);
        }
        let to = Vec::with_capacity(x.layout().num_elements());
        Self::Copy { from: x, to }
    }

    fn chunks(&mut self, length: usize) -> Vec<Chunk<'_>> {
        match self {
            Self::Own(x) => {
                let (start, end) = x.layout().contiguous_offsets().expect("made contiguous");
                let all = x.try_storage_mut().expect("nobody else holds it");
                all[start..end].chunks_mut(length).map(Chunk::Own).collect()
            }
            Self::Copy { from, to } => {
                let from = slice(from);
                let to = to.spare_capacity_mut()[..from.len()].chunks_mut(length);
                from.chunks(length)
                    .zip(to)
                    .map(|(from, to)| Chunk::Copy(from, to))
                    .collect()
            }
        }
    }

    /// # Safety
    /// Every chunk must have been filled.
    unsafe fn finish(self) -> FlexTensor {
        match self {
            Self::Own(x) => x,
            Self::Copy { from, mut to } => {
                let layout = Layout::contiguous(from.layout().shape().clone());
                // SAFETY: by the caller; the chunks covered this length.
                unsafe { to.set_len(layout.num_elements()) };
                FlexTensor::new(Bytes::from_elems(to), layout, DType::F32)
            }
        }
    }
}

impl<'a> Chunk<'a> {
    /// The chunk with the old elements in it.
    fn filled(self) -> &'a mut [f32] {
        match self {
            Self::Own(x) => x,
            Self::Copy(from, to) => {
                assert_eq!(from.len(), to.len());
                for (to, from) in to.iter_mut().zip(from) {
                    to.write(*from);
                }
                // SAFETY: all elements have just been written, and `MaybeUninit<f32>` is laid out
                // like `f32`.
                unsafe { &mut *(std::ptr::from_mut(to) as *mut [f32]) }
            }
        }
    }
}

/// Sums and maxima run in this many lanes, because one chain of additions cannot be vectorised.
const LANES: usize = 16;

/// `Σ f(elements at i)` over equally long rows.
#[inline(always)]
pub(super) fn sum<const N: usize>(rows: [&[f32]; N], f: impl Fn([f32; N]) -> f32) -> f32 {
    let rows = rows.map(|row| row.as_chunks::<LANES>());
    let mut lanes = [0.0; LANES];
    for i in 0..rows[0].0.len() {
        let block = rows.map(|(whole, _)| &whole[i]);
        for (lane, total) in lanes.iter_mut().enumerate() {
            *total += f(block.map(|x| x[lane]));
        }
    }
    for (lane, total) in lanes.iter_mut().enumerate().take(rows[0].1.len()) {
        *total += f(rows.map(|(_, rest)| rest[lane]));
    }
    fold(lanes, |a, b| a + b)
}

/// Replaces each element by `f` of it and returns the sum of the new ones.
#[inline(always)]
pub(super) fn replace_and_sum(row: &mut [f32], f: impl Fn(f32) -> f32) -> f32 {
    let (whole, rest) = row.as_chunks_mut::<LANES>();
    let mut lanes = [0.0; LANES];
    for block in whole {
        for (total, x) in lanes.iter_mut().zip(block) {
            *x = f(*x);
            *total += *x;
        }
    }
    for (total, x) in lanes.iter_mut().zip(rest) {
        *x = f(*x);
        *total += *x;
    }
    fold(lanes, |a, b| a + b)
}

/// The lanes in one, in pairs: vectorised, and the rounding error of a sum stays small.
#[inline(always)]
pub(super) fn fold(mut lanes: [f32; LANES], f: impl Fn(f32, f32) -> f32) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = f(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// The scalar product of two equally long rows.
#[inline(always)]
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    sum([a, b], |[a, b]| a * b)
}

/// The largest element, minus infinity if there is none.
#[inline(always)]
pub(super) fn max(row: &[f32]) -> f32 {
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (whole, rest) = row.as_chunks::<LANES>();
    for block in whole {
        lanes = std::array::from_fn(|i| larger(lanes[i], block[i]));
    }
    for (lane, x) in lanes.iter_mut().zip(rest) {
        *lane = larger(*lane, *x);
    }
    fold(lanes, larger)
}

/// `eˣ` within 2e-7 of its value, without branches; 0 where that is below the smallest normal
/// number, and never infinite.
///
/// `eˣ = 2ⁿ eʳ` with `n` the integer next to `x / ln 2`; the polynomial for `eʳ` is that of `expf`
/// in the Cephes library, <https://www.netlib.org/cephes/>.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    const LOWEST: f32 = -87.33654; // e to this is the smallest normal number
    const HIGHEST: f32 = 88.376_26; // beyond, n would be 128
    // Adding 1.5 · 2²³ leaves the nearest integer in the low bits: `round` is a function call on
    // processors before SSE4.1.
    const SHIFT: f32 = 12_582_912.0;
    let clamped = x.clamp(LOWEST, HIGHEST);
    let shifted = clamped * std::f32::consts::LOG2_E + SHIFT;
    let n = shifted - SHIFT;
    let r = clamped - n * 0.693_359_4 + n * 2.121_944_4e-4; // ln 2 in two parts
    let mut p = 1.987_569_1e-4;
    p = p * r + 1.398_199_9e-3;
    p = p * r + 8.333_452e-3;
    p = p * r + 4.166_579_6e-2;
    p = p * r + 1.666_666_5e-1;
    p = p * r + 5e-1;
    let e_r = p * (r * r) + r + 1.0;
    let two_n = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < LOWEST { 0.0 } else { e_r * two_n }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_within_its_error_bound() {
        let mut x = -87.33_f32;
        while x < 88.3 {
            let (ours, exact) = (f64::from(exp(x)), f64::from(x).exp());
            let off = (ours / exact - 1.0).abs();
            assert!(off < 2e-7, "exp({x}) is off by {off:e}");
            x += 0.000_37;
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert_eq!(exp(-1000.0), 0.0);
        assert!(exp(f32::NAN).is_nan());
        assert!(exp(1000.0).is_finite());
    }

    #[test]
    fn sums_and_maxima_take_every_element() {
        for n in [0, 1, 31, 32, 33, 100] {
            let row: Vec<f32> = (0..n).map(|i| i as f32 - 40.0).collect();
            assert_eq!(sum([&row], |[x]| x), row.iter().sum::<f32>());
            let mut doubled = row.clone();
            let total = replace_and_sum(&mut doubled, |x| 2.0 * x);
            assert_eq!(total, doubled.iter().sum::<f32>());
            assert!(doubled.iter().zip(&row).all(|(y, x)| *y == 2.0 * x));
            let largest = row.last().copied().unwrap_or(f32::NEG_INFINITY);
            assert_eq!(max(&row), largest);
        }
    }

    #[test]
    fn update_is_in_place_for_its_only_owner_and_spares_the_others() {
        let x = from_vec((0..10).map(|i| i as f32).collect(), [10]);
        let shared = x.clone();
        let address = |x: &FlexTensor| slice(x).as_ptr();
        let double = |x| {
            let [x] = update([x], [4], |_, [x]| x.iter_mut().for_each(|x| *x *= 2.0));
            x
        };
        let doubled = double(x);
        assert_eq!(slice(&shared)[9], 9.0);
        assert_eq!(slice(&doubled)[9], 18.0);
        let before = address(&doubled);
        let doubled = double(doubled);
        assert_eq!(address(&doubled), before);
        assert_eq!(slice(&doubled)[9], 36.0);
    }

    #[test]
    fn a_view_into_a_longer_buffer_is_its_own_elements() {
        let x = from_vec((0..12).map(|i| i as f32).collect(), [4, 3]);
        let view = x.clone().with_layout(x.layout().narrow(0, 1, 2));
        assert_eq!(slice(&contiguous(view)), [3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let turned = x.clone().with_layout(x.layout().transpose(0, 1));
        assert_eq!(slice(&contiguous(turned))[..4], [0.0, 3.0, 6.0, 9.0]);
    }
}
