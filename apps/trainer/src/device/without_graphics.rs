//! A build that knows no graphics adapters.

use super::{Device, Listed};

pub fn find(backend: &str, _: usize) -> anyhow::Result<Device> {
    Err(super::not_compiled(backend))
}

pub fn best() -> Option<Device> {
    None
}

pub fn list() -> Vec<Listed> {
    Vec::new()
}
