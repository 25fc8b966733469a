//! The kernels, one source for wgpu and CUDA.

use cubecl::prelude::*;

use crate::{NESTED_BLOCK_SIZE, Precision, Side};

/// Codes of a word.
pub(super) const CODES: usize = 8;
/// Threads that share a row in [`one_row`].
pub(super) const ROW_UNITS: usize = 64;
/// Rows and columns of a product that a cube makes in [`tiled`].
pub(super) const TILE: usize = 64;
/// How far into rows and columns it goes at a time: both tiles together are the 16 KiB of shared
/// memory that every device has, and each unit decodes one word.
const DEPTH: usize = 32;
/// Threads that share a tile.
pub(super) const TILE_UNITS: usize = TILE * DEPTH / CODES;
/// Rows, and columns, of a thread.
const UNIT_TILE: usize = TILE / UNIT_COLUMNS;
/// Threads side by side in a tile; there are as many below each other.
const UNIT_COLUMNS: usize = TILE_UNITS.isqrt();

/// A 4-bit weight, see [`crate::PackedWeight`]. A word's codes lie in one block: blocks are whole
/// numbers of words.
#[derive(CubeType, CubeLaunch)]
pub(super) struct Weight {
    codes: Array<u32>,
    code_book: Array<f32>,
    absmax: Absmax,
    #[cube(comptime)]
    block_size: usize,
    #[cube(comptime)]
    precision: Precision,
}

/// The largest magnitude of each block.
#[derive(CubeType, CubeLaunch)]
#[allow(dead_code, reason = "it is made by its launch argument")]
pub(super) enum Absmax {
    Plain(Array<f32>),
    Nested {
        codes: Array<u32>,
        code_book: Array<f32>,
        absmax: Array<f32>,
        offset: f32,
    },
}

#[cube]
impl Absmax {
    fn of_block(&self, block: usize) -> f32 {
        match self {
            Absmax::Plain(absmax) => absmax[block],
            Absmax::Nested {
                codes,
                code_book,
                absmax,
                offset,
            } => {
                let shift = (block % 4) as u32 * 8u32;
                let code = (codes[block / 4] >> shift) & 255u32;
                code_book[code as usize] * absmax[block / NESTED_BLOCK_SIZE] + *offset
            }
        }
    }
}

#[cube]
impl Weight {
    /// The absmax of the codes of a word.
    fn absmax(&self, word: usize) -> f32 {
        self.absmax.of_block(word * CODES / self.block_size)
    }

    /// The value of code `i` of a word.
    fn value(&self, bits: u32, absmax: f32, #[comptime] i: usize) -> f32 {
        let shift = comptime!((i as u32 ^ 1) * 4); // the high nibble of a byte is the earlier code
        let code = (bits >> shift) & 15u32;
        round(self.code_book[code as usize] * absmax, self.precision)
    }

    /// Decodes `[DEPTH, TILE]` of a product's right side, from `start` deep and `left` on, a word a
    /// unit; beyond its edges there are zeros.
    fn tile(
        &self,
        tile: &mut SharedMemory<f32>,
        start: usize,
        left: usize,
        depth: usize,
        columns: usize,
        #[comptime] side: Side,
    ) {
        let unit = UNIT_POS as usize;
        // A word goes down a column of `Wᵀ`, and along a row of `W`.
        let (down, across, next, width) = match comptime!(side) {
            Side::Transposed => (unit / TILE * CODES, unit % TILE, TILE.runtime(), depth),
            Side::Plain => {
                let words = comptime!(TILE / CODES);
                (
                    unit / words,
                    unit % words * CODES,
                    1usize.runtime(),
                    columns,
                )
            }
        };
        let deep = start + down;
        let column = left + across;
        let first = match comptime!(side) {
            Side::Transposed => column * width + deep,
            Side::Plain => deep * width + column,
        };
        let mut bits = 0u32;
        let mut absmax = 0.0f32;
        if deep < depth && column < columns {
            bits = self.codes[first / CODES];
            absmax = self.absmax(first / CODES);
        }
        #[unroll]
        for i in 0..CODES {
            tile[down * TILE + across + i * next] = self.value(bits, absmax, i);
        }
    }
}

/// Decodes a word a unit, from word `first` on: `values` are those of some rows of the dense weight.
#[cube(launch)]
pub(super) fn dequantize<F: Float>(
    weight: &Weight,
    values: &mut Array<F>,
    first: u32,
    #[define(F)] _dtype: StorageType,
) {
    let word = ABSOLUTE_POS + first as usize;
    if word < weight.codes.len() {
        let bits = weight.codes[word];
        let absmax = weight.absmax(word);
        #[unroll]
        for i in 0..CODES {
            let at = ABSOLUTE_POS * CODES + i;
            if at < values.len() {
                values[at] = F::cast_from(weight.value(bits, absmax, i));
            }
        }
    }
}

