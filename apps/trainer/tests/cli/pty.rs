//! The program in a terminal.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

/// Longer than anything takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A terminal with a program in it.
pub struct Pty {
    child: Child,
    /// The side of whoever looks and types.
    user: Arc<File>,
    /// The side of the program.
    tty: File,
    written: Receiver<Vec<u8>>,
    /// All that has been written.
    seen: String,
    /// Where the next search begins.
    at: usize,
    settings: [libc::tcflag_t; 4],
}

impl Pty {
    pub fn open(mut command: Command, columns: u16, rows: u16) -> Self {
        let (mut user, mut tty) = (-1, -1);
        let none = std::ptr::null_mut();
        // SAFETY: `openpty` writes two descriptors, which nobody else has.
        let (user, tty) = unsafe {
            let opened = libc::openpty(&mut user, &mut tty, none, none.cast(), none.cast());
            assert_eq!(opened, 0);
            // or the program would keep its own terminal from being closed
            libc::fcntl(user, libc::F_SETFD, libc::FD_CLOEXEC);
            libc::fcntl(tty, libc::F_SETFD, libc::FD_CLOEXEC);
            (File::from_raw_fd(user), File::from_raw_fd(tty))
        };
        resize(&user, columns, rows);
        for stream in [Command::stdin, Command::stdout, Command::stderr] {
            stream(&mut command, tty.try_clone().unwrap());
        }
        command.env("TERM", "xterm-256color");
        // SAFETY: both calls are allowed between fork and exec.
        unsafe {
            command.pre_exec(|| {
                libc::setsid();
                libc::ioctl(0, libc::TIOCSCTTY as _, 0);
                Ok(())
            });
        }
        let settings = settings(&tty);
        let child = command.spawn().unwrap();
        let user = Arc::new(user);
        let (sender, written) = channel();
        let looking = Arc::downgrade(&user);
        std::thread::spawn(move || {
            while let Some(bytes) = looking.upgrade().and_then(|user| look(&user)) {
                if sender.send(bytes).is_err() {
                    break;
                }
            }
        });
        Self {
            child,
            user,
            tty,
            written,
            seen: String::new(),
            at: 0,
            settings,
        }
    }

    /// Waits until the program has written this, after what was waited for before. What is drawn
    /// comes word by word: spaces that are there already are not written again.
    #[track_caller]
    pub fn waits_for(&mut self, text: &str) {
        self.reads_until(text, |new| new.contains(text));
        self.at += self.seen[self.at..].find(text).unwrap() + text.len();
    }

    /// Waits for so many bytes after what was waited for before.
    #[track_caller]
    pub fn waits_for_bytes(&mut self, count: usize) {
        self.reads_until("enough", |new| new.len() >= count);
    }

    #[track_caller]
    fn reads_until(&mut self, what: &str, enough: impl Fn(&str) -> bool) {
        let start = Instant::now();
        while !enough(&self.seen[self.at..]) {
            match self.written.recv() {
                Ok(bytes) if start.elapsed() < PATIENCE => {
                    self.seen += &String::from_utf8_lossy(&bytes);
                }
                _ => panic!("{what:?} was never written: {}", self.seen),
            }
        }
    }

    pub fn types(&mut self, keys: &str) {
        (&*self.user).write_all(keys.as_bytes()).unwrap();
    }

    pub fn resizes(&mut self, columns: u16, rows: u16) {
        resize(&self.user, columns, rows);
    }

    pub fn kills(&mut self, signal: i32) {
        let pid = i32::try_from(self.child.id()).unwrap();
        // SAFETY: `kill` only sends a signal, to a child that has not been waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Closes the terminal, and waits for the end of the program.
    pub fn hangs_up(self) -> Option<i32> {
        let mut child = self.child;
        drop((self.user, self.tty));
        child.wait().unwrap().code()
    }

    /// The exit code, and all that was written. The terminal must be as it was found.
    #[track_caller]
    pub fn ends(mut self) -> (Option<i32>, String) {
        let code = self.child.wait().unwrap().code();
        let settings = settings(&self.tty);
        drop(self.tty); // the last of the program's side, so that reading ends
        while let Ok(bytes) = self.written.recv() {
            self.seen += &String::from_utf8_lossy(&bytes);
        }
        let seen = self.seen;
        assert_eq!(settings, self.settings, "{seen}");
        // the other screen, the cursor and bracketed paste
        for [on, off] in [
            ["\x1b[?1049h", "\x1b[?1049l"],
            ["\x1b[?25l", "\x1b[?25h"],
            ["\x1b[?2004h", "\x1b[?2004l"],
        ] {
            assert!(
                seen.rfind(on) <= seen.rfind(off),
                "{on:?} is left on: {seen}"
            );
        }
        (code, seen)
    }
}

/// What is written within a moment; `None` when the program has closed its side.
fn look(user: &File) -> Option<Vec<u8>> {
    let mut polled = libc::pollfd {
        fd: user.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one structure, which outlives the call.
    if unsafe { libc::poll(&mut polled, 1, 50) } == 0 {
        return Some(Vec::new());
    }
    let mut buffer = [0; 4096];
    let mut user = user;
    let count = user.read(&mut buffer).ok()?;
    (count > 0).then(|| buffer[..count].to_vec())
}

fn resize(user: &File, columns: u16, rows: u16) {
    let size = libc::winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCSWINSZ reads the structure that it is given.
    assert_eq!(
        unsafe { libc::ioctl(user.as_raw_fd(), libc::TIOCSWINSZ, &size) },
        0
    );
}

fn settings(tty: &File) -> [libc::tcflag_t; 4] {
    let mut settings = std::mem::MaybeUninit::<libc::termios>::zeroed();
    // SAFETY: `tcgetattr` fills in the structure that it is given.
    let settings = unsafe {
        assert_eq!(libc::tcgetattr(tty.as_raw_fd(), settings.as_mut_ptr()), 0);
        settings.assume_init()
    };
    [
        settings.c_iflag,
        settings.c_oflag,
        settings.c_cflag,
        settings.c_lflag,
    ]
}
