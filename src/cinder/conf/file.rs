//! Files of options as oslo.config reads them: sections, continuation lines, quotes, several files over each other.
//!
//! It knows no option: what a value means is decided in `value`.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use super::Error;

/// Where options come from, in the order of the command line; what comes later wins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// `--config-file`.
    File(PathBuf),
    /// `--config-dir`: all its `*.conf`, in the order of their names.
    Dir(PathBuf),
}

/// What one file says.
#[derive(Debug, Clone, Default)]
pub(super) struct File {
    pub path: PathBuf,
    /// By section, in lower case but for `DEFAULT`, and name; an option can be there several times.
    sections: HashMap<String, HashMap<String, Vec<Line>>>,
}

/// What one assignment gave to an option.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Line {
    /// Counts from 1.
    pub number: usize,
    pub value: String,
}

impl File {
    /// All that the file assigns to the option.
    pub fn lines(&self, group: &str, name: &str) -> &[Line] {
        let options = self.sections.get(&section_key(group));
        options.and_then(|options| options.get(name)).map_or(&[], Vec::as_slice)
    }
}

/// Reads every file of `sources`, in order. Without a `Source::File` Cinder's usual files are read first, and without a
/// `Source::Dir` its usual folders, where they are there.
pub(super) fn read_all(sources: &[Source]) -> Result<Vec<File>, Error> {
    let mut paths = Vec::new();
    if !sources.iter().any(|source| matches!(source, Source::File(_))) {
        paths.extend(usual(".conf"));
    }
    if !sources.iter().any(|source| matches!(source, Source::Dir(_))) {
        for folder in usual(".conf.d") {
            paths.extend(files_in(&folder)?);
        }
    }
    for source in sources {
        match source {
            Source::File(path) => paths.push(path.clone()),
            Source::Dir(path) => paths.extend(files_in(path)?),
        }
    }
    paths.iter().map(|path| read(path)).collect()
}

/// The topmost `cinder` and `cinder-backup` with this ending that are there.
fn usual(ending: &str) -> Vec<PathBuf> {
    let home = std::env::var_os("HOME").map(PathBuf::from);
    let mut folders: Vec<PathBuf> =
        home.iter().flat_map(|home| [home.join(".cinder"), home.clone()]).collect();
    folders.extend(["/etc/cinder".into(), "/etc".into()]);
    let topmost = |name: &str| {
        folders.iter().map(|folder| folder.join(format!("{name}{ending}"))).find(|path| path.exists())
    };
    ["cinder", "cinder-backup"].into_iter().filter_map(topmost).collect()
}

fn files_in(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let problem = |source: io::Error| Error::Read { path: folder.into(), source };
    let mut paths = Vec::new();
    for entry in fs::read_dir(folder).map_err(problem)? {
        let name = entry.map_err(problem)?.file_name();
        let text = name.to_string_lossy();
        if text.ends_with(".conf") && !text.starts_with('.') {
            paths.push(folder.join(&name));
        }
    }
    paths.sort();
    Ok(paths)
}

fn read(path: &Path) -> Result<File, Error> {
    let text = fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
    parse(path, &text)
}

/// Takes the text of a file apart.
pub(super) fn parse(path: &Path, text: &str) -> Result<File, Error> {
    let mut file = File { path: path.into(), ..File::default() };
    let mut section: Option<String> = None;
    // The assignment that further lines may continue.
    let mut open: Option<(String, Line)> = None;
    for (index, line) in lines(text).enumerate() {
        let number = index + 1;
        let wrong = |problem: &'static str| Error::Syntax { path: path.into(), line: number, problem };
        let line = line.trim_end_matches(is_space);
        if line.is_empty() {
            file.close(section.as_deref(), open.take());
        } else if line.starts_with([' ', '\t']) {
            let (_, begun) = open.as_mut().ok_or_else(|| {
                wrong("a line that begins with a space continues an option, but there is none above it: remove the space")
            })?;
            begun.value.push('\n');
            begun.value.push_str(line.trim_start_matches(is_space));
        } else {
            file.close(section.as_deref(), open.take());
            if let Some(rest) = line.strip_prefix('[') {
                let name = rest.strip_suffix(']').ok_or_else(|| wrong("a section must end with ]"))?;
                if name.is_empty() {
                    return Err(wrong("a section has no name"));
                }
                section = Some(section_key(name));
            } else if !line.starts_with(['#', ';']) {
                let (name, value) =
                    assignment(line).ok_or_else(|| wrong("neither a section nor `name = value`"))?;
                if name.is_empty() {
                    return Err(wrong("nothing stands before the = or :"));
                }
                if section.is_none() {
                    return Err(wrong("an option stands above all sections: write [DEFAULT] before it"));
                }
                open = Some((name.into(), Line { number, value: value.into() }));
            }
        }
    }
    file.close(section.as_deref(), open);
    Ok(file)
}

impl File {
    fn close(&mut self, section: Option<&str>, assigned: Option<(String, Line)>) {
        if let (Some(section), Some((name, line))) = (section, assigned) {
            self.sections.entry(section.into()).or_default().entry(name).or_default().push(line);
        }
    }
}

/// Splits at the first `=` or `:` and takes one pair of quotes off the value.
fn assignment(line: &str) -> Option<(&str, &str)> {
    let (name, value) = line.split_once(['=', ':'])?;
    let value = value.trim_matches(is_space);
    let unquoted = ['"', '\''].into_iter().find_map(|quote| {
        // Only the quote itself, and nothing else, is its own end.
        let inside = value.strip_prefix(quote)?;
        if inside.is_empty() { Some(inside) } else { inside.strip_suffix(quote) }
    });
    Some((name.trim_matches(is_space), unquoted.unwrap_or(value)))
}

/// Splits at line feeds, carriage returns, and the two together.
fn lines(text: &str) -> impl Iterator<Item = &str> {
    text.split('\n').flat_map(|line| line.strip_suffix('\r').unwrap_or(line).split('\r'))
}

fn section_key(name: &str) -> String {
    if name == "DEFAULT" { name.into() } else { name.to_lowercase() }
}

/// What Python takes for white space.
pub(super) fn is_space(character: char) -> bool {
    character.is_whitespace() || ('\x1c'..='\x1f').contains(&character)
}
