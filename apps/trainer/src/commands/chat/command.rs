//! What is typed in a chat: something to say, or a command.

/// A line.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed<'a> {
    /// Nothing at all.
    Nothing,
    /// Something to answer.
    Text(&'a str),
    /// Something to do.
    Command(Command<'a>),
    /// What there is to say of a command that cannot be done.
    Wrong(String),
}

/// Something to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Command<'a> {
    /// End the chat.
    Exit,
    /// Forget the conversation.
    Reset,
    /// Show the adapters, or use some.
    Adapter(Option<&'a str>),
    /// Add the conversation to a file of training rows.
    Save(&'a str),
    /// Show the commands.
    Help,
}

/// The commands.
pub const HELP: &str = "\
/reset          forget the conversation (also /clear)
/adapter        list the adapters
/adapter NAME   use this one: its folder, the end of its path, or the name of its run; off: none
/adapter A B=0.5  use several at once, with weights
/save FILE      add the conversation to a .jsonl file of training rows
/exit           leave (also /quit and Ctrl-D)
/help           this list
A line that begins with a space is never a command.
Ctrl-C stops an answer; between answers it ends the program.";

/// Reads a line. A command is a slash and a word; a path is something to say.
pub fn read(line: &str) -> Typed<'_> {
    let text = line.trim();
    if text.is_empty() {
        return Typed::Nothing;
    }
    let Some(command) = line.strip_prefix('/') else {
        return Typed::Text(text);
    };
    let (name, rest) = command
        .split_once(char::is_whitespace)
        .unwrap_or((command, ""));
    if name.is_empty()
        || !name
            .chars()
            .all(|c| c.is_alphanumeric() || "-_?".contains(c))
    {
        return Typed::Text(text);
    }
    let command = match (name, rest.trim()) {
        ("exit" | "quit", "") => Command::Exit,
        ("reset" | "clear", "") => Command::Reset,
        ("help", "") => Command::Help,
        ("adapter", "") => Command::Adapter(None),
        ("adapter", name) => Command::Adapter(Some(name)),
        ("save", "") => return Typed::Wrong("/save needs a file: /save chats.jsonl".into()),
        ("save", file) => Command::Save(file),
        ("exit" | "quit" | "reset" | "clear" | "help", rest) => {
            return Typed::Wrong(format!("/{name} stands alone, without {rest:?}"));
        }
        _ => return Typed::Wrong(format!("there is no /{name}; /help lists what there is")),
    };
    Typed::Command(command)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slash_and_a_word_are_a_command() {
        use Command as C;
        for (line, command) in [
            ("/exit", C::Exit),
            ("/quit  ", C::Exit),
            ("/clear", C::Reset),
            ("/adapter", C::Adapter(None)),
            (
                "/adapter  runs/my run/adapter ",
                C::Adapter(Some("runs/my run/adapter")),
            ),
            ("/save my chats.jsonl", C::Save("my chats.jsonl")),
        ] {
            assert_eq!(read(line), Typed::Command(command), "{line}");
        }
        for line in [
            "/nonsense",
            "/reset now",
            "/save",
            "/resett all of it",
            "/?",
        ] {
            assert!(matches!(read(line), Typed::Wrong(_)), "{line}");
        }
        for line in [
            " /exit",
            "/usr/bin holds what?",
            "a /exit",
            "/",
            "// a comment",
            "/ 2",
        ] {
            assert_eq!(read(line), Typed::Text(line.trim()), "{line}");
        }
        assert_eq!(read(" \t"), Typed::Nothing);
    }
}
