//! Attention on CubeCL's backends, bare and under Burn's fusion: FlashAttention-2's passes over the
//! packed rows, in which scores exist a tile at a time. What the kernels cannot take, the reference
//! does: other types of numbers, heads that are too wide for the device's shared memory.

mod fusion;
mod kernels;

use burn::tensor::ops::{FloatTensor, FloatTensorOps};
use burn::tensor::{DType, FloatDType, Shape};
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::ops::numeric::empty_device_contiguous_dtype;
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{CubeBackend, CubeRuntime, FloatElement, IntElement, element::BoolElement};
use cubecl::prelude::*;

use super::{AttentionBackend, AttentionState, reference, reference_backward};
use crate::segments::Segments;
use kernels::{Heads, TILE};

/// Multiplications of a launch, more or less: a display hangs while a kernel runs, and systems stop
/// one that takes seconds.
const WORK: usize = 1 << 33;
/// Buffers of the kernel that has the most.
const BUFFERS: u32 = 9;

impl<R: CubeRuntime, F: FloatElement, I: IntElement, BT: BoolElement> AttentionBackend
    for CubeBackend<R, F, I, BT>
{
    fn causal_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        segments: &Segments,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        if !fits([&q, &k, &v]) {
            let (out, lse) = reference::<Self>(q, k, v, segments);
            return (out, Self::float_cast(lse, FloatDType::F32));
        }
        forward([q, k, v].map(into_contiguous), segments)
    }

    fn causal_attention_backward(
        saved: AttentionState<Self>,
        d_out: FloatTensor<Self>,
    ) -> [FloatTensor<Self>; 3] {
        if !fits([&saved.q, &saved.k, &saved.v]) {
            let lse = Self::float_cast(saved.lse, saved.q.dtype.into());
            return reference_backward::<Self>(AttentionState { lse, ..saved }, d_out);
        }
        let AttentionState {
            q,
            k,
            v,
            out,
            lse,
            segments,
        } = saved;
        let tensors = [q, k, v, out, lse, d_out].map(into_contiguous);
        backward(tensors, &segments)
    }
}

/// The heads of `q` `[n, n_h, h_d]` and `k` `[m, n_kv, h_d]`.
fn heads<R: CubeRuntime>(q: &CubeTensor<R>, k: &CubeTensor<R>) -> Heads {
    let ([_, n_h, h_d], [_, n_kv, _]) = (q.meta.shape().dims(), k.meta.shape().dims());
    Heads {
        n_kv,
        groups: n_h / n_kv,
        h_d,
    }
}

/// Whether the kernels, all three, take these tensors on their device.
fn fits<R: CubeRuntime>([q, k, v]: [&CubeTensor<R>; 3]) -> bool {
    let hardware = &q.client.properties().hardware;
    let units = (TILE * TILE) as u32;
    matches!(q.dtype, DType::F32 | DType::F16 | DType::BF16)
        && [k, v].iter().all(|x| x.dtype == q.dtype)
        && heads(q, k).shared_bytes() <= hardware.max_shared_memory_size
        && units <= hardware.max_units_per_cube
        && BUFFERS <= hardware.max_bindings
        && [q, k]
            .iter()
            .all(|x| u32::try_from(x.meta.num_elements()).is_ok())
}

/// A tensor that is yet to be written.
fn empty<R: CubeRuntime>(like: &CubeTensor<R>, shape: &[usize], dtype: DType) -> CubeTensor<R> {
    let (client, device) = (like.client.clone(), like.device.clone());
    empty_device_contiguous_dtype(client, device, Shape::from(shape.to_vec()), dtype)
}

/// Where the rows' queries start, and where the last ones end, on the device of `like`.
fn starts<R: CubeRuntime>(segments: &Segments, like: &CubeTensor<R>) -> CubeTensor<R> {
    segments.made_once(
        |made: &CubeTensor<R>| made.device == like.device,
        |starts| {
            let (client, device) = (like.client.clone(), like.device.clone());
            let starts: Vec<u32> = starts.iter().map(|start| *start as u32).collect();
            let handle = client.create_from_slice(bytemuck::cast_slice(&starts));
            let shape = Shape::from([starts.len()]);
            CubeTensor::new_contiguous(client, device, shape, handle, DType::U32)
        },
    )
}

