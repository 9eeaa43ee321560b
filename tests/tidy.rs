//! Keeps the house in order: who may name whom, where lapin and unsafe code live, what nothing may be called.
//!
//! The rules on arrows are the room table of `ARCHITECTURE.md`. Sources are looked at as text without comments and
//! strings, which is enough for paths such as `crate::room::Thing` and needs no parser of Rust.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const TABLE_HEADING: &str = "| room | may name | must not know |";

/// Words of the code that only one room may say.
const KEPT_WORDS: [(&str, &str); 2] = [("lapin", "broker"), ("unsafe", "ceph")];

/// Names that say nothing about what is inside.
const EMPTY_NAMES: [&str; 5] = ["utils", "common", "helpers", "types", "manager"];

#[test]
fn no_arrow_points_the_wrong_way() {
    let rules = Rules::parse(&read(&root().join("ARCHITECTURE.md"))).unwrap();
    let sources = sources_below("src");
    assert!(sources.iter().any(|source| source.room() == Some("job")), "no room was found below src");

    assert_none(sources.iter().flat_map(|source| wrong_arrows(source, &rules)));
}

#[test]
fn lapin_and_unsafe_code_stay_in_their_rooms() {
    assert_none(sources_below("src").iter().flat_map(strayed_words));
}

#[test]
fn every_source_file_opens_with_what_it_is_for() {
    assert_none(sources_below("src").iter().flat_map(missing_opening));
}

#[test]
fn nothing_has_an_empty_name() {
    let sources = [sources_below("src"), sources_below("tests")].concat();

    assert_none(sources.iter().flat_map(empty_name));
}

#[test]
fn no_test_is_ignored() {
    let sources = [sources_below("src"), sources_below("tests")].concat();

    assert_none(sources.iter().flat_map(ignored_tests));
}

fn assert_none(problems: impl Iterator<Item = String>) {
    let problems: Vec<String> = problems.collect();
    assert!(problems.is_empty(), "\n{}\n", problems.join("\n"));
}

/// What the room table says.
struct Rules(BTreeMap<String, MayName>);

/// What a room may name besides itself.
#[derive(Debug, PartialEq)]
enum MayName {
    Everything,
    Rooms(BTreeSet<String>),
}

impl Rules {
    /// Reads the room table out of a Markdown text.
    fn parse(markdown: &str) -> Result<Self, String> {
        let mut rows = markdown.lines().skip_while(|line| line.trim() != TABLE_HEADING).skip(1);
        if !rows.next().is_some_and(|line| line.starts_with("|--")) {
            return Err(format!("no table with the heading {TABLE_HEADING:?}"));
        }
        let mut rules = BTreeMap::new();
        for row in rows.take_while(|line| line.starts_with('|')) {
            let cells: Vec<&str> = row.trim().trim_matches('|').split('|').map(str::trim).collect();
            let [rooms, may_name, _] = cells[..] else {
                return Err(format!("this row has not three cells: {row}"));
            };
            for room in words(rooms) {
                let may_name = match may_name {
                    "everything" => MayName::Everything,
                    "nothing" => MayName::Rooms(BTreeSet::new()),
                    others => MayName::Rooms(words(others).collect()),
                };
                if rules.insert(room.clone(), may_name).is_some() {
                    return Err(format!("{room} has two rows"));
                }
            }
        }
        for (room, may_name) in &rules {
            let MayName::Rooms(named) = may_name else { continue };
            if let Some(unknown) = named.iter().find(|name| !rules.contains_key(*name)) {
                return Err(format!("{room} may name {unknown}, which has no row"));
            }
        }
        Ok(Self(rules))
    }

    /// Says why `from` must not name `to`, if it must not.
    fn broken_by(&self, from: &str, to: &str) -> Option<String> {
        match self.0.get(from) {
            _ if from == to => None,
            None => Some(format!("{from} has no row in the room table of ARCHITECTURE.md")),
            _ if !self.0.contains_key(to) => Some(format!("{to} is no room of the table in ARCHITECTURE.md")),
            Some(MayName::Everything) => None,
            Some(MayName::Rooms(rooms)) if rooms.contains(to) => None,
            Some(MayName::Rooms(rooms)) if rooms.is_empty() => Some(format!("{from} may name nothing")),
            Some(MayName::Rooms(rooms)) => {
                let rooms: Vec<&str> = rooms.iter().map(String::as_str).collect();
                Some(format!("{from} may name {} and nothing else", rooms.join(", ")))
            }
        }
    }
}

/// Splits a cell of the table at its commas.
fn words(cell: &str) -> impl Iterator<Item = String> {
    cell.split(',').map(|word| word.trim().trim_matches('`').to_owned())
}

/// A source file.
#[derive(Clone)]
struct Source {
    /// Relative to the repository, such as `src/job/mod.rs`.
    path: PathBuf,
    text: String,
}

