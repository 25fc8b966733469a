//! The two 4-bit code books and how a value finds its code.

/// A 4-bit format: which 16 values the codes stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// Quantiles of the normal distribution, in ascending order.
    Nf4,
    /// A float of one sign, two exponent and one mantissa bits, in the order of its bit patterns.
    Fp4,
}

const NF4: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

const FP4: [f32; 16] = [
    0.0,
    0.0625 / 12.0,
    8.0 / 12.0,
    1.0,
    4.0 / 12.0,
    6.0 / 12.0,
    2.0 / 12.0,
    3.0 / 12.0,
    0.0,
    -0.0625 / 12.0,
    -8.0 / 12.0,
    -1.0,
    -4.0 / 12.0,
    -6.0 / 12.0,
    -2.0 / 12.0,
    -3.0 / 12.0,
];

/// What FP4 codes decode to: the code book, but code 8 is the negative zero that its sign bit says.
const FP4_DECODED: [f32; 16] = {
    let mut values = FP4;
    values[8] = -0.0;
    values
};

const NF4_ASCENDING: [u8; 16] = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15];

/// The FP4 codes by ascending value. The two zeros are a pair of neighbours like any other, so
/// zero and what rounds up to it get code 0, and what rounds down to zero gets code 8.
const FP4_ASCENDING: [u8; 16] = [11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3];

const NF4_MIDPOINTS: [f32; 15] = midpoints(&NF4, &NF4_ASCENDING);
const FP4_MIDPOINTS: [f32; 15] = midpoints(&FP4, &FP4_ASCENDING);

const fn midpoints(code_book: &[f32; 16], ascending: &[u8; 16]) -> [f32; 15] {
    let mut midpoints = [0.0; 15];
    let mut i = 0;
    while i < 15 {
        let below = code_book[ascending[i] as usize];
        let above = code_book[ascending[i + 1] as usize];
        midpoints[i] = (below + above) / 2.0;
        i += 1;
    }
    midpoints
}

impl Format {
    /// Its name in recipes and in checkpoints.
    pub fn name(self) -> &'static str {
        match self {
            Format::Nf4 => "nf4",
            Format::Fp4 => "fp4",
        }
    }

    /// The format of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Format::Nf4, Format::Fp4]
            .into_iter()
            .find(|format| format.name() == name)
    }

    /// The value of each code as bitsandbytes stores it (`quant_map`), between -1 and 1.
    pub fn code_book(self) -> &'static [f32; 16] {
        match self {
            Format::Nf4 => &NF4,
            Format::Fp4 => &FP4,
        }
    }

    /// The value each code decodes to: [`Format::code_book`], save that FP4's code 8 is `-0.0`.
    ///
    /// bitsandbytes stores `+0.0` there and decodes to `-0.0` in its portable CPU kernel. Its
    /// AVX-512 kernel decodes to `+0.0`, and so does torch, which takes over for rows with an odd
    /// number of values and, with AVX-512, for blocks of 2048 and more.
    pub fn decoded(self) -> &'static [f32; 16] {
        match self {
            Format::Nf4 => &NF4,
            Format::Fp4 => &FP4_DECODED,
        }
    }

    /// The code nearest to a value between -1 and 1; on a midpoint, the lower one.
    #[inline]
    pub(crate) fn nearest(self, value: f32) -> u8 {
        let midpoints = self.midpoints();
        // A binary search without branches: how many midpoints lie below the value?
        let mut rank = 0;
        for step in [8, 4, 2, 1] {
            rank += step * usize::from(value > midpoints[rank + step - 1]);
        }
        self.ascending()[rank]
    }

    /// The codes by ascending value.
    pub(crate) fn ascending(self) -> &'static [u8; 16] {
        match self {
            Format::Nf4 => &NF4_ASCENDING,
            Format::Fp4 => &FP4_ASCENDING,
        }
    }

    /// The decision boundaries between ascending neighbours.
    pub(crate) fn midpoints(self) -> &'static [f32; 15] {
        match self {
            Format::Nf4 => &NF4_MIDPOINTS,
            Format::Fp4 => &FP4_MIDPOINTS,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `get_4bit_type(...)` and the boundaries of `quantize_4bit` in bitsandbytes 0.50.2, as bits.
    const NF4_BITS: [u32; 16] = [
        0xbf800000, 0xbf3239b1, 0xbf066b30, 0xbeca32a0, 0xbe91a24d, 0xbe3d353f, 0xbdba7871, 0x0,
        0x3da2faff, 0x3e24cae3, 0x3e7c04dd, 0x3ead033a, 0x3ee1a4b8, 0x3f1007ab, 0x3f3913b3,
        0x3f800000,
    ];
    const FP4_BITS: [u32; 16] = [
        0x0, 0x3baaaaab, 0x3f2aaaab, 0x3f800000, 0x3eaaaaab, 0x3f000000, 0x3e2aaaab, 0x3e800000,
        0x0, 0xbbaaaaab, 0xbf2aaaab, 0xbf800000, 0xbeaaaaab, 0xbf000000, 0xbe2aaaab, 0xbe800000,
    ];
    const NF4_MIDPOINT_BITS: [u32; 15] = [
        0xbf591cd8, 0xbf1c5270, 0xbeeb8480, 0xbeadea76, 0xbe703cec, 0xbe0d38bc, 0xbd3a7871,
        0x3d22faff, 0x3df64862, 0x3e5067e0, 0x3e9582d4, 0x3ec753f9, 0x3f006d04, 0x3f248daf,
        0x3f5c89da,
    ];
    const FP4_MIDPOINT_BITS: [u32; 15] = [
        0xbf555556, 0xbf155556, 0xbed55556, 0xbe955556, 0xbe555556, 0xbdb00000, 0xbb2aaaab, 0x0,
        0x3b2aaaab, 0x3db00000, 0x3e555556, 0x3e955556, 0x3ed55556, 0x3f155556, 0x3f555556,
    ];

    #[test]
    fn code_books_and_midpoints_have_the_bits_of_bitsandbytes() {
        assert_eq!(Format::Nf4.code_book().map(f32::to_bits), NF4_BITS);
        assert_eq!(Format::Fp4.code_book().map(f32::to_bits), FP4_BITS);
        assert_eq!(Format::Nf4.midpoints().map(f32::to_bits), NF4_MIDPOINT_BITS);
        assert_eq!(Format::Fp4.midpoints().map(f32::to_bits), FP4_MIDPOINT_BITS);
    }

    #[test]
    fn ascending_lists_every_code_once_by_value() {
        for format in [Format::Nf4, Format::Fp4] {
            let values = format
                .ascending()
                .map(|code| format.code_book()[usize::from(code)]);
            assert!(values.is_sorted());
            let mut codes = *format.ascending();
            codes.sort_unstable();
            assert_eq!(codes, NF4_ASCENDING);
        }
    }

    #[test]
    fn decoded_values_equal_the_code_book_up_to_the_sign_of_zero() {
        for format in [Format::Nf4, Format::Fp4] {
            assert_eq!(format.decoded(), format.code_book());
        }
        assert!(Format::Fp4.decoded()[8].is_sign_negative());
    }
}
