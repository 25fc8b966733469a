//! The terminal dashboard: burn-train's in what it shows and how it is steered.
//!
//! burn-train's own renderer polls without a pause and takes a whole core, which halves training on
//! a small machine. This one sleeps until a key is pressed or a quarter of a second is over, and
//! draws only what changed.

mod curve;
mod draw;
mod keys;
pub mod scale;
pub mod state;

use std::io::{self, Write, stderr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use burn::train::Interrupter;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};

use self::keys::{Action, Keys};
use self::state::State;
use crate::{signals, terminal};

/// How long the dashboard sleeps when nothing is pressed.
const TICK: Duration = Duration::from_millis(250);
/// Least time between two drawings, whatever is pressed.
const LEAST_PAUSE: Duration = Duration::from_millis(100);
/// How often the clock is drawn when nothing else changes.
const CLOCK: Duration = Duration::from_secs(1);

/// The thread that draws; clones share it.
#[derive(Clone)]
pub struct Dashboard(Arc<Mutex<Option<JoinHandle<()>>>>);

impl Dashboard {
    /// Takes the screen and shows `state` on it; keys tell `interrupter` to stop.
    pub fn open(state: Arc<Mutex<State>>, interrupter: Interrupter) -> io::Result<Self> {
        let screen = Screen::take()?;
        let thread = std::thread::Builder::new()
            .name("dashboard".into())
            .spawn(move || watch(screen, &state, &interrupter))?;
        Ok(Self(Arc::new(Mutex::new(Some(thread)))))
    }

    /// Gives the screen back, once `state` has ended.
    pub fn close(&self) {
        const PATIENCE: Duration = Duration::from_secs(2);
        if let Some(thread) = lock(&self.0).take() {
            let start = Instant::now();
            // A terminal that takes no more characters must not keep the program.
            while !thread.is_finished() && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        terminal::give_back();
    }
}

/// Locks, also after a panic elsewhere.
pub fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What is drawn, before it is written: the terminal may be slow, and the run does not wait for it.
#[derive(Clone, Default)]
struct Drawn(Arc<Mutex<Vec<u8>>>);

impl Write for Drawn {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        lock(&self.0).write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The terminal's other screen.
struct Screen {
    terminal: Terminal<CrosstermBackend<Drawn>>,
    drawn: Drawn,
}

impl Screen {
    fn take() -> io::Result<Self> {
        #[cfg(unix)]
        crate::crash::terminal_is_taken();
        terminal::take(|| {
            // What fails here cannot be mended here.
            let _ = disable_raw_mode();
            let _ = execute!(stderr(), LeaveAlternateScreen, Show);
            #[cfg(unix)]
            crate::crash::terminal_is_given_back();
        });
        let drawn = Drawn::default();
        let terminal = enable_raw_mode()
            .and_then(|()| execute!(stderr(), EnterAlternateScreen))
            .and_then(|()| Terminal::new(CrosstermBackend::new(drawn.clone())));
        if terminal.is_err() {
            terminal::give_back();
        }
        let terminal = terminal?;
        Ok(Self { terminal, drawn })
    }

    fn draw(&mut self, state: &Mutex<State>) -> io::Result<()> {
        {
            let mut state = lock(state);
            state.changed = false;
            self.terminal.draw(|frame| draw::draw(frame, &state))?;
        }
        terminal::write(&std::mem::take(&mut *lock(&self.drawn.0)))
    }
}

/// Draws and listens until the run has ended, or the terminal is gone: the run goes on without.
fn watch(mut screen: Screen, state: &Mutex<State>, interrupter: &Interrupter) {
    let keys = Keys::open();
    let mut last = None;
    loop {
        let due = {
            let mut state = lock(state);
            if state.ended {
                break;
            }
            let stopping = interrupter.should_stop();
            state.changed |= state.stopping != stopping;
            state.stopping = stopping;
            state.changed || last.is_none_or(|last: Instant| last.elapsed() >= CLOCK)
        };
        let since = last.map_or(LEAST_PAUSE, |last| last.elapsed());
        let mut time = TICK;
        if due && since < LEAST_PAUSE {
            time = LEAST_PAUSE - since;
        } else if due {
            last = Some(Instant::now());
            if screen.draw(state).is_err() {
                break;
            }
        }
        let act = |action| act(action, &mut lock(state), interrupter);
        if keys.wait(time, || interrupter.should_stop(), act).is_err() {
            break;
        }
    }
    terminal::give_back();
}

fn act(action: Action, state: &mut State, interrupter: &Interrupter) {
    state.changed = true;
    match action {
        Action::Stop => signals::ask(interrupter),
        Action::GoOn => signals::take_back(interrupter),
        Action::Leave => signals::end(),
        Action::Select(by) => state.select(by),
        Action::SwitchHistory => state.recent = !state.recent,
        Action::Draw => {}
    }
}
