//! The loss as a picture.

use std::fmt::Write;

use super::curves::{Curve, Curves};
use super::record::RunRecord;
use super::words::escape;

/// What a file of its own has to say and a part of a page does not.
pub const NAMESPACE: &str = " xmlns=\"http://www.w3.org/2000/svg\"";

const WIDTH: f64 = 840.0;
const HEIGHT: f64 = 420.0;
/// Left, top, right, bottom.
const MARGIN: [f64; 4] = [64.0, 56.0, 24.0, 44.0];
/// About the width of a character.
const CHARACTER: f64 = 7.0;
/// The colours of runs, those of the page.
const COLORS: [&str; 8] = [
    "#2563c9", "#c4560b", "#15803d", "#a8328f", "#6d4fd0", "#0b7f8f", "#c02f3c", "#7a6118",
];

/// A picture of the losses of runs: each step faint, the smoothed line, the evaluations.
pub fn loss(runs: &[RunRecord]) -> String {
    let curves: Vec<_> = runs.iter().map(|run| Curves::of(run, runs.len())).collect();
    let lines = curves.iter().flat_map(|c| [&c.loss, &c.eval]);
    let ranges: Vec<_> = lines.clone().filter_map(Curve::range).collect();
    let low = ranges.iter().map(|range| range.0).reduce(f64::min);
    let high = ranges.iter().map(|range| range.1).reduce(f64::max);
    let last = lines.filter_map(|line| line.x.last().copied()).max();
    let frame = Frame::new(last.unwrap_or(1), low.unwrap_or(0.0), high.unwrap_or(1.0));
    let mut svg = format!(
        "<svg{NAMESPACE} viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"system-ui, sans-serif\" font-size=\"12\" role=\"img\" \
         aria-label=\"Loss\">\n<style>.ink{{fill:#1d2126}}.soft{{fill:#626a73}}\
         .rule{{stroke:#e3e5e8}}.page{{fill:#fff}}\
         @media (prefers-color-scheme:dark){{.ink{{fill:#e6e8eb}}.soft{{fill:#99a2ad}}\
         .rule{{stroke:#2c323a}}.page{{fill:#14171b}}}}</style>\n\
         <rect class=\"page\" width=\"{WIDTH}\" height=\"{HEIGHT}\"/>\n"
    );
    frame.axes(&mut svg);
    for (index, run) in curves.iter().enumerate() {
        let color = COLORS[index % COLORS.len()];
        draw(&mut svg, &frame, run, color, curves.len() == 1);
    }
    legend(&mut svg, &curves);
    svg.push_str("</svg>\n");
    svg
}

fn draw(svg: &mut String, frame: &Frame, run: &Curves, color: &str, is_alone: bool) {
    let eval_color = if is_alone { COLORS[1] } else { color };
    let has_trend = !run.smooth.x.is_empty();
    let faint = if has_trend { 0.28 } else { 1.0 };
    frame.line(
        svg,
        &run.loss,
        color,
        &format!("stroke-opacity=\"{faint}\""),
    );
    frame.line(svg, &run.smooth, color, "stroke-width=\"2\"");
    frame.line(svg, &run.eval, eval_color, "stroke-dasharray=\"5 3\"");
    let dots: &[&Curve] = match run.loss.x.len() {
        1 => &[&run.eval, &run.loss], // a line of one point shows nothing
        _ => &[&run.eval],
    };
    for (curve, color) in dots.iter().zip([eval_color, color]) {
        for (x, y) in curve.x.iter().zip(&curve.y).take(400) {
            let (x, y) = frame.place(*x, *y);
            let _ = writeln!(
                svg,
                "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"3\" fill=\"{color}\"/>"
            );
        }
    }
}

fn legend(svg: &mut String, curves: &[Curves]) {
    let _ = writeln!(
        svg,
        "<text class=\"ink\" x=\"{}\" y=\"24\" font-size=\"15\" font-weight=\"600\">Loss</text>",
        MARGIN[0]
    );
    let entries: Vec<(String, &str)> = match curves {
        [run] if run.eval.x.is_empty() => vec![(run.name.clone(), COLORS[0])],
        [run] => vec![
            (format!("{}, training", run.name), COLORS[0]),
            ("evaluation".into(), COLORS[1]),
        ],
        all => {
            let names = all.iter().map(|run| run.name.clone());
            names.zip(COLORS.into_iter().cycle()).collect()
        }
    };
    let mut x = MARGIN[0];
    let count = entries.len();
    for (index, (name, color)) in entries.into_iter().enumerate() {
        if x > WIDTH - 120.0 {
            let more = count - index;
            let _ = writeln!(
                svg,
                "<text class=\"soft\" x=\"{x:.0}\" y=\"41\">and {more} more</text>"
            );
            break;
        }
        let short = short_name(&name, (WIDTH - MARGIN[2] - x - 20.0) / CHARACTER);
        let _ = writeln!(
            svg,
            "<rect x=\"{x:.0}\" y=\"34\" width=\"14\" height=\"4\" rx=\"2\" fill=\"{color}\"/>\
             <text class=\"soft\" x=\"{:.0}\" y=\"41\">{}</text>",
            x + 20.0,
            escape(&short)
        );
        x += 44.0 + CHARACTER * short.chars().count() as f64;
    }
}