impl Source {
    fn new(path: &str, text: &str) -> Self {
        Self { path: path.into(), text: text.into() }
    }

    /// The names of folders and file from `src` or `tests` on, without `.rs`.
    fn parts(&self) -> Vec<&str> {
        self.path.iter().skip(1).map(|part| part.to_str().unwrap().trim_end_matches(".rs")).collect()
    }

    /// The room that the file belongs to; `main.rs` and `lib.rs` stand outside.
    fn room(&self) -> Option<&str> {
        self.parts().first().copied().filter(|&part| part != "main" && part != "lib")
    }

    /// How many `super` lead from the file's own module to the crate.
    fn depth(&self) -> usize {
        self.parts().iter().filter(|&&part| part != "mod").count()
    }

    fn problem(&self, line: usize, what: &str) -> String {
        format!("{}:{line}: {what}", self.path.display())
    }
}

/// Finds each path that leads from the file's room to another one that it must not name.
fn wrong_arrows(source: &Source, rules: &Rules) -> Vec<String> {
    let Some(from) = source.room() else { return Vec::new() };
    let arrow = |(line, to): (usize, String)| {
        let rule = rules.broken_by(from, &to)?;
        Some(source.problem(line, &format!("{from} -> {to}: {rule}")))
    };
    named_rooms(&tokens(&source.text), source.depth()).into_iter().filter_map(arrow).collect()
}

/// Finds what comes after `crate::`, or after as many `super::` as lead out of the room, with its line.
///
/// `depth` is how deep the file's own module lies in the crate; modules within the file are counted on top.
fn named_rooms(tokens: &[Token], depth: usize) -> Vec<(usize, String)> {
    let mut named = Vec::new();
    // One entry for each open brace: does it belong to a module?
    let mut braces = Vec::new();
    let mut supers = 0;
    for at in 0..tokens.len() {
        match tokens[at].text.as_str() {
            "{" => braces.push(at >= 2 && tokens[at - 2].text == "mod"),
            "}" => drop(braces.pop()),
            _ => {}
        }
        let leads_out = match tokens[at].text.as_str() {
            "crate" => true,
            "super" => {
                supers += 1;
                supers == depth + braces.iter().filter(|&&is_module| is_module).count()
            }
            "::" => false,
            _ => {
                supers = 0;
                false
            }
        };
        if leads_out && tokens.get(at + 1).is_some_and(|next| next.text == "::") {
            named.extend(heads(&tokens[at + 2..]));
        }
    }
    named
}

/// The first names of what follows a `::`: one, or each of a group in braces.
fn heads(tokens: &[Token]) -> Vec<(usize, String)> {
    let Some(first) = tokens.first() else { return Vec::new() };
    if first.text != "{" {
        return vec![(first.line, first.text.clone())];
    }
    let mut heads = Vec::new();
    let mut open = 0;
    for (before, token) in tokens.iter().zip(&tokens[1..]) {
        match before.text.as_str() {
            "{" => open += 1,
            "}" => open -= 1,
            _ => {}
        }
        if open == 0 {
            break;
        }
        if open == 1 && (before.text == "{" || before.text == ",") && token.text != "}" {
            heads.push((token.line, token.text.clone()));
        }
    }
    heads
}

/// Finds words that only another room may say.
fn strayed_words(source: &Source) -> Vec<String> {
    let mut problems = Vec::new();
    for token in tokens(&source.text) {
        for (word, home) in KEPT_WORDS {
            if token.text == word && source.room() != Some(home) {
                problems.push(source.problem(token.line, &format!("only {home} may say {word}")));
            }
        }
    }
    problems
}

fn missing_opening(source: &Source) -> Option<String> {
    (!source.text.starts_with("//!"))
        .then(|| source.problem(1, "opens without a //! comment on what it is for"))
}

fn empty_name(source: &Source) -> Option<String> {
    let name = source.parts().into_iter().find(|part| EMPTY_NAMES.contains(part))?.to_owned();
    Some(source.problem(1, &format!("{name} says nothing about what is inside")))
}

fn ignored_tests(source: &Source) -> Vec<String> {
    let tokens = tokens(&source.text);
    let ignored = tokens.windows(3).filter(|three| {
        matches!(three[0].text.as_str(), "[" | ",")
            && three[1].text == "ignore"
            && "]=)".contains(&three[2].text)
    });
    ignored.map(|three| source.problem(three[1].line, "a test is ignored")).collect()
}

/// A name, `::`, or any other single character of the code.
struct Token {
    line: usize,
    text: String,
}

