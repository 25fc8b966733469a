//! Ctrl-C, SIGTERM and SIGHUP: the first asks what is being done to stop, the second ends it.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

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

/// Signals that come within this time of the first are the same wish: a terminal that is closed sends
/// SIGHUP itself, and the shell in it does so, too.
const SAME: Duration = Duration::from_millis(300);

fn listen() -> Interrupter {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    let mut last: Option<Instant> = None;
    let nohup = hangup_is_ignored();
    // If there is no handler, Ctrl-C ends the program at once, as it does without this call.
    let _ = ctrlc::set_handler(move || {
        let is_same = last.is_some_and(|last| last.elapsed() < SAME);
        last = Some(Instant::now());
        if is_same {
            return;
        }
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
    if nohup {
        ignore_hangup();
    }
    interrupter
}

/// Whether the program was started by `nohup`, to outlive its terminal.
fn hangup_is_ignored() -> bool {
    #[cfg(unix)]
    {
        let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: without a new action, `sigaction` only fills in the structure that it is given.
        let filled =
            unsafe { libc::sigaction(libc::SIGHUP, std::ptr::null(), action.as_mut_ptr()) };
        // SAFETY: filled in above.
        filled == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
    }
    #[cfg(not(unix))]
    false
}

fn ignore_hangup() {
    #[cfg(unix)]
    // SAFETY: it installs no handler.
    unsafe {
        libc::signal(libc::SIGHUP, libc::SIG_IGN);
    }
}

/// Makes a limit on the size of files (`ulimit -f`) an error of the write that runs into it, as a
/// full disk is, where it would kill the program.
pub fn take_file_size_limits_as_errors() {
    #[cfg(unix)]
    // SAFETY: it installs no handler.
    unsafe {
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
    }
}
