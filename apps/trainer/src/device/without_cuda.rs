//! A build that knows no NVIDIA cards.

use super::{Device, Listed};

pub fn list() -> Result<Vec<Listed>, String> {
    Err("cuda: built without it (build with --features cuda)".into())
}

pub fn find(_: usize) -> anyhow::Result<Device> {
    Err(super::not_compiled("cuda"))
}

pub fn best() -> Option<Device> {
    None
}
