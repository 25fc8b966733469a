//! A device that fails while it computes, because its memory is full.
//!
//! Burn's backends have no other way to tell than a panic: the thread that serves the device meets
//! the failure and goes on without what could not be made, and whoever reads a result that rests on
//! it panics, too. What was in the device's memory before is still there.

use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};

/// What backends, drivers and allocators say of a memory that is full or too small.
const OF_MEMORY: [&str; 5] = [
    "out of memory",
    "out-of-memory",
    "outofmemory",
    "buffertoobig",
    "can't allocate",
];

/// A device had no memory left.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutOfMemory;

/// How many [`guarded`] runs there are.
static RUNS: AtomicUsize = AtomicUsize::new(0);
/// Whether a device has failed: every panic after that is because of it.
static FAILED: AtomicBool = AtomicBool::new(false);

/// Runs what computes on a device, and makes an error of a panic because of the device's memory, in
/// whatever thread it began; it is not told as a panic. Any other panic goes on.
///
/// # Errors
/// [`OutOfMemory`]. Of what `run` has changed, tensors that were complete before it are still good.
pub fn guarded<T>(run: impl FnOnce() -> T) -> Result<T, OutOfMemory> {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if RUNS.load(SeqCst) > 0 && is_of_memory(&info.to_string()) {
                FAILED.store(true, SeqCst);
            }
            if RUNS.load(SeqCst) == 0 || !FAILED.load(SeqCst) {
                before(info);
            }
        }));
    });
    RUNS.fetch_add(1, SeqCst);
    let done = panic::catch_unwind(AssertUnwindSafe(run));
    RUNS.fetch_sub(1, SeqCst);
    match done {
        Ok(done) => Ok(done),
        Err(_) if FAILED.load(SeqCst) => Err(OutOfMemory),
        Err(payload) => panic::resume_unwind(payload),
    }
}

fn is_of_memory(message: &str) -> bool {
    let message = message.to_lowercase();
    OF_MEMORY.iter().any(|words| message.contains(words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_of_a_full_memory_are_told_from_others() {
        for message in [
            "wgpu error: Out of Memory",
            "called `Result::unwrap()` on an `Err` value: can't allocate buffer of size: 9",
            "CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\"",
            "An out-of-memory error happened during launch",
        ] {
            assert!(is_of_memory(message), "{message}");
        }
        for message in [
            "index out of bounds",
            "called `Option::unwrap()` on a `None` value",
        ] {
            assert!(!is_of_memory(message), "{message}");
        }
    }

    #[test]
    fn only_a_panic_because_of_memory_becomes_an_error() {
        assert_eq!(guarded(|| 7), Ok(7));
        let other = panic::catch_unwind(|| guarded(|| panic!("a bug")));
        assert!(other.is_err());
        let in_its_thread = || {
            let device = std::thread::spawn(|| panic!("the device is out of memory"));
            device.join().expect("a result")
        };
        assert_eq!(guarded(in_its_thread), Err(OutOfMemory));
    }
}
