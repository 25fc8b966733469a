//! Curves, and what stands at their axes.

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Style, Stylize};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{Axis, Block, Chart, Dataset, GraphType, LegendPosition};

use super::super::curve::Curve;
use super::super::scale::{Scale, bytes, bytes_in, number, numbers_in};
use super::super::state::{LEARNING_RATE, LOSS, MEMORY, Plot, State};

/// Least size of a plot beside the large one.
const LEAST_SMALL_PLOT: [u16; 2] = [32, 9];
/// Digits that an axis has at most behind the point, to tell values apart.
const MOST_DIGITS: usize = 9;

impl Plot {
    /// A value of it, in words.
    pub fn shown(&self, value: f64) -> String {
        match self.name == MEMORY {
            true => bytes(value),
            false => number(value),
        }
    }
}

/// The selected plot, and on a large screen the others below it.
pub fn draw_all(frame: &mut Frame, area: Rect, state: &State) {
    let Some(selected) = state.plots.get(state.selected) else {
        frame.render_widget(Block::bordered().title("before the first step"), area);
        return;
    };
    let count = state.plots.len();
    let others = (1..count).map(|by| &state.plots[(state.selected + by) % count]);
    let [width, height] = LEAST_SMALL_PLOT;
    let room = usize::from(area.width / width).min(count - 1);
    if area.height < 3 * height || room == 0 {
        draw_plot(frame, area, selected, state);
        return;
    }
    let [large, small] = Layout::vertical([Constraint::Fill(2), Constraint::Fill(1)]).areas(area);
    draw_plot(frame, large, selected, state);
    let columns = Layout::horizontal(vec![Constraint::Fill(1); room]).split(small);
    for (plot, area) in others.zip(columns.iter()) {
        draw_plot(frame, *area, plot, state);
    }
}

/// One plot.
fn draw_plot(frame: &mut Frame, area: Rect, plot: &Plot, state: &State) {
    let points = |curve: &Curve| match state.recent {
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
    let is_logarithmic = matches!(scale, Scale::Log { .. });
    let on_scale = |points: &[(f64, f64)]| -> Vec<(f64, f64)> {
        points.iter().map(|(x, y)| (*x, scale.place(*y))).collect()
    };
    let spikes: Vec<_> = match plot.name.as_str() {
        LOSS => state
            .spikes
            .iter()
            .copied()
            .filter(|(x, _)| *x >= first)
            .collect(),
        _ => Vec::new(),
    };
    let (train, eval, spikes) = (on_scale(&train), on_scale(&eval), on_scale(&spikes));
    let lines = Dataset::default()
        .marker(Marker::Braille)
        .graph_type(GraphType::Line)
        .style(Style::new().fg(Color::Cyan))
        .data(&train);
    let dots = Dataset::default()
        .marker(Marker::Dot)
        .style(Style::new().fg(Color::Yellow))
        .data(&eval);
    let jumps = Dataset::default()
        .marker(Marker::Dot)
        .style(Style::new().fg(Color::Red))
        .data(&spikes);
    let x = Axis::default()
        .bounds([first, last])
        .labels([format!("{first:.0}"), format!("{last:.0}")]);
    let y = Axis::default()
        .bounds([0.0, 1.0])
        .labels(labels(plot, &scale));
    let block = Block::bordered();
    let room = usize::from(block.inner(area).width);
    let has_spikes = !spikes.is_empty();
    let title = title_of(plot, state.recent, is_logarithmic, has_spikes, room);
    let chart = Chart::new(vec![lines, dots, jumps])
        .x_axis(x)
        .y_axis(y)
        .legend_position(None::<LegendPosition>);
    frame.render_widget(chart.block(block.title(title)), area);
}

/// The title, and as many of the words behind it as there is room for.
fn title_of(
    plot: &Plot,
    recent: bool,
    logarithmic: bool,
    has_spikes: bool,
    room: usize,
) -> Line<'_> {
    let mut title = vec![plot.name.as_str().bold()];
    let mut more: Vec<Span> = Vec::new();
    if recent {
        more.push(" recent".into());
    }
    if !plot.eval.is_empty() {
        more.extend([" training".cyan(), " • evaluation".yellow()]);
    }
    if has_spikes {
        more.push(" • spike".red());
    }
    if logarithmic {
        more.push(" (logarithmic)".into());
    }
    let mut used = title[0].width();
    for span in more {
        used += span.width();
        if used > room {
            break;
        }
        title.push(span);
    }
    Line::from(title)
}

/// What stands at the bottom, the middle and the top of an axis, in as many digits as tell them
/// apart.
fn labels(plot: &Plot, scale: &Scale) -> Vec<String> {
    let values = [0.0, 0.5, 1.0].map(|at| scale.value(at));
    let apart = |labels: &[String; 3]| labels[0] != labels[1] && labels[1] != labels[2];
    let with = |digits| match plot.name == MEMORY {
        true => bytes_in(values, digits),
        false => numbers_in(values, digits),
    };
    let usual = values.map(|value| plot.shown(value));
    let mut finer = (1..=MOST_DIGITS).map(with);
    match apart(&usual) {
        true => usual.into(),
        // of values that are all but the same, one is enough
        false => finer.find(apart).map_or(
            vec![String::new(), usual[1].clone(), String::new()],
            Into::into,
        ),
    }
}
