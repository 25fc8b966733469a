//! Which part of a rendered conversation is trained, in bytes of the text and in tokens.

use std::ops::Range;

use super::jinja::{END, MARKED, START, is_space};
use super::{Message, Renderer, SPOKEN_KEYS, TrainOn};
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
///
/// A turn is found by rendering the conversation again with a marker in the place of what the turn
/// says: what then stands around the marker stands around the turn's body in the real text.
pub(super) struct TurnSearch<'a> {
    pub(super) renderer: &'a Renderer<'a>,
    pub(super) text: &'a str,
    pub(super) messages: &'a [Message],
    pub(super) markers: &'a [&'a str],
}

/// What stands before and after the only place where a marker is shown.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    before: String,
    after: String,
}

impl TurnSearch<'_> {
    /// What is trained of a turn.
    pub(super) fn find(&self, turn: usize) -> Result<Range<usize>> {
        let found = self.find_body(turn).map(|body| {
            let end = body.end + self.marker_len(body.end);
            body.start..end
        });
        found.ok_or_else(|| Error::TurnNotRendered {
            name: self.renderer.chat.name.clone(),
            turn: turn + 1,
        })
    }

    /// What a turn says: its text, and its reasoning and tool calls where the template shows these.
    fn find_body(&self, turn: usize) -> Option<Range<usize>> {
        let (message, all) = (&self.messages[turn], self.messages.len());
        let marker = unused_marker(self.text);
        let own = self.frame(turn, message.with_text(&marker), all, &marker);
        let content = message.text().unwrap_or_default();
        if !message.extra.keys().any(|key| message.has(key)) {
            return self.content_between(&own?, &content);
        }
        let bare = self.frame(turn, message.without_extra(&marker), all, &marker);
        if let (Some(own), true) = (&own, own == bare)
            && let Some(found) = self.content_between(own, &content)
        {
            return Some(found);
        }
        let speaks_by_keys = SPOKEN_KEYS.iter().any(|key| message.has(key));
        match own {
            Some(own) if !speaks_by_keys => self.content_between(&own, &content),
            own => self.find_whole(turn, own.as_ref(), bare.as_ref()),
        }
    }

    /// The frame of a marker in a turn of the first `turns`; none when the template refuses the
    /// marker, hides it or shows it twice.
    fn frame(&self, turn: usize, message: Message, turns: usize, marker: &str) -> Option<Frame> {
        let mut marked = self.renderer.turns[..turns].to_vec();
        marked[turn] = message.for_template();
        let text = self.renderer.render(marked.into_iter(), false).ok()?;
        let (before, after) = text.split_once(marker)?;
        (!after.contains(marker)).then(|| Frame {
            before: before.to_owned(),
            after: after.to_owned(),
        })
    }

    /// The content in its frame.
    fn content_between(&self, frame: &Frame, content: &str) -> Option<Range<usize>> {
        let rest = self.text.strip_suffix(&frame.after)?;
        let Some(shown) = rest.strip_prefix(&frame.before) else {
            // without a content, what would stand in front of it can be missing
            let is_header =
                content.trim_matches(is_space).is_empty() && is_separator(rest, &frame.before);
            return is_header.then_some(rest.len()..rest.len());
        };
        // A template may trim the content or show a part of it, but what it shows instead of it or
        // adds to it is not what the assistant said.
        let fits = content.contains(shown)
            && (!shown.is_empty() || content.trim_matches(is_space).is_empty());
        fits.then_some(frame.before.len()..rest.len())
    }

    /// All that a turn shows. `own` is the frame of its content beside the rest, `bare` that of a
    /// turn which has a content only: both are there where the template allows them.
    fn find_whole(
        &self,
        turn: usize,
        own: Option<&Frame>,
        bare: Option<&Frame>,
    ) -> Option<Range<usize>> {
        let marker = unused_marker(self.text);
        let message = self.messages[turn].without_extra(&marker);
        // Without the turns after it, which may not follow a turn that calls no tool.
        let last = self.frame(turn, message, turn + 1, &marker);
        let in_frame = || {
            let start = self.start(turn, own, bare.or(last.as_ref()))?;
            Some(start..self.end(turn, start, bare, last.as_ref())?)
        };
        let found = in_frame().or_else(|| self.missing_without(turn, last.as_ref()?));
        found.filter(|found| !found.is_empty())
    }

    /// What the text loses when the turn is left out, without its header: for templates that show
    /// earlier turns differently when later ones follow, so that no frame fits. It ends with an end
    /// marker, which tells it from the same text moved by some characters.
    fn missing_without(&self, turn: usize, last: &Frame) -> Option<Range<usize>> {
        let mut turns = self.renderer.turns.clone();
        turns.remove(turn);
        let without = self.renderer.render(turns.into_iter(), false).ok()?;
        let lost = self.text.len().checked_sub(without.len())?;
        let is_lost = |end: &usize| {
            let around = end
                .checked_sub(lost)
                .and_then(|start| self.text.get(..start))
                .and_then(|before| without.strip_prefix(before));
            around.is_some_and(|after| self.text.get(*end..) == Some(after))
        };
        let ends = self.markers.iter().flat_map(|marker| {
            let places = self.text.match_indices(marker);
            places.map(|(at, marker)| at + marker.len())
        });
        let mut ends = ends.filter(is_lost);
        let end = ends.next()?;
        if ends.any(|other| other != end) {
            return None;
        }
        let turns = self.renderer.turns[..turn].iter().cloned();
        let before = self.renderer.render(turns, false).ok()?;
        let header = last.before.strip_prefix(&before)?;
        let body = &self.text[end - lost..end];
        let shown = common_prefix(body, header);
        is_separator(shown, header).then_some(end - lost + shown.len()..end)
    }

    fn start(&self, turn: usize, own: Option<&Frame>, bare: Option<&Frame>) -> Option<usize> {
        let content = self.messages[turn].text().unwrap_or_default();
        let is_blank = content.trim_matches(is_space).is_empty();
        let fits = |before: &str| self.text.starts_with(before).then_some(before.len());
        if let Some(bare) = bare {
            // the content comes first
            let own = own.filter(|own| !is_blank && bare.before.starts_with(&own.before));
            let empty = || self.empty_header(turn, bare).filter(|_| is_blank);
            let known = own.and_then(|own| fits(&own.before));
            let known = known.or_else(|| fits(&empty()?));
            if let Some(start) = known.or_else(|| fits(&bare.before)) {
                return Some(start);
            }
        }
        let before = |prompt| {
            let turns = self.renderer.turns[..turn].iter().cloned();
            self.renderer.render(turns, prompt).ok()
        };
        let prompt =
            before(true).filter(|prompt| before(false).is_some_and(|none| none != *prompt));
        prompt.and_then(|prompt| fits(&prompt)).or_else(|| {
            // what separates a header from a content may be missing in front of a tool call
            let header = common_prefix(self.text, &bare?.before);
            let is_word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            let cuts = is_word(header.chars().next_back())
                && is_word(self.text[header.len()..].chars().next());
            (!cuts && is_separator(header, &bare?.before)).then_some(header.len())
        })
    }

    /// What stands in front of the content of a turn that says nothing.
    fn empty_header(&self, turn: usize, bare: &Frame) -> Option<String> {
        let content = self.messages[turn].text().unwrap_or_default();
        let message = self.messages[turn].without_extra(&content);
        let turns = |turns: usize| {
            let mut all = self.renderer.turns[..turns].to_vec();
            all[turn] = message.for_template();
            self.renderer.render(all.into_iter(), false).ok()
        };
        let texts = [self.messages.len(), turn + 1]
            .into_iter()
            .filter_map(turns);
        let headers = texts.filter_map(|text| Some(text.strip_suffix(&bare.after)?.to_owned()));
        let mut headers = headers.filter(|header| bare.before.starts_with(header));
        headers.next()
    }

    fn end(
        &self,
        turn: usize,
        start: usize,
        bare: Option<&Frame>,
        last: Option<&Frame>,
    ) -> Option<usize> {
        let rest = bare.and_then(|bare| self.text.strip_suffix(&bare.after));
        if let Some(end) = rest.map(str::len).filter(|end| start <= *end) {
            return Some(end);
        }
        let turns = self.renderer.turns[..=turn].iter().cloned();
        let upto = self.renderer.render(turns, false).ok()?;
        let body = last.and_then(|last| upto.strip_suffix(&last.after));
        let body = body.filter(|body| start <= body.len() && self.text.starts_with(body));
        body.map(str::len).or_else(|| {
            // The turn ends otherwise than one without tool calls: with a marker, or at its end.
            let own = upto.get(start..)?;
            let ends = self
                .markers
                .iter()
                .filter_map(|m| own.rfind(m).map(|at| at + m.len()));
            let end = start + ends.max().unwrap_or(own.trim_end().len());
            self.text.starts_with(&upto[..end]).then_some(end)
        })
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

/// Whether a text is the beginning of a header that lacks a separator at most: white space and
/// punctuation.
fn is_separator(text: &str, header: &str) -> bool {
    let missing = header.strip_prefix(text);
    missing.is_some_and(|missing| !missing.contains(char::is_alphanumeric))
}

fn common_prefix<'a>(a: &'a str, b: &str) -> &'a str {
    let same = a.char_indices().zip(b.chars()).find(|((_, a), b)| a != b);
    &a[..same.map_or(a.len().min(b.len()), |((at, _), _)| at)]
}

/// A string that the text does not have; of private characters, which no template trims or changes.
fn unused_marker(text: &str) -> String {
    let mut marker = String::from("\u{f8f0}\u{f8f1}\u{f8f2}");
    while text.contains(&marker) {
        marker.push('\u{f8f3}');
    }
    marker
}
