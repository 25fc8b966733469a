//! The kernels, one source for wgpu and CUDA. All sums are f32.
//!
//! The query heads of a KV head share its keys, so that for one KV head the work is a matrix of
//! `n · groups` lines (all query heads of the first query, then those of the second) by `m` keys.
//! A cube takes [`TILE`] lines or [`TILE`] keys of one KV head, through shared memory, and each of
//! its units one element of a tile of scores and some columns of what is summed. Rows need not end
//! where tiles do: each line knows the keys that it sees.
//!
//! No two cubes write the same element, so that results repeat bit by bit.

use cubecl::prelude::*;

/// Lines and columns of a tile of scores; a cube has a unit for each.
pub(super) const TILE: usize = 16;

/// What the kernels are compiled for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Heads {
    /// KV heads.
    pub n_kv: usize,
    /// Query heads of a KV head.
    pub groups: usize,
    /// Elements of a head.
    pub h_d: usize,
}

impl Heads {
    /// Query heads.
    fn n_h(self) -> usize {
        self.n_kv * self.groups
    }

    /// Columns of a head that each unit of a line takes.
    fn columns(self) -> usize {
        self.h_d.div_ceil(TILE)
    }

    /// From one line of a tile of heads to the next: whole columns, and one more so that the units
    /// of a column read from different banks.
    fn stride(self) -> usize {
        self.columns() * TILE + 1
    }

    /// Elements of a tile of heads.
    fn tile(self) -> usize {
        TILE * self.stride()
    }

    /// Shared memory of the kernel that has the most.
    pub fn shared_bytes(self) -> usize {
        (3 * self.tile() + TILE * TILE) * size_of::<f32>()
    }

    /// What scores are multiplied by.
    fn scale(self) -> f32 {
        (self.h_d as f32).sqrt().recip()
    }
}

/// Below every score.
const LOWEST: f32 = -3e38;

/// The row that a query lies in; with `seen` positions before each row's queries, that of a key.
#[cube]
fn row_of(starts: &Array<u32>, seen: usize, at: usize) -> usize {
    let mut row = 0usize;
    let mut end = starts.len() - 1;
    while end - row > 1 {
        let middle = (row + end) / 2;
        if starts[middle] as usize + middle * seen <= at {
            row = middle;
        } else {
            end = middle;
        }
    }
    row
}

/// The first key that a query sees.
#[cube]
fn first_key(starts: &Array<u32>, seen: usize, query: usize) -> usize {
    let row = row_of(starts, 0usize, query);
    starts[row] as usize + row * seen
}

/// Behind the last key that a query sees.
#[cube]
fn end_key(starts: &Array<u32>, seen: usize, query: usize) -> usize {
    query + (row_of(starts, 0usize, query) + 1) * seen + 1
}

/// The first query that sees a key.
#[cube]
fn first_query(starts: &Array<u32>, seen: usize, key: usize) -> usize {
    let row = row_of(starts, seen, key);
    let start = starts[row] as usize;
    let mut query = start;
    let before = start + (row + 1) * seen; // the keys that all of the row's queries see end here
    if key > before {
        query = start + (key - before);
    }
    query
}

/// Behind the last query that sees a key.
#[cube]
fn end_query(starts: &Array<u32>, seen: usize, key: usize) -> usize {
    starts[row_of(starts, seen, key) + 1] as usize
}

/// Where a line of a KV head lies among the query heads `[n, n_h]`.
#[cube]
fn head_of(line: usize, kv: usize, #[comptime] heads: Heads) -> usize {
    let groups = comptime!(heads.groups);
    let n_h = comptime!(heads.n_h());
    line / groups * n_h + kv * groups + line % groups
}

/// A unit's line of its cube's tile.
#[derive(CubeType)]
struct Line {
    /// Whether there is one: the last tile need not be full.
    exists: bool,
    /// Where it lies among the query heads.
    head: usize,
    /// The first key that it sees.
    sees_from: usize,
    /// Behind the last key that it sees.
    sees_to: usize,
    /// The first key that a line of the tile sees.
    tile_from: usize,
    /// Behind the last key that a line of the tile sees.
    tile_to: usize,
}

