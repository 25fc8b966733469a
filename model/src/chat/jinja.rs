//! The jinja environment of chat templates: what transformers gives them, on minijinja.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Tuple, Value, ValueKind, from_args};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, State};
use minijinja_contrib::{globals, pycompat};

/// The template as it is.
pub(super) const PLAIN: &str = "template";
/// The template with what `{% generation %}` blocks print between [`START`] and [`END`].
pub(super) const MARKED: &str = "template with marks";
/// Private characters, which no template trims or changes.
pub(super) const START: &str = "\u{f8e0}\u{f8e1}\u{f8e2}";
/// As [`START`].
pub(super) const END: &str = "\u{f8e0}\u{f8e3}\u{f8e4}";

/// A template in its environment; cheap to clone.
#[derive(Clone)]
pub(super) struct Compiled {
    environment: Arc<Environment<'static>>,
    /// Whether it has `{% generation %}` blocks.
    pub(super) has_generation: bool,
}

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Compiled")
            .field("has_generation", &self.has_generation)
            .finish_non_exhaustive()
    }
}

impl Compiled {
    pub(super) fn new(source: &str) -> Result<Self, Error> {
        let mut environment = environment()?;
        let marked = mark_generation(source);
        if let Some(marked) = &marked {
            environment.add_template_owned(MARKED, marked.clone())?;
        }
        // Minijinja has no generation tags; without marks they only open a scope.
        let plain = marked.map(|marked| marked.replace(FILTER, "").replace(END_FILTER, ""));
        environment.add_template_owned(PLAIN, plain.unwrap_or_else(|| source.to_owned()))?;
        Ok(Self {
            has_generation: environment.get_template(MARKED).is_ok(),
            environment: Arc::new(environment),
        })
    }

    pub(super) fn render(
        &self,
        template: &str,
        context: BTreeMap<&str, Value>,
    ) -> Result<String, Error> {
        self.environment.get_template(template)?.render(context)
    }
}

/// The environment that templates run in: blocks trimmed, Python's methods and JSON.
fn environment() -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()?;
    environment.set_syntax(syntax);
    environment.set_auto_escape_callback(|_| AutoEscape::None);
    environment.set_unknown_method_callback(call_method);
    environment.add_filter("tojson", to_json);
    environment.add_filter("trim", trim);
    environment.add_filter("truncate", truncate);
    environment.add_filter("mark_generation", |text: &str| {
        format!("{START}{text}{END}")
    });
    environment.add_test("sequence", is_sequence);
    environment.add_test("iterable", is_iterable);
    environment.add_function("cycler", |items: Rest<Value>| {
        globals::cycler(items.to_vec())
    });
    environment.add_function("joiner", globals::joiner);
    environment.add_function("raise_exception", raise_exception);
    environment.add_function("strftime_now", strftime_now);
    Ok(environment)
}

const FILTER: &str = " %}{% filter mark_generation";
const END_FILTER: &str = "endfilter %}{% ";

/// Writes `{% generation %}` blocks, which transformers has to find what an assistant says, in tags
/// that minijinja knows: a scope, and in it a filter that puts marks around what is printed. The
/// white space control around and inside of the blocks stays. `None` if there are none.
fn mark_generation(source: &str) -> Option<String> {
    let mut found = false;
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        let Some(end) = tag.find("%}") else {
            rest = tag;
            break;
        };
        let inner = &tag[..end];
        match inner.trim_matches(['-', '+']).trim() {
            "generation" => {
                found = true;
                out.push_str(&inner.replace("generation", &format!("with{FILTER}")));
            }
            "endgeneration" => {
                let tags = format!("{END_FILTER}endwith");
                out.push_str(&inner.replace("endgeneration", &tags));
            }
            _ => out.push_str(inner),
        }
        rest = &tag[end..];
    }
    out.push_str(rest);
    found.then_some(out)
}

/// Jinja's test, to which all that has a length and items is a sequence.
fn is_sequence(value: &Value) -> bool {
    use ValueKind::{Map, Seq, String, Undefined};
    matches!(value.kind(), Map | Seq | String | Undefined)
}

/// Jinja's test; minijinja can also go through a none.
fn is_iterable(value: &Value) -> bool {
    !value.is_none() && value.try_iter().is_ok()
}

fn raise_exception(message: String) -> Result<Value, Error> {
    Err(Error::new(ErrorKind::InvalidOperation, message))
}