/// `x` `[in]` times the weight's rows is `y` `[out]`; the units of a cube share a row, each takes
/// every [`ROW_UNITS`]th word. Sums are f32.
#[cube(launch)]
pub(super) fn one_row<F: Float>(
    x: &Array<F>,
    weight: &Weight,
    y: &mut Array<F>,
    #[define(F)] _dtype: StorageType,
) {
    let row = CUBE_POS;
    if row < y.len() {
        let start = row * x.len();
        let end = start + x.len();
        let mut sum = 0.0f32;
        let mut word = start / CODES + UNIT_POS as usize;
        while word * CODES < end {
            let bits = weight.codes[word];
            let absmax = weight.absmax(word);
            #[unroll]
            for i in 0..CODES {
                let at = word * CODES + i;
                if at >= start && at < end {
                    sum += f32::cast_from(x[at - start]) * weight.value(bits, absmax, i);
                }
            }
            word += ROW_UNITS;
        }
        let total = sum_of_units(sum);
        if UNIT_POS == 0 {
            y[row] = F::cast_from(total);
        }
    }
}

/// `x` `[n, depth]` times the weight, see [`Side`], is `y` `[n, columns]`: a cube makes a tile of it,
/// decodes the tiles of the weight as it comes to them and writes none. Rows of the weight are whole
/// words. Products and sums are f32.
#[cube(launch)]
pub(super) fn tiled<F: Float>(
    x: &Array<F>,
    weight: &Weight,
    y: &mut Array<F>,
    depth: u32,
    columns: u32,
    #[comptime] side: Side,
    #[define(F)] _dtype: StorageType,
) {
    let depth = depth as usize;
    let columns = columns as usize;
    let n = x.len() / depth;
    let left = CUBE_POS_X as usize * TILE;
    let top = CUBE_POS_Y as usize * TILE;
    let unit = UNIT_POS as usize;
    let unit_column = unit % UNIT_COLUMNS;
    let unit_row = unit / UNIT_COLUMNS * UNIT_TILE;
    let mut x_tile = SharedMemory::<f32>::new(TILE * DEPTH); // [row, depth]
    let mut weight_tile = SharedMemory::<f32>::new(DEPTH * TILE); // [depth, column]
    let mut sums = Array::<f32>::new(comptime!(UNIT_TILE * UNIT_TILE));
    #[unroll]
    for i in 0..comptime!(UNIT_TILE * UNIT_TILE) {
        sums[i] = 0.0f32;
    }

    let mut start = 0usize;
    while start < depth {
        #[unroll]
        for i in 0..comptime!(TILE * DEPTH / TILE_UNITS) {
            let at = unit + i * TILE_UNITS;
            let row = top + at / DEPTH;
            let deep = start + at % DEPTH;
            let mut value = 0.0f32;
            if row < n && deep < depth {
                value = f32::cast_from(x[row * depth + deep]);
            }
            x_tile[at] = value;
        }
        weight.tile(&mut weight_tile, start, left, depth, columns, side);
        sync_cube();
        for deep in 0..DEPTH {
            let mut across = Array::<f32>::new(UNIT_TILE);
            #[unroll]
            for column in 0..UNIT_TILE {
                // Neighbours read what lies side by side.
                across[column] = weight_tile[deep * TILE + column * UNIT_COLUMNS + unit_column];
            }
            #[unroll]
            for row in 0..UNIT_TILE {
                let down = x_tile[(unit_row + row) * DEPTH + deep];
                #[unroll]
                for column in 0..UNIT_TILE {
                    sums[row * UNIT_TILE + column] += down * across[column];
                }
            }
        }
        sync_cube();
        start += DEPTH;
    }

    #[unroll]
    for row in 0..UNIT_TILE {
        #[unroll]
        for column in 0..UNIT_TILE {
            let at_row = top + unit_row + row;
            let at_column = left + column * UNIT_COLUMNS + unit_column;
            if at_row < n && at_column < columns {
                y[at_row * columns + at_column] = F::cast_from(sums[row * UNIT_TILE + column]);
            }
        }
    }
}

/// The sum over the units of a cube, in unit 0.
#[cube]
fn sum_of_units(sum: f32) -> f32 {
    let mut sums = SharedMemory::<f32>::new(ROW_UNITS);
    let unit = UNIT_POS as usize;
    sums[unit] = sum;
    sync_cube();
    #[unroll]
    for level in 1..=comptime!(ROW_UNITS.ilog2()) {
        let half = comptime!(ROW_UNITS >> level);
        if unit < half {
            let other = sums[unit + half];
            sums[unit] += other;
        }
        sync_cube();
    }
    sums[0]
}

