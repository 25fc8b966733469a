//! What can be wrong with an adapter.

use std::path::PathBuf;

/// The result of this crate's fallible functions.
pub type Result<T> = std::result::Result<T, Error>;

/// Everything that can be wrong with an adapter folder or an adapter's settings.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file of the adapter cannot be read, parsed or written.
    #[error(transparent)]
    File(#[from] model::Error),
    /// `adapter_config.json` asks for something that is not supported; every problem is listed.
    #[error("{}: {}", path.display(), problems.join("; "))]
    Config {
        /// The file.
        path: PathBuf,
        /// One sentence a problem, each naming its key.
        problems: Vec<String>,
    },
    /// The settings do not fit the model; every problem is listed.
    #[error("the adapter does not fit the model: {}", problems.join("; "))]
    Fit {
        /// One sentence a problem.
        problems: Vec<String>,
    },
    /// The base model's checkpoint is quantised in a way that is not supported.
    #[error("{}", path.display())]
    Quantization {
        /// The checkpoint.
        path: PathBuf,
        /// What is not.
        source: quant::Error,
    },
    /// A weight of the base model cannot be quantised.
    #[error("cannot quantise {name}")]
    Weight {
        /// Its name.
        name: String,
        /// Why.
        source: quant::Error,
    },
    /// The model is in fewer bits already.
    #[error("{} is quantised already", path.display())]
    Quantized {
        /// The model's folder.
        path: PathBuf,
    },
    /// Tensors are missing, unexpected or of another shape; every one is listed.
    #[error("{} is not an adapter of this model: {}", path.display(), problems.join("; "))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// One sentence a tensor, with both shapes where they differ.
        problems: Vec<String>,
    },
}