/// The line of this unit, when the cubes begin with tile `first_tile`.
#[cube]
fn own_line(starts: &Array<u32>, seen: usize, first_tile: u32, #[comptime] heads: Heads) -> Line {
    let groups = comptime!(heads.groups);
    let lines = starts[starts.len() - 1] as usize * groups;
    let start = (CUBE_POS_X as usize + first_tile as usize) * TILE;
    let mut end = start + TILE;
    if end > lines {
        end = lines;
    }
    let line = start + UNIT_POS_Y as usize;
    let exists = line < end;
    let mut query = start / groups;
    if exists {
        query = line / groups;
    }
    Line {
        exists,
        head: head_of(line, CUBE_POS_Y as usize, heads),
        sees_from: first_key(starts, seen, query),
        sees_to: end_key(starts, seen, query),
        tile_from: first_key(starts, seen, start / groups),
        tile_to: end_key(starts, seen, (end - 1) / groups),
    }
}

/// Puts head `head` of `x` into the unit's line of a tile; zeros if it is none.
#[cube]
fn load<F: Float>(
    x: &Array<F>,
    head: usize,
    exists: bool,
    tile: &mut SharedMemory<f32>,
    #[comptime] heads: Heads,
) {
    let h_d = comptime!(heads.h_d);
    let line = UNIT_POS_Y as usize * comptime!(heads.stride());
    #[unroll]
    for part in 0..comptime!(heads.columns()) {
        let column = part * TILE + UNIT_POS_X as usize;
        let mut value = 0.0f32;
        if exists && column < h_d {
            value = f32::cast_from(x[head * h_d + column]);
        }
        tile[line + column] = value;
    }
}

/// The product of the unit's line of one tile and its column, a line too, of another.
#[cube]
fn dot(a: &SharedMemory<f32>, b: &SharedMemory<f32>, #[comptime] heads: Heads) -> f32 {
    let stride = comptime!(heads.stride());
    let a_line = UNIT_POS_Y as usize * stride;
    let b_line = UNIT_POS_X as usize * stride;
    let mut sum = 0.0f32;
    for column in 0..comptime!(heads.h_d) {
        sum += a[a_line + column] * b[b_line + column];
    }
    sum
}

/// Adds the unit's line of weights times a tile of heads to the unit's columns.
#[cube]
fn add(
    sums: &mut Array<f32>,
    weights: &SharedMemory<f32>,
    tile: &SharedMemory<f32>,
    #[comptime] heads: Heads,
) {
    let stride = comptime!(heads.stride());
    for other in 0..TILE {
        let weight = weights[UNIT_POS_Y as usize * TILE + other];
        #[unroll]
        for part in 0..comptime!(heads.columns()) {
            sums[part] += weight * tile[other * stride + part * TILE + UNIT_POS_X as usize];
        }
    }
}

/// Writes the unit's columns times `factor` to head `head` of `x`.
#[cube]
fn store<F: Float>(
    sums: &Array<f32>,
    factor: f32,
    x: &mut Array<F>,
    head: usize,
    #[comptime] heads: Heads,
) {
    let h_d = comptime!(heads.h_d);
    #[unroll]
    for part in 0..comptime!(heads.columns()) {
        let column = part * TILE + UNIT_POS_X as usize;
        if column < h_d {
            x[head * h_d + column] = F::cast_from(sums[part] * factor);
        }
    }
}

/// The unit's columns, all zero.
#[cube]
fn zeros(#[comptime] heads: Heads) -> Array<f32> {
    let mut sums = Array::<f32>::new(comptime!(heads.columns()));
    #[unroll]
    for part in 0..comptime!(heads.columns()) {
        sums[part] = 0.0f32;
    }
    sums
}

