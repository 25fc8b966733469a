//! `trainer devices`

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use crate::device::{self, Device};
use crate::output::Output;

/// Lists the devices that this build can use, and says what it lacks; of one that is named, that
/// alone.
pub fn run(name: &str, output: &Output) -> Result<ExitCode> {
    Device::find(name)?;
    let (mut devices, lacking) = device::list();
    devices.retain(|listed| device::is_meant(name, listed));
    let line = |d: &device::Listed| {
        let memory = d
            .memory_bytes
            .map(|bytes| format!(", {:.1} GiB", bytes as f64 / (1u64 << 30) as f64));
        format!(
            "{:8} {} ({}, {}{}, {})",
            d.id,
            d.name,
            d.backend,
            d.kind,
            memory.unwrap_or_default(),
            d.dtypes.join(" ")
        )
    };
    let text: Vec<_> = devices.iter().map(line).collect();
    output.result(&json!({"devices": devices}), &text.join("\n"))?;
    for reason in lacking {
        output.note(reason);
    }
    Ok(ExitCode::SUCCESS)
}