/// Splits the code into tokens; comments and what stands between quotes are left out.
fn tokens(text: &str) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut line = 1;
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let is_name = first.is_alphabetic() || first == '_';
        let length = if is_name {
            rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len())
        } else if rest.starts_with("::") {
            2
        } else {
            first.len_utf8()
        };
        let length = skipped(rest).unwrap_or_else(|| {
            if !first.is_whitespace() {
                tokens.push(Token { line, text: rest[..length].into() });
            }
            length
        });
        line += rest[..length].matches('\n').count();
        rest = &rest[length..];
    }
    tokens
}

/// How many bytes the comment, string or character is long that `text` begins with, if it does.
fn skipped(text: &str) -> Option<usize> {
    let to = |end: Option<usize>| Some(end.unwrap_or(text.len()));
    if text.starts_with("//") {
        return to(text.find('\n'));
    }
    if text.starts_with("/*") {
        return to(block_comment_end(text));
    }
    let quoted = text.trim_start_matches(['b', 'c']);
    if let Some(raw) = quoted.strip_prefix('r').filter(|_| text.len() - quoted.len() <= 1) {
        let hashes = raw.len() - raw.trim_start_matches('#').len();
        if raw[hashes..].starts_with('"') {
            let begin = text.len() - raw.len() + hashes + 1;
            let end = format!("\"{}", "#".repeat(hashes));
            return to(text[begin..].find(&end).map(|at| begin + at + end.len()));
        }
    }
    if quoted.starts_with('"') && text.len() - quoted.len() <= 1 {
        let begin = text.len() - quoted.len() + 1;
        return to(closing(&text[begin..], '"').map(|at| begin + at));
    }
    // A lifetime has no second quote after its first character.
    let inside = text.strip_prefix('\'')?;
    let character = inside.chars().next()?;
    if character == '\\' {
        return to(closing(inside, '\'').map(|at| 1 + at));
    }
    inside[character.len_utf8()..].starts_with('\'').then_some(character.len_utf8() + 2)
}

/// Where the block comment ends that `text` begins with; others may lie within it.
fn block_comment_end(text: &str) -> Option<usize> {
    let mut open = 0;
    let mut at = 0;
    while at < text.len() {
        let two = text.as_bytes().get(at..at + 2)?;
        open += match two {
            b"/*" => 1,
            b"*/" => -1,
            _ => 0,
        };
        at += if two == b"/*" || two == b"*/" { 2 } else { 1 };
        if open == 0 {
            return Some(at);
        }
    }
    None
}

/// Where the string ends that is closed by `quote`; a backslash guards the character after it.
fn closing(text: &str, quote: char) -> Option<usize> {
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        if character == '\\' {
            characters.next();
        } else if character == quote {
            return Some(at + 1);
        }
    }
    None
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Reads every Rust file below a folder of the repository.
fn sources_below(folder: &str) -> Vec<Source> {
    let mut sources = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = read(&path);
                sources.push(Source { path: path.strip_prefix(root()).unwrap().into(), text });
            }
        }
    }
    sources.sort_by(|a, b| a.path.cmp(&b.path));
    sources
}

/// The checker itself, on small sources that break a rule or look as if they did.
mod checker {
    use super::*;

    const TABLE: &str = "
| room | may name | must not know |
|---|---|---|
| job | error | I/O |
| error, ceph | nothing | jobs |
| broker | error | jobs |
| `message` | error, `job` | lapin |
| volume, store | error, job, ceph | each other |
| engine | error, job, volume, store | messages |
| worker | everything | – |

| another | table | below |
|---|---|---|
";

    fn arrows(path: &str, text: &str) -> Vec<String> {
        wrong_arrows(&Source::new(path, text), &Rules::parse(TABLE).unwrap())
    }

    #[test]
    fn an_arrow_that_points_the_right_way_is_no_problem() {
        for (path, text) in [
            ("src/engine/mod.rs", "use crate::store::ObjectStore;\nuse crate::job::{Job, error};"),
            ("src/engine/chunked/backup.rs", "use super::super::Method; use super::{store, broker};"),
            ("src/engine/chunked/backup.rs", "use super::super::super::volume::Extent;"),
            ("src/engine.rs", "mod tests { use super::broker; mod deep { use super::super::broker; } }"),
            ("src/worker.rs", "use crate::{broker::Delivery, engine, store::{posix, message}};"),
            ("src/message/mod.rs", "use crate::message::native; use crate::error::Class;"),
            ("src/main.rs", "use crate::broker; use crate::elsewhere;"),
            ("src/lib.rs", "pub use crate::broker;"),
        ] {
            assert_eq!(arrows(path, text), [""; 0], "{path}: {text}");
        }
    }

    #[test]
    fn an_arrow_that_points_the_wrong_way_is_named_with_its_place_and_rule() {
        assert_eq!(
            arrows(
                "src/store/posix.rs",
                "//! Files.\nuse crate::job::Container;\n\nuse crate::volume::Extent;\n"
            ),
            ["src/store/posix.rs:4: store -> volume: store may name ceph, error, job and nothing else"]
        );
        assert_eq!(
            arrows("src/ceph/mod.rs", "fn f() { crate::error::Class::Transient }"),
            ["src/ceph/mod.rs:1: ceph -> error: ceph may name nothing"]
        );
    }

