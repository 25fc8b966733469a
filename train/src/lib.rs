//! A fine-tuning run: its recipe, its data, its loop and its run folder.
//!
//! [`recipe`] says what is wanted, [`data`] reads rows, [`batch`] puts them side by side, [`step`]
//! computes loss and gradients, [`fit`] is the loop, [`checkpoint`] lets it go on later,
//! [`report`] shows it, [`card`] describes what it trained.

#![deny(missing_docs)]

pub mod batch;
pub mod card;
pub mod checkpoint;
pub mod data;
pub mod device_failure;
mod error;
pub mod evaluate;
mod exact;
pub mod fit;
pub mod loss_scale;
pub mod memory;
mod metrics;
pub mod optimizer;
pub mod recipe;
mod recompute;
pub mod report;
pub mod run_folder;
pub mod schedule;
pub mod session;
pub mod step;
pub mod tensorboard;
pub mod trained;

pub use error::{Error, Result};
