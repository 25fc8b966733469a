//! Memory: what was predicted beside what was measured.

use std::fmt::Write;

use super::super::record::RunRecord;
use super::super::words::{bytes, escape};

/// The memory of some runs: predicted beside measured.
pub fn section(page: &mut String, runs: &[RunRecord]) {
    page.push_str("<section id=\"memory\">\n<h2>Memory</h2>\n<div class=\"card memory\">\n");
    let most = |run: &RunRecord| {
        let measured = measured(run).unwrap_or(0);
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
        let measured = measured(run);
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

/// What is of the same memory as the prediction: a card's own is not measured, and what the process
/// holds beside it says nothing about it.
fn measured(run: &RunRecord) -> Option<u64> {
    run.measured_bytes().filter(|_| !is_card(run))
}

/// Whether a run computed with memory other than the process's.
pub fn is_card(run: &RunRecord) -> bool {
    !matches!(run.facts.device.id.as_str(), "" | "cpu")
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cards_memory_is_not_compared_with_that_of_the_process() {
        let dir = tempfile::tempdir().unwrap();
        let line = "{\"kind\":\"train\",\"step\":1,\"peak_memory_bytes\":1000}\n";
        std::fs::write(dir.path().join("metrics.jsonl"), line).unwrap();
        let mut run = RunRecord::read(dir.path()).unwrap();
        run.facts.predicted_peak_bytes = 2000;
        for (device, is_compared) in [("cpu", true), ("cuda:0", false)] {
            run.facts.device.id = device.into();
            let mut page = String::new();
            section(&mut page, std::slice::from_ref(&run));
            assert_eq!(page.contains("what was measured"), is_compared, "{page}");
            assert_eq!(page.contains("not known"), !is_compared, "{page}");
            let whole = super::super::render(std::slice::from_ref(&run), "");
            let tile = "<span>peak memory, without the card&#39;s";
            assert_eq!(whole.contains(tile), !is_compared);
        }
    }
}