/// `q` and `out` `[n, n_h, h_d]`, `k` and `v` `[m, n_kv, h_d]`, `starts` `[rows + 1]`, `lse`
/// `[n, n_h]`. A cube takes the lines of its tile and goes over the keys that they see, with a
/// running maximum and sum of each line.
#[cube(launch)]
pub(super) fn forward<F: Float>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    starts: &Array<u32>,
    out: &mut Array<F>,
    lse: &mut Array<f32>,
    seen: u32,
    first_tile: u32,
    #[comptime] heads: Heads,
    #[define(F)] _dtype: StorageType,
) {
    let n_kv = comptime!(heads.n_kv);
    let kv = CUBE_POS_Y as usize;
    let line = own_line(starts, seen as usize, first_tile, heads);

    let mut queries = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut keys = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut scores = SharedMemory::<f32>::new(TILE * TILE);
    let own = UNIT_POS_Y as usize * TILE + UNIT_POS_X as usize;
    load(q, line.head, line.exists, &mut queries, heads);

    let mut sums = zeros(heads);
    let mut sum = 0.0f32;
    let mut max = f32::new(LOWEST);
    let mut at = line.tile_from;
    while at < line.tile_to {
        sync_cube(); // the tiles are free
        let key = at + UNIT_POS_Y as usize;
        load(k, key * n_kv + kv, key < line.tile_to, &mut keys, heads);
        sync_cube();
        let key = at + UNIT_POS_X as usize;
        let sees = key >= line.sees_from && key < line.sees_to;
        let score = dot(&queries, &keys, heads) * comptime!(heads.scale());
        scores[own] = select(sees, score, LOWEST);
        sync_cube();
        let before = max;
        for other in 0..TILE {
            max = f32::max(max, scores[UNIT_POS_Y as usize * TILE + other]);
        }
        sync_cube();
        scores[own] = select(sees, f32::exp(score - max), 0.0f32);
        let key = at + UNIT_POS_Y as usize;
        load(v, key * n_kv + kv, key < line.tile_to, &mut keys, heads);
        sync_cube();
        let shrink = f32::exp(before - max);
        sum *= shrink;
        for other in 0..TILE {
            sum += scores[UNIT_POS_Y as usize * TILE + other];
        }
        #[unroll]
        for part in 0..comptime!(heads.columns()) {
            sums[part] *= shrink;
        }
        add(&mut sums, &scores, &keys, heads);
        at += TILE;
    }
    if line.exists {
        store(&sums, 1.0f32 / sum, out, line.head, heads);
        if UNIT_POS_X == 0 {
            lse[line.head] = f32::ln(sum) + max;
        }
    }
}

/// `dq` `[n, n_h, h_d]`, and for [`backward_keys`] `along` `[n, n_h]`: each output times its
/// gradient. Goes over the keys as [`forward`] does.
#[cube(launch)]
pub(super) fn backward_queries<F: Float>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    starts: &Array<u32>,
    out: &Array<F>,
    lse: &Array<f32>,
    d_out: &Array<F>,
    dq: &mut Array<F>,
    along: &mut Array<f32>,
    seen: u32,
    first_tile: u32,
    #[comptime] heads: Heads,
    #[define(F)] _dtype: StorageType,
) {
    let n_kv = comptime!(heads.n_kv);
    let kv = CUBE_POS_Y as usize;
    let line = own_line(starts, seen as usize, first_tile, heads);

    let mut queries = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut gradients = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut keys = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut scores = SharedMemory::<f32>::new(TILE * TILE);
    let own = UNIT_POS_Y as usize * TILE + UNIT_POS_X as usize;
    load(q, line.head, line.exists, &mut queries, heads);
    load(d_out, line.head, line.exists, &mut gradients, heads);
    load(out, line.head, line.exists, &mut keys, heads);
    sync_cube();
    let mut line_along = 0.0f32;
    let tile_line = UNIT_POS_Y as usize * comptime!(heads.stride());
    for column in 0..comptime!(heads.h_d) {
        line_along += gradients[tile_line + column] * keys[tile_line + column];
    }
    let mut line_lse = 0.0f32;
    if line.exists {
        line_lse = lse[line.head];
        if UNIT_POS_X == 0 {
            along[line.head] = line_along;
        }
    }

    let scale = comptime!(heads.scale());
    let mut sums = zeros(heads);
    let mut at = line.tile_from;
    while at < line.tile_to {
        sync_cube(); // the tiles are free
        let key = at + UNIT_POS_Y as usize;
        load(v, key * n_kv + kv, key < line.tile_to, &mut keys, heads);
        sync_cube();
        let d_weight = dot(&gradients, &keys, heads);
        sync_cube();
        load(k, key * n_kv + kv, key < line.tile_to, &mut keys, heads);
        sync_cube();
        let key = at + UNIT_POS_X as usize;
        let sees = line.exists && key >= line.sees_from && key < line.sees_to;
        let weight = f32::exp(dot(&queries, &keys, heads) * scale - line_lse);
        scores[own] = select(sees, weight * (d_weight - line_along), 0.0f32);
        sync_cube();
        add(&mut sums, &scores, &keys, heads);
        at += TILE;
    }
    if line.exists {
        store(&sums, scale, dq, line.head, heads);
    }
}

