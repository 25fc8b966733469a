//! What the program changes about the terminal, and how that is undone on every way out.

use std::io::{self, Write, stderr};
use std::sync::{Mutex, MutexGuard, Once, TryLockError};
use std::time::Duration;

/// Leaves the terminal as it was found.
type Undo = Box<dyn FnOnce() + Send>;

/// Set while the terminal is changed.
static TAKEN: Mutex<Option<Undo>> = Mutex::new(None);

/// Notes how to undo what is about to be done to the terminal. A panic undoes it, too, in whatever
/// thread it happens.
pub fn take(undo: impl FnOnce() + Send + 'static) {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            give_back();
            before(info);
        }));
    });
    if let Some(mut taken) = taken() {
        *taken = Some(Box::new(undo));
    }
}

/// Leaves the terminal as it was found; does nothing if it was not taken.
pub fn give_back() {
    // Held until it is done: another thread may be about to end the program.
    if let Some(mut taken) = taken()
        && let Some(undo) = taken.take()
    {
        undo();
    }
}

/// Forgets what there was to undo: it has been undone.
fn release() {
    if let Some(mut taken) = taken() {
        *taken = None;
    }
}

/// Whether lines would spoil what is on the screen.
pub fn is_taken() -> bool {
    taken().is_none_or(|taken| taken.is_some())
}

/// Writes to stderr if the terminal is still taken, and fails if it is not.
pub fn write(bytes: &[u8]) -> io::Result<()> {
    let taken = taken().filter(|taken| taken.is_some());
    let _taken = taken.ok_or_else(|| io::Error::other("the terminal was given back"))?;
    let mut stderr = stderr().lock();
    stderr.write_all(bytes)?;
    stderr.flush()
}

/// The lock, or nothing if a terminal that takes no more characters holds a writer up: the program
/// must be able to end all the same.
fn taken() -> Option<MutexGuard<'static, Option<Undo>>> {
    const TRIES: usize = 50;
    for _ in 0..TRIES {
        match TAKEN.try_lock() {
            Ok(taken) => return Some(taken),
            Err(TryLockError::Poisoned(error)) => return Some(error.into_inner()),
            Err(TryLockError::WouldBlock) => std::thread::sleep(Duration::from_millis(10)),
        }
    }
    None
}

/// Runs an editor of lines, which changes the terminal and undoes it itself, unless the program
/// ends meanwhile.
pub fn while_editing<T>(edit: impl FnOnce() -> T) -> T {
    #[cfg(unix)]
    if let Some(undo) = undo_editing() {
        take(undo);
    }
    let result = edit();
    release();
    result
}

/// Puts stdin's settings back to what they are now, and ends bracketed paste.
#[cfg(unix)]
fn undo_editing() -> Option<impl FnOnce() + Send + use<>> {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: `tcgetattr` fills in the structure that it is given.
    let filled = unsafe { libc::tcgetattr(libc::STDIN_FILENO, settings.as_mut_ptr()) };
    // SAFETY: filled in above.
    let settings = (filled == 0).then(|| unsafe { settings.assume_init() })?;
    Some(move || {
        // SAFETY: `tcsetattr` only reads the structure.
        unsafe { libc::tcsetattr(libc::STDIN_FILENO, libc::TCSADRAIN, &settings) };
        let mut stdout = io::stdout();
        // What fails here cannot be mended here.
        let _ = stdout
            .write_all(b"\x1b[?2004l\n")
            .and_then(|()| stdout.flush());
    })
}
