//! Ctrl-C, SIGTERM and SIGHUP: the first asks what is being done to stop, the second ends it.

use std::io::{self, IsTerminal};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Result;
use burn::train::Interrupter;
use serde_json::json;

use crate::output::Output;
use crate::{output, terminal};

/// Exit code of an interrupted program.
pub const INTERRUPTED: u8 = 130;

static INTERRUPTER: OnceLock<Interrupter> = OnceLock::new();
/// What Ctrl-C says.
static ANSWER: Mutex<&str> = Mutex::new("");
/// Whether the next signal ends the program.
static ASKED: AtomicBool = AtomicBool::new(false);
/// Whether only Ctrl-C may ask, and other signals end the program.
static OTHERS_END: AtomicBool = AtomicBool::new(false);
/// Whether the terminal was closed.
static HUNG_UP: AtomicBool = AtomicBool::new(false);
/// What is done and said before the program ends at once.
static FAREWELL: Mutex<Option<Box<dyn FnOnce() + Send>>> = Mutex::new(None);

/// The handle that Ctrl-C sets; `answer` is what it then says.
fn interrupter(answer: &'static str) -> Interrupter {
    *ANSWER.lock().unwrap_or_else(PoisonError::into_inner) = answer;
    INTERRUPTER.get_or_init(listen).clone()
}

/// From now on every signal ends the program, but Ctrl-C in [`interruptible`].
pub fn end_at_once() {
    interrupter("");
    ASKED.store(true, Ordering::Relaxed);
    OTHERS_END.store(true, Ordering::Relaxed);
}

/// From now on every signal ends the program, which says that it was interrupted.
pub fn end_and_say_so(output: &Output) {
    let output = *output;
    at_once(move || {
        let _ = interrupted(&output); // who is not there any more needs no answer
    });
    end_at_once();
}

/// From now on the first signal only asks for a stop again, and says `answer`.
pub fn ask_first(answer: &'static str) -> Interrupter {
    let interrupter = interrupter(answer);
    take_back(&interrupter);
    OTHERS_END.store(false, Ordering::Relaxed);
    interrupter
}

/// What the program does and says when it ends at once, in place of what it was told before. It may
/// take a moment and no more.
pub fn at_once(farewell: impl FnOnce() + Send + 'static) {
    let mut place = FAREWELL.lock().unwrap_or_else(PoisonError::into_inner);
    *place = Some(Box::new(farewell));
}

/// There is nothing any more to say when the program ends at once.
pub fn no_farewell() {
    drop(farewell());
}

fn farewell() -> Option<Box<dyn FnOnce() + Send>> {
    let mut place = FAREWELL.lock().unwrap_or_else(PoisonError::into_inner);
    place.take()
}

/// Does something that the first Ctrl-C stops and that the program outlives.
pub fn interruptible<T>(work: impl FnOnce(&Interrupter) -> T) -> T {
    let interrupter = interrupter("");
    take_back(&interrupter);
    let result = work(&interrupter);
    ASKED.store(true, Ordering::Relaxed);
    result
}

/// The end of a command that was interrupted and leaves nothing behind.
pub fn interrupted(output: &Output) -> Result<ExitCode> {
    output.result(&json!({"interrupted": true}), "interrupted")?;
    Ok(ExitCode::from(INTERRUPTED))
}

/// From now on a signal ends the program at once, during a transfer that the same command goes on
/// with: `left` says what there is of it.
pub fn end_transfer(output: &Output, left: String) {
    let output = *output;
    at_once(move || {
        if io::stderr().is_terminal() {
            output::log(""); // below the bar of what is on its way
        }
        output::log(format_args!(
            "interrupted: {left}; give the same command to go on"
        ));
        let _ = output.result(&json!({"interrupted": true}), "interrupted");
    });
    end_at_once();
}

/// A signal. Those that come within a moment of each other are the same wish: a terminal that is closed
/// sends SIGHUP itself, and the shell in it does so, too.
fn hear(interrupter: &Interrupter) {
    const MOMENT: Duration = Duration::from_millis(300);
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let now = Instant::now();
    let last = LAST
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .replace(now);
    if last.is_none_or(|last| now - last >= MOMENT) {
        ask(interrupter);
    }
}

/// What Ctrl-C does, by key or by signal: the first asks, the second ends the program.
pub fn ask(interrupter: &Interrupter) {
    if ASKED.swap(true, Ordering::Relaxed) {
        end();
    }
    let answer = *ANSWER.lock().unwrap_or_else(PoisonError::into_inner);
    if !answer.is_empty() && !terminal::is_taken() {
        output::log(answer);
    }
    interrupter.stop(Some("interrupted"));
}

/// Nobody has asked for a stop.
pub fn take_back(interrupter: &Interrupter) {
    interrupter.reset();
    ASKED.store(false, Ordering::Relaxed);
}

/// Whether nobody is there any more to read what is written.
pub fn hung_up() -> bool {
    HUNG_UP.load(Ordering::Relaxed)
}

/// Ends the program at once, after its farewell.
pub fn end() -> ! {
    /// For a farewell: a terminal that takes no more characters must not keep the program.
    const PATIENCE: Duration = Duration::from_secs(3);
    terminal::give_back();
    if let Some(farewell) = farewell() {
        let (sender, said) = channel();
        let thread = std::thread::Builder::new().name("farewell".into());
        let thread = thread.spawn(move || {
            // What else is going on says nothing any more: it waits for these.
            let _others_wait = (io::stdout().lock(), io::stderr().lock());
            farewell();
            let _ = sender.send(());
            loop {
                std::thread::park();
            }
        });
        if thread.is_ok() {
            let _ = said.recv_timeout(PATIENCE);
        }
    }
    std::process::exit(i32::from(INTERRUPTED));
}

fn listen() -> Interrupter {
    let interrupter = Interrupter::new();
    let handle = interrupter.clone();
    // If there is no handler, Ctrl-C ends the program at once, as it does without this call.
    let _ = ctrlc::set_handler(move || hear(&handle));
    #[cfg(unix)]
    listen_to_others(interrupter.clone());
    interrupter
}

/// The signals of `kill`, and of a terminal that is closed unless `nohup` says to go on.
#[cfg(unix)]
fn listen_to_others(interrupter: Interrupter) {
    let wanted = [libc::SIGTERM, libc::SIGHUP];
    let wanted = wanted.into_iter().filter(|signal| !is_ignored(*signal));
    // As above, without a listener these signals end the program.
    let Ok(mut signals) = signal_hook::iterator::Signals::new(wanted) else {
        return;
    };
    let _ = std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            for signal in signals.forever() {
                HUNG_UP.fetch_or(signal == libc::SIGHUP, Ordering::Relaxed);
                match OTHERS_END.load(Ordering::Relaxed) {
                    true => end(),
                    false => hear(&interrupter),
                }
            }
        });
}

#[cfg(unix)]
fn is_ignored(signal: i32) -> bool {
    let mut action = std::mem::MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: without a new action, `sigaction` only fills in the present one.
    let filled = unsafe { libc::sigaction(signal, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: filled in above.
    filled == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
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
