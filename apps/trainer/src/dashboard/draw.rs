//! What the dashboard looks like.

mod plot;
mod text;

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Clear, Gauge, Paragraph, Wrap};

use super::state::{State, duration};

/// Narrower or lower screens show numbers alone.
const LEAST_FOR_PLOTS: [u16; 2] = [60, 14];
/// Width of the column of numbers.
const NUMBERS: u16 = 34;
/// Width of their names.
const NAME: usize = 14;

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
    let lines = numbers_of(state, usize::from(block.inner(numbers).width));
    frame.render_widget(Paragraph::new(lines).block(block), numbers);
    plot::draw_all(frame, plots, state);
    draw_messages(frame, messages, state);
    draw_bar(frame, bar, state);
    if state.stopping {
        draw_popup(frame, area);
    }
}

/// A screen without room for plots.
fn draw_small(frame: &mut Frame, area: Rect, state: &State) {
    let [numbers, bar] = Layout::vertical([Constraint::Min(0), Constraint::Length(1)]).areas(area);
    let width = usize::from(numbers.width);
    let mut lines = numbers_of(state, width);
    if state.stopping {
        lines.insert(0, Line::from("saving and stopping").yellow());
    }
    let room = usize::from(numbers.height).saturating_sub(lines.len());
    lines.extend(newest(state, width, room));
    frame.render_widget(Paragraph::new(lines), numbers);
    draw_bar(frame, bar, state);
}

fn draw_head(frame: &mut Frame, area: Rect, state: &State) {
    let keys = Line::from("q save and stop  ← → plot  ↑ ↓ all or recent").dark_gray();
    let room = Constraint::Length(keys.width() as u16);
    let [title, right] = Layout::horizontal([Constraint::Min(0), room]).areas(area);
    let shown = text::end_of(&state.title, usize::from(title.width).saturating_sub(1));
    frame.render_widget(Line::from(shown.bold()), title);
    frame.render_widget(keys, right);
}

/// A line a number; the one that is plotted large is marked. What has no room is left out: half of a
/// number would be another one.
fn numbers_of(state: &State, width: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let mut add = |name: &str, value: String, style: Style| {
        let (name, value) = text::pair(name, &value, NAME, width);
        lines.push(Line::from(vec![Span::styled(name, style), value.into()]));
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
            let value = plot.shown(value);
            let long = format!("{value} (step {step})");
            let fits = NAME + 1 + long.chars().count() <= width;
            let value = if fits { long } else { value };
            add("  evaluation", value, Style::new().fg(Color::Yellow));
        }
    }
    for (name, count) in [
        ("Skipped steps", state.skipped),
        ("Loss spikes", state.spikes.len()),
    ] {
        if count > 0 {
            add(name, count.to_string(), Style::new().fg(Color::Red));
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

fn draw_messages(frame: &mut Frame, area: Rect, state: &State) {
    let block = Block::bordered().title("Messages");
    let inner = block.inner(area);
    let lines = newest(state, usize::from(inner.width), usize::from(inner.height));
    frame.render_widget(Paragraph::new(lines).block(block), area);
}

/// The newest messages that have room, the last one at the bottom.
fn newest(state: &State, width: usize, room: usize) -> Vec<Line<'static>> {
    let mut all = Vec::new();
    for message in state.messages.iter().rev() {
        let indent = message.time.len() + 1;
        let parts = text::wrapped(&message.text, width.saturating_sub(indent));
        if all.len() + parts.len() > room && !all.is_empty() {
            break; // not a message without its beginning
        }
        let line = |(index, part): (usize, String)| {
            let time = match index {
                0 => format!("{} ", message.time),
                _ => " ".repeat(indent),
            };
            let part = match message.is_warning {
                true => part.yellow(),
                false => part.into(),
            };
            Line::from(vec![time.dark_gray(), part])
        };
        all.extend(parts.into_iter().enumerate().map(line).rev());
    }
    let skipped = all.len().saturating_sub(room);
    all.split_off(skipped).into_iter().rev().collect()
}

fn draw_bar(frame: &mut Frame, area: Rect, state: &State) {
    let ratio = state.step as f64 / state.total.max(1) as f64;
    let mut items = vec![format!("step {}/{}", state.step, state.total)];
    if let (Some(epoch), Some(epochs)) = (state.epoch, state.epochs()) {
        let digits = if epochs < 0.1 { 4 } else { 2 };
        items.push(format!("epoch {epoch:.digits$}/{epochs:.digits$}"));
    }
    items.extend(time_left(state).map(|left| format!("ETA {left}")));
    items.extend(Some(state.status.clone()).filter(|status| !status.is_empty()));
    let label = text::joined(&items, usize::from(area.width));
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

    use super::super::state::{GRADIENT_NORM, LEARNING_RATE, LOSS, MEMORY, TOKENS, Weight};
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
            loss_scale: None,
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
        shows(&text, &["Loss          1.2500", "step 3/12"]);
    }

    #[test]
    fn no_number_is_cut_to_another_one() {
        let mut state = filled();
        let eval = Metrics::Eval {
            step: 987_654,
            loss: 1.625,
            perplexity: 5.0,
            tokens: 7,
        };
        state.begin(&[eval], 1_000_000);
        state.progress(987_654, 1_000_000);
        state.say("step 987654  eval loss 1.6250".into(), Weight::Note);
        for width in 12..120 {
            let text = screen(width, 24, &state);
            for word in text.split(|c: char| c.is_whitespace() || "│┌┐()/".contains(c)) {
                let is_part = |whole: &str| word.len() > 3 && whole.starts_with(word);
                assert!(!is_part("98765"), "{width}: {word} in\n{text}");
                assert!(!is_part("1.625"), "{width}: {word} in\n{text}");
            }
        }
    }

    #[test]
    fn values_that_are_close_have_labels_that_differ() {
        let mut state = State::default();
        let close = |index: usize| {
            let mut line = step(index);
            if let Metrics::Train {
                loss,
                peak_memory_bytes,
                ..
            } = &mut line
            {
                *loss = 1.25 + 1e-6 * index as f64;
                *peak_memory_bytes = (300 << 20) + 2048 * index as u64;
            }
            line
        };
        state.begin(&[1, 2, 3].map(close), 9);
        shows(
            &screen(80, 24, &state),
            &["1.250001", "1.250002", "1.250003"],
        );
        state.select(-1);
        shows(&screen(80, 24, &state), &["300.002 MiB", "300.006 MiB"]);
    }

    #[test]
    fn spikes_and_skipped_steps_are_counted_and_a_spike_is_marked() {
        let mut state = filled();
        state.spike(3, 1.25);
        state.skip(4);
        let text = screen(80, 24, &state);
        shows(&text, &["Loss spikes    1", "Skipped steps  1", "• spike"]);
        assert_eq!(
            text.matches('•').count(),
            4,
            "two of them in the plot:\n{text}"
        );
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
