//! `trainer devices`

use std::process::ExitCode;

use anyhow::Result;
use serde_json::json;

use crate::device;
use crate::output::Output;

/// Lists the devices that this build can use, and says what it lacks.
pub fn run(output: &Output) -> Result<ExitCode> {
    let (devices, lacking) = device::list();
    let line = |d: &device::Listed| {
        let memory = d
            .memory_bytes
            .map(|bytes| format!(", {:.1} GiB", bytes as f64 / (1u64 << 30) as f64));
        format!(
            "{:8} {} ({}, {}{})",
            d.id,
            d.name,
            d.backend,
            d.kind,
            memory.unwrap_or_default()
        )
    };
    let text: Vec<_> = devices.iter().map(line).collect();
    output.result(&json!({"devices": devices}), &text.join("\n"))?;
    for reason in lacking {
        output.note(reason);
    }
    Ok(ExitCode::SUCCESS)
}
