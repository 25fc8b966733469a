//! Ctrl-C and SIGTERM: the first asks the run to save and stop, the second ends it.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::train::Interrupter;

use crate::{dashboard, output};

/// Exit code of an interrupted program.
pub const INTERRUPTED: u8 = 130;

static INTERRUPTER: OnceLock<Interrupter> = OnceLock::new();

/// The handle that Ctrl-C sets.
pub fn interrupter() -> Interrupter {
    INTERRUPTER.get_or_init(listen).clone()
}

fn listen() -> Interrupter {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    let asked = AtomicBool::new(false);
    // If there is no handler, Ctrl-C ends the program at once, as it does without this call.
    let _ = ctrlc::set_handler(move || {
        if asked.swap(true, Ordering::Relaxed) {
            dashboard::give_screen_back();
            std::process::exit(i32::from(INTERRUPTED));
        }
        if !dashboard::has_screen() {
            output::log("saving and stopping after this step (again: at once, unsaved)");
        }
        handle.stop(Some("interrupted"));
    });
    interrupter
}
