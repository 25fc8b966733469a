//! LoRA adapters on a Llama, and PEFT's file format.
//!
//! [`load`] makes a base model, [`attach`] puts fresh adapters on it, [`peft`] loads and saves them,
//! [`lora`] is the layer; [`Merge`] makes models that need no adapter, [`quantize_folder`] 4-bit ones.

#![deny(missing_docs)]

mod attach;
mod base;
mod config;
mod drift;
mod error;
pub mod lora;
mod merge;
mod parameters;
pub mod peft;
mod quantize;

pub use attach::{AdaptedLlama, attach, set_dropout, train_all};
pub use base::{AdaptedBackend, BaseLinear, TrainBackend, base_bytes, check, init, load, scheme};
pub use config::{LoraConfig, LoraInit, LoraLayer, Pattern, Targets};
pub use drift::{Drift, drift};
pub use error::{Error, Result};
pub use merge::{Merge, Onto, Weighted};
pub use parameters::{parameters, read_parameters, write_parameters};
pub use quantize::quantize_folder;
