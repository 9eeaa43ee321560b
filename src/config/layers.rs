//! Where settings come from, the file below and the environment above, and errors that say so.

use std::io;
use std::path::{Path, PathBuf};

use figment::error::{Actual, Kind};
use figment::providers::{Format, Toml};
use figment::value::{Dict, Map, Value};
use figment::{Figment, Metadata, Profile, Provider};

use super::value::Kind as StoreKind;
use super::{SETTINGS, Sections, settings_of, unknown_to};

/// Where the file is looked for, when nobody says.
const FILES: [&str; 2] = ["backhaul.toml", "/etc/backhaul/backhaul.toml"];
/// What all our environment variables begin with.
const PREFIX: &str = "BACKHAUL_";

/// What is said instead of a file, where there is none.
pub(super) const NO_FILE: &str = "no configuration file";

/// Says which setting is wrong, where it came from, what is wrong with it and what to write.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file is not there or not readable.
    #[error("read the configuration file {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The file is not TOML.
    // The line itself is not shown, since it may hold a password.
    #[error("{} is not TOML: line {line}: {problem}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Counts from 1.
        line: usize,
        /// What the parser found.
        problem: String,
    },
    /// A setting is unknown, missing or not valid.
    #[error("{setting} ({origin}): {problem}")]
    Setting {
        /// Its full name, such as `store.local.path`.
        setting: String,
        /// The file or the environment variable it came from.
        origin: String,
        /// What is wrong and what to write.
        problem: String,
    },
}

/// Our variables in the process's environment.
pub(super) fn environment() -> Result<Vec<(String, String)>, ConfigError> {
    let mut variables = Vec::new();
    for (name, value) in std::env::vars_os() {
        let Some(name) = name.to_str().filter(|name| name.starts_with(PREFIX)) else { continue };
        let value = value.into_string().map_err(|_| ConfigError::Setting {
            setting: name.into(),
            origin: "environment".into(),
            problem: "the value is not UTF-8".into(),
        })?;
        variables.push((name.into(), value));
    }
    Ok(variables)
}

/// The file to read: `path`, else what `BACKHAUL_CONFIG` names, else the first that is there of the usual ones.
pub(super) fn find(path: Option<&Path>, environment: &[(String, String)]) -> Option<PathBuf> {
    let named = || environment.iter().find(|(name, value)| name == "BACKHAUL_CONFIG" && !value.is_empty());
    let usual = || FILES.into_iter().map(PathBuf::from).find(|path| path.exists());
    path.map(PathBuf::from).or_else(|| named().map(|(_, path)| path.into())).or_else(usual)
}

/// All sources of settings, one above the other.
pub(super) struct Layers {
    figment: Figment,
    file: Option<PathBuf>,
    folder: PathBuf,
}

/// One source of settings.
struct Layer {
    origin: String,
    settings: Dict,
}

impl Provider for Layer {
    fn metadata(&self) -> Metadata {
        Metadata::named(self.origin.clone())
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Ok(Profile::Default.collect(self.settings.clone()))
    }
}

impl Layers {
    /// Reads `file` and puts the variables of `environment` above it.
    pub(super) fn read(file: Option<&Path>, environment: &[(String, String)]) -> Result<Self, ConfigError> {
        let at = |path: &Path, source| ConfigError::Read { path: path.into(), source };
        let file = file.map(|path| std::path::absolute(path).map_err(|e| at(path, e))).transpose()?;
        let folder = match file.as_deref().and_then(Path::parent) {
            Some(folder) => folder.into(),
            None => std::env::current_dir().map_err(|e| at(Path::new("."), e))?,
        };
        // The worker's section is there even if nobody writes it, so that its settings have their defaults.
        let worker = Dict::from([("worker".into(), Value::from(Dict::new()))]);
        let mut figment = Figment::from(Layer { origin: "default".into(), settings: worker });
        let mut in_file = Dict::new();
        if let Some(path) = &file {
            let text = std::fs::read_to_string(path).map_err(|e| at(path, e))?;
            in_file = Toml::from_str(&text).map_err(|e| {
                let start = e.span().map_or(0, |span| span.start);
                let line = 1 + text.bytes().take(start).filter(|byte| *byte == b'\n').count();
                ConfigError::Syntax { path: path.clone(), line, problem: e.message().replace('\n', ", ") }
            })?;
            figment = figment.merge(Layer { origin: path.display().to_string(), settings: in_file.clone() });
        }
        for (variable, value) in environment {
            if let Some(setting) = setting_of(variable, &in_file)? {
                let settings = nested(&setting, environment_value(value));
                let origin = format!("environment variable {variable}");
                figment = figment.merge(Layer { origin, settings });
            }
        }
        Ok(Self { figment, file, folder })
    }

