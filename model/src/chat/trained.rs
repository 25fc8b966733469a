//! Which part of a rendered conversation is trained, in bytes of the text and in tokens.

use std::ops::Range;

use super::jinja::{END, MARKED, START};
use super::{Message, REASONING_KEYS, Renderer, TrainOn};
use crate::error::{Error, Result};
use crate::tokenizer::Encoding;

/// Which tokens are trained: those whose span overlaps a trained range.
///
/// A token that stands for no text is trained when it lies in a trained range or at its start.
pub fn trained_tokens(encoding: &Encoding, trained: &[Range<usize>]) -> Vec<bool> {
    let is_trained = |span: &Range<usize>| {
        trained
            .iter()
            .any(|range| span.start < range.end && range.start < span.end.max(span.start + 1))
    };
    encoding.spans.iter().map(is_trained).collect()
}

/// What the `{% generation %}` blocks print, from the answer `first` on: in front of it are the
/// prompt, and with [`TrainOn::Last`] the other answers.
pub(super) fn generated(
    renderer: &Renderer<'_>,
    text: &str,
    first: usize,
    prompt_turns: usize,
    train_on: TrainOn,
) -> Result<Vec<Range<usize>>> {
    let not_rendered = || Error::TurnNotRendered {
        name: renderer.chat.name.clone(),
        turn: first + 1,
    };
    let marked = renderer.render_with(MARKED, renderer.turns.iter().cloned(), false)?;
    let (ranges, plain) = take_marks(&marked).ok_or_else(not_rendered)?;
    if plain != text {
        return Err(not_rendered()); // the template looks at what the blocks print
    }
    if prompt_turns == 0 && train_on == TrainOn::Assistant {
        return Ok(ranges);
    }
    let head = renderer.render(renderer.turns[..first].iter().cloned(), false)?;
    if !text.starts_with(&head) {
        return Err(not_rendered());
    }
    let after = |range: Range<usize>| range.start.max(head.len())..range.end;
    let ranges = ranges.into_iter().map(after);
    Ok(ranges.filter(|range| !range.is_empty()).collect())
}

/// Takes the marks out of a text: where what they enclose then lies, and the text.
fn take_marks(marked: &str) -> Option<(Vec<Range<usize>>, String)> {
    let (mut ranges, mut text, mut rest) = (Vec::new(), String::new(), marked);
    while let Some((before, after)) = rest.split_once(START) {
        let (inside, after) = after.split_once(END)?;
        text.push_str(before);
        let start = text.len();
        text.push_str(inside);
        ranges.push(start..text.len());
        rest = after;
    }
    text.push_str(rest);
    Some((ranges, text))
}

/// The search for the turns of a conversation in its rendering.
pub(super) struct TurnSearch<'a> {
    pub(super) renderer: &'a Renderer<'a>,
    pub(super) text: &'a str,
    pub(super) messages: &'a [Message],
    pub(super) markers: &'a [&'a str],
}

impl TurnSearch<'_> {
    /// What is trained of a turn.
    pub(super) fn find(&self, turn: usize) -> Result<Range<usize>> {
        let message = &self.messages[turn];
        let reasons = REASONING_KEYS.iter().any(|key| message.has(key));
        let found = match message.text() {
            Some(content) if !message.has("tool_calls") => {
                let whole = if reasons {
                    self.find_whole(turn)?
                } else {
                    None
                };
                match whole {
                    Some(range) => Some(range),
                    None => self.find_content(turn, &content)?,
                }
            }
            _ => self.find_whole(turn)?,
        };
        let name = &self.renderer.chat.name;
        found.ok_or_else(|| Error::TurnNotRendered {
            name: name.clone(),
            turn: turn + 1,
        })
    }

    /// The content of a turn and its end marker.
    fn find_content(&self, turn: usize, content: &str) -> Result<Option<Range<usize>>> {
        let marker = unused_marker(self.text);
        let mut turns = self.renderer.turns.clone();
        turns[turn] = self.messages[turn].with_text(&marker).for_template();
        let marked = self.renderer.render(turns.into_iter(), false)?;
        let Some((before, after)) = marked.split_once(&marker) else {
            return Ok(None);
        };
        let shown = self
            .text
            .strip_prefix(before)
            .and_then(|rest| rest.strip_suffix(after));
        // A template may trim the content or show a part of it, but what it shows instead of it or
        // adds to it is not what the assistant said.
        let fits = |shown: &&str| {
            content.contains(shown) && (!shown.is_empty() || content.trim().is_empty())
        };
        let Some(shown) = shown.filter(fits).filter(|_| !after.contains(&marker)) else {
            return Ok(None);
        };
        let end = before.len() + shown.len();
        Ok(Some(before.len()..end + self.marker_len(end)))
    }

    /// The whole turn, from the end of the generation prompt on.
    fn find_whole(&self, turn: usize) -> Result<Option<Range<usize>>> {
        let first = |turns: usize| self.renderer.turns[..turns].iter().cloned();
        let head = self.renderer.render(first(turn), true)?;
        let upto = self.renderer.render(first(turn + 1), false)?;
        let fits = self.text.starts_with(&upto) && upto.starts_with(&head);
        let range = head.len()..upto.trim_end().len();
        Ok(Some(range).filter(|range| fits && !range.is_empty()))
    }

    /// The length of the end marker at a place of the text, with the white space before it; 0 when
    /// there is none.
    fn marker_len(&self, place: usize) -> usize {
        let rest = &self.text[place..];
        let blank = rest.len() - rest.trim_start().len();
        let lengths = self.markers.iter().filter_map(|marker| {
            // A marker may itself begin with white space.
            let blank = if rest.starts_with(*marker) { 0 } else { blank };
            rest[blank..]
                .starts_with(*marker)
                .then_some(blank + marker.len())
        });
        lengths.max().unwrap_or(0)
    }
}

/// Whether the text ends with one of the markers.
pub(super) fn ends_with_any(text: &str, markers: &[&str]) -> bool {
    markers.iter().any(|marker| text.ends_with(marker))
}

/// A string that the text does not have; of private characters, which no template trims or changes.
fn unused_marker(text: &str) -> String {
    let mut marker = String::from("\u{f8f0}\u{f8f1}\u{f8f2}");
    while text.contains(&marker) {
        marker.push('\u{f8f3}');
    }
    marker
}
