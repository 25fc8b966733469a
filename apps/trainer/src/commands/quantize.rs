//! `trainer quantize`

use std::process::ExitCode;
use std::time::Instant;

use adapters::{base_bytes, quantize_folder};
use anyhow::Result;
use burn::tensor::DType;
use model::folder::write_folder;
use model::hub::Files;
use serde_json::json;

use super::{check_out, open_model, read_scheme};
use crate::cli::QuantizeArgs;
use crate::device::Device;
use crate::output::Output;
use crate::signals;

/// Writes a model with 4-bit weights.
pub fn run(args: QuantizeArgs, device: &str, output: &Output) -> Result<ExitCode> {
    let scheme = read_scheme(Some(&args.format), args.block_size, args.double_quant)?;
    let scheme = scheme.expect("the command line knows no other formats");
    Device::find(device)?; // computes on the CPU, and no name is taken unread
    check_out(&args.out)?;
    let base = open_model(&args.model, Files::Model, output)?;
    let interrupter = signals::ask_first("stopping");
    let go_on = || !interrupter.should_stop();
    output.note(format_args!("quantising {} to {scheme}", args.model));
    let start = Instant::now();
    let written = write_folder(&args.out, |folder| {
        quantize_folder(&base, scheme, folder, &go_on)
    });
    match written {
        Err(_) if interrupter.should_stop() => return signals::interrupted(output),
        written => written?,
    }
    let seconds = start.elapsed().as_secs_f64();
    let bytes = base_bytes(&base, Some(scheme), DType::F32)?;
    let json = json!({
        "out": args.out,
        "format": args.format,
        "block_size": scheme.block_size,
        "double_quant": scheme.double_quant,
        "memory_bytes": bytes,
        "seconds": seconds,
    });
    let text = format!(
        "{}\nquantised to {scheme} in {seconds:.1} s; the weights take {:.1} MiB in memory",
        args.out.display(),
        bytes as f64 / f64::from(1 << 20),
    );
    output.result(&json, &text)?;
    Ok(ExitCode::SUCCESS)
}
