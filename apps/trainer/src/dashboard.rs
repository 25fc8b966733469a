//! The terminal dashboard: burn-train's in what it shows and how it is steered.
//!
//! burn-train's own renderer polls without a pause and takes a whole core, which halves training on
//! a small machine. This one sleeps until a key is pressed or a quarter of a second is over, and
//! draws only what changed.

use std::collections::VecDeque;
use std::io::{Stderr, stderr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use burn::train::Interrupter;
use ratatui::Terminal;
use ratatui::backend::CrosstermBackend;
use ratatui::crossterm::cursor::Show;
use ratatui::crossterm::event::{self, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::execute;
use ratatui::crossterm::terminal::{
    EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode, enable_raw_mode,
};
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::Line;
use ratatui::widgets::{Axis, Block, Chart, Dataset, Gauge, GraphType, Paragraph};
use train::run_folder::{Line as Metrics, peak_memory_bytes};

use crate::renderer::duration;
use crate::signals;

/// How long the dashboard sleeps when nothing is pressed.
const TICK: Duration = Duration::from_millis(250);
/// Messages that stay on the screen.
const MESSAGES: usize = 3;

/// A handle on the dashboard; clones share it.
#[derive(Clone)]
pub struct Dashboard {
    state: Arc<Mutex<State>>,
    thread: Arc<Mutex<Option<JoinHandle<()>>>>,
}

/// One plotted number.
struct Series {
    name: String,
    /// Of each step.
    train: Vec<(f64, f64)>,
    /// Of each evaluation.
    eval: Vec<(f64, f64)>,
}

#[derive(Default)]
struct State {
    title: String,
    series: Vec<Series>,
    selected: usize,
    step: usize,
    total: usize,
    /// What goes on beside steps.
    status: String,
    first: Option<(Instant, usize)>,
    messages: VecDeque<String>,
    changed: bool,
    ended: bool,
}

impl Dashboard {
    /// Takes the screen; `q` and Ctrl-C tell `interrupter` to stop.
    pub fn open(title: String, interrupter: Interrupter) -> std::io::Result<Self> {
        let terminal = take_screen()?;
        let state = Arc::new(Mutex::new(State {
            title,
            changed: true,
            ..State::default()
        }));
        let shared = state.clone();
        let thread = std::thread::Builder::new()
            .name("dashboard".into())
            .spawn(move || watch(terminal, &shared, &interrupter))?;
        Ok(Self {
            state,
            thread: Arc::new(Mutex::new(Some(thread))),
        })
    }

    fn change(&self) -> MutexGuard<'_, State> {
        let mut state = lock(&self.state);
        state.changed = true;
        state
    }

    /// Begins with a run of `total` steps, of which those in `past` have been taken.
    pub fn begin(&self, past: &[Metrics], total: usize) {
        self.change().begin(past, total);
    }

    /// A step's value of a metric; it belongs to the step that [`Dashboard::progress`] tells next.
    pub fn train_value(&self, name: &str, value: f64) {
        let mut state = self.change();
        let step = state.step as f64 + 1.0;
        state.series(name).train.push((step, value));
    }

    /// An evaluation's loss.
    pub fn eval_loss(&self, step: usize, loss: f64) {
        self.change().series("Loss").eval.push((step as f64, loss));
    }

    /// How far the run is.
    pub fn progress(&self, step: usize, total: usize) {
        let mut state = self.change();
        (state.step, state.total) = (step, total);
        state.status.clear();
        state.first.get_or_insert((Instant::now(), step));
    }

    /// Says what goes on until the next step.
    pub fn status(&self, text: String) {
        self.change().status = text;
    }

    /// Shows a message.
    pub fn message(&self, text: String) {
        self.change().say(text);
    }

    /// Gives the screen back.
    pub fn close(&self) {
        lock(&self.state).ended = true;
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join(); // a panic there has been reported already
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn begin(&mut self, past: &[Metrics], total: usize) {
        self.total = total;
        for line in past {
            match *line {
                Metrics::Train {
                    step,
                    loss,
                    lr,
                    grad_norm,
                    tokens_per_second,
                    ..
                } => {
                    for (name, value) in [
                        ("Loss", loss),
                        ("Learning rate", lr),
                        ("Gradient norm", grad_norm),
                        ("Tokens/s", tokens_per_second),
                    ] {
                        self.series(name).train.push((step as f64, value));
                    }
                    self.step = step;
                }
                Metrics::Eval { step, loss, .. } => {
                    self.series("Loss").eval.push((step as f64, loss))
                }
                Metrics::Skipped { step, .. } => self.step = step,
            }
        }
    }

    fn series(&mut self, name: &str) -> &mut Series {
        let found = self.series.iter().position(|series| series.name == name);
        let index = found.unwrap_or_else(|| {
            self.series.push(Series {
                name: name.to_owned(),
                train: Vec::new(),
                eval: Vec::new(),
            });
            self.series.len() - 1
        });
        &mut self.series[index]
    }

    /// Shows a message below the others, of which the oldest makes room.
    fn say(&mut self, text: String) {
        self.messages.push_back(text);
        if self.messages.len() > MESSAGES {
            self.messages.pop_front();
        }
    }

    fn select(&mut self, by: isize) {
        let count = self.series.len().max(1) as isize;
        self.selected = (self.selected as isize + by).rem_euclid(count) as usize;
        self.changed = true;
    }

    /// Time since the first step, and the time left at the same rate.
    fn times(&self) -> Option<(Duration, Duration)> {
        let (since, first) = self.first?;
        let taken = self.step.checked_sub(first).filter(|taken| *taken > 0)?;
        let elapsed = since.elapsed();
        Some((
            elapsed,
            elapsed.mul_f64((self.total - self.step) as f64 / taken as f64),
        ))
    }
}

type Screen = Terminal<CrosstermBackend<Stderr>>;

fn take_screen() -> std::io::Result<Screen> {
    let before = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        give_screen_back();
        before(info);
    }));
    TAKEN.store(true, Ordering::Relaxed);
    let screen = enable_raw_mode()
        .and_then(|()| execute!(stderr(), EnterAlternateScreen))
        .and_then(|()| Terminal::new(CrosstermBackend::new(stderr())));
    if screen.is_err() {
        give_screen_back();
    }
    screen
}

