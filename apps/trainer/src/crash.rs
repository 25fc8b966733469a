//! The end of a program that is broken off: memory that the system refuses aborts it, without a panic.

use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use libc::{STDERR_FILENO, STDOUT_FILENO, c_int};

use crate::output::Output;

const ERROR: &str = "the program was broken off, most likely for lack of memory";
const HELP: &str = "`trainer plan` says what takes memory and what saves it; a run goes on from its \
                    newest checkpoint with: trainer train --resume RUN";

/// The settings of stderr's terminal from before the dashboard took it; null if it has not.
static SETTINGS: AtomicPtr<libc::termios> = AtomicPtr::new(null_mut());
/// Whether results are JSON.
static JSON: AtomicBool = AtomicBool::new(false);

/// Makes an abort an error that says what to do, and that leaves the terminal as it was found.
pub fn tell_aborts(output: &Output) {
    JSON.store(output.json, Ordering::Relaxed);
    let handler = broke_off as extern "C" fn(c_int);
    // SAFETY: the handler calls only what may be called in one.
    unsafe {
        libc::signal(libc::SIGABRT, handler as libc::sighandler_t);
    }
}

/// The dashboard is about to take the terminal.
pub fn terminal_is_taken() {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: `tcgetattr` fills in the structure that it is given.
    let filled = unsafe { libc::tcgetattr(STDERR_FILENO, settings.as_mut_ptr()) };
    if filled == 0 {
        // SAFETY: filled in above. Never freed: a handler may be reading it.
        let settings = Box::leak(Box::new(unsafe { settings.assume_init() }));
        SETTINGS.store(settings, Ordering::SeqCst);
    }
}

/// The terminal is as it was.
pub fn terminal_is_given_back() {
    SETTINGS.store(null_mut(), Ordering::SeqCst);
}

extern "C" fn broke_off(_: c_int) {
    let settings = SETTINGS.swap(null_mut(), Ordering::SeqCst);
    if !settings.is_null() {
        // SAFETY: `tcsetattr` may be called in a handler, and only reads the settings.
        unsafe { libc::tcsetattr(STDERR_FILENO, libc::TCSANOW, settings) };
        put(STDERR_FILENO, &["\x1b[?1049l\x1b[?25h"]);
    }
    put(STDERR_FILENO, &["error: ", ERROR, "\nhelp: ", HELP, "\n"]);
    if JSON.load(Ordering::Relaxed) {
        let parts = [
            "{\"error\":\"",
            ERROR,
            "\",\"causes\":[],\"help\":\"",
            HELP,
            "\"}\n",
        ];
        put(STDOUT_FILENO, &parts);
    }
    // SAFETY: it may be called in a handler.
    unsafe { libc::_exit(1) }
}

fn put(to: c_int, parts: &[&str]) {
    for part in parts {
        // SAFETY: `write` may be called in a handler. What fails here cannot be mended here.
        unsafe { libc::write(to, part.as_ptr().cast(), part.len()) };
    }
}