/// `dk` and `dv` `[m, n_kv, h_d]`. A cube takes the keys of its tile and goes over the lines that
/// see them, of all query heads of the KV head.
#[cube(launch)]
pub(super) fn backward_keys<F: Float>(
    q: &Array<F>,
    k: &Array<F>,
    v: &Array<F>,
    starts: &Array<u32>,
    lse: &Array<f32>,
    along: &Array<f32>,
    d_out: &Array<F>,
    dk: &mut Array<F>,
    dv: &mut Array<F>,
    seen: u32,
    first_tile: u32,
    #[comptime] heads: Heads,
    #[define(F)] _dtype: StorageType,
) {
    let groups = comptime!(heads.groups);
    let n_kv = comptime!(heads.n_kv);
    let seen = seen as usize;
    let kv = CUBE_POS_Y as usize;
    let rows = starts.len() - 1;
    let m = starts[rows] as usize + rows * seen;
    let start = (CUBE_POS_X as usize + first_tile as usize) * TILE;
    let mut end = start + TILE;
    if end > m {
        end = m;
    }
    let key = start + UNIT_POS_Y as usize;
    let exists = key < end;
    let mut known = start;
    if exists {
        known = key;
    }
    let seen_from = first_query(starts, seen, known);
    let seen_to = end_query(starts, seen, known);

    let mut keys = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut values = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut lines = SharedMemory::<f32>::new(comptime!(heads.tile()));
    let mut scores = SharedMemory::<f32>::new(TILE * TILE);
    let own = UNIT_POS_Y as usize * TILE + UNIT_POS_X as usize;
    load(k, key * n_kv + kv, exists, &mut keys, heads);
    load(v, key * n_kv + kv, exists, &mut values, heads);

    let scale = comptime!(heads.scale());
    let mut k_sums = zeros(heads);
    let mut v_sums = zeros(heads);
    let mut at = first_query(starts, seen, start) * groups;
    let to = end_query(starts, seen, end - 1) * groups;
    while at < to {
        let line = at + UNIT_POS_Y as usize;
        let head = head_of(line, kv, heads);
        sync_cube(); // the tiles are free
        load(q, head, line < to, &mut lines, heads);
        sync_cube();
        let other = at + UNIT_POS_X as usize;
        let other_head = head_of(other, kv, heads);
        let sees = exists && other < to && other / groups >= seen_from && other / groups < seen_to;
        let score = dot(&keys, &lines, heads) * scale;
        let mut weight = 0.0f32;
        let mut other_along = 0.0f32;
        if sees {
            weight = f32::exp(score - lse[other_head]);
            other_along = along[other_head];
        }
        scores[own] = weight;
        sync_cube();
        load(d_out, head, line < to, &mut lines, heads);
        sync_cube();
        let d_score = weight * (dot(&values, &lines, heads) - other_along);
        add(&mut v_sums, &scores, &lines, heads);
        sync_cube();
        scores[own] = d_score;
        load(q, head, line < to, &mut lines, heads);
        sync_cube();
        add(&mut k_sums, &scores, &lines, heads);
        at += TILE;
    }
    if exists {
        store(&k_sums, scale, dk, key * n_kv + kv, heads);
        store(&v_sums, 1.0f32, dv, key * n_kv + kv, heads);
    }
}

