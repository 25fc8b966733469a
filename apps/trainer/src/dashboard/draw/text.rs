//! Texts in little room. Half of a number looks like another one: what is cut says so, or is left out.

/// The beginning of a text.
pub fn start_of(text: &str, width: usize) -> String {
    match text.chars().count() <= width {
        true => text.to_owned(),
        false => text
            .chars()
            .take(width.saturating_sub(1))
            .chain(['…'])
            .take(width)
            .collect(),
    }
}

/// The end of a text: of a path it tells more than the beginning.
pub fn end_of(text: &str, width: usize) -> String {
    let count = text.chars().count();
    match count <= width {
        true => text.to_owned(),
        false => {
            let end = text.chars().skip(count + 1 - width.max(1));
            ['…'].into_iter().chain(end).take(width).collect()
        }
    }
}

/// A name of `usual` characters and a value behind it. Where there is no room for both, the name is
/// what becomes shorter.
pub fn pair(name: &str, value: &str, usual: usize, width: usize) -> (String, String) {
    let left = width.saturating_sub(value.chars().count() + 1);
    let name = start_of(name, left.min(usual));
    let padding = left.min(usual);
    (format!("{name:padding$} "), start_of(value, width))
}

/// The first items that have room side by side.
pub fn joined(items: &[String], width: usize) -> String {
    let mut all = String::new();
    for item in items {
        let next = match all.is_empty() {
            true => start_of(item, width),
            false => format!("{all}  {item}"),
        };
        if next.chars().count() > width {
            break;
        }
        all = next;
    }
    all
}

/// Lines of at most `width`, broken between words; a word that is longer is broken as well.
pub fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        let next = match lines.last() {
            Some(line) => format!("{line} {word}"),
            None => word.to_owned(),
        };
        if next.chars().count() <= width {
            lines.pop();
            lines.push(next);
        } else {
            let all: Vec<char> = word.chars().collect();
            lines.extend(all.chunks(width.max(1)).map(String::from_iter));
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_cut_says_so() {
        assert_eq!(
            ["runs/a", "runs/ab"].map(|text| start_of(text, 6)),
            ["runs/a", "runs/…"]
        );
        assert_eq!(
            ["runs/a", "runs/ab"].map(|text| end_of(text, 6)),
            ["runs/a", "…ns/ab"]
        );
        assert_eq!(
            (start_of("abc", 0), end_of("abc", 0)),
            (String::new(), String::new())
        );
        assert_eq!(end_of("abc", 1), "…");
    }

    #[test]
    fn a_value_stays_whole_as_long_as_it_can() {
        let shown = |width| {
            let (name, value) = pair("Gradient norm", "12345678", 14, width);
            name + &value
        };
        assert_eq!(shown(40), "Gradient norm  12345678");
        assert_eq!(shown(20), "Gradient n… 12345678");
        assert_eq!(shown(9), " 12345678");
        assert_eq!(shown(5), " 1234…");
        let items = ["step 9000/10000", "ETA 12s", "evaluating"].map(str::to_owned);
        assert_eq!(joined(&items, 24), "step 9000/10000  ETA 12s");
        assert_eq!(joined(&items, 23), "step 9000/10000");
        assert_eq!(joined(&items, 9), "step 900…");
    }

    #[test]
    fn long_messages_go_on_in_the_next_line() {
        assert_eq!(
            wrapped("step 100  eval loss 0.5", 12),
            ["step 100 ", "eval loss", "0.5"]
        );
        assert_eq!(wrapped("abcdef gh", 4), ["abcd", "ef", "gh"]);
        assert_eq!(wrapped("", 4), [""]);
        assert_eq!(wrapped("ab", 0), ["a", "b"]);
    }
}
