//! Attention of a lone query, what generating is made of: keys and values are read in the order they
//! lie in, of all heads at a time.

use super::matrix::{Heads, scale};
use super::{Diagonal, KEYS, Sizes, Tile, weigh};
use crate::ops::cpu::{self, exp, vectorized};

/// Keys that one thread takes, enough to be worth a task.
const PART: usize = 256;

/// `q` `[n_h, h_d]` with all keys and values: the output `[n_h, h_d]` and the log-sum-exp `[n_h]`.
pub(super) fn forward(sizes: Sizes, q: &[f32], k: Heads, v: Heads) -> (Vec<f32>, Vec<f32>) {
    let Sizes { m, n_h, h_d, .. } = sizes;
    let mut q = q.to_vec();
    scale(&mut q, sizes.scale());
    let mut parts: Vec<_> = (0..m.div_ceil(PART)).map(|_| Tile::new(n_h, h_d)).collect();
    cpu::for_each(parts.iter_mut().collect(), |i, tile| {
        let mut scores = vec![0.0; n_h * KEYS];
        let end = m.min((i + 1) * PART);
        tile.clear();
        for start in (i * PART..end).step_by(KEYS) {
            let keys = KEYS.min(end - start);
            let scores = &mut scores[..n_h * keys];
            score(scores, &q, k, start, sizes.groups);
            weigh(tile, scores, Diagonal::new(m, start, keys, sizes.groups));
            add_weighted(&mut tile.out, scores, v, start, sizes.groups);
        }
    });
    let all = parts.into_iter().reduce(merged);
    let Tile { max, sum, mut out } = all.expect("the query sees itself");
    for (out, sum) in out.chunks_exact_mut(h_d).zip(&sum) {
        out.iter_mut().for_each(|x| *x /= sum);
    }
    let lse = max.iter().zip(&sum).map(|(max, sum)| max + sum.ln());
    (out, lse.collect())
}

/// The softmax of the keys of both.
fn merged(mut a: Tile, b: Tile) -> Tile {
    let h_d = a.out.len() / a.max.len();
    for head in 0..a.max.len() {
        let max = a.max[head].max(b.max[head]);
        let [of_a, of_b] = [a.max[head], b.max[head]].map(|x| exp(x - max));
        a.max[head] = max;
        a.sum[head] = a.sum[head] * of_a + b.sum[head] * of_b;
        let at = head * h_d..(head + 1) * h_d;
        for (x, y) in a.out[at.clone()].iter_mut().zip(&b.out[at]) {
            *x = *x * of_a + y * of_b;
        }
    }
    a
}

vectorized! {
    /// The scores `[n_h, keys]` of the keys from `first` on.
    fn score(scores: &mut [f32], q: &[f32], k: Heads, first: usize, groups: usize) {
        let keys = scores.len() / (q.len() / k.h_d);
        for i in 0..keys {
            for (head, q) in q.chunks_exact(k.h_d).enumerate() {
                scores[head * keys + i] = cpu::dot(q, k.head(first + i, head / groups));
            }
        }
    }
}

vectorized! {
    /// Adds to `out` `[n_h, h_d]` the values from `first` on times `weights` `[n_h, keys]`.
    fn add_weighted(out: &mut [f32], weights: &[f32], v: Heads, first: usize, groups: usize) {
        let keys = weights.len() / (out.len() / v.h_d);
        for i in 0..keys {
            for (head, out) in out.chunks_exact_mut(v.h_d).enumerate() {
                let weight = weights[head * keys + i];
                for (out, v) in out.iter_mut().zip(v.head(first + i, head / groups)) {
                    *out += weight * v;
                }
            }
        }
    }
}