/// Whether the screen is the dashboard's.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Leaves the terminal as it was found; does nothing if it was not taken.
pub fn give_screen_back() {
    if TAKEN.swap(false, Ordering::Relaxed) {
        // What fails here cannot be mended here, and the program goes on or ends all the same.
        let _ = disable_raw_mode();
        let _ = execute!(stderr(), LeaveAlternateScreen, Show);
    }
}

/// Whether messages would be drawn over.
pub fn has_screen() -> bool {
    TAKEN.load(Ordering::Relaxed)
}

/// Draws and listens until the run has ended.
fn watch(mut screen: Screen, state: &Mutex<State>, interrupter: &Interrupter) {
    loop {
        {
            let mut state = lock(state);
            if state.ended {
                break;
            }
            if std::mem::take(&mut state.changed)
                && screen.draw(|frame| draw(frame, &state)).is_err()
            {
                break; // the terminal is gone; the run goes on
            }
        }
        match event::poll(TICK) {
            Ok(true) => match event::read() {
                Ok(event::Event::Key(key)) => on_key(key, state, interrupter),
                Ok(event::Event::Resize(..)) => lock(state).changed = true,
                Ok(_) => {}
                Err(_) => break,
            },
            Ok(false) => {}
            Err(_) => break,
        }
    }
    give_screen_back();
}

fn on_key(key: KeyEvent, state: &Mutex<State>, interrupter: &Interrupter) {
    if key.kind != KeyEventKind::Press {
        return;
    }
    let ctrl_c = key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    match key.code {
        _ if ctrl_c && interrupter.should_stop() => {
            give_screen_back();
            std::process::exit(i32::from(signals::INTERRUPTED));
        }
        KeyCode::Char('q') | KeyCode::Char('c') if ctrl_c || key.code == KeyCode::Char('q') => {
            interrupter.stop(Some("interrupted"));
            let mut state = lock(state);
            state.say("saving and stopping (Ctrl-C again: at once, unsaved)".into());
            state.changed = true;
        }
        KeyCode::Left => lock(state).select(-1),
        KeyCode::Right => lock(state).select(1),
        _ => {}
    }
}

