//! The page: one file that needs no other, and no network.

mod memory;

use std::fmt::Write;

use serde_json::json;

use super::curves::Curves;
use super::facts::{SampleFacts, TextFacts};
use super::record::RunRecord;
use super::svg;
use super::table::{self, Group, Setting};
use super::words::{bytes, count, duration, escape, loss, script_json};

const STYLE: &str = include_str!("page.css");
const SCRIPT: &str = include_str!("page.js");

/// The curves: what they are drawn from, and their titles.
const CHARTS: [(&str, &str); 5] = [
    ("loss", "Loss"),
    ("lr", "Learning rate"),
    ("grad_norm", "Gradient norm"),
    ("speed", "Tokens per second"),
    ("memory", "Peak memory so far"),
];

/// The page of some runs; `picture` is their loss for who lets no script run.
pub fn render(runs: &[RunRecord], picture: &str) -> String {
    let curves: Vec<_> = runs.iter().map(|run| Curves::of(run, runs.len())).collect();
    let data = json!({ "runs": curves }).to_string();
    let names: Vec<_> = runs.iter().map(|run| run.name.as_str()).collect();
    let mut page = format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
         <meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; \
         style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:\">\n\
         <title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n",
        escape(&names.join(", "))
    );
    match runs {
        [run] => header(&mut page, run),
        runs => compared(&mut page, runs),
    }
    charts(&mut page, runs, picture);
    facts(&mut page, runs);
    memory::section(&mut page, runs);
    samples(&mut page, runs);
    warnings(&mut page, runs);
    recipe(&mut page, runs);
    let _ = write!(
        page,
        "<footer>Written by trainer {}. {}</footer>\n\
         <script type=\"application/json\" id=\"data\">{}</script>\n\
         <script>\n{SCRIPT}</script>\n</body>\n</html>\n",
        env!("CARGO_PKG_VERSION"),
        escape(&paths(runs)),
        script_json(&data),
    );
    page
}

fn paths(runs: &[RunRecord]) -> String {
    let one = |run: &RunRecord| {
        let full = std::path::absolute(&run.path).unwrap_or(run.path.clone());
        full.display().to_string()
    };
    runs.iter().map(one).collect::<Vec<_>>().join(", ")
}

/// The state of a run, in the colour that its first word stands for.
fn state(run: &RunRecord) -> String {
    let text = table::state(run);
    let class = text.split([' ', ':', ',']).next().unwrap_or_default();
    format!("<span class=\"state {class}\">{}</span>", escape(&text))
}

fn header(page: &mut String, run: &RunRecord) {
    let base = run.recipe.get("model").and_then(|model| model.get("path"));
    let base = base.and_then(|path| path.as_str()).unwrap_or("a model");
    let method = table::method(run).unwrap_or("trained".into());
    let warnings = run.facts.warnings.len() + run.notes.len();
    let warnings = match warnings {
        0 => String::new(),
        1 => " · <a href=\"#warnings\">1 warning</a>".into(),
        n => format!(" · <a href=\"#warnings\">{n} warnings</a>"),
    };
    let _ = write!(
        page,
        "<header>\n<h1>{}</h1>\n<p>{} on {} · {}{warnings}</p>\n</header>\n<ul class=\"tiles\">\n",
        escape(&run.name),
        escape(&method),
        escape(base),
        state(run),
    );
    let mut tile = |value: Option<String>, what: String| {
        if let Some(value) = value {
            let (value, what) = (escape(&value), escape(&what));
            let _ = writeln!(page, "<li><b>{value}</b><span>{what}</span></li>");
        }
    };
    let first = run.steps.first().and_then(|entry| entry.loss);
    let last = run.steps.last().and_then(|entry| entry.loss);
    let from = first.map_or(String::new(), |first| format!(", from {}", loss(first)));
    tile(last.map(loss), format!("loss{from}"));
    if let Some(best) = run.best() {
        let at = count(best.step as u64);
        tile(best.loss.map(loss), format!("best evaluation, step {at}"));
    }
    let of = match run.facts.steps {
        0 => "steps".into(),
        1 => "of 1 step".into(),
        all => format!("of {} steps", count(all as u64)),
    };
    tile(Some(count(run.last_step() as u64)), of);
    tile(Some(duration(table::wall_seconds(run))), "wall time".into());
    let speed = table::speed(run).map(|speed| count(speed.round() as u64));
    tile(speed, "tokens per second".into());
    let of = match memory::is_card(run) {
        true => "peak memory, without the card's",
        false => "peak memory",
    };
    tile(run.measured_bytes().map(bytes), of.into());
    page.push_str("</ul>\n");
}

