//! What the tests of adapters share.

use std::path::{Path, PathBuf};

use adapters::methods::lora::LoraSettings;
use adapters::{AdapterConfig, Selection, Targets};

/// The tests run on the processor, or with `--features wgpu` on the first graphics adapter.
#[cfg(not(feature = "wgpu"))]
pub type B = burn::backend::Flex;
#[cfg(feature = "wgpu")]
pub type B = burn::backend::Wgpu;

/// A path of this crate.
pub fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Settings of rank 4 without any extras.
pub fn lora(target_modules: Targets) -> AdapterConfig {
    AdapterConfig {
        selection: Selection {
            target_modules,
            ..Selection::default()
        },
        method: rank_4().into(),
    }
}

/// LoRA of rank 4 without any extras.
pub fn rank_4() -> LoraSettings {
    LoraSettings {
        rank: 4,
        alpha: 8.0,
        ..LoraSettings::default()
    }
}
