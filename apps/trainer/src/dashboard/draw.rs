//! What the dashboard looks like.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Axis, Block, Chart, Clear, Dataset, Gauge, GraphType, LegendPosition, Paragraph, Wrap,
};

use super::curve::Curve;
use super::scale::{Scale, bytes, number};
use super::state::{LEARNING_RATE, MEMORY, Plot, State, duration};

/// Narrower or lower screens show numbers alone.
const LEAST_FOR_PLOTS: [u16; 2] = [60, 14];
/// Width of the column of numbers.
const NUMBERS: u16 = 34;
/// Least size of a plot beside the large one.
const LEAST_SMALL_PLOT: [u16; 2] = [32, 9];

/// Draws everything.
pub fn draw(frame: &mut Frame, state: &State) {
    let area = frame.area();
    let [width, height] = LEAST_FOR_PLOTS;
    match area.width < width || area.height < height {
        true => draw_small(frame, area, state),
        false => draw_all(frame, area, state),
    }
}

fn draw_all(frame: &mut Frame, area: Rect, state: &State) {
    let messages = (area.height / 5).clamp(4, 12);
    let rows = [
        Constraint::Length(1),
        Constraint::Min(8),
        Constraint::Length(messages),
        Constraint::Length(1),
    ];
    let [head, body, messages, bar] = Layout::vertical(rows).areas(area);
    let [numbers, plots] =
        Layout::horizontal([Constraint::Length(NUMBERS), Constraint::Min(20)]).areas(body);
    draw_head(frame, head, state);
    let block = Block::bordered().title("Metrics");
    frame.render_widget(Paragraph::new(numbers_of(state)).block(block), numbers);
    draw_plots(frame, plots, state);
    draw_messages(frame, messages, state);
    draw_bar(frame, bar, state);
    if state.stopping {
        draw_popup(frame, area);
    }
}

/// A screen without room for plots.
fn draw_small(frame: &mut Frame, area: Rect, state: &State) {
    let [numbers, bar] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(area);
    let mut lines = numbers_of(state);
    if state.stopping {
        lines.insert(0, Line::from("saving and stopping").yellow());
    }
    let room = usize::from(numbers.height).saturating_sub(lines.len());
    let newest = state.messages.iter().rev().take(room);
    lines.extend(
        newest
            .rev()
            .map(|message| Line::from(message.text.as_str())),
    );
    frame.render_widget(Paragraph::new(lines), numbers);
    draw_bar(frame, bar, state);
}

fn draw_head(frame: &mut Frame, area: Rect, state: &State) {
    let keys = Line::from("q save and stop  ← → plot  ↑ ↓ all or recent").dark_gray();
    let room = Constraint::Length(keys.width() as u16);
    let [title, right] = Layout::horizontal([Constraint::Min(0), room]).areas(area);
    // the end of a path tells more than its beginning
    let skipped = state
        .title
        .chars()
        .count()
        .saturating_sub(usize::from(title.width) - 1);
    let shown: String = state.title.chars().skip(skipped).collect();
    frame.render_widget(Line::from(shown.bold()), title);
    frame.render_widget(keys, right);
}

/// A line a number; the one that is plotted large is marked.
fn numbers_of(state: &State) -> Vec<Line<'_>> {
    let mut lines = Vec::new();
    let mut add = |name: &str, value: String, style: Style| {
        let name = Span::styled(format!("{name:14} "), style);
        lines.push(Line::from(vec![name, value.into()]));
    };
    for (index, plot) in state.plots.iter().enumerate() {
        let style = match index == state.selected {
            true => Style::new().bold().fg(Color::Cyan),
            false => Style::new(),
        };
        if let Some((_, value)) = plot.train.last() {
            add(&plot.name, plot.shown(value), style);
        }
        if let Some((step, value)) = plot.eval.last() {
            let value = format!("{} (step {step})", plot.shown(value));
            add("  evaluation", value, Style::new().fg(Color::Yellow));
        }
    }
    if let Some(pace) = state.pace {
        add("Time", duration(pace.elapsed()), Style::new());
    }
    if let Some(left) = time_left(state) {
        add("Time left", left, Style::new());
    }
    lines
}

/// The clock goes on between steps.
fn time_left(state: &State) -> Option<String> {
    let since = state.pace?.elapsed().saturating_sub(state.at_step);
    let left = state.left()?;
    Some(duration(left.saturating_sub(since).max(Duration::ZERO)))
}

impl Plot {
    fn shown(&self, value: f64) -> String {
        match self.name == MEMORY {
            true => bytes(value),
            false => number(value),
        }
    }
}

