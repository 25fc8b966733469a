//! What rounding leaves of an update.

use std::ops::Add;

use model::checkpoint::rounded;
use rayon::prelude::*;
use safetensors::Dtype;

/// How many elements are added up at a time.
const CHUNK: usize = 1 << 14;

/// What is left of updates that were added to weights which then were rounded to a type of fewer
/// digits: an update that is smaller than half of the last digit is gone.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Kept {
    /// Sum over all elements of what an update changes, times what is left of that.
    product: f64,
    /// Sum of the squares of what the updates change.
    squares: f64,
}

impl Kept {
    /// Of weights before and after an update, which are then rounded.
    pub(super) fn of(before: &[f32], after: &[f32], dtype: Dtype) -> Self {
        let chunks = before.par_chunks(CHUNK).zip(after.par_chunks(CHUNK));
        let sums = chunks.map(|(before, after)| {
            let elements = before.iter().zip(after);
            elements.fold(Self::default(), |sum, (&before, &after)| {
                let change = f64::from(after) - f64::from(before);
                let left = f64::from(rounded(after, dtype)) - f64::from(before);
                sum + Self {
                    product: change * left,
                    squares: change * change,
                }
            })
        });
        let sums: Vec<_> = sums.collect(); // added up in order, so that the sum repeats
        sums.into_iter().fold(Self::default(), Add::add)
    }

    /// The share of the updates that is left, in their direction: 1 if all is, 0 if nothing; nothing
    /// where there is no update.
    pub fn share(&self) -> Option<f64> {
        (self.squares > 0.0).then(|| self.product / self.squares)
    }
}

impl Add for Kept {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            product: self.product + other.product,
            squares: self.squares + other.squares,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_takes_what_is_below_half_of_the_last_digit() {
        // bf16 has 1/128 as its last digit between 1 and 2
        let of = |changes: [f32; 2], dtype| {
            let after = changes.map(|change| 1.0 + change);
            Kept::of(&[1.0, 1.0], &after, dtype).share().unwrap()
        };
        assert_eq!(of([1.0 / 512.0, -1.0 / 2048.0], Dtype::BF16), 0.0);
        assert_eq!(of([1.0 / 512.0, -1.0 / 2048.0], Dtype::F32), 1.0);
        assert_eq!(of([1.0 / 128.0, 1.0 / 512.0], Dtype::BF16), 16.0 / 17.0);
        assert_eq!(Kept::of(&[1.0], &[1.0], Dtype::BF16).share(), None);
        let (one, other) = (vec![1.0; 3 * CHUNK], vec![1.0 + 1.0 / 128.0; 3 * CHUNK]);
        assert_eq!(Kept::of(&one, &other, Dtype::BF16).share(), Some(1.0));
    }
}
