//! Ctrl-C and SIGTERM: the first asks what is being done to stop, the second ends it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};

use anyhow::Result;
use burn::train::Interrupter;
use serde_json::json;

use crate::output::Output;
use crate::{dashboard, output};

/// Exit code of an interrupted program.
pub const INTERRUPTED: u8 = 130;

static INTERRUPTER: OnceLock<Interrupter> = OnceLock::new();
/// What Ctrl-C says.
static ANSWER: Mutex<&str> = Mutex::new("");
/// Whether the next Ctrl-C ends the program.
static ASKED: AtomicBool = AtomicBool::new(false);

/// The handle that Ctrl-C sets; `answer` is what it then says.
pub fn interrupter(answer: &'static str) -> Interrupter {
    *ANSWER.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    INTERRUPTER.get_or_init(listen).clone()
}

/// From now on Ctrl-C ends the program, except in [`interruptible`].
pub fn end_at_once() {
    interrupter("");
    ASKED.store(true, Ordering::Relaxed);
}

/// Does something that the first Ctrl-C stops and that the program outlives.
pub fn interruptible<T>(work: impl FnOnce(&Interrupter) -> T) -> T {
    let interrupter = interrupter("");
    interrupter.reset();
    ASKED.store(false, Ordering::Relaxed);
    let result = work(&interrupter);
    ASKED.store(true, Ordering::Relaxed);
    result
}

/// The end of a command that was interrupted and leaves nothing behind.
pub fn interrupted(output: &Output) -> Result<ExitCode> {
    output.result(&json!({"interrupted": true}), "interrupted")?;
    Ok(ExitCode::from(INTERRUPTED))
}

fn listen() -> Interrupter {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    // If there is no handler, Ctrl-C ends the program at once, as it does without this call.
    let _ = ctrlc::set_handler(move || {
        if ASKED.swap(true, Ordering::Relaxed) {
            dashboard::give_screen_back();
            std::process::exit(i32::from(INTERRUPTED));
        }
        let answer = *ANSWER.lock().unwrap_or_else(PoisonError::into_inner);
        if !answer.is_empty() && !dashboard::has_screen() {
            output::log(answer);
        }
        handle.stop(Some("interrupted"));
    });
    interrupter
}
