//! Eight codes at a time: a code looks its value up in two registers.

use std::arch::x86_64::*;

use super::{Precision, View};

/// Codes of a vector.
const CODES: usize = 8;

kernels!("avx2,fma");
block_kernels!("avx2,fma");

/// The high and the low nibbles of bytes, with other bits above them.
#[target_feature(enable = "avx2,fma")]
fn bytes_to_lanes(bytes: &[u8; CODES]) -> [__m256i; 2] {
    // SAFETY: there are eight bytes.
    let bytes = unsafe { _mm_loadl_epi64(bytes.as_ptr().cast()) };
    let low = _mm256_cvtepu8_epi32(bytes);
    [_mm256_srli_epi32::<4>(low), low]
}

/// A code book.
#[derive(Clone, Copy)]
struct Book {
    low: __m256,
    high: __m256,
}

impl Book {
    #[target_feature(enable = "avx2,fma")]
    fn load(code_book: &[f32; 16]) -> Self {
        // SAFETY: there are sixteen elements.
        unsafe {
            Self {
                low: _mm256_loadu_ps(code_book.as_ptr()),
                high: _mm256_loadu_ps(code_book.as_ptr().add(8)),
            }
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn scaled(self, by: f32) -> Self {
        let by = _mm256_set1_ps(by);
        Self {
            low: _mm256_mul_ps(self.low, by),
            high: _mm256_mul_ps(self.high, by),
        }
    }

    #[target_feature(enable = "avx2,fma")]
    fn look_up(self, word: [u8; 4]) -> __m256 {
        let shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24); // high nibbles first
        let word = _mm256_set1_epi32(i32::from_le_bytes(word));
        self.choose(_mm256_srlv_epi32(word, shifts))
    }

    #[target_feature(enable = "avx2,fma")]
    fn choose(self, codes: __m256i) -> __m256 {
        // Three bits choose here, whatever is above them, and the fourth one as a sign bit below.
        let low = _mm256_permutevar8x32_ps(self.low, codes);
        let high = _mm256_permutevar8x32_ps(self.high, codes);
        let fourth = _mm256_slli_epi32::<28>(codes);
        _mm256_blendv_ps(low, high, _mm256_castsi256_ps(fourth))
    }

    #[target_feature(enable = "avx2,fma")]
    fn write(self, word: [u8; 4], out: &mut [f32; CODES]) {
        // SAFETY: there are eight elements.
        unsafe { _mm256_storeu_ps(out.as_mut_ptr(), self.look_up(word)) };
    }
}

/// A sum in eight lanes.
#[derive(Clone, Copy)]
struct Sum(__m256);

impl Sum {
    #[target_feature(enable = "avx2,fma")]
    fn zero() -> Self {
        Self(_mm256_setzero_ps())
    }

    #[target_feature(enable = "avx2,fma")]
    fn add(self, book: Book, word: [u8; 4], x: &[f32; CODES]) -> Self {
        self.add_values(book.look_up(word), x)
    }

    #[target_feature(enable = "avx2,fma")]
    fn add_values(self, values: __m256, x: &[f32; CODES]) -> Self {
        // SAFETY: there are eight elements.
        let x = unsafe { _mm256_loadu_ps(x.as_ptr()) };
        Self(_mm256_fmadd_ps(x, values, self.0))
    }

    #[target_feature(enable = "avx2,fma")]
    fn plus(self, other: Self) -> Self {
        Self(_mm256_add_ps(self.0, other.0))
    }

    #[target_feature(enable = "avx2,fma")]
    fn add_scaled(self, [a, b]: [Self; 2], by: f32) -> Self {
        let sum = _mm256_add_ps(a.0, b.0);
        Self(_mm256_fmadd_ps(_mm256_set1_ps(by), sum, self.0))
    }

    #[target_feature(enable = "avx2,fma")]
    fn lanes(self) -> f32 {
        let halves = [
            _mm256_castps256_ps128(self.0),
            _mm256_extractf128_ps::<1>(self.0),
        ];
        let four = _mm_add_ps(halves[0], halves[1]);
        let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        let one = _mm_add_ss(two, _mm_shuffle_ps::<1>(two, two));
        _mm_cvtss_f32(one)
    }
}
