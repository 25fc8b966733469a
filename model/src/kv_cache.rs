//! Keys and values of the positions that a generating model has already seen.
//!
//! Shapes: `b` rows, of which `s` positions are new and `t` are seen in all; `n_kv` KV heads,
//! `h_d` head dim; there is room for `c`
//! positions.

use burn::tensor::{Tensor, backend::Backend};

use crate::ops::{AttentionBackend, write_positions};
use crate::virtual_tokens::Prefix;

/// One entry a layer; grows by what each forward pass adds.
#[derive(Debug, Clone)]
pub struct KvCache<B: Backend> {
    layers: Vec<LayerCache<B>>,
}

impl<B: Backend> KvCache<B> {
    /// An empty cache.
    pub fn new(num_layers: usize) -> Self {
        let empty = LayerCache {
            seen: None,
            length: 0,
        };
        Self {
            layers: vec![empty; num_layers],
        }
    }

    /// Forgets all but the first `length` positions.
    pub fn truncate(&mut self, length: usize) {
        for layer in &mut self.layers {
            layer.length = layer.length.min(length);
        }
    }

    /// The cache of one layer.
    pub fn layer(&mut self, index: usize) -> &mut LayerCache<B> {
        &mut self.layers[index]
    }
}

impl<B: AttentionBackend> KvCache<B> {
    /// Puts learned keys and values in front of what `rows` rows will add.
    pub(crate) fn begin(&mut self, prefix: &Prefix<B>, n_kv: usize, rows: usize) {
        for (index, layer) in self.layers.iter_mut().enumerate() {
            let (k, v) = prefix.layer(index).repeated(rows, n_kv);
            layer.extend(k, v, rows);
        }
    }
}

/// Keys and values of one layer, both `[b, c, n_kv, h_d]`, of which the first `t` positions count.
#[derive(Debug, Clone)]
pub struct LayerCache<B: Backend> {
    seen: Option<[Tensor<B, 4>; 2]>,
    /// `t`.
    length: usize,
}

impl<B: AttentionBackend> LayerCache<B> {
    /// Adds the keys and values `[b · s, n_kv, h_d]` of new positions of `b` rows, equally many of
    /// each, and returns all of them, `[b · t, n_kv, h_d]`.
    ///
    /// They are written where they stay; only when there is no room, everything moves to twice as
    /// much. A backend does so in place as long as what this returned before is dropped.
    pub fn extend(
        &mut self,
        k: Tensor<B, 3>,
        v: Tensor<B, 3>,
        b: usize,
    ) -> (Tensor<B, 3>, Tensor<B, 3>) {
        let [n, n_kv, h_d] = k.dims();
        let seen = self.length;
        self.length += n / b;
        let new = [k, v].map(|x| x.reshape([b, n / b, n_kv, h_d]));
        let old = self.seen.take().map(|old| old.map(Some));
        let [old_k, old_v] = old.unwrap_or_default();
        let [k, v] = new;
        let all = [(old_k, k), (old_v, v)].map(|(old, new)| write(old, seen, new));
        let [k, v] = all.clone().map(|x| first_positions(x, self.length));
        self.seen = Some(all);
        (k, v)
    }
}

/// Positions that there is room for at first, at least.
const ROOM: usize = 64;

/// Puts `new` `[b, s, n_kv, h_d]` after the first `seen` positions of `old`.
fn write<B: AttentionBackend>(
    old: Option<Tensor<B, 4>>,
    seen: usize,
    new: Tensor<B, 4>,
) -> Tensor<B, 4> {
    let [b, s, n_kv, h_d] = new.dims();
    let room = old.as_ref().map_or(0, |old| old.dims()[1]);
    let all = match old {
        Some(old) if seen + s <= room => old,
        old => {
            let room = (seen + s).max(2 * room).next_multiple_of(ROOM);
            let all = Tensor::zeros([b, room, n_kv, h_d], &new.device());
            match old {
                Some(old) if seen > 0 => write_positions(all, old.narrow(1, 0, seen), 0),
                _ => all,
            }
        }
    };
    write_positions(all, new, seen)
}

/// The first `t` positions of each row, `[b · t, n_kv, h_d]`; of a lone row where they lie.
fn first_positions<B: Backend>(x: Tensor<B, 4>, t: usize) -> Tensor<B, 3> {
    match x.dims() {
        [1, ..] => x.squeeze_dim::<3>(0).narrow(0, 0, t),
        _ => x.narrow(1, 0, t).flatten(0, 1),
    }
}

#[cfg(test)]
mod tests {
    use burn::backend::Flex;
    use burn::tensor::Int;

    use super::*;

    /// Positions `from..to` of two rows, `[2 · s, 1, 2]`, each element another number.
    fn positions(from: usize, to: usize) -> Tensor<Flex, 3> {
        let device = Default::default();
        let row = |row: usize| {
            let first = (1000 * row + 2 * from) as i64;
            let x = Tensor::<Flex, 1, Int>::arange(first..first + 2 * (to - from) as i64, &device);
            x.float().reshape([to - from, 1, 2])
        };
        Tensor::cat(vec![row(1), row(2)], 0)
    }

    #[test]
    fn positions_come_back_in_order_however_they_came() {
        let mut cache = KvCache::new(1);
        let mut seen = 0;
        for s in [3, 1, 1, 70, 1, 300, 2] {
            let new = positions(seen, seen + s);
            let (k, v) = cache.layer(0).extend(new.clone(), new.neg(), 2);
            seen += s;
            k.into_data()
                .assert_eq(&positions(0, seen).into_data(), true);
            v.into_data()
                .assert_eq(&positions(0, seen).neg().into_data(), true);
        }
    }

    #[test]
    fn what_is_forgotten_is_written_over() {
        let mut cache = KvCache::new(1);
        let add = |cache: &mut KvCache<Flex>, from, to| {
            let new = positions(from, to);
            cache.layer(0).extend(new.clone(), new, 2).0
        };
        add(&mut cache, 500, 510);
        cache.truncate(20);
        cache.truncate(0);
        add(&mut cache, 0, 5);
        cache.truncate(3);
        let k = add(&mut cache, 3, 9);
        k.into_data().assert_eq(&positions(0, 9).into_data(), true);
    }

    #[test]
    fn a_position_is_written_where_the_others_lie() {
        let mut cache = KvCache::new(1);
        let mut addresses = Vec::new();
        for at in 0..5 {
            let new = positions(at, at + 1).narrow(0, 0, 1);
            let (k, _) = cache.layer(0).extend(new.clone(), new, 1);
            let k = k.into_primitive().tensor();
            addresses.push(k.bytes().as_ptr());
        }
        assert!(
            addresses.iter().all(|x| *x == addresses[0]),
            "{addresses:?}"
        );
    }
}
