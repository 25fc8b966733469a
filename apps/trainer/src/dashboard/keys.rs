//! Keys: waiting for them, and what they mean.

use std::io;
use std::time::Duration;

use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};

/// What somebody wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Save and stop.
    Stop,
    /// Do not stop after all.
    GoOn,
    /// Leave at once.
    Leave,
    /// The plot so many places further.
    Select(isize),
    /// All of the run, or its end.
    SwitchHistory,
    /// The screen has another size.
    Draw,
}

/// The meaning of a key, while the run goes on or is `stopping`. They are burn-train's, but that `q`
/// stops at once: a stop can be taken back.
pub fn meaning(key: KeyEvent, stopping: bool) -> Option<Action> {
    if key.kind == KeyEventKind::Release {
        return None;
    }
    let control = key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        KeyCode::Char('c') if control && stopping => Some(Action::Leave),
        KeyCode::Char('c') if control => Some(Action::Stop),
        KeyCode::Char('q') if !stopping => Some(Action::Stop),
        KeyCode::Char('c') if stopping => Some(Action::GoOn),
        KeyCode::Char('k') if stopping => Some(Action::Leave),
        KeyCode::Left => Some(Action::Select(-1)),
        KeyCode::Right => Some(Action::Select(1)),
        KeyCode::Up | KeyCode::Down => Some(Action::SwitchHistory),
        _ => None,
    }
}

/// The terminal's keys.
pub struct Keys {
    #[cfg(unix)]
    tty: Option<std::os::fd::OwnedFd>,
}

impl Keys {
    /// Those that crossterm reads: stdin's, or if that is a file or a pipe, the terminal's that the
    /// program was started in.
    pub fn open() -> Self {
        Self {
            #[cfg(unix)]
            tty: open_tty().ok(),
        }
    }

    /// Waits for keys, and tells `act` what they mean; `stopping` says whether the run is.
    ///
    /// # Errors
    /// When the terminal is gone.
    pub fn wait(
        &self,
        time: Duration,
        stopping: impl Fn() -> bool,
        mut act: impl FnMut(Action),
    ) -> io::Result<()> {
        let mut time = time;
        #[cfg(unix)]
        if let Some(tty) = &self.tty {
            wait_for(tty, time)?;
            time = Duration::ZERO;
        }
        while event::poll(time)? {
            time = Duration::ZERO;
            let action = match event::read()? {
                Event::Key(key) => meaning(key, stopping()),
                Event::Resize(..) => Some(Action::Draw),
                _ => None,
            };
            action.into_iter().for_each(&mut act);
        }
        Ok(())
    }
}

#[cfg(unix)]
fn open_tty() -> io::Result<std::os::fd::OwnedFd> {
    use std::io::IsTerminal;
    use std::os::fd::AsFd;

    match io::stdin().is_terminal() {
        true => io::stdin().as_fd().try_clone_to_owned(),
        false => Ok(std::fs::File::open("/dev/tty")?.into()),
    }
}

/// Waits for something to read. When the terminal is closed, crossterm would try to read from it for
/// ever, so that it must not be asked any more.
#[cfg(unix)]
fn wait_for(tty: &std::os::fd::OwnedFd, time: Duration) -> io::Result<()> {
    use std::os::fd::AsRawFd;

    let mut polled = libc::pollfd {
        fd: tty.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    let millis = i32::try_from(time.as_millis()).unwrap_or(i32::MAX);
    // SAFETY: one structure, which outlives the call. A signal cuts the wait short, which is as good.
    unsafe { libc::poll(&mut polled, 1, millis) };
    match polled.revents & libc::POLLHUP {
        0 => Ok(()),
        _ => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_steer_as_in_burn_train() {
        let press = |code, stopping| meaning(KeyEvent::new(code, KeyModifiers::NONE), stopping);
        let control =
            |code, stopping| meaning(KeyEvent::new(code, KeyModifiers::CONTROL), stopping);
        assert_eq!(press(KeyCode::Left, false), Some(Action::Select(-1)));
        assert_eq!(press(KeyCode::Right, true), Some(Action::Select(1)));
        assert_eq!(press(KeyCode::Up, false), Some(Action::SwitchHistory));
        // stop, as `q` and then `s` do there, and what the popup offers
        assert_eq!(press(KeyCode::Char('q'), false), Some(Action::Stop));
        assert_eq!(press(KeyCode::Char('s'), true), None);
        assert_eq!(press(KeyCode::Char('q'), true), None);
        assert_eq!(press(KeyCode::Char('c'), true), Some(Action::GoOn));
        assert_eq!(press(KeyCode::Char('k'), true), Some(Action::Leave));
        // neither does anything by accident
        assert_eq!(press(KeyCode::Char('c'), false), None);
        assert_eq!(press(KeyCode::Char('k'), false), None);
        assert_eq!(control(KeyCode::Char('c'), false), Some(Action::Stop));
        assert_eq!(control(KeyCode::Char('c'), true), Some(Action::Leave));
        let mut release = KeyEvent::new(KeyCode::Char('q'), KeyModifiers::NONE);
        release.kind = KeyEventKind::Release;
        assert_eq!(meaning(release, false), None);
    }
}
