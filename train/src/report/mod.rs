//! What a run leaves for people: `run.json`, `report.html` and `loss.svg`.
//!
//! [`facts`] is what neither the recipe nor the metrics say, [`samples`] what the model answers
//! before and after, `record` reads a run folder, `curves` makes lines of its metrics that are short
//! enough to draw, `table` says everything else in words, and `page` and `svg` draw.

mod curves;
pub mod facts;
mod page;
mod record;
pub mod samples;
mod svg;
mod table;
mod words;

use std::path::{Path, PathBuf};

use model::checkpoint::write_file;

use crate::error::Result;
pub use record::{Entry, RunRecord, tell_apart};
pub(crate) use table::{method, parameters};

/// File name of the page.
pub const REPORT_FILE: &str = "report.html";
/// File name of the picture of the loss.
pub const LOSS_FILE: &str = "loss.svg";

/// Writes the page of one or several runs, and the picture of their losses beside it, `loss.svg` or
/// `NAME-loss.svg` beside a page of another name.
///
/// # Errors
/// Files that cannot be written; each is complete or absent.
pub fn write(runs: &[RunRecord], page: &Path) -> Result<PathBuf> {
    let picture = match page.file_stem().and_then(|stem| stem.to_str()) {
        Some("report") | None => page.with_file_name(LOSS_FILE),
        Some(stem) => page.with_file_name(format!("{stem}-{LOSS_FILE}")),
    };
    let svg = svg::loss(runs);
    write_file(page, page::render(runs, &svg).as_bytes())?;
    write_file(&picture, svg.as_bytes())?;
    Ok(picture)
}