fn compared(page: &mut String, runs: &[RunRecord]) {
    let _ = write!(
        page,
        "<header>\n<h1>{} runs</h1>\n<p>What they were given differently is marked below.</p>\n</header>\n",
        runs.len()
    );
}

fn charts(page: &mut String, runs: &[RunRecord], picture: &str) {
    page.push_str(
        "<section id=\"curves\">\n<div class=\"bar\"><h2>Curves</h2><span class=\"gap\"></span>\
         <span id=\"view\"></span><button id=\"reset\" disabled>Reset zoom</button></div>\n",
    );
    if runs.len() > 1 {
        page.push_str("<div class=\"legend\">\n");
        for (index, run) in runs.iter().enumerate() {
            let _ = writeln!(
                page,
                "<button aria-pressed=\"true\"><i class=\"swatch\" style=\"--c:var(--run-{})\"></i>{}\
                 </button>",
                index % 8,
                escape(&run.name)
            );
        }
        page.push_str("</div>\n");
    }
    let picture = picture.replace(svg::NAMESPACE, ""); // HTML knows what an svg is
    let _ = writeln!(
        page,
        "<noscript>{picture}</noscript>\n<div class=\"charts\">"
    );
    for (index, (curve, title)) in CHARTS.iter().enumerate() {
        let wide = if index == 0 { " wide" } else { "" };
        let _ = writeln!(
            page,
            "<figure class=\"chart card{wide}\" data-curve=\"{curve}\"><figcaption>{title}\
             <span class=\"keys\"></span><button aria-pressed=\"false\">log scale</button></figcaption>\
             <svg tabindex=\"0\" role=\"img\" aria-label=\"{title}\"></svg>\
             <div class=\"tip\" hidden></div></figure>"
        );
    }
    page.push_str("</div>\n</section>\n");
}

fn facts(page: &mut String, runs: &[RunRecord]) {
    page.push_str("<section id=\"facts\">\n<h2>Facts</h2>\n");
    let groups = table::groups(runs);
    match runs {
        [_] => fact_cards(page, &groups),
        runs => fact_table(page, &groups, runs),
    }
    page.push_str("</section>\n");
}

fn fact_cards(page: &mut String, groups: &[Group]) {
    page.push_str("<div class=\"facts\">\n");
    for group in groups {
        let _ = writeln!(page, "<div class=\"card\"><h3>{}</h3><dl>", group.title);
        for (label, values) in &group.rows {
            let value = values[0].as_deref().unwrap_or("–");
            let _ = writeln!(page, "<dt>{label}</dt><dd>{}</dd>", escape(value));
        }
        page.push_str("</dl></div>\n");
    }
    page.push_str("</div>\n");
}

fn fact_table(page: &mut String, groups: &[Group], runs: &[RunRecord]) {
    page.push_str("<div class=\"card scroll\"><table>\n");
    table_head(page, runs);
    for group in groups {
        let _ = writeln!(
            page,
            "<tr class=\"title\"><th colspan=\"{}\">{}</th></tr>",
            runs.len() + 1,
            group.title
        );
        for (label, values) in &group.rows {
            table_row(page, label, values, "", group.is_choice);
        }
    }
    page.push_str("</table></div>\n");
}

fn table_head(page: &mut String, runs: &[RunRecord]) {
    page.push_str("<thead><tr><th></th>");
    for (index, run) in runs.iter().enumerate() {
        let _ = write!(
            page,
            "<th scope=\"col\"><i class=\"swatch\" style=\"--c:var(--run-{})\"></i> {}</th>",
            index % 8,
            escape(&run.name)
        );
    }
    page.push_str("</tr></thead>\n");
}