/// Python's string methods that minijinja's compatibility layer lacks, then that layer.
fn call_method(
    state: &mut State,
    value: &Value,
    method: &str,
    args: &[Value],
) -> Result<Value, Error> {
    let Some(text) = value.as_str() else {
        return pycompat::unknown_method_callback(state, value, method, args);
    };
    match method {
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_prefix(prefix).unwrap_or(text)))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(args)?;
            Ok(Value::from(text.strip_suffix(suffix).unwrap_or(text)))
        }
        "rsplit" => {
            let (separator, limit): (&str, Option<usize>) = from_args(args)?;
            let mut pieces: Vec<&str> = match limit {
                Some(limit) => text.rsplitn(limit + 1, separator).collect(),
                None => text.rsplit(separator).collect(),
            };
            pieces.reverse();
            Ok(pieces.into_iter().map(Value::from).collect())
        }
        "partition" | "rpartition" => {
            let (separator,): (&str,) = from_args(args)?;
            let parts = match (
                method,
                text.split_once(separator),
                text.rsplit_once(separator),
            ) {
                ("partition", Some((head, tail)), _) => [head, separator, tail],
                ("partition", None, _) => [text, "", ""],
                (_, _, Some((head, tail))) => [head, separator, tail],
                (_, _, None) => ["", "", text],
            };
            Ok(Value::from(Tuple::from(parts.map(Value::from))))
        }
        "split" if args.last().is_some_and(Value::is_kwargs) => {
            let options: Kwargs = from_args::<(Kwargs,)>(args)?.0;
            let separator = options.get::<Option<Value>>("sep")?;
            let limit = options.get::<Option<Value>>("maxsplit")?;
            options.assert_all_used()?;
            let by_place = [
                separator.unwrap_or_default(),
                limit.unwrap_or(Value::from(-1)),
            ];
            pycompat::unknown_method_callback(state, value, method, &by_place)
        }
        "strip" | "lstrip" | "rstrip" if args.first().is_none_or(Value::is_none) => {
            Ok(Value::from(strip(text, method)))
        }
        "splitlines" if args.is_empty() => Ok(split_lines(text).map(Value::from).collect()),
        "title" => Ok(Value::from(title(text))),
        "index" => {
            let (part,): (&str,) = from_args(args)?;
            let place = text.find(part).map(|at| text[..at].chars().count());
            let missing = || Error::new(ErrorKind::InvalidOperation, "substring not found");
            place.map(Value::from).ok_or_else(missing)
        }
        "casefold" => Ok(Value::from(text.to_lowercase())),
        "zfill" => {
            let (width,): (usize,) = from_args(args)?;
            Ok(Value::from(format!("{text:0>width$}")))
        }
        "ljust" | "rjust" => {
            let (width, fill): (usize, Option<char>) = from_args(args)?;
            let missing = width.saturating_sub(text.chars().count());
            let blank = fill.unwrap_or(' ').to_string().repeat(missing);
            Ok(Value::from(match method {
                "ljust" => format!("{text}{blank}"),
                _ => format!("{blank}{text}"),
            }))
        }
        _ => pycompat::unknown_method_callback(state, value, method, args),
    }
}

/// White space, as Python's strings see it: four control characters more than Unicode's.
pub(super) fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c)
}

fn strip<'a>(text: &'a str, method: &str) -> &'a str {
    match method {
        "lstrip" => text.trim_start_matches(is_space),
        "rstrip" => text.trim_end_matches(is_space),
        _ => text.trim_matches(is_space),
    }
}

/// Jinja's filter `trim`, of anything that can be printed.
fn trim(value: &Value, chars: Option<&str>) -> String {
    let text = value.to_string();
    match chars {
        Some(chars) => text.trim_matches(|c| chars.contains(c)).to_owned(),
        None => strip(&text, "strip").to_owned(),
    }
}

/// The lines of a text, by all the breaks that Python knows.
fn split_lines(text: &str) -> impl Iterator<Item = &str> {
    let is_break =
        |c| matches!(c, '\n'..='\r' | '\u{1c}'..='\u{1e}' | '\u{85}' | '\u{2028}' | '\u{2029}');
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = rest.find(is_break).unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        let after = after.strip_prefix("\r\n").unwrap_or_else(|| {
            let mut chars = after.chars();
            chars.next();
            chars.as_str()
        });
        rest = after;
        Some(line)
    })
}

/// Python's `title`: every letter that follows no letter is a capital, those after an apostrophe, too.
fn title(text: &str) -> String {
    let mut is_first = true;
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match is_first {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        is_first = !c.is_alphabetic();
    }
    out
}

