//! What can be wrong with an adapter.

use std::path::PathBuf;

use model::error::listed;
use quant::{Format, Scheme};

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
    #[error("{}:{}", path.display(), listed(problems, usize::MAX))]
    Config {
        /// The file.
        path: PathBuf,
        /// One sentence a problem, each naming its key.
        problems: Vec<String>,
    },
    /// The settings do not fit the model; every problem is listed.
    #[error("the adapter does not fit the model:{}", listed(problems, usize::MAX))]
    Fit {
        /// One sentence a problem.
        problems: Vec<String>,
    },
    /// The base model's checkpoint is quantised in a way that is not supported.
    #[error("{} cannot be read as a 4-bit model", path.display())]
    Quantization {
        /// The checkpoint.
        path: PathBuf,
        /// What is not.
        source: quant::Error,
    },
    /// The base model is stored in another 4-bit format than the one asked for.
    #[error(
        "{} is stored as {stored}, and {} is asked for", path.display(), asked.name()
    )]
    OtherFormat {
        /// The checkpoint.
        path: PathBuf,
        /// What it is stored as.
        stored: Scheme,
        /// What is asked for.
        asked: Format,
    },
    /// A weight of the base model cannot be quantised.
    #[error("cannot quantise {name}")]
    Weight {
        /// Its name.
        name: String,
        /// Why.
        source: quant::Error,
    },
    /// A weight in parts would have to be one tensor.
    #[error(
        "{name} is larger than a tensor of this device can be: it can be used, in parts, but not \
         adapted or trained"
    )]
    Split {
        /// The module.
        name: String,
    },
    /// The model is in fewer bits already.
    #[error("{} is quantised already", path.display())]
    Quantized {
        /// The model's folder.
        path: PathBuf,
    },
    /// Tensors are missing, unexpected or of another shape; the first are listed.
    #[error("{} is not an adapter of this model:{}", path.display(), listed(problems, 8))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// One sentence a tensor, with both shapes where they differ.
        problems: Vec<String>,
    },
    /// Adapters that cannot be used together, or not with their weights; every problem is listed.
    #[error("cannot combine these adapters:{}", listed(problems, usize::MAX))]
    Combine {
        /// One sentence a problem.
        problems: Vec<String>,
    },
    /// Adapters that cannot be merged together, or not onto what they are to be merged onto; every
    /// problem is listed.
    #[error("cannot merge these adapters:{}", listed(problems, usize::MAX))]
    Merge {
        /// One sentence a problem.
        problems: Vec<String>,
    },
    /// Adapters that are no part of a model's weights; every one is listed.
    #[error("cannot merge these adapters:{}", listed(problems, usize::MAX))]
    NotInWeights {
        /// One sentence an adapter.
        problems: Vec<String>,
    },
    /// The original weights of a model that has them no more.
    #[error("{} is in 4 bits: there are no original weights to merge onto", path.display())]
    NoOriginal {
        /// The model's folder.
        path: PathBuf,
    },
    /// A merged weight is infinite or NaN, or too large for the type of its tensor.
    #[error("the merged {name} has values that are no finite numbers of its type")]
    NotFinite {
        /// The tensor.
        name: String,
    },
    /// Whoever asked for it asked to stop.
    #[error("interrupted")]
    Interrupted,
}
