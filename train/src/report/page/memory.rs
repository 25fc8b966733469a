//! Memory: what was predicted beside what was measured.

use std::fmt::Write;

use super::super::record::RunRecord;
use super::super::table;
use super::super::words::{bytes, escape};

/// The memory of some runs: predicted beside measured.
pub fn section(page: &mut String, runs: &[RunRecord]) {
    page.push_str("<section id=\"memory\">\n<h2>Memory</h2>\n<div class=\"card memory\">\n");
    let most = |run: &RunRecord| {
        let measured = table::measured_bytes(run).unwrap_or(0);
        measured.max(run.facts.predicted_peak_bytes)
    };
    let scale = runs.iter().map(most).max().unwrap_or(0).max(1) as f64;
    for (index, run) in runs.iter().enumerate() {
        page.push_str("<div>\n");
        if runs.len() > 1 {
            let _ = writeln!(page, "<h3>{}</h3>", escape(&run.name));
        }
        let predicted = Some(run.facts.predicted_peak_bytes).filter(|bytes| *bytes > 0);
        let color = format!("var(--run-{})", index % 8);
        meter(
            page,
            "predicted",
            predicted,
            scale,
            &format!("{color};opacity:.45"),
        );
        let measured = table::measured_bytes(run);
        meter(page, "measured", measured, scale, &color);
        if let (Some(predicted), Some(measured)) = (predicted, measured) {
            let off = 100.0 * (predicted as f64 / measured as f64 - 1.0);
            let _ = writeln!(
                page,
                "<p class=\"soft\">The prediction is {:.1} % {} what was measured.{}</p>",
                off.abs(),
                if off < 0.0 { "below" } else { "above" },
                match run.facts.recompute {
                    true => " Decoder layers were computed again in the backward pass.",
                    false => "",
                }
            );
        }
        let part = |(name, size): (&String, &u64)| {
            format!(
                "<li>{} <b>{}</b></li>",
                escape(&name.replace('_', " ")),
                bytes(*size)
            )
        };
        let parts: String = run.facts.predicted_memory.iter().map(part).collect();
        if !parts.is_empty() {
            let _ = writeln!(
                page,
                "<ul class=\"parts\"><li>predicted by part:</li>{parts}</ul>"
            );
        }
        page.push_str("</div>\n");
    }
    page.push_str("</div>\n</section>\n");
}

fn meter(page: &mut String, what: &str, size: Option<u64>, scale: f64, color: &str) {
    let share = 100.0 * size.unwrap_or(0) as f64 / scale;
    let text = size.map_or("not known".into(), bytes);
    let _ = writeln!(
        page,
        "<div class=\"meter\"><span>{what}</span><div class=\"track\">\
         <span style=\"width:{share:.1}%;--c:{color}\"></span></div><b>{text}</b></div>"
    );
}