/// The selected plot, and on a large screen the others below it.
fn draw_plots(frame: &mut Frame, area: Rect, state: &State) {
    let Some(selected) = state.plots.get(state.selected) else {
        frame.render_widget(Block::bordered().title("before the first step"), area);
        return;
    };
    let count = state.plots.len();
    let others = (1..count).map(|by| &state.plots[(state.selected + by) % count]);
    let [width, height] = LEAST_SMALL_PLOT;
    let room = usize::from(area.width / width).min(count - 1);
    if area.height < 3 * height || room == 0 {
        draw_plot(frame, area, selected, state.recent);
        return;
    }
    let [large, small] = Layout::vertical([Constraint::Fill(2), Constraint::Fill(1)]).areas(area);
    draw_plot(frame, large, selected, state.recent);
    let columns = Layout::horizontal(vec![Constraint::Fill(1); room]).split(small);
    for (plot, area) in others.zip(columns.iter()) {
        draw_plot(frame, *area, plot, state.recent);
    }
}

fn draw_plot(frame: &mut Frame, area: Rect, plot: &Plot, recent: bool) {
    let points = |curve: &Curve| match recent {
        true => curve.recent(),
        false => curve.whole(),
    };
    let train = points(&plot.train);
    let first = train.first().map_or(0.0, |(x, _)| *x);
    let mut eval = points(&plot.eval);
    eval.retain(|(x, _)| *x >= first);
    let all = || train.iter().chain(&eval);
    let low = all().map(|(_, y)| *y).fold(f64::INFINITY, f64::min);
    let high = all().map(|(_, y)| *y).fold(f64::NEG_INFINITY, f64::max);
    let last = all().map(|(x, _)| *x).fold(first + 1.0, f64::max);
    let scale = match plot.name.as_str() {
        LEARNING_RATE => Scale::linear(low, high),
        _ => Scale::new(low, high),
    };
    let on_scale = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|(x, y)| (*x, scale.place(*y))).collect()
    };
    let (train, eval) = (on_scale(&train), on_scale(&eval));
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
        .bounds([first, last])
        .labels([format!("{first:.0}"), format!("{last:.0}")]);
    let y = Axis::default()
        .bounds([0.0, 1.0])
        .labels([0.0, 0.5, 1.0].map(|at| plot.shown(scale.value(at))));
    let title = title_of(plot, recent, matches!(scale, Scale::Log { .. }));
    let chart = Chart::new(vec![lines, dots])
        .x_axis(x)
        .y_axis(y)
        .legend_position(None::<LegendPosition>);
    frame.render_widget(chart.block(Block::bordered().title(title)), area);
}

fn title_of(plot: &Plot, recent: bool, logarithmic: bool) -> Line<'_> {
    let mut title = vec![plot.name.as_str().bold()];
    if !plot.eval.is_empty() {
        title.extend([" training".cyan(), " • evaluation".yellow()]);
    }
    if recent {
        title.push(" recent".into());
    }
    if logarithmic {
        title.push(" (logarithmic)".into());
    }
    Line::from(title)
}

