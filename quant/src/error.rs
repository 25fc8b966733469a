//! What can be wrong with a weight or with its quantised parts.

/// The result of a fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a weight can't be quantised, or quantised parts don't make a weight.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The block size is not one bitsandbytes has.
    #[error("block size {block_size} is not a power of two from 32 to 4096")]
    UnsupportedBlockSize {
        /// The block size asked for.
        block_size: usize,
    },
    /// A side of the shape is zero, or the shape overflows.
    #[error("shape {shape:?} has no values or too many to address")]
    InvalidShape {
        /// The shape `[out, in]` asked for.
        shape: [usize; 2],
    },
    /// A part has another length than the shape and block size call for.
    #[error("{part} has {found} values, expected {expected}")]
    WrongLength {
        /// The part, such as `weight` or `absmax`.
        part: &'static str,
        /// The length that the shape and block size call for.
        expected: usize,
        /// The length found.
        found: usize,
    },
    /// A weight is infinite or NaN.
    #[error("weight[{row}, {column}] is {value}, and only finite values can be quantised")]
    NonFiniteWeight {
        /// The row of the first such value.
        row: usize,
        /// The column of the first such value.
        column: usize,
        /// The value.
        value: f32,
    },
    /// A value that scales weights is infinite or NaN.
    #[error("{part}[{index}] is {value}, expected a finite value")]
    NonFinitePart {
        /// The part, such as `absmax`; in a checkpoint its whole name.
        part: String,
        /// The index of the first such value.
        index: usize,
        /// The value.
        value: f32,
    },
    /// A checkpoint lacks a part of a 4-bit weight.
    #[error("{name} is missing")]
    MissingPart {
        /// Its name.
        name: String,
    },
    /// A part of a 4-bit weight in a checkpoint is of another type or length than the others call
    /// for.
    #[error("{name} is {found}, expected {expected}")]
    WrongPart {
        /// Its name.
        name: String,
        /// What the others call for.
        expected: String,
        /// What it is.
        found: String,
    },
    /// What describes a 4-bit weight in a checkpoint cannot be read, or describes another one.
    #[error("{name}: {reason}")]
    QuantState {
        /// The part's name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A `quantization_config` of something else than bitsandbytes' 4 bits.
    #[error(
        "quantization_config.{key} is {found}: only 4-bit weights of bitsandbytes are supported"
    )]
    QuantConfig {
        /// The key.
        key: &'static str,
        /// Its value, in JSON.
        found: String,
    },
}
