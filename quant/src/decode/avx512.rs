//! Sixteen codes at a time: a code looks its value up in one register.

use std::arch::x86_64::*;

use super::{Precision, View};

/// Codes of a vector.
const CODES: usize = 16;

kernels!("avx512f,avx2,fma");
block_kernels!("avx512f,avx2,fma");

/// The high and the low nibbles of bytes, with other bits above them.
#[target_feature(enable = "avx512f")]
fn bytes_to_lanes(bytes: &[u8; CODES]) -> [__m512i; 2] {
    // SAFETY: there are sixteen bytes.
    let bytes = unsafe { _mm_loadu_si128(bytes.as_ptr().cast()) };
    let low = _mm512_cvtepu8_epi32(bytes);
    [_mm512_srli_epi32::<4>(low), low]
}

/// A code book.
#[derive(Clone, Copy)]
struct Book(__m512);

impl Book {
    #[target_feature(enable = "avx512f")]
    fn load(code_book: &[f32; 16]) -> Self {
        // SAFETY: there are sixteen elements.
        Self(unsafe { _mm512_loadu_ps(code_book.as_ptr()) })
    }

    #[target_feature(enable = "avx512f")]
    fn scaled(self, by: f32) -> Self {
        Self(_mm512_mul_ps(self.0, _mm512_set1_ps(by)))
    }

    #[target_feature(enable = "avx512f")]
    fn look_up(self, word: [u8; 8]) -> __m512 {
        // Eight lanes of the first four bytes, eight of the others, high nibbles first.
        let halves = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
        let shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
        let word = _mm512_castsi128_si512(_mm_cvtsi64_si128(i64::from_le_bytes(word)));
        let words = _mm512_permutexvar_epi32(halves, word);
        self.choose(_mm512_srlv_epi32(words, shifts))
    }

    #[target_feature(enable = "avx512f")]
    fn choose(self, codes: __m512i) -> __m512 {
        _mm512_permutexvar_ps(codes, self.0) // four bits choose, whatever is above them
    }

    #[target_feature(enable = "avx512f")]
    fn write(self, word: [u8; 8], out: &mut [f32; CODES]) {
        // SAFETY: there are sixteen elements.
        unsafe { _mm512_storeu_ps(out.as_mut_ptr(), self.look_up(word)) };
    }
}

/// A sum in sixteen lanes.
#[derive(Clone, Copy)]
struct Sum(__m512);

impl Sum {
    #[target_feature(enable = "avx512f")]
    fn zero() -> Self {
        Self(_mm512_setzero_ps())
    }

    #[target_feature(enable = "avx512f")]
    fn add(self, book: Book, word: [u8; 8], x: &[f32; CODES]) -> Self {
        self.add_values(book.look_up(word), x)
    }

    #[target_feature(enable = "avx512f")]
    fn add_values(self, values: __m512, x: &[f32; CODES]) -> Self {
        // SAFETY: there are sixteen elements.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        Self(_mm512_fmadd_ps(x, values, self.0))
    }

    #[target_feature(enable = "avx512f")]
    fn plus(self, other: Self) -> Self {
        Self(_mm512_add_ps(self.0, other.0))
    }

    #[target_feature(enable = "avx512f")]
    fn add_scaled(self, [a, b]: [Self; 2], by: f32) -> Self {
        let sum = _mm512_add_ps(a.0, b.0);
        Self(_mm512_fmadd_ps(_mm512_set1_ps(by), sum, self.0))
    }

    #[target_feature(enable = "avx512f")]
    fn lanes(self) -> f32 {
        _mm512_reduce_add_ps(self.0)
    }
}