    #[test]
    fn no_way_of_writing_a_path_hides_the_arrow() {
        for (path, text) in [
            ("src/store/mod.rs", "use crate::{\n    job::Container,\n    volume::{Extent, Source},\n};"),
            ("src/store/mod.rs", "use crate :: { error::Class, volume };"),
            ("src/store/mod.rs", "pub(crate) use crate::volume as v;"),
            ("src/store/mod.rs", "fn f(x: &'static crate::volume::Extent) {}"),
            ("src/store/mod.rs", "let a = '\"'; crate::volume::f(); let b = '\"';"),
            ("src/store/mod.rs", "let a = r#\"\"\"#; /* \" */ crate::volume::f(); // \""),
            ("src/store/mod.rs", "use super::volume;"),
            ("src/store.rs", "use super::volume;"),
            ("src/store/posix.rs", "use super::super::volume;"),
            ("src/store/posix/put.rs", "use super::super::super::{job, volume};"),
            ("src/store/posix.rs", "mod tests { use super::super::super::volume; }"),
            ("src/store/posix.rs", "mod a {} use super::super::volume;"),
        ] {
            let found = arrows(path, text);
            assert_eq!(found.len(), 1, "{path}: {text}: {found:?}");
            assert!(found[0].contains("store -> volume"), "{found:?}");
        }
    }

    #[test]
    fn what_only_looks_like_an_arrow_is_none() {
        for text in [
            "// use crate::volume;",
            "/// [`crate::volume`]",
            "/* use crate::volume; /* nested */ use crate::volume; */",
            "let a = \"crate::volume \\\" crate::volume\";",
            "let a = br##\"crate::volume\"# crate::volume\"##;",
            "use mycrate::volume;",
        ] {
            assert_eq!(arrows("src/store/mod.rs", text), [""; 0], "{text}");
        }
    }

    #[test]
    fn a_room_or_a_name_outside_the_table_is_a_problem() {
        assert!(arrows("src/attic/mod.rs", "use crate::job::Job;")[0].contains("attic has no row"));
        assert!(arrows("src/worker.rs", "use crate::attic::Box;")[0].contains("attic is no room"));
        assert!(arrows("src/store/mod.rs", "use crate::*;")[0].contains("* is no room"));
    }

    #[test]
    fn a_table_that_cannot_be_understood_is_refused() {
        for table in [
            "",
            "| room | may name |\n|---|---|\n| job | nothing |",
            "| room | may name | must not know |\n|---|---|---|\n| job | nothing |",
            "| room | may name | must not know |\n|---|---|---|\n| job, error | nothing | |\n| job | error | |",
            "| room | may name | must not know |\n|---|---|---|\n| job, error | nothing | |\n| store | cehp | |",
        ] {
            assert!(Rules::parse(table).is_err(), "{table}");
        }
    }

    #[test]
    fn a_word_outside_its_room_is_a_problem() {
        let strayed = |path: &str, text: &str| strayed_words(&Source::new(path, text)).len();

        assert_eq!(strayed("src/broker/mod.rs", "use lapin::Channel;"), 0);
        assert_eq!(strayed("src/event/mod.rs", "use lapin::Channel;"), 1);
        assert_eq!(strayed("src/ceph/rbd.rs", "unsafe { f() }"), 0);
        assert_eq!(strayed("src/volume/mod.rs", "unsafe { f() }"), 1);
        assert_eq!(strayed("src/volume/mod.rs", "#![deny(unsafe_code)] // unsafe, lapin"), 0);
    }

    #[test]
    fn empty_names_missing_openings_and_ignored_tests_are_problems() {
        let named = |path: &str| empty_name(&Source::new(path, "")).is_some();
        assert!(named("src/store/utils/mod.rs"));
        assert!(named("src/helpers.rs"));
        assert!(!named("src/store/posix.rs"));

        let opens = |text: &str| missing_opening(&Source::new("src/store/mod.rs", text)).is_none();
        assert!(opens("//! Keeps objects.\n"));
        assert!(!opens("use std::fs;\n//! Keeps objects."));

        let ignored = |text: &str| ignored_tests(&Source::new("tests/a.rs", text)).len();
        assert_eq!(ignored("#[test]\n#[ignore]\nfn a() {}"), 1);
        assert_eq!(ignored("#[test]\n#[ignore = \"slow\"]\nfn a() {}"), 1);
        assert_eq!(ignored("#[cfg_attr(debug_assertions, ignore)]\nfn a() {}"), 1);
        assert_eq!(ignored("// #[ignore]\nfn ignore(x: [ignore; 2]) {}"), 0);
    }
}