    /// The absolute path of the file, if there is one.
    pub(super) fn file(&self) -> Option<&Path> {
        self.file.as_deref()
    }

    /// What relative paths are relative to.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Reads all sections.
    pub(super) fn sections(&self) -> Result<Sections, ConfigError> {
        // A store of a kind that there is not, or not yet, is refused as such, not for its kind's settings.
        if let Ok(Value::Dict(_, stores)) = self.figment.find_value("store") {
            for (name, section) in &stores {
                let kind = section.find_ref("kind").and_then(Value::as_str);
                let problem = match kind {
                    Some("rbd") if cfg!(not(feature = "ceph")) => {
                        "this program was built without Ceph: build it with the feature ceph, or remove the section"
                            .into()
                    }
                    _ => continue,
                };
                return Err(self.refuse(&format!("store.{name}.kind"), problem));
            }
        }
        self.figment.extract_lossy().map_err(|error| self.explain(error))
    }

    /// Refuses the value of `setting`.
    pub(super) fn refuse(&self, setting: &str, problem: String) -> ConfigError {
        ConfigError::Setting { setting: setting.into(), origin: self.origin(setting), problem }
    }

    /// Whether anybody has written `setting`.
    pub(super) fn has(&self, setting: &str) -> bool {
        self.figment.find_value(setting).is_ok()
    }

    /// Tells that `setting` must be written.
    pub(super) fn missing(&self, setting: &str) -> ConfigError {
        let origin = self.file.as_ref().map_or(NO_FILE.into(), |file| file.display().to_string());
        let key = setting.rsplit('.').next().unwrap_or(setting);
        ConfigError::Setting {
            setting: setting.into(),
            origin,
            problem: format!("it is missing; write {}", example(key)),
        }
    }

    /// Where `setting` came from.
    pub(super) fn origin(&self, setting: &str) -> String {
        match self.figment.find_metadata(setting) {
            Some(metadata) => metadata.name.to_string(),
            None => "default".into(),
        }
    }

    /// The kind of the store that a setting is of, if that is known.
    fn kind_at(&self, setting: &[String]) -> Option<StoreKind> {
        let [section, name, _] = setting else { return None };
        let kind = self.figment.find_value(&format!("{section}.{name}.kind")).ok()?;
        StoreKind::named(kind.as_str()?).filter(|_| section == "store")
    }

    /// Tells an error of reading the sections in the words of the configuration.
    fn explain(&self, error: figment::Error) -> ConfigError {
        let setting = error.path.join(".");
        let origin = error.metadata.map_or("default".into(), |metadata| metadata.name.into_owned());
        let problem = match error.kind {
            Kind::MissingField(field) => return self.missing(&format!("{setting}.{field}")),
            Kind::UnknownField(field, known) => match self.kind_at(&error.path) {
                Some(kind) => near(&field, &settings_of(kind)).unwrap_or_else(|| unknown_to(kind)),
                None => near(&field, known)
                    .unwrap_or_else(|| format!("it is unknown; known here are {}", known.join(", "))),
            },
            Kind::InvalidType(found, expected) | Kind::InvalidValue(found, expected) => {
                format!("found {}; write {expected}", shown(&found))
            }
            other => other.to_string(),
        };
        ConfigError::Setting { setting, origin, problem }
    }
}

/// What a missing setting could be; only few have no default.
fn example(setting: &str) -> &'static str {
    match setting {
        "url" => "the URL of the broker, such as url = \"amqp://user:password@host:5672/%2f\"",
        "kind" if cfg!(feature = "ceph") => {
            "kind = \"posix\", kind = \"nfs\", kind = \"s3\", kind = \"swift\", kind = \"gcs\" or kind = \"rbd\""
        }
        "kind" => "kind = \"posix\", kind = \"nfs\", kind = \"s3\", kind = \"swift\" or kind = \"gcs\"",
        "endpoint" => "the URL of the server, such as endpoint = \"https://s3.example.org\"",
        "bucket" => "the bucket, such as bucket = \"example-volumebackups\"",
        "credentials_file" => "the path of the file with the key of a service account, or anonymous = true",
        "share" => {
            "the share, such as share = \"nfs.example.org:/backups\", or path if somebody else mounts it"
        }
        "access_key" => "the access key, such as access_key = \"AKIDEXAMPLE\"",
        "secret_key" => "the secret key, or secret_key_file with the path of a file that has it",
        "auth_url" => "the URL to log in at, such as auth_url = \"https://keystone.example.org:5000/v3\"",
        "user" => "the user, such as user = \"backup\"",
        "project" => "the project whose account is used, such as project = \"service\"",
        "password" => "the password, or password_file with the path of a file that has it",
        "pool" => "the pool for backups, such as pool = \"backups\"",
        _ => "the path of the folder, such as path = \"/var/backups/backhaul\"",
    }
}

