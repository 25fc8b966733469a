//! Sixteen codes at a time: a code looks its value up in one register.

use std::arch::x86_64::*;

use super::{Precision, View};

/// Codes of a vector.
const CODES: usize = 16;

kernels!("avx512f,avx2,fma");

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
        let codes = _mm512_srlv_epi32(words, shifts);
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
        // SAFETY: there are sixteen elements.
        let x = unsafe { _mm512_loadu_ps(x.as_ptr()) };
        Self(_mm512_fmadd_ps(x, book.look_up(word), self.0))
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
