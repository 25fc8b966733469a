//! A 4-bit weight on a device.

use burn::module::Module;
use burn::tensor::{Bytes, DType, Int, IntDType, Tensor, TensorData, backend::Backend};

use crate::{Absmax, NESTED_BLOCK_SIZE, Precision, Quantized, Scheme};

/// A weight `[out, in]` in 4 bits, as [`Quantized`], in a backend's memory.
///
/// Its tensors are no parameters: records, gradients and optimizers know nothing of them.
#[derive(Module, Debug)]
pub struct PackedWeight<B: Backend> {
    /// Two codes a byte, the earlier one in the high nibble, four bytes a little-endian `u32`:
    /// `[⌈out · in / 8⌉]`, what is left over is 0.
    pub codes: Tensor<B, 1, Int>,
    /// The largest magnitude of each block, or of each 256 of them if they are `nested`.
    pub absmax: Tensor<B, 1>,
    /// How the blocks' largest magnitudes are stored in 8 bits, if they are.
    pub nested: Option<NestedAbsmax<B>>,
    /// What the codes decode to: `[16]`.
    pub code_book: Tensor<B, 1>,
    /// What the tensors' own sizes do not tell.
    #[module(skip)]
    pub layout: PackedLayout,
}

/// Absmax values in 8 bits: `code_book[code] * absmax + offset`.
#[derive(Module, Debug)]
pub struct NestedAbsmax<B: Backend> {
    /// One code a block of the weight, four a little-endian `u32`; what is left over is 0.
    pub codes: Tensor<B, 1, Int>,
    /// `[256]`.
    pub code_book: Tensor<B, 1>,
    /// Added to every value.
    pub offset: f32,
}

/// What the tensors of a [`PackedWeight`] mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PackedLayout {
    /// `[out, in]`.
    pub shape: [usize; 2],
    /// Format and blocks.
    pub scheme: Scheme,
    /// What decoded values are rounded to.
    pub precision: Precision,
}

impl PackedLayout {
    /// Number of values.
    pub fn num_values(&self) -> usize {
        self.shape[0] * self.shape[1]
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.num_values().div_ceil(self.scheme.block_size)
    }
}

impl<B: Backend> PackedWeight<B> {
    /// Moves a weight to a device.
    pub fn new(weight: Quantized, device: &B::Device) -> Self {
        let layout = PackedLayout {
            shape: weight.shape(),
            scheme: weight.scheme(),
            precision: weight.precision(),
        };
        let code_book = floats(weight.format().decoded().to_vec(), device);
        let (codes, absmax) = weight.into_parts();
        let (absmax, nested) = match absmax {
            Absmax::Plain(absmax) => (absmax, None),
            Absmax::Double(double) => {
                let nested = NestedAbsmax {
                    codes: words(double.codes, device),
                    code_book: floats(double.code_book.to_vec(), device),
                    offset: double.offset,
                };
                (double.absmax, Some(nested))
            }
        };
        Self {
            codes: words(codes, device),
            absmax: floats(absmax, device),
            nested,
            code_book,
            layout,
        }
    }

    /// The largest magnitude of each block, `[blocks]`, in plain tensor operations.
    pub fn block_absmax(&self) -> Tensor<B, 1> {
        let Some(nested) = &self.nested else {
            return self.absmax.clone();
        };
        let blocks = self.layout.blocks();
        let codes = unpack(nested.codes.clone(), [0, 8, 16, 24], 0xff);
        let values = nested
            .code_book
            .clone()
            .select(0, codes.narrow(0, 0, blocks));
        let [outer] = self.absmax.dims();
        let absmax = self.absmax.clone().reshape([outer, 1]);
        let absmax = absmax.expand([outer, NESTED_BLOCK_SIZE]);
        let absmax = absmax
            .reshape([outer * NESTED_BLOCK_SIZE])
            .narrow(0, 0, blocks);
        values * absmax + nested.offset
    }

    /// The dense weight `[out, in]`, in plain tensor operations: the reference that the kernels
    /// are held to, and what backends without a kernel use.
    pub fn dequantize(&self) -> Tensor<B, 2> {
        let PackedLayout {
            shape,
            scheme,
            precision,
        } = self.layout;
        let block_size = scheme.block_size;
        let (len, blocks) = (self.layout.num_values(), self.layout.blocks());
        // The high nibble of a byte is the earlier code.
        let codes = unpack(self.codes.clone(), [4, 0, 12, 8, 20, 16, 28, 24], 0xf);
        let values = self.code_book.clone().select(0, codes.narrow(0, 0, len));
        let absmax = self.block_absmax().reshape([blocks, 1]);
        let absmax = absmax
            .expand([blocks, block_size])
            .reshape([blocks * block_size]);
        let values: Tensor<B, 2> = (values * absmax.narrow(0, 0, len)).reshape(shape);
        if precision == Precision::F32 {
            return values;
        }
        // On the host: casts of backends do not all round to the nearest number.
        let device = values.device();
        let data = values.into_data();
        let rounded = data.iter::<f32>().map(|value| precision.round(value));
        let data = TensorData::new(rounded.collect(), shape);
        Tensor::from_data(data, (&device, DType::F32))
    }
}

/// `words` `[n]` to `[n · N]`: the bits of `mask` after each of the shifts.
fn unpack<B: Backend, const N: usize>(
    words: Tensor<B, 1, Int>,
    shifts: [u32; N],
    mask: u32,
) -> Tensor<B, 1, Int> {
    let device = words.device();
    let [n] = words.dims();
    let constant = |data: TensorData| Tensor::<B, 2, Int>::from_data(data, (&device, DType::U32));
    let shifts = constant(TensorData::new(shifts.to_vec(), [1, N])).expand([n, N]);
    let mask = constant(TensorData::new(vec![mask], [1, 1])).expand([n, N]);
    let parts = words
        .reshape([n, 1])
        .expand([n, N])
        .bitwise_right_shift(shifts);
    parts.bitwise_and(mask).cast(IntDType::I32).reshape([n * N])
}

fn floats<B: Backend>(values: Vec<f32>, device: &B::Device) -> Tensor<B, 1> {
    let shape = [values.len()];
    Tensor::from_data(TensorData::new(values, shape), (device, DType::F32))
}

/// Bytes as `u32` words, in place unless there are some to add.
fn words<B: Backend>(mut bytes: Vec<u8>, device: &B::Device) -> Tensor<B, 1, Int> {
    let words = bytes.len().div_ceil(4);
    bytes.resize(4 * words, 0);
    let data = TensorData::from_bytes(Bytes::from_bytes_vec(bytes), [words], DType::U32);
    Tensor::from_data(data, (device, DType::U32))
}
