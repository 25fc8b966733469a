//! The generator behind PyTorch's random numbers on the processor.
//!
//! Source: Matsumoto, Nishimura: Mersenne Twister (1998), and `at::uniform_real_distribution`.

const N: usize = 624;
const M: usize = 397;

/// The state of the generator.
pub(super) struct Mt19937 {
    words: [u32; N],
    next: usize,
}

impl Mt19937 {
    /// As `torch.Generator().manual_seed(seed)`.
    pub(super) fn new(seed: u32) -> Self {
        let mut words = [seed; N];
        for i in 1..N {
            let before = words[i - 1];
            let mixed = 1_812_433_253_u32.wrapping_mul(before ^ (before >> 30));
            words[i] = mixed.wrapping_add(i as u32);
        }
        Self { words, next: N }
    }

    /// The next 32 bits.
    pub(super) fn next_u32(&mut self) -> u32 {
        if self.next == N {
            self.twist();
        }
        let mut y = self.words[self.next];
        self.next += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }

    fn twist(&mut self) {
        for i in 0..N {
            let y = (self.words[i] & 0x8000_0000) | (self.words[(i + 1) % N] & 0x7fff_ffff);
            let odd = if y & 1 == 1 { 0x9908_b0df } else { 0 };
            self.words[i] = self.words[(i + M) % N] ^ (y >> 1) ^ odd;
        }
        self.next = 0;
    }

    /// As `tensor.uniform_(-bound, bound)`: of 24 bits, with one rounding.
    pub(super) fn uniform(&mut self, bound: f64) -> f32 {
        let unit = (self.next_u32() & 0x00ff_ffff) as f32 / (1 << 24) as f32;
        let bound = bound as f32;
        unit.mul_add(bound + bound, -bound)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The ten thousandth output of the seed 5489, which the C++ standard names.
    #[test]
    fn its_numbers_are_those_of_the_standard() {
        let mut generator = Mt19937::new(5489);
        let last = (0..10_000).map(|_| generator.next_u32()).last();
        assert_eq!(last, Some(4_123_659_995));
    }
}
