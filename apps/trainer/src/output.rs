//! Where words go: results to stdout, everything else to stderr.

use std::io::{self, ErrorKind, Write};
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
use model::hub::{DownloadEvent, UploadEvent};
use serde_json::Value;

use crate::cli::Cli;
use crate::signals;

/// How much is said, and in which form.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    /// stdout is one JSON object.
    pub json: bool,
    quiet: bool,
    verbose: bool,
}

impl Output {
    /// As the command line asks.
    pub fn new(cli: &Cli) -> Self {
        Self {
            json: cli.json,
            quiet: cli.quiet,
            verbose: cli.verbose,
        }
    }

    /// For a command line that did not parse.
    pub fn from_env() -> Self {
        Self {
            json: std::env::args_os().any(|arg| arg == "--json"),
            quiet: false,
            verbose: false,
        }
    }

    /// Prints the result: the JSON object, or the text. A reader who has gone away wants no more.
    pub fn result(&self, json: &Value, text: &str) -> Result<()> {
        let mut stdout = io::stdout().lock();
        let written = match self.json {
            true => writeln!(stdout, "{json}"),
            false => writeln!(stdout, "{text}"),
        };
        match written.and_then(|()| stdout.flush()) {
            Err(e) if e.kind() != ErrorKind::BrokenPipe && !signals::hung_up() => {
                Err(e).context("cannot write the result to stdout")
            }
            _ => Ok(()),
        }
    }

    /// Prints a part of a text that is still being made. A reader who has gone away ends it.
    pub fn part(&self, text: &str) -> Result<ControlFlow<()>> {
        let mut stdout = io::stdout().lock();
        let written = stdout.write_all(text.as_bytes());
        match written.and_then(|()| stdout.flush()) {
            Ok(()) => Ok(ControlFlow::Continue(())),
            Err(e) if e.kind() == ErrorKind::BrokenPipe => Ok(ControlFlow::Break(())),
            Err(e) => Err(e).context("cannot write the text to stdout"),
        }
    }

    /// Says what happens.
    pub fn note(&self, text: impl std::fmt::Display) {
        if !self.quiet {
            log(text);
        }
    }

    /// Says what only some want to know.
    pub fn detail(&self, text: impl std::fmt::Display) {
        if self.verbose {
            log(text);
        }
    }

    /// Whether progress is shown.
    pub fn is_quiet(&self) -> bool {
        self.quiet
    }

    /// Shows uploads as they go on.
    pub fn uploads(&self) -> impl FnMut(UploadEvent<'_>) + use<> {
        let output = *self;
        let mut bar: Option<ProgressBar> = None;
        move |event| match event {
            UploadEvent::Created { repo } => output.note(format_args!("created {repo}")),
            UploadEvent::Hashing { file } => output.detail(format_args!("checksum of {file}")),
            UploadEvent::Started { file, total_bytes } if !output.quiet => {
                bar = Some(transfer_bar(file, total_bytes));
            }
            UploadEvent::Advanced { bytes } => {
                if let Some(bar) = &bar {
                    bar.inc(bytes);
                }
            }
            UploadEvent::Finished { file } => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                    output.note(format_args!("uploaded {file}"));
                }
            }
            _ => {}
        }
    }

    /// Shows downloads as they go on.
    pub fn downloads(&self) -> impl FnMut(DownloadEvent<'_>) + use<> {
        let output = *self;
        let mut bar: Option<ProgressBar> = None;
        move |event| match event {
            DownloadEvent::Started { file, total_bytes } if !output.quiet => {
                bar = Some(transfer_bar(file, total_bytes));
            }
            DownloadEvent::Advanced { bytes } => {
                if let Some(bar) = &bar {
                    bar.inc(bytes);
                }
            }
            DownloadEvent::Finished { file } => {
                if let Some(bar) = bar.take() {
                    bar.finish_and_clear();
                    output.note(format_args!("downloaded {file}"));
                }
            }
            DownloadEvent::CacheOnly { id, reason } => output.note(format_args!(
                "warning: {reason}; going on with the files of {id} that were downloaded before"
            )),
            DownloadEvent::Waiting { file } => {
                output.note(format_args!(
                    "waiting for another process that downloads {file}"
                ));
            }
            _ => {}
        }
    }
}

/// The bar of a file on its way.
fn transfer_bar(file: &str, total_bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template(
        "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
    );
    let bar = ProgressBar::new(total_bytes);
    if let Ok(style) = style {
        bar.set_style(style);
    }
    bar.set_message(file.to_owned());
    bar
}

/// `1 row`, `2 rows`.
pub fn count(number: usize, what: &str) -> String {
    let ending = if number == 1 { "" } else { "s" };
    format!("{number} {what}{ending}")
}

/// A path as a shell takes it.
pub fn word(path: &Path) -> String {
    let text = path.display().to_string();
    let is_plain = |c: char| c.is_alphanumeric() || "/\\._-+:@,%".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text,
        false => format!("'{}'", text.replace('\'', "'\\''")),
    }
}

/// Prints a line on stderr. Unlike `eprintln!`, it does not end a run whose stderr is closed.
pub fn log(text: impl std::fmt::Display) {
    let _ = writeln!(io::stderr(), "{text}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_is_not_many() {
        assert_eq!(
            [0, 1, 2].map(|n| count(n, "row")),
            ["0 rows", "1 row", "2 rows"]
        );
    }

    #[test]
    fn a_path_is_one_word_of_a_shell() {
        let words = ["runs/a-1", "my run", "it's", "$HOME"].map(|path| word(Path::new(path)));
        assert_eq!(words, ["runs/a-1", "'my run'", "'it'\\''s'", "'$HOME'"]);
    }
}