/// A row of a table, marked if its values differ and that says something.
fn table_row(
    page: &mut String,
    label: &str,
    values: &[Option<String>],
    class: &str,
    is_choice: bool,
) {
    let differs = is_choice && values.windows(2).any(|pair| pair[0] != pair[1]);
    let differs = if differs { " differs" } else { "" };
    let _ = write!(
        page,
        "<tr class=\"{}\"><th scope=\"row\">{}</th>",
        format_args!("{class}{differs}"),
        escape(label)
    );
    for value in values {
        let _ = write!(page, "<td>{}</td>", escape(value.as_deref().unwrap_or("–")));
    }
    page.push_str("</tr>\n");
}

fn samples(page: &mut String, runs: &[RunRecord]) {
    page.push_str("<section id=\"samples\">\n<h2>Samples before and after</h2>\n");
    if runs.iter().all(|run| run.facts.samples.is_empty()) {
        page.push_str(
            "<div class=\"card soft\">None were made: output.samples is 0, or the rows or the model \
             have no text.</div>\n",
        );
    }
    for run in runs {
        if runs.len() > 1 && !run.facts.samples.is_empty() {
            let _ = writeln!(page, "<h3>{}</h3>", escape(&run.name));
        }
        run.facts.samples.iter().for_each(|one| sample(page, one));
    }
    page.push_str("</section>\n");
}

fn sample(page: &mut String, sample: &SampleFacts) {
    let _ = writeln!(
        page,
        "<div class=\"card sample\"><h4>Prompt</h4><pre>{}</pre>\n<div class=\"answers\">",
        escape(&sample.prompt)
    );
    answer(page, "before", sample.before.as_ref());
    answer(page, "after", sample.after.as_ref());
    let _ = writeln!(
        page,
        "<div><h4>In the data</h4><pre>{}</pre></div>\n</div></div>",
        escape(&sample.expected)
    );
}

fn answer(page: &mut String, when: &str, answer: Option<&TextFacts>) {
    let title = if when == "before" { "Before" } else { "After" };
    let (text, note) = match answer {
        None => (String::from("<p class=\"soft\">Not made.</p>"), ""),
        Some(TextFacts { text, cut }) => (
            format!("<pre>{}</pre>", escape(text)),
            if *cut { " (cut: out of time)" } else { "" },
        ),
    };
    let _ = writeln!(
        page,
        "<div class=\"{when}\"><h4>{title} training{note}</h4>{text}</div>"
    );
}

fn warnings(page: &mut String, runs: &[RunRecord]) {
    let of_run = |run: &RunRecord| {
        let all = run.facts.warnings.iter().chain(&run.notes);
        let named = |text: &String| match runs.len() {
            1 => text.clone(),
            _ => format!("{}: {text}", run.name),
        };
        all.map(named).collect::<Vec<_>>()
    };
    let all: Vec<_> = runs.iter().flat_map(of_run).collect();
    let class = if all.is_empty() { "" } else { "some" };
    let _ = writeln!(
        page,
        "<section id=\"warnings\" class=\"{class}\">\n<h2>Warnings</h2>\n<div class=\"card\">"
    );
    match all.is_empty() {
        true => page.push_str("<span class=\"soft\">None.</span>\n"),
        false => {
            page.push_str("<ul>\n");
            for text in all {
                let _ = writeln!(page, "<li>{}</li>", escape(&text));
            }
            page.push_str("</ul>\n");
        }
    }
    page.push_str("</div>\n</section>\n");
}

fn recipe(page: &mut String, runs: &[RunRecord]) {
    let (settings, note) = (
        table::settings(runs),
        match runs.len() {
            1 => "What differs from the defaults is bold.",
            _ => "What differs from the defaults is bold, what differs between the runs is marked.",
        },
    );
    let _ = writeln!(
        page,
        "<section id=\"recipe\">\n<h2>Recipe</h2>\n<p class=\"soft\">{note}</p>\n\
         <div class=\"card scroll\"><table class=\"recipe\">"
    );
    if runs.len() > 1 {
        table_head(page, runs);
    }
    for Setting {
        key,
        values,
        is_own,
    } in &settings
    {
        table_row(page, key, values, if *is_own { "own" } else { "" }, true);
    }
    page.push_str("</table></div>\n</section>\n");
}