/// What to say of an unknown setting that is one letter or so away from a known one.
fn near(found: &str, known: &[&str]) -> Option<String> {
    let likeness = known.iter().map(|name| (strsim::jaro_winkler(found, name), name));
    let (likeness, name) = likeness.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (likeness > 0.8).then(|| format!("it is unknown; did you mean {name}?"))
}

fn shown(found: &Actual) -> String {
    match found {
        Actual::Bool(value) => value.to_string(),
        Actual::Unsigned(value) => value.to_string(),
        Actual::Signed(value) => value.to_string(),
        Actual::Float(value) => value.to_string(),
        Actual::Str(value) => format!("{value:?}"),
        Actual::Seq => "a list".into(),
        Actual::Map => "a section".into(),
        other => other.to_string(),
    }
}

/// The path of the setting that a variable overrides; none if it is no setting of ours.
fn setting_of(variable: &str, in_file: &Dict) -> Result<Option<Vec<String>>, ConfigError> {
    let Some(rest) = variable.strip_prefix(PREFIX).map(str::to_ascii_lowercase) else { return Ok(None) };
    let Some((section, inner)) = rest.split_once("__") else {
        // Other software may set variables such as BACKHAUL_WORKER_SERVICE_HOST; only a slip of ours is an error.
        let slip = SETTINGS.iter().map(|s| variable_of(s)).find(|s| s.replace("__", "_") == variable);
        return slip.map_or(Ok(None), |meant| Err(slip_error(variable, format!("did you mean {meant}?"))));
    };
    if section != "store" && section != "ceph" {
        return Ok(Some(rest.split("__").map(Into::into).collect()));
    }
    let Some((name, key)) = inner.rsplit_once("__") else {
        return Err(slip_error(variable, format!("write {PREFIX}{}__NAME__SETTING", section.to_uppercase())));
    };
    let plain = |name: &str| name.to_ascii_lowercase().replace('-', "_");
    let names = in_file.get(section).and_then(Value::as_dict).into_iter().flat_map(Dict::keys);
    let same: Vec<&String> = names.filter(|other| plain(other) == plain(name)).collect();
    match same[..] {
        [] => Ok(Some(vec![section.into(), name.into(), key.into()])),
        [written] => Ok(Some(vec![section.into(), written.clone(), key.into()])),
        [one, two, ..] => {
            Err(slip_error(variable, format!("it could mean {section}.{one} or {section}.{two}")))
        }
    }
}

/// The variable that overrides a setting.
fn variable_of(setting: &str) -> String {
    format!("{PREFIX}{}", setting.to_ascii_uppercase().replace('.', "__"))
}

fn slip_error(variable: &str, problem: String) -> ConfigError {
    ConfigError::Setting { setting: variable.into(), origin: "environment".into(), problem }
}

/// A list is written as in TOML; everything else is taken as it is.
fn environment_value(text: &str) -> Value {
    let list = || Toml::from_str::<Dict>(&format!("list = {text}")).ok()?.remove("list");
    text.starts_with('[').then(list).flatten().unwrap_or_else(|| text.into())
}

fn nested(path: &[String], value: Value) -> Dict {
    path.iter()
        .rev()
        .fold(value, |inner, key| Dict::from([(key.clone(), inner)]).into())
        .into_dict()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_named_goes_before_one_that_is_found() {
        let environment = [("BACKHAUL_CONFIG".to_owned(), "/from/environment".to_owned())];
        assert_eq!(find(Some(Path::new("/given")), &environment).as_deref(), Some(Path::new("/given")));
        assert_eq!(find(None, &environment).as_deref(), Some(Path::new("/from/environment")));
    }
}