/// The launches over so many tiles of queries or keys, each the first tile and the number of cubes.
fn launches(
    tiles: usize,
    heads: Heads,
    segments: &Segments,
) -> impl Iterator<Item = (u32, CubeCount)> {
    let longest = segments.iter().map(|row| row.keys.len()).max().unwrap_or(1);
    let work = TILE * longest * heads.h_d * heads.groups * heads.n_kv; // of a tile, at most
    let at_once = (WORK / work).clamp(1, u16::MAX.into());
    (0..tiles).step_by(at_once).map(move |first| {
        let count = at_once.min(tiles - first) as u32;
        let cubes = CubeCount::Static(count, heads.n_kv as u32, 1);
        (first as u32, cubes)
    })
}

fn cube() -> CubeDim {
    CubeDim::new_2d(TILE as u32, TILE as u32)
}

fn forward<R: CubeRuntime>(
    [q, k, v]: [CubeTensor<R>; 3],
    segments: &Segments,
) -> (CubeTensor<R>, CubeTensor<R>) {
    let ([n, n_h, h_d], heads) = (q.meta.shape().dims(), heads(&q, &k));
    let starts = starts(segments, &q);
    let out = empty(&q, &[n, n_h, h_d], q.dtype);
    let lse = empty(&q, &[n, n_h], DType::F32);
    let tiles = (n * heads.groups).div_ceil(TILE);
    for (first, cubes) in launches(tiles, heads, segments) {
        kernels::forward::launch::<R>(
            &q.client,
            cubes,
            cube(),
            q.clone().into_array_arg(),
            k.clone().into_array_arg(),
            v.clone().into_array_arg(),
            starts.clone().into_array_arg(),
            out.clone().into_array_arg(),
            lse.clone().into_array_arg(),
            segments.seen() as u32,
            first,
            heads,
            q.dtype.into(),
        );
    }
    (out, lse)
}

fn backward<R: CubeRuntime>(
    [q, k, v, out, lse, d_out]: [CubeTensor<R>; 6],
    segments: &Segments,
) -> [CubeTensor<R>; 3] {
    let ([n, n_h, _], [m, ..]) = (q.meta.shape().dims::<3>(), k.meta.shape().dims::<3>());
    let (starts, heads) = (starts(segments, &q), heads(&q, &k));
    let [dq, dk, dv] = [&q, &k, &v].map(|x| empty(x, &x.meta.shape().to_vec(), x.dtype));
    let along = empty(&q, &[n, n_h], DType::F32);
    let seen = segments.seen() as u32;
    let tiles = (n * heads.groups).div_ceil(TILE);
    for (first, cubes) in launches(tiles, heads, segments) {
        kernels::backward_queries::launch::<R>(
            &q.client,
            cubes,
            cube(),
            q.clone().into_array_arg(),
            k.clone().into_array_arg(),
            v.clone().into_array_arg(),
            starts.clone().into_array_arg(),
            out.clone().into_array_arg(),
            lse.clone().into_array_arg(),
            d_out.clone().into_array_arg(),
            dq.clone().into_array_arg(),
            along.clone().into_array_arg(),
            seen,
            first,
            heads,
            q.dtype.into(),
        );
    }
    for (first, cubes) in launches(m.div_ceil(TILE), heads, segments) {
        kernels::backward_keys::launch::<R>(
            &q.client,
            cubes,
            cube(),
            q.clone().into_array_arg(),
            k.clone().into_array_arg(),
            v.clone().into_array_arg(),
            starts.clone().into_array_arg(),
            lse.clone().into_array_arg(),
            along.clone().into_array_arg(),
            d_out.clone().into_array_arg(),
            dk.clone().into_array_arg(),
            dv.clone().into_array_arg(),
            seen,
            first,
            heads,
            q.dtype.into(),
        );
    }
    [dq, dk, dv]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_launches_are_split_without_a_gap() {
        let heads = Heads {
            n_kv: 8,
            groups: 4,
            h_d: 128,
        };
        let segments = Segments::new([32_768, 5]);
        let mut next = 0;
        for (first, cubes) in launches(8195, heads, &segments) {
            assert_eq!(first, next);
            let CubeCount::Static(count, 8, 1) = cubes else {
                panic!("{cubes:?}");
            };
            assert!(count > 0 && count as usize * TILE * 32_768 * 128 * 32 <= WORK);
            next += count;
        }
        assert_eq!(next, 8195);
        assert_eq!(launches(64, heads, &Segments::new([8, 8])).count(), 1);
    }
}