fn draw(frame: &mut ratatui::Frame, state: &State) {
    let [head, body, messages, gauge] = Layout::vertical([
        Constraint::Length(1),
        Constraint::Min(8),
        Constraint::Length(MESSAGES as u16),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    let [numbers, plot] =
        Layout::horizontal([Constraint::Length(36), Constraint::Min(20)]).areas(body);

    let keys = "  q save and stop   ← → plot".dark_gray();
    frame.render_widget(Line::from(vec![state.title.as_str().bold(), keys]), head);
    draw_numbers(frame, numbers, state);
    if let Some(series) = state.series.get(state.selected) {
        draw_plot(frame, plot, series);
    }
    let lines: Vec<Line> = state
        .messages
        .iter()
        .map(|text| Line::from(text.as_str()))
        .collect();
    frame.render_widget(Paragraph::new(lines), messages);
    let ratio = state.step as f64 / state.total.max(1) as f64;
    let label = format!("step {}/{}  {}", state.step, state.total, state.status);
    let bar = Gauge::default().ratio(ratio.clamp(0.0, 1.0)).label(label);
    frame.render_widget(bar.gauge_style(Style::new().fg(Color::Cyan)), gauge);
}

fn draw_numbers(frame: &mut ratatui::Frame, area: Rect, state: &State) {
    let mut lines = Vec::new();
    for series in &state.series {
        if let Some((_, value)) = series.train.last() {
            lines.push(format!("{:14} {}", series.name, number(*value)));
        }
        if let Some((step, value)) = series.eval.last() {
            lines.push(format!(
                "{:14} {} (step {step})",
                "  evaluation",
                number(*value)
            ));
        }
    }
    let peak = peak_memory_bytes() as f64 / (1u64 << 20) as f64;
    lines.push(format!("{:14} {peak:.0} MiB at most", "Memory"));
    if let Some((elapsed, left)) = state.times() {
        lines.push(format!("{:14} {}", "Time", duration(elapsed)));
        lines.push(format!("{:14} {}", "Time left", duration(left)));
    }
    let text: Vec<Line> = lines.into_iter().map(Line::from).collect();
    frame.render_widget(
        Paragraph::new(text).block(Block::bordered().title("Metrics")),
        area,
    );
}

fn draw_plot(frame: &mut ratatui::Frame, area: Rect, series: &Series) {
    let points = || series.train.iter().chain(&series.eval);
    let finite = || points().filter(|(_, y)| y.is_finite());
    let low = finite().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = finite().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    let last = points().map(|(x, _)| *x).fold(1.0, f64::max);
    let scale = match series.name.as_str() {
        "Learning rate" => Scale::linear(low, high), // its schedule is known by its shape
        _ => Scale::new(low, high),
    };
    let on_scale = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|(x, y)| (*x, scale.place(*y))).collect()
    };
    let (train, eval) = (on_scale(&series.train), on_scale(&series.eval));
    let lines = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::new().fg(Color::Cyan))
        .data(&train);
    let dots = Dataset::default()
        .marker(Marker::Dot)
        .style(Style::new().fg(Color::Yellow))
        .data(&eval);
    let x = Axis::default()
        .bounds([0.0, last])
        .labels(["0".to_owned(), format!("{last:.0}")]);
    let y = Axis::default()
        .bounds([0.0, 1.0])
        .labels([0.0, 0.5, 1.0].map(|at| number(scale.value(at))));
    let mut title = vec![series.name.as_str().into(), " training".cyan()];
    if !eval.is_empty() {
        title.push(" • evaluation".yellow());
    }
    if let Scale::Log { .. } = scale {
        title.push(" (logarithmic)".into());
    }
    let chart = Chart::new(vec![lines, dots]).x_axis(x).y_axis(y);
    let block = Block::bordered().title(Line::from(title));
    frame.render_widget(chart.block(block), area);
}

/// Where a value stands between the bottom (0) and the top (1) of a plot.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Scale {
    Linear {
        low: f64,
        high: f64,
    },
    /// The same with logarithms.
    Log {
        low: f64,
        high: f64,
    },
}

impl Scale {
    /// Above this ratio of its ends, a linear plot would show little but its largest values.
    const LARGEST_LINEAR: f64 = 50.0;

    /// The scale for values from `low` to `high`.
    fn new(low: f64, high: f64) -> Self {
        if low > 0.0 && high > Self::LARGEST_LINEAR * low {
            let (low, high) = (low.ln(), high.ln());
            return Self::Log { low, high };
        }
        Self::linear(low, high)
    }

    fn linear(low: f64, high: f64) -> Self {
        match low < high {
            true => Self::Linear { low, high },
            // a level line, in the middle
            false if low.is_finite() && low != 0.0 => {
                let half = low.abs() / 2.0;
                let (low, high) = (low - half, low + half);
                Self::Linear { low, high }
            }
            false => Self::Linear {
                low: -1.0,
                high: 1.0,
            },
        }
    }

    fn place(&self, value: f64) -> f64 {
        match self {
            Self::Linear { low, high } => (value - low) / (high - low),
            Self::Log { low, high } => (value.ln() - low) / (high - low),
        }
    }

    fn value(&self, place: f64) -> f64 {
        match self {
            Self::Linear { low, high } => low + place * (high - low),
            Self::Log { low, high } => (low + place * (high - low)).exp(),
        }
    }
}

