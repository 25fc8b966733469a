//! Llama models: the network, its weights, its tokenizer and its chat template.
//!
//! - [`llama`] is the network, generic over Burn's backends and over what its linear layers are;
//!   [`ops`] holds its operations, one file each.
//! - [`folder`], [`config`], [`checkpoint`] and [`load`] read a Hugging Face model folder.
//! - [`generate`] continues a prompt with a loaded model.

#![deny(missing_docs)]

pub mod chat;
pub mod checkpoint;
pub mod config;
pub mod error;
pub mod folder;
pub mod generate;
pub mod hub;
pub mod kv_cache;
pub mod linear;
pub mod llama;
pub mod load;
pub mod ops;
pub mod rope;
pub mod segments;
pub mod tokenizer;
pub mod virtual_tokens;
pub mod weight;

pub use error::{Error, Result};
