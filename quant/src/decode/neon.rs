//! Eight codes at a time: the sixteen values are a table of 64 bytes, of which each code chooses
//! four.

use std::arch::aarch64::*;

use super::{Precision, View};

/// Codes of a vector.
const CODES: usize = 8;

kernels!("neon");

/// A code book.
#[derive(Clone, Copy)]
struct Book([float32x4_t; 4]);

impl Book {
    #[target_feature(enable = "neon")]
    fn load(code_book: &[f32; 16]) -> Self {
        // SAFETY: there are sixteen elements.
        Self([0, 4, 8, 12].map(|i| unsafe { vld1q_f32(code_book.as_ptr().add(i)) }))
    }

    #[target_feature(enable = "neon")]
    fn scaled(self, by: f32) -> Self {
        Self(self.0.map(|values| vmulq_n_f32(values, by)))
    }

    #[target_feature(enable = "neon")]
    fn look_up(self, word: [u8; 4]) -> [float32x4_t; 2] {
        let [a, b, c, d] = self.0.map(|values| vreinterpretq_u8_f32(values));
        let table = uint8x16x4_t(a, b, c, d);
        let bytes = vreinterpret_u8_u32(vdup_n_u32(u32::from_le_bytes(word)));
        let high_first = vzip1_u8(vshr_n_u8::<4>(bytes), vand_u8(bytes, vdup_n_u8(0xf)));
        let codes = vcombine_u8(high_first, high_first);
        let four = |first: u8| {
            const BYTE: [u8; 16] = [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3];
            const CODE: [u8; 16] = [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3];
            // SAFETY: there are sixteen elements.
            let (byte, code) = unsafe { (vld1q_u8(BYTE.as_ptr()), vld1q_u8(CODE.as_ptr())) };
            let codes = vqtbl1q_u8(codes, vaddq_u8(code, vdupq_n_u8(first)));
            let at = vaddq_u8(vshlq_n_u8::<2>(codes), byte);
            vreinterpretq_f32_u8(vqtbl4q_u8(table, at))
        };
        [four(0), four(4)]
    }

    #[target_feature(enable = "neon")]
    fn write(self, word: [u8; 4], out: &mut [f32; CODES]) {
        let [a, b] = self.look_up(word);
        // SAFETY: there are eight elements.
        unsafe {
            vst1q_f32(out.as_mut_ptr(), a);
            vst1q_f32(out.as_mut_ptr().add(4), b);
        }
    }
}

/// A sum in eight lanes.
#[derive(Clone, Copy)]
struct Sum([float32x4_t; 2]);

impl Sum {
    #[target_feature(enable = "neon")]
    fn zero() -> Self {
        Self([vdupq_n_f32(0.0); 2])
    }

    #[target_feature(enable = "neon")]
    fn add(self, book: Book, word: [u8; 4], x: &[f32; CODES]) -> Self {
        // SAFETY: there are eight elements.
        let x = unsafe { [vld1q_f32(x.as_ptr()), vld1q_f32(x.as_ptr().add(4))] };
        let values = book.look_up(word);
        let [a, b] = self.0;
        Self([vfmaq_f32(a, x[0], values[0]), vfmaq_f32(b, x[1], values[1])])
    }

    #[target_feature(enable = "neon")]
    fn add_scaled(self, [a, b]: [Self; 2], by: f32) -> Self {
        let [low, high] = self.0;
        let sums = [vaddq_f32(a.0[0], b.0[0]), vaddq_f32(a.0[1], b.0[1])];
        Self([
            vfmaq_n_f32(low, sums[0], by),
            vfmaq_n_f32(high, sums[1], by),
        ])
    }

    #[target_feature(enable = "neon")]
    fn lanes(self) -> f32 {
        let [low, high] = self.0;
        vaddvq_f32(vaddq_f32(low, high))
    }
}