/// [`Precision::round`] for finite numbers, by their bits: not every device has the types.
#[cube]
fn round(x: f32, #[comptime] precision: Precision) -> f32 {
    match comptime!(precision) {
        Precision::F32 => x,
        Precision::Bf16 => keep_bits(x, 16u32),
        Precision::F16 => {
            // Below f16's normal numbers its steps are those of f32 numbers from 0.5 to 1.
            let subnormal = (x + 0.75) - 0.75;
            select(f32::abs(x) < 6.103_515_6e-5, subnormal, keep_bits(x, 13u32))
        }
    }
}

/// `x` without its last `dropped` bits, rounded to nearest, the even one of two.
#[cube]
fn keep_bits(x: f32, #[comptime] dropped: u32) -> f32 {
    let bits = u32::reinterpret(x);
    let half = comptime!((1u32 << (dropped - 1)) - 1);
    let rounded = bits + half + ((bits >> dropped) & 1u32);
    f32::reinterpret((rounded >> dropped) << dropped)
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

    fn weight(absmax: AbsmaxCompilationArg, precision: Precision) -> WeightCompilationArg {
        WeightCompilationArg {
            codes: array(),
            code_book: array(),
            absmax,
            block_size: 64,
            precision,
        }
    }

    /// The CUDA C++ of a kernel.
    fn source<K: CubeKernel>(kernel: K) -> String {
        let task = KernelTask::<cubecl::cuda::CudaCompiler, _>::new(kernel);
        let address = AddressType::U32.unsigned_type();
        let mode = ExecutionMode::Checked;
        let compiled = task.compile(&mut Default::default(), &Default::default(), mode, address);
        compiled.expect("CubeCL knows how").source
    }

    /// Every kind of weight, by all kernels, in every type of the other tensors.
    fn sources() -> Vec<(String, String)> {
        let client = WgpuRuntime::client(&WgpuDevice::Cpu);
        let mut all = Vec::new();
        for precision in [Precision::F32, Precision::F16, Precision::Bf16] {
            for nested in [false, true] {
                for dtype in [DType::F32, DType::F16, DType::BF16] {
                    let settings = KernelSettings::default()
                        .cube_dim(CubeDim::new_1d(ROW_UNITS as u32))
                        .address_type(AddressType::U32);
                    let weight = || {
                        let absmax = match nested {
                            false => AbsmaxCompilationArg::Plain(array()),
                            true => AbsmaxCompilationArg::Nested {
                                codes: array(),
                                code_book: array(),
                                absmax: array(),
                                offset: (),
                            },
                        };
                        weight(absmax, precision)
                    };
                    let case = format!("{dtype:?}, values {precision:?}, nested {nested}");
                    let kernel = dequantize::Dequantize::<WgpuRuntime>::new(
                        settings.clone(),
                        client.clone(),
                        weight(),
                        array(),
                        (),
                        dtype.into(),
                    );
                    all.push((format!("dequantize, {case}"), source(kernel)));
                    for side in [Side::Transposed, Side::Plain] {
                        let kernel = tiled::Tiled::<WgpuRuntime>::new(
                            settings
                                .clone()
                                .cube_dim(CubeDim::new_1d(TILE_UNITS as u32)),
                            client.clone(),
                            array(),
                            weight(),
                            array(),
                            (),
                            (),
                            side,
                            dtype.into(),
                        );
                        all.push((format!("tiled, {side:?}, {case}"), source(kernel)));
                    }
                    let kernel = one_row::OneRow::<WgpuRuntime>::new(
                        settings,
                        client.clone(),
                        array(),
                        weight(),
                        array(),
                        dtype.into(),
                    );
                    all.push((format!("one_row, {case}"), source(kernel)));
                }
            }
        }
        all
    }

    #[test]
    #[ignore = "needs NVRTC and CUDA's headers: .ci/nvrtc brings them"]
    fn cuda_compiles_every_kernel() {
        let include = std::env::var("CUDA_INCLUDE").expect("the folder of CUDA's headers");
        for (name, source) in sources() {
            for architecture in ARCHITECTURES {
                let options = CompileOptions {
                    options: vec![format!("--gpu-architecture={architecture}")],
                    include_paths: vec![include.clone()],
                    ..CompileOptions::default()
                };
                let ptx = compile_ptx_with_opts(&source, options);
                let ptx = ptx.unwrap_or_else(|e| panic!("{name} for {architecture}: {e}"));
                assert!(ptx.to_src().contains(".entry"), "{name} for {architecture}");
            }
        }
    }
}