fn draw_messages(frame: &mut Frame, area: Rect, state: &State) {
    let room = usize::from(area.height.saturating_sub(2));
    let newest = state.messages.iter().rev().take(room);
    let line = |message: &super::state::Message| {
        let text = Span::raw(message.text.clone());
        let text = match message.is_warning {
            true => text.yellow(),
            false => text,
        };
        Line::from(vec![format!("{} ", message.time).dark_gray(), text])
    };
    let lines: Vec<Line> = newest.rev().map(line).collect();
    let block = Block::bordered().title("Messages");
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

fn draw_bar(frame: &mut Frame, area: Rect, state: &State) {
    let ratio = state.step as f64 / state.total.max(1) as f64;
    let mut label = format!("step {}/{}", state.step, state.total);
    if let (Some(epoch), Some(epochs)) = (state.epoch, state.epochs()) {
        label += &format!("  epoch {epoch:.2}/{epochs:.2}");
    }
    if let Some(left) = time_left(state) {
        label += &format!("  ETA {left}");
    }
    if !state.status.is_empty() {
        label += &format!("  {}", state.status);
    }
    let bar = Gauge::default().ratio(ratio.clamp(0.0, 1.0)).label(label);
    frame.render_widget(bar.gauge_style(Style::new().fg(Color::Cyan)), area);
}

fn draw_popup(frame: &mut Frame, area: Rect) {
    const WIDTH: u16 = 50;
    const HEIGHT: u16 = 7;
    let popup = Rect {
        x: area.x + area.width.saturating_sub(WIDTH) / 2,
        y: area.y + area.height.saturating_sub(HEIGHT) / 2,
        width: WIDTH,
        height: HEIGHT,
    };
    let popup = popup.intersection(area);
    let key = |key: &'static str, text: &'static str| {
        Line::from(vec![key.bold(), Span::styled(text, Style::new().yellow())])
    };
    let lines = vec![
        Line::from("The step at hand is finished, then a checkpoint is saved."),
        Line::default(),
        key("[c] ", "go on training"),
        key("[k] ", "leave at once, unsaved (also Ctrl-C)"),
    ];
    let block = Block::bordered().title("saving and stopping".bold());
    frame.render_widget(Clear, popup);
    frame.render_widget(
        Paragraph::new(lines)
            .wrap(Wrap { trim: false })
            .block(block),
        popup,
    );
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;
    use train::run_folder::Line as Metrics;

    use super::super::state::{GRADIENT_NORM, LOSS, TOKENS, Weight};
    use super::*;

    /// The screen as text.
    fn screen(width: u16, height: u16, state: &State) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| draw(frame, state)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows = buffer.content().chunks(usize::from(width.max(1)));
        rows.map(|row| row.iter().map(|cell| cell.symbol()).collect::<String>() + "\n")
            .collect()
    }

    #[track_caller]
    fn shows(text: &str, parts: &[&str]) {
        for part in parts {
            assert!(text.contains(part), "{part} is not in:\n{text}");
        }
    }

    fn step(step: usize) -> Metrics {
        Metrics::Train {
            step,
            epoch: step as f64 / 4.0,
            loss: 2.5 / step as f64,
            lr: 2e-4,
            grad_norm: 0.5,
            tokens: 10,
            tokens_per_second: 321.0,
            peak_memory_bytes: 300 << 20,
            seconds: 0.1,
            spike: false,
        }
    }

    fn filled() -> State {
        let eval = Metrics::Eval {
            step: 2,
            loss: 1.75,
            perplexity: 5.75,
            tokens: 7,
        };
        let mut state = State {
            title: "runs/mine".into(),
            ..State::default()
        };
        state.begin(&[step(1), step(2), eval], 12);
        for (name, value) in [(LOSS, 1.25), (GRADIENT_NORM, 0.75), ("Epoch", 0.75)] {
            state.train_value(name, value);
        }
        state.progress(3, 12);
        state.say("step 3  eval loss 1.7500".into(), Weight::Note);
        state
    }

    #[test]
    fn all_that_matters_fits_on_80_by_24() {
        let mut state = filled();
        let everything = [
            "runs/mine",
            "save and stop",
            "Loss           1.2500",
            "1.7500 (step 2)",
            "2.000e-4",
            "0.7500",
            "Tokens/s       321.0",
            "300 MiB",
            "Time left",
            "step 3  eval loss",
            "step 3/12  epoch 0.75/3.00  ETA 0s",
            "training",
            "• evaluation",
        ];
        shows(&screen(80, 24, &state), &everything);
        state.status("evaluating 3/10".into());
        shows(&screen(80, 24, &state), &["ETA 0s  evaluating 3/10"]);
    }

    #[test]
    fn a_large_screen_shows_every_plot() {
        let text = screen(200, 50, &filled());
        for name in [LOSS, LEARNING_RATE, GRADIENT_NORM, TOKENS, MEMORY] {
            // among the numbers, and above its plot
            assert_eq!(text.matches(name).count(), 2, "{name}:\n{text}");
        }
    }

    #[test]
    fn a_run_that_goes_on_shows_what_was_before() {
        let mut state = State::default();
        state.begin(&[step(1), step(2)], 9);
        let text = screen(80, 24, &state);
        shows(&text, &["step 2/9", "1.2500", "Tokens/s       321.0"]);
        assert!(!text.contains("Time left"), "no step has been taken yet");
    }

    #[test]
    fn the_selected_plot_is_drawn() {
        let mut state = filled();
        let title = |state: &State| {
            let text = screen(80, 24, state);
            let row = text.lines().nth(1).unwrap().chars();
            row.skip(usize::from(NUMBERS)).collect::<String>()
        };
        assert!(title(&state).contains("Loss training • evaluation"));
        state.select(-1);
        assert!(title(&state).contains(MEMORY));
        state.select(2);
        assert!(title(&state).contains(LEARNING_RATE));
        state.recent = true;
        assert!(title(&state).contains("Learning rate recent"));
    }

    #[test]
    fn a_stop_says_what_it_does_and_how_to_take_it_back() {
        let mut state = filled();
        state.stopping = true;
        shows(
            &screen(80, 24, &state),
            &["saving and stopping", "[c] go on", "[k] leave"],
        );
        shows(
            &screen(40, 10, &state),
            &["saving and stopping", "step 3/12"],
        );
    }

    #[test]
    fn the_newest_messages_are_shown() {
        let mut state = filled();
        for number in 0..20 {
            state.say(format!("message {number}"), Weight::Warning);
        }
        for (width, height) in [(80, 24), (200, 50)] {
            let text = screen(width, height, &state);
            shows(&text, &["message 18", "message 19"]);
            assert!(!text.contains("message 2 "), "{text}");
        }
    }

    #[test]
    fn a_small_screen_shows_numbers() {
        let text = screen(20, 5, &filled());
        shows(&text, &["Loss           1.250", "step 3/12"]);
    }

    #[test]
    fn any_size_and_any_state_can_be_drawn() {
        let mut broken = filled();
        for (name, value) in [(LOSS, f64::NAN), (TOKENS, f64::INFINITY), (MEMORY, -1.0)] {
            broken.train_value(name, value);
        }
        broken.progress(20, 12); // more than there are
        broken.stopping = true;
        for width in (0..90).step_by(3).chain([300]) {
            for height in (0..30).chain([90]) {
                for state in [&State::default(), &filled(), &broken] {
                    screen(width, height, state);
                }
            }
        }
    }
}
