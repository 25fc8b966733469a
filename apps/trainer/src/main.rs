//! `trainer`: fine-tunes Llama models with LoRA on whatever machine is there.

mod cli;
mod commands;
#[cfg(unix)]
mod crash;
mod dashboard;
mod demo;
mod device;
mod encoder;
mod failure;
mod forecast;
mod labels;
mod lines;
mod memory;
mod output;
mod record;
mod renderer;
mod signals;
mod terminal;

use std::process::ExitCode;

use crate::cli::{Cli, Command};
use crate::failure::Failure;
use crate::output::Output;

fn main() -> ExitCode {
    keep_freed_memory();
    signals::take_file_size_limits_as_errors();
    let cli = match Cli::read() {
        Ok(cli) => cli,
        Err(error) if !error.use_stderr() => {
            let _ = error.print(); // --help and --version
            return ExitCode::SUCCESS;
        }
        Err(error) => return Failure::from_usage(&error).report(&Output::from_env()),
    };
    let output = Output::new(&cli);
    #[cfg(unix)]
    crash::tell_aborts(&output);
    let result = run(cli, &output);
    terminal::give_back(); // whatever happened
    match result {
        Ok(code) => code,
        Err(error) => Failure::from(error).report(&output),
    }
}

fn run(cli: Cli, output: &Output) -> anyhow::Result<ExitCode> {
    signals::end_and_say_so(output); // until a command knows better
    let device = cli.device;
    device::check_name(&device)?; // also where nothing is computed
    match cli.command {
        None => demo::run(&device, cli.no_tui, output),
        Some(Command::Train(args)) => commands::train::run(args, &device, cli.no_tui, output),
        Some(Command::Eval(args)) => commands::eval::run(args, &device, output),
        Some(Command::Generate(args)) => commands::generate::run(args, &device, output),
        Some(Command::Chat(args)) => commands::chat::run(args, &device, output),
        Some(Command::Merge(args)) => commands::merge::run(args, &device, output),
        Some(Command::Quantize(args)) => commands::quantize::run(args, &device, output),
        Some(Command::Plan(args)) => commands::plan::run(args, &device, output),
        Some(Command::Report(args)) => commands::report::run(args, output),
        Some(Command::Push(args)) => commands::push::run(args, output),
        Some(Command::Pull(args)) => commands::pull::run(args, output),
        Some(Command::Devices) => commands::devices::run(&device, output),
    }
}

/// glibc gives large buffers back to the system when they are freed and asks for them again at the
/// next step; the page faults cost more than the arithmetic. These settings keep them. (One arena for
/// all threads would save nothing, and rows would be encoded more slowly by many threads than by one.)
fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: `mallopt` only changes settings of the allocator, before any other thread exists.
    unsafe {
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, i32::MAX);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}
