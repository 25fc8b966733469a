//! The 4-bit formats of bitsandbytes on the host, equal to bitsandbytes 0.50.2 (CPU) to the bit.
//!
//! A weight `[out, in]` is flattened row by row and cut into blocks of `block_size` values; the
//! last block may be shorter, and a block may span two rows. Each block keeps its largest
//! magnitude, `absmax`; each value becomes the 4-bit index of the entry of the format's code book
//! nearest to `value / absmax`. Two codes share a byte, the earlier one in the high nibble. With
//! double quantization the absmax values are themselves stored in 8 bits ([`DoubleQuantized`]).
//!
//! ```
//! use quant::{Format, Scheme, quantize};
//!
//! let weight: Vec<f32> = (0..6 * 32).map(|i| (i as f32 * 0.7).sin()).collect();
//! let quantized = quantize(&weight, [6, 32], Scheme::new(Format::Nf4, 64, false))?;
//! assert_eq!(quantized.codes().len(), 6 * 32 / 2);
//!
//! let mut row = vec![0.0; 32];
//! quantized.dequantize_rows(2..3, &mut row);
//! assert_eq!(row, quantized.dequantize()[2 * 32..3 * 32]);
//! # Ok::<(), quant::Error>(())
//! ```
//!
//! Source: QLoRA, <https://arxiv.org/abs/2305.14314>, and the observed behaviour of bitsandbytes.

#![deny(missing_docs)]

pub mod bitsandbytes;
mod code_book;
mod decode;
mod double_quant;
mod error;
mod linear;
mod matmul;
mod packed;
mod precision;
mod quantized;

pub use code_book::Format;
pub use double_quant::{DoubleQuantized, NESTED_BLOCK_SIZE};
pub use error::{Error, Result};
pub use linear::QuantLinear;
pub use matmul::{QuantBackend, Side, matmul, reference};
pub use packed::{NestedAbsmax, PackedLayout, PackedWeight};
pub use precision::Precision;
pub use quantized::{Absmax, Quantized, Scheme, quantize};
