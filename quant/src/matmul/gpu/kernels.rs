//! The kernels, one source for wgpu and CUDA.

use cubecl::prelude::*;

use crate::{NESTED_BLOCK_SIZE, Precision};

/// Codes of a word.
pub(super) const CODES: usize = 8;
/// Threads that share a row in [`one_row`].
pub(super) const ROW_UNITS: usize = 64;

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

    /// Every kind of weight, by both kernels, in every type of the other tensors.
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