/// Four significant digits, small numbers with an exponent.
fn number(value: f64) -> String {
    match value.abs() {
        x if x != 0.0 && x < 1e-2 => format!("{value:.3e}"),
        x if x >= 1000.0 => format!("{value:.0}"),
        _ => format!("{value:.4}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ratatui::backend::TestBackend;

    /// The screen as text.
    fn screen(width: u16, height: u16, state: &State) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, state)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows = buffer.content().chunks(usize::from(width));
        rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>() + "\n")
            .collect()
    }

    fn filled() -> State {
        let mut state = State {
            title: "runs/mine".into(),
            step: 3,
            total: 10,
            ..State::default()
        };
        for (step, loss) in [(1.0, 2.5), (2.0, 1.5), (3.0, 1.25)] {
            state.series("Loss").train.push((step, loss));
            state.series("Learning rate").train.push((step, 2e-4));
        }
        state.series("Loss").eval.push((3.0, 1.75));
        state.messages.push_back("step 3  eval loss 1.7500".into());
        state
    }

    #[test]
    fn all_that_matters_fits_on_80_by_24() {
        let text = screen(80, 24, &filled());
        for part in [
            "runs/mine",
            "save and stop",
            "1.2500",
            "1.7500 (step 3)",
            "2.000e-4",
            "Memory",
            "step 3  eval loss",
            "step 3/10",
            "training",
            "• evaluation",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }

    #[test]
    fn a_run_that_goes_on_shows_what_was_before() {
        let step = |step: usize| Metrics::Train {
            step,
            epoch: 1.0,
            loss: 2.0 / step as f64,
            lr: 1e-4,
            grad_norm: 0.5,
            tokens: 10,
            tokens_per_second: 321.0,
            peak_memory_bytes: 0,
            seconds: 0.1,
            spike: false,
        };
        let eval = Metrics::Eval {
            step: 2,
            loss: 1.5,
            perplexity: 4.5,
            tokens: 7,
        };
        let mut state = State::default();
        state.begin(&[step(1), step(2), eval], 9);
        assert_eq!(state.series("Loss").train, [(1.0, 2.0), (2.0, 1.0)]);
        assert_eq!(state.series("Loss").eval, [(2.0, 1.5)]);
        let text = screen(80, 24, &state);
        for part in [
            "step 2/9",
            "1.5000 (step 2)",
            "Tokens/s       321.0",
            "0.5000",
        ] {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
        assert!(!text.contains("Time left"), "no step has been taken yet");
    }

    #[test]
    fn small_values_are_seen_beside_large_ones() {
        let plain = Scale::new(1.0, 3.0);
        assert_eq!([1.0, 2.0, 3.0].map(|y| plain.place(y)), [0.0, 0.5, 1.0]);
        let wide = Scale::new(1e-3, 10.0);
        for (value, place) in [(1e-3, 0.0), (0.1, 0.5), (10.0, 1.0)] {
            assert!((wide.place(value) - place).abs() < 1e-12);
            assert!((wide.value(place) - value).abs() < 1e-12 * value);
        }
        // nothing to take a logarithm of, and level lines
        assert_eq!(Scale::new(0.0, 10.0).place(5.0), 0.5);
        for level in [2e-4, 0.0, -3.0] {
            assert!((Scale::new(level, level).place(level) - 0.5).abs() < 1e-12);
        }
        let nothing = Scale::new(f64::INFINITY, f64::NEG_INFINITY);
        assert!(nothing.value(0.5).is_finite());
    }

    #[test]
    fn any_size_and_an_empty_run_can_be_drawn() {
        for (width, height) in [(1, 1), (20, 5), (300, 90)] {
            screen(width, height, &State::default());
            screen(width, height, &filled());
        }
    }

    #[test]
    fn keys_walk_through_the_plots_and_stop_the_run() {
        let state = Mutex::new(filled());
        let interrupter = Interrupter::new();
        let press = |code| {
            on_key(
                KeyEvent::new(code, KeyModifiers::NONE),
                &state,
                &interrupter,
            )
        };
        press(KeyCode::Left);
        assert_eq!(lock(&state).selected, 1);
        press(KeyCode::Right);
        assert_eq!(lock(&state).selected, 0);
        press(KeyCode::Char('c'));
        assert!(!interrupter.should_stop());
        let say = |number| lock(&state).say(format!("message {number}"));
        (0..5).for_each(say);
        press(KeyCode::Char('q'));
        assert!(interrupter.should_stop());
        let text = screen(80, 24, &lock(&state));
        assert!(
            text.contains("saving and stopping") && text.contains("message 4"),
            "{text}"
        );
    }
}