/// What CubeCL makes of the kernels for CUDA compiles with NVIDIA's compiler, which needs no GPU.
/// The launch arguments come from a wgpu device; they do not show in the source.
#[cfg(all(test, feature = "cuda", feature = "wgpu"))]
mod tests {
    use burn::backend::wgpu::{WgpuDevice, WgpuRuntime};
    use burn::tensor::DType;
    use cubecl::prelude::*;
    use cubecl::{CubeTask, Runtime};
    use cudarc::nvrtc::{CompileOptions, compile_ptx_with_opts};

    use super::*;

    /// Turing, Ampere, Ada and Hopper; the last as CubeCL asks for it.
    const ARCHITECTURES: [&str; 4] = ["sm_75", "sm_80", "sm_89", "sm_90a"];

    fn array() -> ArrayCompilationArg {
        ArrayCompilationArg { inplace: None }
    }

    /// The CUDA C++ of a kernel.
    fn source<K: CubeKernel>(kernel: K) -> String {
        let task = KernelTask::<cubecl::cuda::CudaCompiler, _>::new(kernel);
        let address = AddressType::U32.unsigned_type();
        let mode = ExecutionMode::Checked;
        let compiled = task.compile(&mut Default::default(), &Default::default(), mode, address);
        compiled.expect("CubeCL knows how").source
    }

    /// The three kernels for heads of these sizes, in a type.
    fn sources(heads: Heads, dtype: DType) -> [(&'static str, String); 3] {
        let client = WgpuRuntime::client(&WgpuDevice::Cpu);
        let settings = KernelSettings::default()
            .cube_dim(CubeDim::new_2d(TILE as u32, TILE as u32))
            .address_type(AddressType::U32);
        let forward = forward::Forward::<WgpuRuntime>::new(
            settings.clone(),
            client.clone(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            (),
            (),
            heads,
            dtype.into(),
        );
        let queries = backward_queries::BackwardQueries::<WgpuRuntime>::new(
            settings.clone(),
            client.clone(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            (),
            (),
            heads,
            dtype.into(),
        );
        let keys = backward_keys::BackwardKeys::<WgpuRuntime>::new(
            settings,
            client,
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            array(),
            (),
            (),
            heads,
            dtype.into(),
        );
        [
            ("forward", source(forward)),
            ("backward_queries", source(queries)),
            ("backward_keys", source(keys)),
        ]
    }

    #[test]
    #[ignore = "needs NVRTC and CUDA's headers: .ci/nvrtc brings them"]
    fn cuda_compiles_every_kernel() {
        let include = std::env::var("CUDA_INCLUDE").expect("the folder of CUDA's headers");
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (n_kv, groups, h_d) in [(3, 3, 64), (8, 4, 128), (2, 1, 80)] {
                let heads = Heads { n_kv, groups, h_d };
                for (name, source) in sources(heads, dtype) {
                    for architecture in ARCHITECTURES {
                        let case = format!("{name} in {dtype:?}, {heads:?}, for {architecture}");
                        let options = CompileOptions {
                            options: vec![format!("--gpu-architecture={architecture}")],
                            include_paths: vec![include.clone()],
                            ..CompileOptions::default()
                        };
                        let ptx = compile_ptx_with_opts(&source, options);
                        let ptx = ptx.unwrap_or_else(|e| panic!("{case}: {e}"));
                        assert!(ptx.to_src().contains(".entry"), "{case}");
                    }
                }
            }
        }
    }
}
