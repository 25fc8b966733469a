//! Lines that a user types, or that come through a pipe.

use std::io::{self, BufRead, ErrorKind, IsTerminal};

use anyhow::{Context, Result};
use rustyline::error::{ReadlineError, Signal};

use crate::failure::Advised;
use crate::terminal;

const PROMPT: &str = "> ";

/// Where lines come from.
pub enum Lines {
    /// A terminal, with the keys that edit a line and walk through earlier ones.
    Terminal(Box<rustyline::DefaultEditor>),
    /// Anything else, without a prompt.
    Pipe,
}

/// What comes next.
pub enum Line {
    /// A line, without its end.
    Text(String),
    /// Ctrl-D, or the end of the pipe.
    End,
    /// Ctrl-C.
    Interrupted,
}

impl Lines {
    /// Reads stdin.
    pub fn open() -> Result<Self> {
        let terminal = io::stdin().is_terminal() && io::stdout().is_terminal();
        Ok(match terminal {
            true => Self::Terminal(Box::new(
                rustyline::DefaultEditor::new().context("cannot use the terminal")?,
            )),
            false => Self::Pipe,
        })
    }

    /// Whether somebody types them.
    pub fn are_typed(&self) -> bool {
        matches!(self, Self::Terminal(_))
    }

    /// Waits for the next line.
    pub fn next(&mut self) -> Result<Line> {
        match self {
            Self::Terminal(editor) => match terminal::while_editing(|| editor.readline(PROMPT)) {
                Ok(text) => {
                    let _ = editor.add_history_entry(&text); // kept in memory alone
                    Ok(Line::Text(text))
                }
                Err(ReadlineError::Eof) => Ok(Line::End),
                Err(ReadlineError::Interrupted | ReadlineError::Signal(Signal::Interrupt)) => {
                    Ok(Line::Interrupted)
                }
                Err(error) => Err(error).context("cannot read from the terminal"),
            },
            Self::Pipe => read_pipe(),
        }
    }
}

fn read_pipe() -> Result<Line> {
    let mut text = String::new();
    match io::stdin().lock().read_line(&mut text) {
        Ok(0) => Ok(Line::End),
        Ok(_) => Ok(Line::Text(text.trim_end_matches(['\r', '\n']).to_owned())),
        Err(e) if e.kind() == ErrorKind::InvalidData => {
            Err(Advised::failed("stdin is not UTF-8", "send the text as UTF-8").into())
        }
        Err(e) => Err(e).context("cannot read stdin"),
    }
}
