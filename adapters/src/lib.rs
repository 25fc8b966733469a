//! Adapters on a Llama by the methods of PEFT, and PEFT's file format.
//!
//! [`load`] makes a base model, [`attach`] puts a fresh adapter on it, [`peft`] loads and saves them,
//! [`combine()`] puts several on it, [`methods`] has what an adapter may be; [`Merge`] makes models that need no adapter,
//! [`quantize_folder`] 4-bit ones.

#![deny(missing_docs)]

mod attach;
mod base;
mod combine;
mod config;
mod drift;
mod error;
mod linear;
mod merge;
pub mod methods;
mod parameters;
pub mod peft;
mod quantize;

pub use attach::{AdaptedLlama, attach, draw, train_all};
pub use base::{
    AdaptedBackend, BaseLinear, TrainBackend, base_bytes, check, init, load, load_in, scheme,
};
pub use combine::{Combination, Weighted, check_fit, combine};
pub use config::{AdapterConfig, Layer, MAX_RANK, OneOrMany, Pattern, Selection, Targets};
pub use drift::{Drift, drift};
pub use error::{Error, Result};
pub use linear::{AdaptedLinear, Dropout, DropoutBackend};
pub use merge::{Kept, Merge, Onto};
pub use methods::{Method, Update};
pub use parameters::{read_parameters, write_parameters};
pub use quantize::quantize_folder;
