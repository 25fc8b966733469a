//! Numbers and texts as people read them, and as HTML takes them.

/// A text inside of HTML or SVG, in an element or a quoted attribute.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            '\'' => escaped.push_str("&#39;"),
            // neither SVG nor a screen can show these
            c if c.is_control() && !"\n\t\r".contains(c) => escaped.push('\u{fffd}'),
            c => escaped.push(c),
        }
    }
    escaped
}

/// JSON inside of a `<script>`: the same data, with nothing that could end the element.
pub fn script_json(json: &str) -> String {
    json.replace('<', "\\u003c")
}

/// `1,234,567`.
pub fn count(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `1.65 GiB`.
pub fn bytes(number: u64) -> String {
    let size = number as f64;
    match number {
        0..0x10_0000 => format!("{:.0} KiB", size / 1024.0),
        0x10_0000..0x4000_0000 => format!("{:.1} MiB", size / f64::from(1 << 20)),
        _ => format!("{:.2} GiB", size / f64::from(1 << 30)),
    }
}

/// `1 h 02 min`, `3 min 20 s`, `1.2 s` or `45 ms`.
pub fn duration(seconds: f64) -> String {
    let whole = seconds.round() as u64;
    match whole {
        _ if seconds < 0.9995 => format!("{:.0} ms", 1000.0 * seconds),
        0..10 => format!("{seconds:.1} s"),
        10..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        _ => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
    }
}

/// A loss.
pub fn loss(value: f64) -> String {
    match value > 0.0 && value < 1e-3 {
        true => format!("{value:.2e}"),
        false => format!("{value:.4}"),
    }
}

/// The middle one of some numbers.
pub fn median(values: impl Iterator<Item = f64>) -> Option<f64> {
    let mut values: Vec<f64> = values.filter(|value| value.is_finite()).collect();
    values.sort_unstable_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => None,
        count if count.is_multiple_of(2) => Some((values[middle - 1] + values[middle]) / 2.0),
        _ => Some(values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_read_well() {
        assert_eq!(
            [0, 999, 1000, 1_234_567].map(count),
            ["0", "999", "1,000", "1,234,567"]
        );
        assert_eq!(
            [2048, 5 << 20, 3 << 29].map(bytes),
            ["2 KiB", "5.0 MiB", "1.50 GiB"]
        );
        assert_eq!(
            [1.25, 9.54e-7, 0.0].map(loss),
            ["1.2500", "9.54e-7", "0.0000"]
        );
        let times = [0.25, 1.24, 59.4, 200.0, 3725.0].map(duration);
        assert_eq!(
            times,
            ["250 ms", "1.2 s", "59 s", "3 min 20 s", "1 h 02 min"]
        );
        assert_eq!(median([3.0, 1.0, f64::NAN].into_iter()), Some(2.0));
        assert_eq!(median(std::iter::empty()), None);
    }

    #[test]
    fn nothing_ends_the_element_that_it_is_in() {
        assert_eq!(
            escape("</script>&\"'\u{7}\n"),
            "&lt;/script&gt;&amp;&quot;&#39;\u{fffd}\n"
        );
        let json = serde_json::to_string("</script><!--").unwrap();
        let safe = script_json(&json);
        assert!(!safe.contains('<'));
        assert_eq!(
            serde_json::from_str::<String>(&safe).unwrap(),
            "</script><!--"
        );
    }
}