/// `tojson` as transformers has it: `json.dumps` with `ensure_ascii=False` and no HTML escapes.
fn to_json(value: Value, options: Kwargs) -> Result<String, Error> {
    let ascii = options
        .get::<Option<bool>>("ensure_ascii")?
        .unwrap_or(false);
    let sort_keys = options.get::<Option<bool>>("sort_keys")?.unwrap_or(false);
    let indent = options.get::<Option<usize>>("indent")?;
    let separators = options.get::<Option<Vec<String>>>("separators")?;
    options.assert_all_used()?;
    let (comma, colon) = match separators.as_deref() {
        Some([comma, colon]) => (comma.clone(), colon.clone()),
        _ if indent.is_some() => (",".to_owned(), ": ".to_owned()),
        _ => (", ".to_owned(), ": ".to_owned()),
    };
    let value = serde_json::to_value(&value).map_err(|e| {
        Error::new(ErrorKind::InvalidOperation, "cannot write as JSON").with_source(e)
    })?;
    let mut writer = JsonWriter {
        out: String::new(),
        ascii,
        sort_keys,
        indent,
        comma,
        colon,
    };
    writer.write(&value, 1);
    Ok(writer.out)
}

/// Writes JSON with the spacing of Python's `json.dumps`.
struct JsonWriter {
    out: String,
    ascii: bool,
    sort_keys: bool,
    indent: Option<usize>,
    comma: String,
    colon: String,
}

impl JsonWriter {
    fn write(&mut self, value: &serde_json::Value, depth: usize) {
        use serde_json::Value::{Array, Number, Object, String};
        match value {
            String(text) => self.write_string(text),
            Number(number) => match number.as_f64().filter(|_| number.is_f64()) {
                Some(float) => self.out.push_str(&python_float(float)),
                None => self.out.push_str(&number.to_string()),
            },
            Array(items) => self.write_items('[', ']', depth, items, |writer, item| {
                writer.write(item, depth + 1);
            }),
            Object(map) => {
                let mut entries = map.iter().collect::<Vec<_>>();
                if self.sort_keys {
                    entries.sort_by_key(|(key, _)| *key);
                }
                self.write_items('{', '}', depth, &entries, |writer, (key, item)| {
                    writer.write_string(key);
                    writer.out.push_str(&writer.colon.clone());
                    writer.write(item, depth + 1);
                });
            }
            other => self.out.push_str(&other.to_string()),
        }
    }

    fn write_items<T>(
        &mut self,
        open: char,
        close: char,
        depth: usize,
        items: &[T],
        write: impl Fn(&mut Self, &T),
    ) {
        self.out.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                self.out.push_str(&self.comma.clone());
            }
            self.break_line(depth);
            write(self, item);
        }
        if !items.is_empty() {
            self.break_line(depth - 1);
        }
        self.out.push(close);
    }

    fn break_line(&mut self, depth: usize) {
        if let Some(indent) = self.indent {
            self.out.push('\n');
            self.out.push_str(&" ".repeat(indent * depth));
        }
    }

    fn write_string(&mut self, text: &str) {
        let quoted = serde_json::Value::from(text).to_string();
        if !self.ascii {
            self.out.push_str(&quoted);
            return;
        }
        for c in quoted.chars() {
            if c.is_ascii() {
                self.out.push(c);
            } else {
                let mut units = [0; 2];
                for unit in c.encode_utf16(&mut units) {
                    self.out.push_str(&format!("\\u{unit:04x}"));
                }
            }
        }
    }
}

/// A float as Python prints it: an exponent from 1e16 on and below 1e-4, with two digits.
fn python_float(float: f64) -> String {
    let scientific = format!("{float:e}");
    let (digits, exponent) = scientific.split_once('e').unwrap_or((&scientific, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    match exponent {
        -4..16 => format!("{float:?}"),
        _ => format!(
            "{digits}e{}{:02}",
            if exponent < 0 { '-' } else { '+' },
            exponent.abs()
        ),
    }
}

/// Jinja's filter `truncate(length=255, killwords=false, end="...", leeway=5)`.
fn truncate(text: &str, args: Rest<Value>, options: Kwargs) -> Result<String, Error> {
    let arg = |index: usize, name: &str| match args.get(index) {
        Some(arg) => Ok(Some(arg.clone())),
        None => options.get::<Option<Value>>(name),
    };
    let number = |arg: Option<Value>, default| arg.map_or(Ok(default), usize::try_from);
    let length = number(arg(0, "length")?, 255)?;
    let kills_words = arg(1, "killwords")?.is_some_and(|arg| arg.is_true());
    let end = arg(2, "end")?.map_or_else(|| "...".to_owned(), |end| end.to_string());
    if text.chars().count() <= length + number(arg(3, "leeway")?, 5)? {
        return Ok(text.to_owned());
    }
    let kept = length.saturating_sub(end.chars().count());
    let cut: String = text.chars().take(kept).collect();
    let whole = match cut.rsplit_once(' ') {
        Some((words, _)) if !kills_words => words,
        _ => &cut,
    };
    Ok(whole.to_owned() + &end)
}

/// The local time, in the codes of Python's `strftime`.
fn strftime_now(format: &str) -> Result<String, Error> {
    jiff::fmt::strtime::format(format, &jiff::Zoned::now()).map_err(|e| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now({format:?}): {e}"),
        )
    })
}