/// A name in at most 40 characters, and no more than there is `room` for; what is cut says so.
fn short_name(name: &str, room: f64) -> String {
    let most = 40.min(room as usize);
    match name.chars().count() <= most {
        true => name.to_owned(),
        false => name
            .chars()
            .take(most.saturating_sub(1))
            .chain(['…'])
            .collect(),
    }
}

/// Where values lie in the picture.
struct Frame {
    last: f64,
    low: f64,
    high: f64,
    rules: Vec<f64>,
}

impl Frame {
    fn new(last: usize, low: f64, high: f64) -> Self {
        let spread = match high - low {
            spread if spread > 0.0 => spread,
            _ => high.abs().max(1.0) / 5.0,
        };
        let (low, high) = (low - 0.05 * spread, high + 0.05 * spread);
        Self {
            last: last as f64,
            low,
            high,
            rules: ticks(low, high, 6),
        }
    }

    fn place(&self, x: usize, y: f64) -> (f64, f64) {
        let [left, top, right, bottom] = MARGIN;
        let across = match self.last > 1.0 {
            true => (x as f64 - 1.0).max(0.0) / (self.last - 1.0),
            false => 0.5,
        };
        let up = (y - self.low) / (self.high - self.low);
        (
            left + across * (WIDTH - left - right),
            HEIGHT - bottom - up * (HEIGHT - top - bottom),
        )
    }

    fn axes(&self, svg: &mut String) {
        let [left, _, right, bottom] = MARGIN;
        for rule in &self.rules {
            let (_, y) = self.place(1, *rule);
            let digits = decimals(self.rules[1.min(self.rules.len() - 1)] - self.rules[0]);
            let _ = writeln!(
                svg,
                "<line class=\"rule\" x1=\"{left}\" x2=\"{}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\
                 <text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{rule:.digits$}</text>",
                WIDTH - right,
                left - 8.0,
                y + 4.0
            );
        }
        for step in ticks(1.0, self.last, 8) {
            let step = step.round().max(1.0) as usize;
            let (x, _) = self.place(step, self.low);
            let _ = writeln!(
                svg,
                "<text class=\"soft\" x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{step}</text>",
                HEIGHT - bottom + 18.0
            );
        }
        let _ = writeln!(
            svg,
            "<text class=\"soft\" x=\"{}\" y=\"{}\" text-anchor=\"end\">step</text>",
            WIDTH - right,
            HEIGHT - 8.0
        );
    }

    fn line(&self, svg: &mut String, curve: &Curve, color: &str, style: &str) {
        if curve.x.len() < 2 {
            return;
        }
        let _ = write!(
            svg,
            "<polyline fill=\"none\" stroke=\"{color}\" stroke-linejoin=\"round\" {style} points=\""
        );
        for (x, y) in curve.x.iter().zip(&curve.y) {
            let (x, y) = self.place(*x, *y);
            let _ = write!(svg, "{x:.1},{y:.1} ");
        }
        svg.push_str("\"/>\n");
    }
}

/// Round numbers from `low` to `high`, about `count` of them.
fn ticks(low: f64, high: f64, count: usize) -> Vec<f64> {
    let spread = high - low;
    if spread <= 0.0 || !spread.is_finite() {
        return vec![low];
    }
    let rough = spread / count as f64;
    let power = 10f64.powf(rough.log10().floor());
    let wide = [1.0, 2.0, 5.0, 10.0].map(|factor| factor * power);
    let fits = |step: &f64| *step >= rough * (1.0 - 1e-9);
    let step = wide.into_iter().find(fits);
    let step = step.unwrap_or(10.0 * power);
    let first = (low / step).ceil() as i64;
    let all = first..=(high / step).floor() as i64;
    all.map(|index| index as f64 * step).collect()
}

fn decimals(step: f64) -> usize {
    match step > 0.0 {
        true => (-step.log10().floor()).clamp(0.0, 8.0) as usize,
        false => 3,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_legend_stays_inside_and_says_what_it_leaves_out() {
        let run = |index: usize| RunRecord {
            name: format!("a run with quite a long name, number {index}"),
            ..RunRecord::default()
        };
        let runs: Vec<_> = (0..6).map(run).collect();
        let svg = loss(&runs);
        assert!(svg.contains(">and 3 more</text>"), "{svg}");
        assert_eq!(short_name("12345", 5.0), "12345");
        assert_eq!(short_name("123456", 5.9), "1234…");
    }

    #[test]
    fn ticks_are_round_and_inside() {
        let found = ticks(0.9, 2.1, 6);
        assert_eq!(found.len(), 6, "{found:?}");
        for (found, expected) in found.iter().zip([1.0, 1.2, 1.4, 1.6, 1.8, 2.0]) {
            assert!((found - expected).abs() < 1e-9, "{found}");
        }
        assert_eq!(ticks(1.0, 100.0, 8), [20.0, 40.0, 60.0, 80.0, 100.0]);
        assert_eq!(ticks(1.0, 1.0, 8), [1.0]);
        assert_eq!([0.2, 5.0, 0.01].map(decimals), [1, 0, 2]);
    }
}
