//! What the tests of adapters share.

use std::path::{Path, PathBuf};

use adapters::{LoraConfig, LoraInit, Pattern, Targets};

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
pub fn lora(target_modules: Targets) -> LoraConfig {
    LoraConfig {
        rank: 4,
        alpha: 8.0,
        dropout: 0.0,
        target_modules,
        exclude_modules: None,
        layers_to_transform: None,
        rank_pattern: Pattern::default(),
        alpha_pattern: Pattern::default(),
        use_rslora: false,
        modules_to_save: Vec::new(),
        init: LoraInit::Default,
    }
}
